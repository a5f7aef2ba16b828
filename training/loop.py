"""How does a run go? Model → for each stage: freeze, data, trainer, save, evaluate. Top to bottom,
once.

    out/config.yaml            the configuration; a run is only continued with the same one
    out/inputs.json            fingerprints of the files it names; only with the same ones
    out/1-dpt/checkpoint-N     while the stage runs
    out/1-dpt/log.jsonl        the loss curve: loss, the four terms, lr, tokens/s, peak memory
    out/1-dpt/scores.json      held-out accuracy and perplexity after the stage
    out/1-dpt/model            the finished model and processor: the stage is done

Started again, a run takes up where it was: finished stages are read from disk, an unfinished one
continues from its newest whole checkpoint, with the same data order and the same loss curve.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from mllmkd_kernels.methods import Stage
from mllmkd_kernels.objective import Objective
from mllmkd_kernels.rows import PAIR, UNITS, kind_of
from training import checkpoint, settings
from training.anatomy import freeze, positions
from training.claim import Claim, claimed
from training.config import Config, StageConfig, require
from training.data.collate import Collator
from training.data.load import (
    collator_of,
    epoch_size,
    has_data,
    open_data,
    order_of,
    require_data,
)
from training.data.records import DataError
from training.evaluation.held_out import Scores, evaluate
from training.forecast import forecast
from training.interrupt import Interrupted
from training.journal import Journal, write_whole
from training.models import (
    DTYPES,
    Processor,
    Vlm,
    build_model,
    load_vlm,
    recompute_activations,
    save_model,
)
from training.pairs import check_pair
from training.progress import LOG
from training.teacher_cache.use import open_rows, stored_stages, use_stored
from training.trainer import DistillTrainer

Say = Callable[[str], None]
SCORES = "scores.json"
PROJECT = "mllmkd"  # of Trackio and W&B, where runs of several folders are compared


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind."""

    name: str
    model: Path
    history: list[dict[str, float]]
    summary: dict[str, float]  # steps, skipped, seconds, tokens and samples a second, peak_gib
    scores: Scores | None


def run(config: Config, say: Say = print) -> list[StageResult]:
    """Train the configured model through its stages; continue what an earlier call left
    unfinished."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if not processes().is_main_process:
        return _run(config, None, lambda message: None)
    with claimed(config) as claim:
        return _run(config, claim, say)


@dataclass(frozen=True)
class Teacher:
    """A model in memory; its processor where it needs batches of its own."""

    model: Vlm
    processor: Processor | None


def _run(config: Config, claim: Claim | None, say: Say) -> list[StageResult]:
    """`run`, with the claim on its folder in the first process."""
    processes().wait_for_everyone()  # the claim is checked
    out = Path(config.out)
    _check_data(config)
    model, processor = build_model(config.model, config.seed)
    _check_students(config, model)
    teacher = _teacher(config, model, processor, say)
    results = []
    for number, name in enumerate(config.stages, 1):
        folder = out / f"{number}-{name}"
        trained = None
        if (folder / "model").is_dir():
            on_main(lambda folder=folder: _remove_checkpoints(folder))  # a kill may have left some
            say(f"{folder}: already done")
        else:
            if (made := config.table[name].student) is not None:
                model = made(model, **settings.arguments(config.of_stage(name).student))
            trained = _train(config, claim, number, model, processor, teacher, say)
        model = trained or load_vlm(folder / "model", dtype=torch.float32)[0]
        results.append(_result(config, claim, name, model, processor, folder, say))
    return results


def processes() -> PartialState:
    """This process among those of the run."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _train(
    config: Config,
    claim: Claim | None,
    number: int,
    model: Vlm,
    processor: Processor,
    teacher: Teacher | None,
    say: Say,
) -> Vlm | None:
    """One stage, from the start or from its newest checkpoint, to its folder's `model`; the trained
    model, or None where no process has its weights whole."""
    stage = config.table[config.stages[number - 1]]
    folder = Path(config.out) / f"{number}-{stage.name}"
    options, objective = config.of_stage(stage.name), config.objective(stage.name)
    freeze(model, *stage.trains)
    if config.grad_checkpointing:
        recompute_activations(model)
    stored = stage.name in stored_stages(config)
    asked = teacher if objective.needs.teacher and not stored else None
    own = asked.processor if asked is not None else None
    dataset = load_data(config, processor, stage, own)
    if claim is not None:
        claim.check_data(stage.data, dataset)
    _check_kinds(objective, dataset, config.data.packing)
    for note in (*dataset.encoding.notes, *_too_long(model, dataset)):
        say(f"{folder.name}: {note}")
    source = asked.model if asked is not None else None
    collator = collator_of(config.data, (model, processor), source, own)
    if stored:
        source, collator = use_stored(config, stage.name, dataset, collator)
        say(f"{folder.name}: learns from {source.name}; no teacher runs")
    steps = _steps(options, epoch_size(dataset))
    arguments = _arguments(config, options, steps, folder)
    for line in forecast(model, arguments, dataset):
        say(f"{folder.name}: {line}")
    trainer = DistillTrainer(
        model,
        arguments,
        teacher=source,
        objective=objective,
        view=config.view(stage.name),
        processor=processor,
        dataset=dataset,
        collator=collator,
        title=folder.name,
        on_nan=config.on_nan,
        skip_limit=config.skip_limit,
        say=say,
        order=order_of(config.data, dataset, options.batch_size, config.seed),
        callbacks=[make() for make in stage.callbacks],
    )
    _make_steps(trainer, folder, steps, say)
    curve = [entry for entry in trainer.state.log_history if "loss" in entry]
    summary = {"steps": steps, **trainer.meter.summary(), "skipped": trainer.watch.skipped}
    state = trainer.student_state()
    on_main(lambda: _finish(model, processor, folder, curve, summary, state))
    if trainer.stopped_by:
        raise Interrupted(trainer.stopped_by, f"{folder} is done; the same command continues")
    return trainer.bare_student() if state is None else None


