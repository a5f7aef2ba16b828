"""What can be set in a training run? Every field, its default and its meaning; nothing else reads
options.

A `Config` describes one model, its method and the stages it goes through, in order. A LLaVA-KD
teacher is a run with stages `pt, sft`; a distilled student is a run with stages `dpt, sft, dft` and
`teacher` pointing at the teacher's folder. Which stages there are, their defaults, and what their
losses take, says the method (`mllmkd_kernels.methods`): the class of a configuration is made of the
method's table (`config_class`). `recipes/` has complete configurations.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import create_model, model_validator

from mllmkd_kernels import BatchView, methods
from mllmkd_kernels.methods import Stage
from mllmkd_kernels.objective import Objective
from training import settings
from training.settings import ConfigError, Section, arguments, arguments_of, section, setting

DEFAULT, OWN = "llava-kd", "own"  # what a method is called that its own file runs
GROUP = "mllmkd_kernels.methods"  # of the entry points of installed ones


class ModelConfig(Section):
    """The model to train: one that is there (`path`), or the parts a LLaVA is put together from."""

    path: str | None = setting(
        None, "folder or hub name of an image-text-to-text model to start from"
    )
    vision: str | None = setting(
        None, "folder or hub name of the vision tower (SigLIP or CLIP), if path is null"
    )
    language: str | None = setting(
        None, "folder or hub name of the causal LM; null: a new one of the sizes below"
    )
    processor: str | None = setting(
        None, "folder or hub name of the processor; null: the one in path, or made of the parts"
    )
    hidden: int = setting(64, "new LM: hidden size D", gt=0)
    layers: int = setting(2, "new LM: number of layers", gt=0)
    heads: int = setting(4, "new LM: number of attention heads", gt=0)
    dropout: float = setting(0.0, "new LM: dropout of its attention in training", ge=0, lt=1)
    vocab_size: int | None = setting(
        None, "new LM: rows of the lm_head; null: as many as the tokenizer has", gt=0
    )
    feature_layer: int = setting(
        -2, "which hidden state of the tower the projector reads (-1 is the last)"
    )
    feature_strategy: Literal["full", "default"] = setting(
        "full", "keep every patch, or drop the first (CLS)"
    )

    @model_validator(mode="after")
    def _whole_heads(self) -> ModelConfig:
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden: got {self.hidden}, expected a multiple of heads ({self.heads})"
            )
        return self


class SourceConfig(Section):
    """One source of samples among several (`data.sources`)."""

    path: str | None = setting(
        None, "a LLaVA json(l); or a folder, parquet or json file, or hub name of HF datasets"
    )
    use: Literal["captions", "conversations", "preferences", "held_out"] = setting(
        "conversations", "what it is for"
    )
    kind: Literal["auto", "llava", "messages"] = setting(
        "auto",
        "entries with LLaVA's conversations or with messages; auto: by the first entry",
    )
    weight: float = setting(
        1.0, "times each of its samples occurs in an epoch (0.5: another half each epoch)", gt=0
    )
    image_root: str | None = setting(
        None, "folder its image paths are relative to; null: data.image_root"
    )
    split: str = setting("train", "split of a HF data set")
    name: str | None = setting(None, "configuration name of a HF data set on the hub")
    messages: str = setting("messages", "column of the messages")
    images: str = setting("images", "column of the images (one, or a list), if there is one")
    stream: bool = setting(
        False, "read a HF data set from front to end instead of by index; needs steps"
    )


class DataConfig(Section):
    """What to train on: LLaVA json files, or any number of sources."""

    captions: str | None = setting(
        None, "json(l) of image captions, for stages whose data they are"
    )
    conversations: str | None = setting(None, "json(l) of instructions, likewise")
    preferences: str | None = setting(None, "json(l) of pairs of answers, likewise")
    held_out: str | None = setting(
        None, "json(l) to evaluate on after each stage; null: no evaluation"
    )
    sources: tuple[SourceConfig, ...] = setting(
        (), "several sources, mixed by weight, in place of the three fields above"
    )
    order: Literal["shuffled", "grouped"] = setting(
        "shuffled",
        "shuffled; or grouped: a step's samples are all with images or all without, and of "
        "similar length where they share a micro-batch",
    )
    packing: bool = setting(
        False,
        "lay a micro-batch's samples end to end, without padding; refused where not exact",
    )
    shuffle_buffer: int = setting(1000, "samples that a streamed source is shuffled among", gt=0)
    image_root: str = setting(".", "folder that the image paths in the json files are relative to")
    max_length: int = setting(2048, "longest sample in tokens, image tokens included", gt=0)
    skip_bad: bool = setting(
        False, "skip faulty samples (counted and listed) instead of stopping at the first"
    )
    cache_mb: int = setting(
        0,
        "keep processed images, and samples as tokens, in memory up to this many MiB, per process",
        ge=0,
    )
    workers: int = setting(0, "data loading processes", ge=0)


class StageConfig(Section):
    """How one stage is optimised."""

    epochs: float = setting(1.0, "passes over the data; ignored where steps is set", gt=0)
    steps: int | None = setting(None, "optimiser steps; null: from epochs", gt=0)
    batch_size: int = setting(
        128, "samples per optimiser step, over all devices and micro-batches", gt=0
    )
    micro_batch: int | None = setting(
        None, "samples per forward pass and device; null: the whole batch", gt=0
    )
    lr: float = setting(2e-5, "peak learning rate of AdamW", gt=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = setting(
        "cosine", "learning-rate schedule"
    )
    warmup: float = setting(0.03, "warm-up as a share of the steps", ge=0, lt=1)
    weight_decay: float = setting(
        0.0, "AdamW's weight decay, not applied to biases and norms", ge=0
    )
    beta2: float = setting(
        0.999, "AdamW's decay of squared gradients; 0.95 where a model is new", gt=0, lt=1
    )
    clip: float = setting(1.0, "gradient norm is clipped to this; 0: no clipping", ge=0)
    loss: Any = section(Section, "the arguments of the stage's objective")
    student: Any = section(Section, "the arguments of what is made of the student")
    view: Any = section(Section, "the arguments of what becomes of a batch")


class TeacherCacheConfig(Section):
    """The teacher's hidden states, stored once instead of computed in every step."""

    path: str | None = setting(
        None,
        "folder of them, one below it a stage: written by `cache`, read by `run`, which then "
        "loads no teacher; null: the teacher runs in every step",
    )
    stages: tuple[str, ...] = setting(
        (), "stages to store and to train from it; empty: all that compare with a teacher"
    )
    visual: bool = setting(
        True,
        "store image rows too, most of the disk; false is for losses without terms over them",
    )
    dtype: Literal["bf16", "fp16", "fp32"] = setting("bf16", "numbers are stored in")
    batch_size: int = setting(8, "samples per forward pass of the teacher and device", gt=0)


