"""How does `python -m training cache` go? Data → cost → teacher → shards, for each distilled stage.

Nothing is written, and no teacher is loaded, before the cost of all stages is known to fit the
disk: rows × hidden size × bytes a number, of rows counted in some hundred samples, encoded as
training does.

A shard is a block of consecutive samples. Each process takes every n-th block whose shard is not
there yet, so the pass goes on where it was killed, with as many processes as it is given then, and
recomputes nothing but the shards that were not finished. What was stored before must be of the same
teacher and data, or the pass stops before it starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from rich.filesize import decimal as size
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig

import mllmkd_kernels as mk
from mllmkd_kernels.batch import ask
from mllmkd_kernels.methods import Stage
from training.anatomy import image_token_id
from training.bar import Bar, track
from training.config import Config, require
from training.data.check import spread
from training.data.collate import Collator
from training.data.item import apart
from training.data.records import DataError
from training.fingerprint import digest
from training.journal import free_bytes
from training.lock import held
from training.loop import load_data, on_main, processes
from training.models import DTYPES as MODEL_DTYPES
from training.models import build_processor, load_processor, load_vlm, marks_of
from training.pairs import check_processors
from training.settings import ConfigError, differences
from training.teacher_cache.store import (
    DTYPES,
    INDEX,
    MANIFEST,
    Manifest,
    Mark,
    TeacherRows,
    mark_of,
    shard_file,
    write_head,
    write_shard,
)
from training.teacher_cache.use import check_needs, place, stored_stages

COUNTED = 512  # samples whose rows tell the cost
SHARD = 512 << 20  # bytes; one is in memory while it is made

Say = Callable[[str], None]


def make(config: Config, *, dry_run: bool = False, say: Say = print) -> None:
    """Store the teacher's rows for the distilled stages of a run, or continue to.

    Args:
        config: the run's own configuration, with `teacher_cache.path`.
        dry_run: count and compare with the disk, and stop there.
        say: how messages are told.

    Raises:
        CheckpointError: teacher and student do not fit (`training.pairs`).
        ConfigError: a path is missing, the disk is too small, or the folder holds something else.
        DataError: a sample cannot be encoded, or the teacher makes NaN of it.
        WriteError: the disk is full.
    """
    path = Path(require(config.teacher_cache.path, "teacher_cache.path", "a folder to store into"))
    alone = processes().is_main_process and not dry_run
    with held(path, "teacher_cache.path") if alone else contextlib.nullcontext():
        _make(config, path, dry_run, say if processes().is_main_process else lambda text: None)


def _make(config: Config, path: Path, dry_run: bool, say: Say) -> None:
    """`make`, in a folder that no other command writes to."""
    state = processes()
    teacher = require(config.teacher, "teacher", "the model whose hidden states are stored")
    processor, its_processor = build_processor(config.model), load_processor(teacher)
    stages = _stages(config)
    report = check_processors(processor, its_processor, visual=config.teacher_cache.visual)
    say(str(report))
    report.require()
    own = its_processor if report.own_batch else None
    jobs = [_job(config, stage, (processor, own), path, teacher) for stage in stages]
    for job in jobs:
        say(job.told)
    need, free = sum(job.bytes for job in jobs), free_bytes(path)
    on_main(lambda: _check_disk(need, free))
    if dry_run:
        return
    model = cache(lambda: load_vlm(teacher, dtype=MODEL_DTYPES[config.teacher_dtype])[0])
    for job in jobs:
        work = Pass(
            folder=path / job.manifest.stage,
            teacher=model,
            dataset=job.dataset,
            collator=Collator(processor, own),
            manifest=job.manifest,
            batch_size=config.teacher_cache.batch_size,
            workers=config.data.workers,
        )
        on_main(work.claim)
        work.fill(state)
        state.wait_for_everyone()
        on_main(lambda work=work: say(_summary(work.folder)))


def _stages(config: Config) -> list[Stage]:
    """The distilled stages to store, each once."""
    names = stored_stages(config)
    if not names:
        raise ConfigError(
            f"teacher_cache.stages: got {list(config.teacher_cache.stages)}, expected some of the "
            f"run's stages {list(config.stages)} that compare with a teacher"
        )
    for name in names:
        check_needs(config, name, config.teacher_cache.visual, "but the cache is to have")
    return [config.table[name] for name in names]


# --- what it costs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A stage's data, with the teacher's own view where it has a processor, and what it costs."""

    dataset: Any
    manifest: Manifest
    bytes: int  # that are not there yet
    told: str


