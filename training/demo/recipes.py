"""The demo's runs as configurations: small models, started from random weights.

No pre-trained LM stands behind them, so the projector-only stages can do little and are kept short,
and rates are those of training from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from training.config import Config, DataConfig, LossConfig, ModelConfig, StageConfig
from training.demo.tower import TowerConfig
from training.settings import check, section, setting


@dataclass(frozen=True)
class DemoConfig:
    """The demo: sizes and steps chosen so that it ends within minutes on two cores."""

    out: str = setting("runs/demo", "folder for data, models and the report")
    seeds: int = setting(
        1, "students of each kind; with 3 or more the table has mean and spread", gt=0
    )
    data: str = setting("scenes", "which data", choices=("scenes", "easy-vqa"))
    garments: str | None = setting(
        None, "folder of Fashion-MNIST's four files; null: the Debian package"
    )
    train_n: int = setting(40_000, "questions the teacher learns from (scenes)", gt=0)
    test_n: int = setting(2_000, "held-out questions (scenes)", gt=0)
    student_n: int = setting(1_000, "questions the students learn from", gt=0)
    batch_size: int = setting(64, "samples a step, teacher and students", gt=0)
    teacher_pt_steps: int = setting(40, "teacher: steps of pre-training", gt=0)
    teacher_sft_steps: int = setting(1_200, "teacher: steps of fine-tuning", gt=0)
    teacher_lr: float = setting(5e-4, "teacher: peak learning rate", gt=0)
    dpt_steps: int = setting(40, "distilled student: steps of DPT", gt=0)
    sft_steps: int = setting(100, "distilled student: steps of SFT", gt=0)
    dft_steps: int = setting(460, "distilled student: steps of DFT", gt=0)
    student_lr: float = setting(2e-3, "students: peak learning rate", gt=0)
    loss: LossConfig = section(LossConfig, "distilled student: weights of the loss in DPT and DFT")
    tower: TowerConfig = section(TowerConfig, "the vision tower that all models share")
    ablation: bool = setting(False, "also train students with other loss weights, one table more")
    threads: int | None = setting(None, "CPU threads; null: PyTorch's choice", gt=0)

    def __post_init__(self) -> None:
        check(self)

    @property
    def student_steps(self) -> int:
        """Steps of the distilled student, all stages; the SFT student gets as many."""
        return self.dpt_steps + self.sft_steps + self.dft_steps

    @property
    def folder(self) -> Path:
        """The output folder as a path."""
        return Path(self.out)


def demo_teacher(demo: DemoConfig) -> Config:
    """192 wide, 4 layers, on all the training data: PT, then SFT."""
    stage = _stage(demo, demo.teacher_lr)
    return replace(
        _demo_run(demo, "teacher", hidden=192, layers=4, prefix="", seed=0),
        stages=("pt", "sft"),
        pt=replace(stage, steps=demo.teacher_pt_steps, lr=1e-3),
        sft=replace(stage, steps=demo.teacher_sft_steps),
    )


def demo_sft(demo: DemoConfig, seed: int, steps: int, name: str) -> Config:
    """64 wide, 2 layers, on the limited data: SFT alone, for `steps` steps."""
    return replace(
        _demo_run(demo, f"seed{seed}/{name}", hidden=64, layers=2, prefix="student_", seed=seed),
        stages=("sft",),
        sft=replace(_stage(demo, demo.student_lr), steps=steps),
    )


def demo_distilled(demo: DemoConfig, seed: int, name: str, loss: LossConfig) -> Config:
    """The same student on the same limited data, in three stages with the teacher: DPT, SFT,
    DFT."""
    stage = _stage(demo, demo.student_lr)
    return replace(
        _demo_run(demo, f"seed{seed}/{name}", hidden=64, layers=2, prefix="student_", seed=seed),
        stages=("dpt", "sft", "dft"),
        teacher=str(demo.folder / "teacher" / "2-sft" / "model"),
        dpt=replace(stage, steps=demo.dpt_steps, loss=loss),
        sft=replace(stage, steps=demo.sft_steps),
        dft=replace(stage, steps=demo.dft_steps, loss=loss),
    )


ABLATION = {
    "CE + response": LossConfig(visual=0.0, relation=0.0),
    "response only": LossConfig(ce=0.0, visual=0.0, relation=0.0),
    "response + visual + relation": LossConfig(ce=0.0),
}


def _stage(demo: DemoConfig, lr: float) -> StageConfig:
    return StageConfig(batch_size=demo.batch_size, lr=lr, warmup=0.05)


def _demo_run(
    demo: DemoConfig, name: str, *, hidden: int, layers: int, prefix: str, seed: int
) -> Config:
    """What teacher and students have in common."""
    tower, data = str(demo.folder / "tower"), demo.folder / "data"
    return Config(
        out=str(demo.folder / name),
        model=ModelConfig(
            vision=tower,
            processor=tower,
            hidden=hidden,
            layers=layers,
            # the tower is trained up to its last layer, so that is what the projector reads
            feature_layer=-1,
        ),
        data=DataConfig(
            captions=str(data / f"{prefix}pretrain.json"),
            conversations=str(data / f"{prefix}train.json"),
            held_out=str(data / "test.json"),
            image_root=str(data),
            image_cache_mb=1_500,
        ),
        seed=seed,
        log_steps=20,
        save_steps=200,
        keep=1,
        threads=demo.threads,
    )