class Config(Section):
    """One run: one model through its stages. Made of a method's table: see `config_class`.

    Attributes:
        table: the method's stages by name; not a field.
    """

    table: ClassVar[Mapping[str, Stage]] = {}

    out: str = setting(
        "runs/run", "folder for checkpoints, logs and the finished model of each stage"
    )
    method: str = setting(
        DEFAULT, "the method it is trained by: `mllmkd_kernels.methods`, or installed"
    )
    stages: tuple[str, ...] = setting((), "stages in order, of those that the method has")
    teacher: str | None = setting(
        None,
        "folder or hub name of the teacher (any image-text-to-text model), where a stage has one",
    )
    teacher_dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto",
        "the frozen teacher's weights: auto (as its checkpoint has them), or half the memory",
    )
    teacher_cache: TeacherCacheConfig = section(
        TeacherCacheConfig, "the teacher's hidden states, stored once by `cache`"
    )
    model: ModelConfig = section(ModelConfig, "the model to train")
    data: DataConfig = section(DataConfig, "the data to train on")
    stage: Any = section(Section, "how each stage is optimised; its fields are the method's stages")
    seed: int = setting(0, "seed of initialisation and data order", ge=0)
    precision: Literal["fp32", "bf16"] = setting("fp32", "fp32, or bf16 autocast")
    grad_checkpointing: bool = setting(False, "recompute activations in backward to save memory")
    log_steps: int = setting(10, "optimiser steps between two entries of the loss curve", gt=0)
    save_steps: int = setting(500, "optimiser steps between two checkpoints", gt=0)
    keep: int = setting(2, "checkpoints kept in each stage", gt=0)
    resume: bool = setting(
        True, "continue from what is in `out`; false: an `out` in use is an error"
    )
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = setting(
        (),
        "where the loss curve goes besides log.jsonl; each must be installed",
    )
    eval_batch_size: int = setting(256, "samples per forward pass in evaluation", gt=0)
    threads: int | None = setting(None, "CPU threads; null: PyTorch's choice", gt=0)

    @model_validator(mode="after")
    def _some_stage(self) -> Config:
        if not self.stages:
            raise ValueError("stages: got [], expected at least one")
        return self

    @property
    def folders(self) -> list[Path]:
        """Where each stage goes, in order."""
        return [Path(self.out) / f"{number}-{name}" for number, name in enumerate(self.stages, 1)]

    @property
    def left(self) -> list[str]:
        """The stages that are not done, whose folders have no finished `model`."""
        pairs = zip(self.stages, self.folders, strict=True)
        return [name for name, folder in pairs if not (folder / "model").is_dir()]

    def of_stage(self, name: str) -> StageConfig:
        """The settings of one stage."""
        return getattr(self.stage, name)

    def objective(self, name: str) -> Objective:
        """What a stage minimises, made of its `loss`; with diagnostics, for the log, which come out
        of what the loss computes anyway.
        """
        make = self.table[name].objective
        kinds = {p.kind for p in inspect.signature(make).parameters.values()}
        more = {"diagnostics": True} if inspect.Parameter.VAR_KEYWORD in kinds else {}
        return make(**arguments(self.of_stage(name).loss), **more)

    def view(self, name: str) -> BatchView | None:
        """What becomes of a stage's batches before they are counted, made of its `view`."""
        make = self.table[name].view
        return None if make is None else make(**arguments(self.of_stage(name).view))

    def compares(self, name: str) -> bool:
        """Whether a stage has a teacher."""
        return self.objective(name).needs.teacher


