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
from training import checkpoint, settings
from training.anatomy import freeze
from training.claim import Claim, claimed
from training.config import Config, StageConfig
from training.data.collate import Collator
from training.data.load import (
    collator_of,
    epoch_size,
    has_data,
    open_data,
    order_of,
)
from training.data.records import DataError
from training.evaluation.held_out import Scores, evaluate
from training.forecast import forecast
from training.interrupt import Interrupted
from training.journal import Journal, write_whole
from training.models import (
    Processor,
    Vlm,
    load_vlm,
    recompute_activations,
    save_model,
)
from training.progress import LOG
from training.start import Say, Teacher, check_kinds, start, too_long
from training.teacher_cache.use import stored_stages, use_stored
from training.trainer import DistillTrainer

SCORES = "scores.json"
PROJECT = "mllmkd"  # of Trackio and W&B, where runs of several folders are compared


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind."""

    name: str
    model: Path
    history: list[dict[str, float]]
    summary: dict[str, float]  # steps, seconds, tokens and samples a second, peak_gib
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


def _run(config: Config, claim: Claim | None, say: Say) -> list[StageResult]:
    """`run`, with the claim on its folder in the first process."""
    processes().wait_for_everyone()  # the claim is checked
    left = config.left
    model, processor, teacher = start(config, left, say)
    results = []
    for number, (name, folder) in enumerate(zip(config.stages, config.folders, strict=True)):
        trained = None
        if (folder / "model").is_dir():
            on_main(lambda folder=folder: _remove_checkpoints(folder))  # a kill may have left some
            say(f"{folder}: already done")
        else:
            if (made := config.table[name].student) is not None:
                model = made(model, **settings.arguments(config.of_stage(name).student))
            trained = _train(config, claim, number, model, processor, teacher, say)
        if left or _unscored(config, folder):
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
    stage, folder = config.table[config.stages[number]], config.folders[number]
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
    check_kinds(objective, dataset, config.data.packing)
    for note in (*dataset.encoding.notes, *too_long(model, dataset)):
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
        say=say,
        order=order_of(config.data, dataset, options.batch_size, config.seed),
        callbacks=[make() for make in stage.callbacks],
    )
    _make_steps(trainer, folder, steps, say)
    curve = [entry for entry in trainer.state.log_history if "loss" in entry]
    summary = {"steps": steps, **trainer.meter.summary()}
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
        # a warm-up begins at 0, and would be all of a stage of one step
        warmup_steps=min(math.ceil(options.warmup * steps), steps - 1),
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
            if not _unscored(config, folder):
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


def _unscored(config: Config, folder: Path) -> bool:
    return has_data(config.data, "held_out") and not (folder / SCORES).is_file()


def _write(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1))


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
