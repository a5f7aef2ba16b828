"""The demo's runs as configurations: small models, started from random weights.

No pre-trained LM stands behind them, so the projector-only stages can do little and are kept short,
and rates are those of training from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from training import settings
from training.config import Config, load
from training.settings import Section, section, setting

#: The arguments of LLaVA-KD's objective.
LossConfig: Any = type(load().of_stage("dft").loss)


class TowerConfig(Section):
    """Sizes and training of the tower."""

    hidden: int = setting(128, "hidden size C of the tower", gt=0)
    layers: int = setting(2, "transformer layers", gt=0)
    heads: int = setting(4, "attention heads", gt=0)
    patch_size: int = setting(
        32, "pixels on a side of a patch; (image_size / patch_size)² tokens", gt=0
    )
    image_size: int = setting(64, "pixels on a side of an image", gt=0)
    steps: int = setting(600, "optimiser steps", gt=0)
    batch_size: int = setting(128, "images a step", gt=0)
    lr: float = setting(1e-3, "peak learning rate", gt=0)
    seed: int = setting(0, "seed of weights and data order", ge=0)


class DemoConfig(Section):
    """The demo: sizes and steps chosen so that it ends within minutes on two cores."""

    out: str = setting("runs/demo", "folder for data, models and the report")
    seeds: int = setting(
        1, "students of each kind; with 3 or more the table has mean and spread", gt=0
    )
    data: Literal["scenes", "easy-vqa"] = setting("scenes", "which data")
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
    loss: Any = section(LossConfig, "distilled student: weights of the loss in DPT and DFT")
    tower: TowerConfig = section(TowerConfig, "the vision tower that all models share")
    ablation: bool = setting(False, "also train students with other loss weights, one table more")
    threads: int | None = setting(None, "CPU threads; null: PyTorch's choice", gt=0)

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
    stages = {
        "pt": _stage(demo, demo.teacher_pt_steps, 1e-3),
        "sft": _stage(demo, demo.teacher_sft_steps, demo.teacher_lr),
    }
    return _run(demo, "teacher", stages, hidden=192, layers=4, prefix="", seed=0)


def demo_sft(demo: DemoConfig, seed: int, steps: int, name: str) -> Config:
    """64 wide, 2 layers, on the limited data: SFT alone, for `steps` steps."""
    return _student(demo, name, seed, {"sft": _stage(demo, steps, demo.student_lr)})


def demo_distilled(demo: DemoConfig, seed: int, name: str, loss: Mapping[str, Any]) -> Config:
    """The same student on the same limited data, in three stages with the teacher: DPT, SFT,
    DFT."""
    stages = {
        "dpt": _stage(demo, demo.dpt_steps, demo.student_lr) | {"loss": loss},
        "sft": _stage(demo, demo.sft_steps, demo.student_lr),
        "dft": _stage(demo, demo.dft_steps, demo.student_lr) | {"loss": loss},
    }
    teacher = str(demo.folder / "teacher" / "2-sft" / "model")
    return _student(demo, name, seed, stages, teacher=teacher)


ABLATION = {
    "CE + response": {"visual": 0.0, "relation": 0.0},
    "response only": {"ce": 0.0, "visual": 0.0, "relation": 0.0},
    "response + visual + relation": {"ce": 0.0},
}


def _stage(demo: DemoConfig, steps: int, lr: float) -> dict[str, Any]:
    return {"steps": steps, "lr": lr, "batch_size": demo.batch_size, "warmup": 0.05}


def _student(
    demo: DemoConfig, name: str, seed: int, stages: Mapping[str, Any], teacher: str | None = None
) -> Config:
    folder, sizes = f"seed{seed}/{name}", {"hidden": 64, "layers": 2}
    return _run(demo, folder, stages, prefix="student_", seed=seed, teacher=teacher, **sizes)


def _run(
    demo: DemoConfig,
    name: str,
    stages: Mapping[str, Any],
    *,
    hidden: int,
    layers: int,
    prefix: str,
    seed: int,
    teacher: str | None = None,
) -> Config:
    """What teacher and students have in common."""
    tower, data = str(demo.folder / "tower"), demo.folder / "data"
    values = {
        "out": str(demo.folder / name),
        "stages": list(stages),
        "stage": stages,
        "teacher": teacher,
        "model": {
            "vision": tower,
            "processor": tower,
            "hidden": hidden,
            "layers": layers,
            # the tower is trained up to its last layer, so that is what the projector reads
            "feature_layer": -1,
        },
        "data": {
            "captions": str(data / f"{prefix}pretrain.json"),
            "conversations": str(data / f"{prefix}train.json"),
            "held_out": str(data / "test.json"),
            "image_root": str(data),
            "image_cache_mb": 1_500,
        },
        "seed": seed,
        "log_steps": 20,
        "save_steps": 200,
        "keep": 1,
        "threads": demo.threads,
    }
    return settings.build(type(load()), values)