# --- the configuration of a method ----------------------------------------------------------------


@functools.cache
def config_class(stages: tuple[Stage, ...], method: str = DEFAULT) -> type[Config]:
    """The class of a method's configurations: `stage` has a section for each row of its table, with
    the row's own defaults, and in it `loss`, `student` and `view`, which are the arguments of the
    row's `objective`, `student` and `view`.
    """
    names = tuple(stage.name for stage in stages)
    table = {stage.name: _field(_stage_section(stage), stage.title) for stage in stages}
    run = tuple(stage.name for stage in stages if stage.usual)
    stage_table: Any = create_model("Stages", __base__=Section, **cast(Any, table))
    literal: Any = Literal
    some: Any = tuple[literal[names], ...]
    about = TeacherCacheConfig.model_fields["stages"].description or ""
    stored = create_model("Stored", __base__=TeacherCacheConfig, stages=(some, setting((), about)))
    fields: Any = {
        "method": (literal[method], setting(method, "the method it is trained by")),
        "stages": (
            some,
            setting(run, f"stages in order, of {', '.join(names)}"),
        ),
        "stage": _field(stage_table, "how each stage is optimised"),
        "teacher_cache": _field(stored, Config.model_fields["teacher_cache"].description or ""),
    }
    made: Any = create_model("Config", __base__=Config, **fields)
    made.table = {stage.name: stage for stage in stages}
    return made


def _stage_section(stage: Stage) -> type[StageConfig]:
    known = StageConfig.model_fields
    fields: dict[str, Any] = {
        name: (
            Annotated[known[name].annotation, *known[name].metadata],
            setting(value, known[name].description or ""),
        )
        for name, value in stage.defaults.items()
    }
    loss = arguments_of(stage.objective, "Loss", _settings)
    fields["loss"] = _field(loss, "the loss: see the method's docstring")
    student = Section
    if stage.student is not None:
        model = tuple(inspect.signature(stage.student).parameters)[:1]
        student = arguments_of(stage.student, "Student", given=model)
    fields["student"] = _field(student, "what is made of the student before the stage")
    view = Section if stage.view is None else arguments_of(stage.view, "View")
    fields["view"] = _field(view, "what becomes of a batch: see the method's docstring")
    return create_model(stage.name, __base__=StageConfig, **fields)


def _settings(
    vocab_size: int | None = None, backend: str = "auto", workspace_mb: float | None = None
) -> None:
    """What of `mllmkd_kernels.view.Settings` a run may set.

    Args:
        vocab_size: shared vocabulary; null: the smaller head's.
        backend: implementation of the losses; auto: by device and shapes.
        workspace_mb: MiB that a loss may take besides inputs and gradients; null: by the plan.
    """


def _field(cls: type[Section], about: str) -> tuple[Any, Any]:
    return cls, section(cls, about)


def class_for(values: Mapping[str, Any]) -> type[Config]:
    """The class of the configuration that has these values.

    Raises:
        ConfigError: the method is not known.
    """
    name = values.get("method", DEFAULT)
    return config_class(module_of(name).STAGES, name)


def module_of(method: Any) -> Any:
    """The module of a method by name, with its `STAGES`, and the equations in its docstring: one of
    ours, or of an installed package that has an entry point to it, in the group
    "mllmkd_kernels.methods". A configuration never imports code of its own.
    """
    known = _methods()
    if not isinstance(method, str) or method not in known:
        raise ConfigError(f"method: got {method!r}, expected one of {', '.join(known)}")
    return known[method]()


def method_names() -> dict[str, str]:
    """The methods that there are, each with the first line of its docstring."""
    return {name: (make().__doc__ or "").partition("\n")[0] for name, make in _methods().items()}


def _methods() -> dict[str, Callable[[], Any]]:
    """By name what loads its module."""
    ours = {name.replace("_", "-"): getattr(methods, name) for name in methods.__all__}
    known: dict[str, Callable[[], Any]] = {p.name: p.load for p in entry_points(group=GROUP)}
    return known | {n: lambda m=m: m for n, m in ours.items() if hasattr(m, "STAGES")}


def load(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    base: Config | None = None,
    stages: tuple[Stage, ...] | None = None,
) -> Config:
    """A run's configuration, as `settings.load`; with `stages`, of that table's method."""
    return settings.load(
        class_for if stages is None else config_class(stages, OWN), path, overrides, base
    )


def require(value: str | None, where: str, why: str) -> str:
    """`value`, or a `ConfigError` saying that the field `where` is needed and why."""
    if value is None:
        raise ConfigError(f"{where}: got null, expected a path: {why}")
    return value