def _make_steps(trainer: DistillTrainer, folder: Path, steps: int, say: Say) -> None:
    """From the start, or from the newest whole checkpoint, to the last step."""
    resume, ignored = checkpoint.newest(folder)
    for message in ignored:
        say(message)
    if resume is not None:
        say(f"{folder}: resuming from {resume.name}")
    if resume is not None and checkpoint.step_of(resume) >= steps:
        trainer.take_over(resume)  # killed between the last step and the model
    else:
        trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    if trainer.state.global_step < steps:  # asked to stop, it would have raised
        raise DataError(
            f"{folder}: the data ended after step {trainer.state.global_step:,} of {steps:,}; the "
            "stage is not done"
        )


def _check_kinds(objective: Objective, dataset: Any, packing: bool) -> None:
    """Refuse rows of a kind that no sample is of: the mean over them would be 0 in every step; and
    samples packed, of which nobody knows then where one of a kind ends.
    """
    if packing and objective.needs.views:
        names = [name for name, term in objective.terms.items() if term.needs.views]
        raise settings.ConfigError(
            f"data.packing: got true, expected false: {', '.join(names)} tells samples apart"
        )
    if (samples := getattr(dataset, "samples", None)) is None:  # a stream is not counted
        return
    there = set(PAIR) if dataset.encoding.pairs else {sample.kind for sample in samples}
    for name in set(objective.over.values()) - set(UNITS):
        if (kind := kind_of(name)[1]) and kind not in there:
            known = ", ".join(sorted(map(str, there)))
            raise DataError(f"data: no sample is of kind {kind!r}, as {name} asks; kinds: {known}")


def _too_long(model: Any, dataset: Any) -> list[str]:
    """A note where samples may be longer than the model's positions, and about how many are."""
    known, encoding = positions(model.config), dataset.encoding
    if known is None or encoding.max_length <= known:
        return []
    about = ""
    if samples := getattr(dataset, "samples", None):  # a stream is not counted
        longer = sum(encoding.estimate(sample) > known for sample in samples)
        about = f"; about {longer:,} of {len(samples):,} are longer"
    allowed = f"data.max_length allows samples of {encoding.max_length:,} tokens"
    return [f"the model has {known:,} positions, and {allowed}{about}"]


def _steps(options: StageConfig, samples: int | None) -> int:
    if samples is None and options.steps is None:
        raise settings.ConfigError(
            "steps: got null, expected a number: a streamed source has no epochs (data.sources)"
        )
    samples = samples or 0
    return options.steps or math.ceil(options.epochs * math.ceil(samples / options.batch_size))


def _finish(
    model: Vlm,
    processor: Processor,
    folder: Path,
    curve: list[dict[str, float]],
    summary: dict[str, float],
    state: dict[str, torch.Tensor] | None,
) -> None:
    """Write what the stage leaves; the model last, because its presence means done."""
    Journal(folder / LOG).write(curve)
    _write(folder / "summary.json", summary)
    (folder / SCORES).unlink(missing_ok=True)  # of a model that was taken away
    save_model(model, processor, folder / "model", state)
    _remove_checkpoints(folder)  # the model, which could be made from them again, is on the disk


def _remove_checkpoints(folder: Path) -> None:
    for path in folder.glob(f"{checkpoint.PREFIX}*"):
        shutil.rmtree(path)


def on_main(work: Callable[[], None]) -> None:
    """Do `work` in the first process only; the others wait for it."""
    state = processes()
    if state.is_main_process:
        work()
    state.wait_for_everyone()


