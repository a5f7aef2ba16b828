"""How does `python -m training cache` go? Data → cost → teacher → shards, for each distilled stage.

Nothing is written, and no teacher is loaded, before the cost of all stages is known to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import Config, require
from training.data.collate import Collator
from training.fingerprint import digest
from training.lock import held
from training.loop import load_data, on_main, processes
from training.models import DTYPES, build_processor, load_processor, load_vlm
from training.pairs import check_processors
from training.settings import ConfigError
from training.stages import STAGES, Stage, loss_of
from training.teacher import OnlineTeacher
from training.teacher_cache import cost, fill, identity
from training.teacher_cache.store import Manifest, TeacherRows
from training.teacher_cache.use import needs_visual, spread, stored_stages

FINGERPRINTED = 16  # samples of the data that the manifest knows it by


@dataclass(frozen=True)
class _Job:
    stage: Stage
    dataset: Any
    cost: cost.Cost


def make(config: Config, *, dry_run: bool = False, say: Callable[[str], None] = print) -> None:
    """Store the teacher's rows for the distilled stages of a run, or continue to.

    Args:
        config: the run's own configuration, with `teacher_cache.path`.
        dry_run: count and compare with the disk, and stop there.
        say: how messages are told.

    Raises:
        CheckpointError: teacher and student do not fit (`training.pairs`).
        ConfigError: a path is missing, the disk is too small, or the folder holds something else.
        DataError: a sample cannot be encoded, or the teacher makes NaN of it.
    """
    state = processes()
    path = Path(require(config.teacher_cache.path, "teacher_cache.path", "a folder to store into"))
    alone = held(path, "teacher_cache.path") if state.is_main_process else nullcontext()
    with nullcontext() if dry_run else alone:
        _make(config, path, dry_run, say if state.is_main_process else _silent)


def _make(config: Config, path: Path, dry_run: bool, say: Callable[[str], None]) -> None:
    """`make`, in a folder that no other command writes to."""
    state = processes()
    teacher_name = require(config.teacher, "teacher", "the model whose hidden states are stored")
    processor, its_processor = build_processor(config.model), load_processor(teacher_name)
    stages = _stages(config)
    report = check_processors(processor, its_processor, visual=config.teacher_cache.visual)
    say(str(report))
    report.require()
    own = its_processor if report.own_batch else None
    jobs = [_job(config, stage, (processor, own), path, teacher_name) for stage in stages]
    for job in jobs:
        say(str(job.cost))
    on_main(lambda: cost.check([job.cost for job in jobs]))
    if dry_run:
        return
    model, _ = load_vlm(teacher_name, dtype=DTYPES[config.teacher_dtype])
    teacher = OnlineTeacher(model, own)
    for job in jobs:
        work = _pass(config, job, teacher, processor, teacher_name)
        on_main(work.claim)
        work.fill(state)
        state.wait_for_everyone()
        on_main(lambda work=work: say(_summary(work.folder)))


def _stages(config: Config) -> list[Stage]:
    """The distilled stages to store, each once."""
    names = stored_stages(config)
    if not names:
        raise ConfigError(
            f"teacher_cache.stages: none of {list(config.teacher_cache.stages) or 'dpt, dft'} is "
            f"among the run's stages {list(config.stages)}"
        )
    for name in names:
        loss = config.stage(name).loss
        if not config.teacher_cache.visual and needs_visual(loss_of(STAGES[name], loss)):
            raise ConfigError(
                f"teacher_cache.visual: got false, but {name}.loss has visual {loss.visual} and "
                f"relation {loss.relation}; set both to 0, or store visual rows"
            )
    return [STAGES[name] for name in names]


def _job(
    config: Config, stage: Stage, processors: tuple[Any, Any], path: Path, teacher: str
) -> _Job:
    """A stage's data, with the teacher's own view where it has a processor, and their cost."""
    processor, own = processors
    dataset = load_data(config, processor, stage.data, stage.template, own)
    if not isinstance(dataset, Sized):
        raise ConfigError(
            f"data: the {stage.data} are a stream, expected data that can be counted; save them to "
            "disk first, or run the teacher online (teacher_cache.path=null)"
        )
    options = config.teacher_cache
    counted = cost.cost_of(
        path / stage.name,
        dataset,
        teacher,
        visual=options.visual,
        dtype=options.dtype,
        shard_mb=options.shard_mb,
        workers=config.data.workers,
    )
    return _Job(stage, dataset, counted)


def _pass(
    config: Config, job: _Job, teacher: OnlineTeacher, processor: Any, name: str
) -> fill.Pass:
    probes = spread(len(job.dataset), FINGERPRINTED)
    marks = cost.marks_of(job.dataset, probes, config.data.workers)
    manifest = Manifest(
        stage=job.stage.name,
        template=job.stage.template,
        visual=config.teacher_cache.visual,
        dtype=config.teacher_cache.dtype,
        precision=config.precision,
        samples=len(job.dataset),
        samples_per_shard=job.cost.samples_per_shard,
        data=digest([mark.key for mark in marks]),
        teacher=identity.of_model(teacher.model, name),
        processor=identity.of_processor(processor),
        softcap=None,
        image_token_id=teacher.image_token_id,
    )
    return fill.Pass(
        folder=job.cost.folder,
        teacher=teacher,
        dataset=job.dataset,
        collator=Collator(processor, teacher.processor),
        manifest=manifest,
        batch_size=config.teacher_cache.batch_size,
        workers=config.data.workers,
    )


def _summary(folder: Path) -> str:
    """What is there now; opening it checks that it is whole."""
    rows = TeacherRows(folder)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtype = rows.manifest.dtype
    return f"{folder}: whole: {len(rows)} samples, {cost.size(stored)} of {dtype} rows and the head"


def _silent(message: str) -> None:
    """What the other processes say."""