def _job(config: Config, stage: Stage, processors: tuple[Any, Any], path: Path, name: str) -> Job:
    options, folder = config.teacher_cache, path / stage.name
    dataset: Any = load_data(config, processors[0], stage, processors[1])
    if not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"data: the {stage.data} are a stream, expected data that can be counted; save them to "
            "disk first, or run the teacher online (teacher_cache.path=null)"
        )
    samples, chosen = len(dataset), spread(len(dataset), COUNTED)
    loader = DataLoader(
        Subset(dataset, chosen),
        batch_size=1,
        num_workers=config.data.workers,
        collate_fn=marks_of_items,
    )
    read = list(track(loader, "reading samples", "samples"))
    response = fmean(sum(mark.response for mark in marks) for marks in read)
    visual = fmean(sum(mark.visual for mark in marks) for marks in read) * options.visual
    width, head = _sizes(name)
    sample = (response + visual) * width * DTYPES[options.dtype].itemsize
    total = round(samples * (sample + INDEX * len(read[0]))) + head
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    about = "" if len(read) == samples else f" (counted in {len(read)})"
    manifest = Manifest(
        stage=stage.name,
        template=stage.template,
        visual=options.visual,
        dtype=options.dtype,
        precision=config.precision,
        samples=samples,
        samples_per_shard=max(1, int(SHARD // max(1.0, sample))),
        data=digest([mark.key for marks in read for mark in marks]),
        name=place(name),
        teacher=marks_of(name),
    )
    told = (
        f"{folder}: {samples:,} samples of {response:.1f} response + {visual:.1f} visual rows"
        f"{about}, a row {width} x {options.dtype}: {size(total)}, {size(stored)} of it stored; "
        f"{size(free_bytes(path))} are free"
    )
    return Job(dataset, manifest, max(0, total - stored), told)


def _check_disk(need: int, free: int) -> None:
    if need > free:
        raise ConfigError(
            f"teacher_cache.path: {size(need)} are needed, {size(free)} are free there; take "
            "another disk, or store less: without visual rows (teacher_cache.visual=false), in a "
            "narrower teacher_cache.dtype, or one stage at a time (teacher_cache.stages)"
        )


def marks_of_items(items: Sequence[Any]) -> list[Mark]:
    """In the order in which a batch has the items, of pairs both answers."""
    return [mark_of(item) for item in apart(items)]


def _sizes(teacher: str) -> tuple[int, int]:
    """Hidden size, and bytes of the head, by the teacher's configuration alone."""
    config: Any = AutoConfig.from_pretrained(teacher)
    text = config.get_text_config()
    stored = getattr(config, "dtype", None)
    return text.hidden_size, text.hidden_size * text.vocab_size * (stored.itemsize if stored else 4)


def _summary(folder: Path) -> str:
    """What is there now; opening it checks that it is whole."""
    rows = TeacherRows(folder)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtype = rows.manifest.dtype
    samples = rows.manifest.samples
    return f"{folder}: whole: {samples} samples, {size(stored)} of {dtype} rows and the head"


# --- the pass -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One stage's pass.

    Attributes:
        teacher: gives the model, where there is anything left to run it on.
        dataset: the stage's data, map-style.
        collator: makes its batches, with a view of the teacher's own where it needs one.
        manifest: what the cache will hold.
        batch_size: samples in a forward pass of the teacher.
        workers: data-loading processes.
    """

    folder: Path
    teacher: Callable[[], Any]
    dataset: Any
    collator: Any
    manifest: Manifest
    batch_size: int
    workers: int

    def claim(self) -> None:
        """Head and manifest into the folder, or `ConfigError` if it has rows of something else."""
        for left in self.folder.glob(".*.incomplete"):
            left.unlink()
        if (self.folder / MANIFEST).is_file():
            changed = _changed(Manifest.read(self.folder), self.manifest)
            if changed:
                raise ConfigError(
                    f"teacher_cache.path: {self.folder} was begun with something else "
                    f"({'; '.join(changed)}); go back to it, remove the folder or name another"
                )
            return
        head = self._run(self.collator([self.dataset[0]]))
        write_head(self.folder, head)
        dataclasses.replace(self.manifest, softcap=head.softcap).write(self.folder)

    def fill(self, state: PartialState) -> None:
        """Write this process's share of the shards that are not there yet."""
        manifest = Manifest.read(self.folder)
        shards = range(state.process_index, manifest.shards, state.num_processes)
        left = [s for s in shards if not shard_file(self.folder, s).is_file()]
        plan = [(shard, batch) for shard in left for batch in self._batches(manifest.block(shard))]
        loader = DataLoader(
            self.dataset,
            batch_sampler=[batch for _, batch in plan],
            num_workers=self.workers,
            collate_fn=partial(_marked, self.collator),
        )
        total = sum(len(manifest.block(s)) for s in shards)
        done = total - sum(len(batch) for _, batch in plan)
        show = state.is_local_main_process
        with Bar(f"teacher {manifest.stage}", total, "samples", done=done, show=show) as bar:
            loaded = zip(plan, loader, strict=True)
            for shard, group in groupby(loaded, key=lambda pair: pair[0][0]):
                hidden, marks = self._rows((loaded for _, loaded in group), bar)
                write_shard(shard_file(self.folder, shard), hidden, marks, manifest.visual)

    def _batches(self, block: range) -> Iterator[list[int]]:
        for start in range(0, len(block), self.batch_size):
            yield list(block[start : start + self.batch_size])

    def _rows(self, batches: Iterator[Any], bar: Bar) -> tuple[Tensor, list[Mark]]:
        """Selected rows (R, D) of one shard's samples, and their marks."""
        hidden, found = [], []
        for marks, batch in batches:
            own = batch.get("teacher") or batch
            visual = (own["input_ids"] == image_token_id(self.teacher())) & self.manifest.visual
            rows, counts = selected(self._run(batch).hidden, own["labels"], visual)
            _check_rows(marks, batch, own, counts, self.manifest.visual)
            hidden.append(_stored(rows, DTYPES[self.manifest.dtype], marks, counts))
            found += marks
            bar.advance(len(batch["sample_ids"]))
        return torch.cat(hidden), found

    @torch.no_grad()
    def _run(self, batch: Mapping[str, Any]) -> mk.HeadInputs:
        device: Any = PartialState().device
        half = self.manifest.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return ask(self.teacher().to(device), send_to_device(batch, device))


def selected(
    hidden: Tensor,  # (B, T, D)
    labels: Tensor,  # (B, T)
    image_mask: Tensor,  # (B, T) bool, False where visual rows are not wanted
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Rows (R, D) of each sample in turn, its response rows and then its visual rows; and how many
    of both each sample has."""
    batch, length = labels.shape
    parts = mk.response_rows(labels)[0], mk.visual_rows(image_mask)
    rows = torch.cat(parts)
    rows = rows[(rows // length).argsort(stable=True)]
    counts = [torch.bincount(part // length, minlength=batch).tolist() for part in parts]
    return hidden.flatten(0, 1)[rows], list(zip(*counts, strict=True))


def _marked(collator: Any, items: Sequence[Any]) -> tuple[list[Mark], Any]:
    """A batch and the marks of its items, made where the items are made."""
    return marks_of_items(items), collator(items)


def _check_rows(
    marks: Sequence[Mark],
    batch: Mapping[str, Any],
    own: Mapping[str, Any],
    counts: Sequence[tuple[int, int]],
    visual: bool,
) -> None:
    """Rows of each sample and of each image on both sides: totals may agree where images do not."""
    ours = [(mark.response, mark.visual * visual) for mark in marks]
    lens = [side["image_lens"].tolist() if visual else [] for side in (batch, own)]
    if ours != list(counts) or lens[0] != lens[1]:
        raise DataError(
            f"samples {', '.join(repr(mark.id) for mark in marks)}: the teacher selects {counts} "
            f"response and visual rows, of images of {lens[1]}, the student {ours}, of {lens[0]}; "
            "take another teacher, or set teacher_cache.visual=false if images alone differ"
        )


def _stored(
    rows: Tensor,  # (R, D)
    dtype: torch.dtype,
    marks: Sequence[Mark],
    counts: Sequence[tuple[int, int]],
) -> Tensor:
    """The rows on the CPU in the dtype of the cache; `DataError` where that gives no number."""
    cast = rows.to(dtype)
    bad = ~cast.isfinite().all(1)
    if bool(bad.any()):
        of_row = [
            mark for mark, count in zip(marks, counts, strict=True) for _ in range(sum(count))
        ]
        first = int(bad.nonzero()[0])
        finite = bool(rows[first].isfinite().all())
        why = f"too large for {dtype}: take bf16 or fp32" if finite else "NaN or inf"
        raise DataError(f"sample {of_row[first].id!r}: the teacher's hidden states are {why}")
    return cast.cpu()


def _changed(stored: Manifest, found: Manifest) -> list[str]:
    """Differences of two manifests by field. What changes nothing of what is stored is left out:
    the size of a shard, the teacher's folder; and what follows from the rest."""
    free = {"samples_per_shard": 0, "softcap": None, "name": ""}
    return differences(dataclasses.asdict(stored) | free, dataclasses.asdict(found) | free)