def load_data(config: Config, processor: Any, stage: Stage, teacher: Any = None) -> Any:
    """The data of a stage, encoded with its template; also as a teacher's own processor does, if
    there is one; as pairs where the objective compares two answers."""
    template: Any = stage.template
    return open_data(
        config.data,
        processor,
        stage.data,
        template,
        teacher=teacher,
        seed=config.seed,
        pairs="rejected" in config.objective(stage.name).needs.views,
    )


def _teacher(config: Config, model: Vlm, processor: Processor, say: Say) -> Teacher | None:
    """The teacher that a stage of the run needs, checked against the student."""
    stored = stored_stages(config)
    for name in stored:  # what is wrong with a later stage's is better known now
        open_rows(config, name)
    needs = {n: config.objective(n).needs for n in config.stages if n not in stored}
    needs = {name: need for name, need in needs.items() if need.teacher}
    if not needs:
        return None
    path = require(config.teacher, "teacher", f"stage {next(iter(needs))} compares with a teacher")
    teacher, its_processor = load_vlm(path, dtype=DTYPES[config.teacher_dtype])
    visual = any(need.visual for need in needs.values())
    report = check_pair(model, processor, teacher, its_processor, visual=visual)
    say(str(report))
    report.require()
    return Teacher(teacher, its_processor if report.own_batch else None)


def _check_data(config: Config) -> None:
    """Every stage has data: what is wrong with a later one is better known now."""
    for name in config.stages:
        require_data(config.data, config.table[name].data)


def _check_students(config: Config, model: Vlm) -> None:
    """What a later stage makes of the student has to be possible: better known now."""
    found = model.config
    for name in config.stages:
        if (fits := config.table[name].fits) is None:
            continue
        try:
            found = fits(found, **settings.arguments(config.of_stage(name).student))
        except ValueError as error:
            raise settings.ConfigError(f"stage.{name}.student: {error}") from error


def check(config: Config, say: Say = print) -> None:
    """What `run` looks at before its first step, and nothing else."""
    _check_data(config)
    model, processor = build_model(config.model, config.seed)
    _check_students(config, model)
    if _teacher(config, model, processor, say) is None:
        say(f"no stage of {', '.join(config.stages)} compares with a teacher: nothing to check")


def _arguments(config: Config, options: StageConfig, steps: int, folder: Path) -> TrainingArguments:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = options.micro_batch or math.ceil(options.batch_size / world)
    if options.batch_size % (micro * world):
        raise settings.ConfigError(
            f"batch_size: got {options.batch_size}, expected a multiple of micro_batch x devices "
            f"({micro} x {world})"
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch_size // (micro * world),
        learning_rate=options.lr,
        lr_scheduler_type=options.schedule,
        warmup_steps=math.ceil(options.warmup * steps),
        weight_decay=options.weight_decay,
        adam_beta2=options.beta2,
        max_grad_norm=options.clip,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # a NaN in the loss curve is to be seen
        save_steps=config.save_steps,
        save_total_limit=config.keep,
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,  # all take part: `sharding.touched`
        dataloader_num_workers=config.data.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        # dispatching cuts every tensor of a stream's batch to as many rows as the batch has samples
        accelerator_config={"dispatch_batches": False},
        report_to=_trackers(config),
        project=PROJECT,
        run_name=f"{folder.parent.name}/{folder.name}",
    )
    if arguments.n_gpu > 1:
        raise settings.ConfigError(
            f"one process sees {arguments.n_gpu} GPUs, expected one process a GPU: start with "
            f"torchrun --nproc_per_node={arguments.n_gpu} -m training run, or set "
            "CUDA_VISIBLE_DEVICES"
        )
    return arguments


def _trackers(config: Config) -> list[str]:
    """`report_to`, if all of it is installed."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise settings.ConfigError(
                f"report_to: got {name!r}, which is not installed: pip install {name}"
            )
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    return list(config.report_to)


def _result(
    config: Config,
    claim: Claim | None,
    name: str,
    model: Vlm,
    processor: Processor,
    folder: Path,
    say: Say,
) -> StageResult:
    scores = None
    if has_data(config.data, "held_out"):
        file = folder / SCORES

        def score() -> None:
            if file.is_file():
                return
            held_out: Any = open_data(config.data, processor, "held_out", "chat", seed=config.seed)
            if claim is not None:
                claim.check_data("held_out", held_out)
            size = config.eval_batch_size
            title = f"{folder.name} held-out"
            found = evaluate(model, held_out, Collator(processor), batch_size=size, title=title)
            _write(file, asdict(found))

        on_main(score)
        scores = Scores(**_read(file))
        say(f"{folder}: {scores}")
    history, summary = Journal(folder / LOG).read(), _read(folder / "summary.json")
    return StageResult(name, folder / "model", history, summary, scores)


def _write(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1))


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
