"""What can be set in a training run? Every field, its default and its meaning; nothing else reads
options.

A `Config` describes one model and the stages it goes through, in order. A teacher is a run with
stages `pt, sft`; a distilled student is a run with stages `dpt, sft, dft` and `teacher` pointing at
the teacher's folder. The defaults are LLaVA-KD's (RECIPES: batch 256 at 1e-3 for the projector
stages, 128 at 2e-5 for the others, cosine, warm-up 3%, no weight decay, loss weights 1, 1, 1, 0.5);
`recipes/` has complete configurations.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.settings import ConfigError, check, section, setting

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "soft_cross_entropy",
)


@dataclass(frozen=True)
class ModelConfig:
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
    vocab_size: int | None = setting(
        None, "new LM: rows of the lm_head; null: as many as the tokenizer has", gt=0
    )
    feature_layer: int = setting(
        -2, "which hidden state of the tower the projector reads (-1 is the last)"
    )
    feature_strategy: str = setting(
        "full", "keep every patch, or drop the first (CLS)", choices=("full", "default")
    )

    def __post_init__(self) -> None:
        check(self)
        if self.hidden % self.heads:
            raise ConfigError(
                f"ModelConfig.hidden: got {self.hidden}, "
                f"expected a multiple of heads ({self.heads})"
            )


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples among several (`data.sources`)."""

    path: str | None = setting(
        None, "a LLaVA json(l); or a folder, parquet or json file, or hub name of HF datasets"
    )
    use: str = setting(
        "conversations", "what it is for", choices=("captions", "conversations", "held_out")
    )
    kind: str = setting(
        "auto",
        "entries with LLaVA's conversations or with messages; auto: by the first entry",
        choices=("auto", "llava", "messages"),
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

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class DataConfig:
    """What to train on: LLaVA json files, or any number of sources."""

    captions: str | None = setting(
        None, "json(l) of image captions, for the projector stages pt and dpt"
    )
    conversations: str | None = setting(None, "json(l) of instructions, for the stages sft and dft")
    held_out: str | None = setting(
        None, "json(l) to evaluate on after each stage; null: no evaluation"
    )
    sources: tuple[SourceConfig, ...] = setting(
        (), "several sources, mixed by weight, in place of the three fields above"
    )
    order: str = setting(
        "shuffled",
        "shuffled; or grouped: a step's samples are all with images or all without, and of "
        "similar length where they share a micro-batch",
        choices=("shuffled", "grouped"),
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
    image_cache_mb: int = setting(
        0, "keep processed images in memory up to this many MiB, per process", ge=0
    )
    workers: int = setting(0, "data loading processes", ge=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class LossConfig:
    """Weights of the four terms: L = ce·CE + response·KL_response + visual·KL_visual +
    relation·L_relation."""

    ce: float = setting(1.0, "weight of the cross-entropy on the labels", ge=0)
    response: float = setting(
        1.0, "α: weight of the divergence from the teacher on response tokens", ge=0
    )
    visual: float = setting(
        1.0, "β: weight of the divergence from the teacher on image tokens", ge=0
    )
    relation: float = setting(
        0.5, "γ: weight of the relation loss of each image's visual logits", ge=0
    )
    temperature: float = setting(
        1.0, "T: both models' logits are divided by it before the divergence", gt=0
    )
    divergence: str = setting("forward_kl", "which divergence", choices=DIVERGENCES)
    backend: str = setting(
        "auto", "implementation of the losses: auto, or a backend of mllmkd_kernels by name"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class StageConfig:
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
    schedule: str = setting(
        "cosine", "learning-rate schedule", choices=("cosine", "linear", "constant_with_warmup")
    )
    warmup: float = setting(0.03, "warm-up as a share of the steps", ge=0)
    weight_decay: float = setting(
        0.0, "AdamW's weight decay, not applied to biases and norms", ge=0
    )
    clip: float = setting(1.0, "gradient norm is clipped to this; 0: no clipping", ge=0)
    loss: LossConfig = section(
        LossConfig, "the stage's loss weights; terms the stage does not have are left out"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.warmup >= 1:
            raise ConfigError(f"StageConfig.warmup: got {self.warmup}, expected a share below 1")


@dataclass(frozen=True)
class TeacherCacheConfig:
    """The teacher's hidden states, stored once instead of computed in every step."""

    path: str | None = setting(
        None,
        "folder of them, one below it a stage: written by `cache`, read by `run`, which then "
        "loads no teacher; null: the teacher runs in every step",
    )
    stages: tuple[str, ...] = setting(
        (),
        "stages to store and to train from it; empty: all distilled ones",
        choices=("dpt", "dft"),
    )
    visual: bool = setting(
        True,
        "store image rows too, most of the disk; false is for runs whose loss.visual and "
        "loss.relation are 0",
    )
    dtype: str = setting("bf16", "numbers are stored in", choices=("bf16", "fp16", "fp32"))
    shard_mb: int = setting(512, "MiB of a shard; one is in memory while it is made", gt=0)
    batch_size: int = setting(8, "samples per forward pass of the teacher and device", gt=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Config:
    """One run: one model through its stages."""

    out: str = setting(
        "runs/run", "folder for checkpoints, logs and the finished model of each stage"
    )
    stages: tuple[str, ...] = setting(
        ("dpt", "sft", "dft"), "stages in order", choices=("pt", "dpt", "sft", "dft")
    )
    teacher: str | None = setting(
        None, "folder or hub name of the teacher (any image-text-to-text model), for dpt and dft"
    )
    teacher_dtype: str = setting(
        "auto",
        "the frozen teacher's weights: auto (as its checkpoint has them), or half the memory",
        choices=("auto", "fp32", "bf16"),
    )
    teacher_cache: TeacherCacheConfig = section(
        TeacherCacheConfig, "the teacher's hidden states, stored once by `cache`"
    )
    model: ModelConfig = section(ModelConfig, "the model to train")
    data: DataConfig = section(DataConfig, "the data to train on")
    pt: StageConfig = section(
        StageConfig, "pre-training: projector, CE on captions", lr=1e-3, batch_size=256
    )
    dpt: StageConfig = section(
        StageConfig,
        "distilled pre-training: projector, four terms on captions",
        lr=1e-3,
        batch_size=256,
    )
    sft: StageConfig = section(StageConfig, "supervised fine-tuning: projector and LM, CE")
    dft: StageConfig = section(StageConfig, "distilled fine-tuning: projector and LM, four terms")
    seed: int = setting(0, "seed of initialisation and data order", ge=0)
    precision: str = setting("fp32", "fp32, or bf16 autocast", choices=("fp32", "bf16"))
    grad_checkpointing: bool = setting(False, "recompute activations in backward to save memory")
    log_steps: int = setting(10, "optimiser steps between two entries of the loss curve", gt=0)
    save_steps: int = setting(500, "optimiser steps between two checkpoints", gt=0)
    keep: int = setting(2, "checkpoints kept in each stage", gt=0)
    resume: bool = setting(
        True, "continue from what is in `out`; false: an `out` in use is an error"
    )
    report_to: tuple[str, ...] = setting(
        (),
        "where the loss curve goes besides log.jsonl; each must be installed",
        choices=("tensorboard", "trackio", "wandb"),
    )
    on_nan: str = setting(
        "stop",
        "a loss or gradient that is not finite: stop naming the batch, or skip the step",
        choices=("stop", "skip"),
    )
    skip_limit: int = setting(5, "on_nan skip: so many bad steps in a row stop the run", gt=0)
    eval_batch_size: int = setting(256, "samples per forward pass in evaluation", gt=0)
    threads: int | None = setting(None, "CPU threads; null: PyTorch's choice", gt=0)

    def __post_init__(self) -> None:
        check(self)
        if not self.stages:
            raise ConfigError("Config.stages: got [], expected at least one of pt, dpt, sft, dft")

    def stage(self, name: str) -> StageConfig:
        """The settings of one stage."""
        return getattr(self, name)


def require(value: str | None, where: str, why: str) -> str:
    """`value`, or a `ConfigError` saying that the field `where` is needed and why."""
    if value is None:
        raise ConfigError(f"{where}: got null, expected a path: {why}")
    return value
