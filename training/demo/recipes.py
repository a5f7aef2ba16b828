"""The demo's runs as configurations: small models, started from random weights.

No pre-trained LM stands behind them, so the projector-only stages can do little and are kept short,
and rates are those of training from scratch. Both kinds of student have the same optimiser; what
regularises is the SFT students' alone, because it helps them and not the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mllmkd_kernels.methods import Stage
from training import settings
from training.config import OWN, Config, class_for, config_class, load
from training.settings import Section, section, setting

if TYPE_CHECKING:

    class LossConfig(Section):
        """The arguments of LLaVA-KD's objective."""

else:
    LossConfig = type(load().of_stage("dft").loss)
#: What a student is shown: labelled captions and questions; questions that the teacher answered;
#: new scenes of the labelled photographs (`training.demo.recomposed`).
LABELLED, ANSWERED, RECOMPOSED = "labelled", "answered", "recomposed"
#: Data that the demo makes or copies itself.
MADE = ("scenes", "easy-vqa")


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
    data: str = setting(
        "scenes", "scenes, easy-vqa, or a folder of your own: see `training.demo.own`"
    )
    held_out: Literal["test", "dev"] = setting(
        "test", "what is held out; dev: of the teacher's training questions, to choose settings by"
    )
    garments: str | None = setting(
        None, "folder of Fashion-MNIST's four files; null: the Debian package"
    )
    train_n: int = setting(40_000, "questions the teacher learns from (scenes)", gt=0)
    test_n: int = setting(2_000, "held-out questions (scenes)", gt=0)
    student_n: int = setting(1_000, "questions with labels that the students learn from", gt=0)
    per_image: int = setting(
        8,
        "questions about each of the students' images that the teacher answers (not for a folder)",
        gt=0,
    )
    labelled: float = setting(
        0.25, "distilled student: share of labelled samples, the rest is answered", gt=0, lt=1
    )
    batch_size: int = setting(64, "samples a step, teacher and students", gt=0)
    teacher_pt_steps: int = setting(40, "teacher: steps of pre-training", gt=0)
    teacher_sft_steps: int = setting(1_200, "teacher: steps of fine-tuning", gt=0)
    teacher_lr: float = setting(5e-4, "teacher: peak learning rate", gt=0)
    dpt_steps: int = setting(20, "distilled student: steps of DPT", gt=0)
    sft_steps: int = setting(20, "distilled student: steps of SFT", gt=0)
    dft_steps: int = setting(560, "distilled student: steps of DFT", gt=0)
    student_lr: float = setting(2e-3, "students: peak learning rate", gt=0)
    student_warmup: float = setting(
        0.2, "students: warm-up as a share of a stage's steps; shorter ones sometimes fail", ge=0
    )
    loss: LossConfig = section(LossConfig, "distilled student: weights of the loss in DPT and DFT")
    weight_decay: float = setting(1.0, "SFT students: AdamW's weight decay", ge=0)
    smoothing: float = setting(0.1, "SFT students: share of smoothed labels", ge=0, le=1)
    dropout: float = setting(0.1, "SFT students: dropout of attention", ge=0, lt=1)
    save_steps: int = setting(
        200, "optimiser steps between two checkpoints, of which early stopping would take one", gt=0
    )
    tower: TowerConfig = section(TowerConfig, "the vision tower that all models share")
    threads: int | None = setting(None, "CPU threads; null: PyTorch's choice", gt=0)

    @property
    def student_steps(self) -> int:
        """Steps of a distilled student, all stages; every other student gets as many."""
        return self.dpt_steps + self.sft_steps + self.dft_steps

    @property
    def folder(self) -> Path:
        """The output folder as a path."""
        return Path(self.out)

    @property
    def images(self) -> Path:
        """What the data's image paths are relative to."""
        return self.folder / "data" if self.data in MADE else Path(self.data)

    def split(self, name: str) -> Path:
        """Where that part of the data is; there is no such file if it does not have that part."""
        return self.folder / "data" / f"{name}.json"

    @property
    def teacher(self) -> Path:
        """Where the finished teacher is."""
        last = "2-sft" if self.split("pretrain").is_file() else "1-sft"
        return self.folder / "teacher" / last / "model"

    @property
    def answered(self) -> Path:
        """Where its answers to the students' questions are."""
        return self.folder / "answered" / "data.json"

    @property
    def recomposed(self) -> Path:
        """Where scenes of the students' own labelled photographs are."""
        return self.folder / "recomposed" / "data.json"


class StudyConfig(DemoConfig):
    """The demo's sizes, steps and data; and which rows."""

    seeds: int = setting(3, "students of each row", gt=0)
    rows: tuple[str, ...] = setting((), "names of the rows; empty: all")
    jobs: int = setting(
        min(os.cpu_count() or 1, 4),
        "students trained at the same time, each in a process with `threads` threads (null: one)",
        gt=0,
    )


def demo_teacher(demo: DemoConfig) -> Config:
    """192 wide, 4 layers, on all the training data: PT, where there are captions, then SFT."""
    shared = {"batch_size": demo.batch_size, "warmup": 0.05}
    stages = {
        "pt": {"steps": demo.teacher_pt_steps, "lr": 1e-3, **shared},
        "sft": {"steps": demo.teacher_sft_steps, "lr": demo.teacher_lr, **shared},
    }
    sources = [*_captions(demo.split("pretrain")), {"path": str(demo.split("train"))}]
    if len(sources) < 2:
        del stages["pt"]
    sizes = {"hidden": 192, "layers": 4}
    return _run(demo, "teacher", "llava-kd", stages, sources, sizes, seed=0, teacher=None)


def demo_sft(
    demo: DemoConfig,
    seed: int,
    steps: int,
    name: str,
    shown: Sequence[str] = (LABELLED,),
    method: str | tuple[Stage, ...] = "llava-kd",
) -> Config:
    """64 wide, 2 layers, on the limited data: regularised SFT alone, for `steps` steps."""
    regularised = {"weight_decay": demo.weight_decay, "loss": {"smoothing": demo.smoothing}}
    stages = {"sft": optimised(demo, steps) | regularised}
    return student(demo, name, seed, stages, shown, method=method, dropout=demo.dropout)


def demo_distilled(demo: DemoConfig, seed: int) -> Config:
    """The same student on the same labels and on the teacher's answers to more questions about
    the same images, in three stages with the teacher: DPT, SFT, DFT. Without captions DFT has the
    steps of DPT too.
    """
    loss = {"loss": settings.to_dict(demo.loss)}
    stages = {
        "dpt": optimised(demo, demo.dpt_steps) | loss,
        "sft": optimised(demo, demo.sft_steps),
        "dft": optimised(demo, demo.dft_steps) | loss,
    }
    if not demo.split("student_pretrain").is_file():
        stages["dft"]["steps"] += stages.pop("dpt")["steps"]
    return student(demo, "distilled", seed, stages, [LABELLED, ANSWERED], teacher=demo.teacher)


def demo_unlabelled(demo: DemoConfig, seed: int) -> Config:
    """The same student without any label: DFT alone, on what the teacher answered."""
    loss = {"loss": settings.to_dict(demo.loss)}
    stages = {"dft": optimised(demo, demo.student_steps) | loss}
    return student(demo, "unlabelled", seed, stages, [ANSWERED], teacher=demo.teacher)


def optimised(demo: DemoConfig, steps: int) -> dict[str, Any]:
    """How every student is optimised in a stage of `steps` steps."""
    return {
        "steps": steps,
        "lr": demo.student_lr,
        "batch_size": demo.batch_size,
        "warmup": demo.student_warmup,
        "beta2": 0.95,
    }


def student(
    demo: DemoConfig,
    name: str,
    seed: int,
    stages: Mapping[str, Any],
    shown: Sequence[str],
    *,
    method: str | tuple[Stage, ...] = "llava-kd",
    teacher: Path | None = None,
    pairs: Path | None = None,
    **model: Any,
) -> Config:
    """A student of 64 wide, 2 layers, called `name`, that is `shown` these kinds of data, or
    `pairs` of answers.
    """
    more = [
        {"path": str(path), "image_root": root}
        for kind, path, root in (
            (ANSWERED, demo.answered, None),
            (RECOMPOSED, demo.recomposed, str(demo.recomposed.parent)),
        )
        if kind in shown
    ]
    sources: list[dict[str, Any]] = []
    if LABELLED in shown:
        file = demo.split("student_train")
        labelled: dict[str, Any] = {"path": str(file)}
        if more:
            ratio = demo.labelled / (1 - demo.labelled)
            others = sum(entries(Path(one["path"])) for one in more)
            labelled["weight"] = ratio * others / entries(file)
        sources += [*_captions(demo.split("student_pretrain")), labelled]
    sources += more
    if pairs is not None:
        sources.append({"path": str(pairs), "use": "preferences"})
    sizes = {"hidden": 64, "layers": 2, **model}
    return _run(
        demo, f"seed{seed}/{name}", method, stages, sources, sizes, seed=seed,
        teacher=None if teacher is None else str(teacher),
    )  # fmt: skip


def _captions(path: Path) -> list[dict[str, Any]]:
    """The source of captions, if there are any."""
    return [{"path": str(path), "use": "captions"}] if path.is_file() else []


def entries(file: Path) -> int:
    """How many a json file has."""
    return len(json.loads(file.read_text(encoding="utf-8")))


def _run(
    demo: DemoConfig,
    name: str,
    method: str | tuple[Stage, ...],
    stages: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    sizes: Mapping[str, Any],
    *,
    seed: int,
    teacher: str | None,
) -> Config:
    """What teacher and students have in common."""
    tower, held_out = str(demo.folder / "tower"), str(demo.split(demo.held_out))
    # the tower is trained up to its last layer, so that is what the projector reads
    model = {"vision": tower, "processor": tower, "feature_layer": -1, **sizes}
    values = {
        "out": str(demo.folder / name),
        "method": method if isinstance(method, str) else OWN,
        "stages": list(stages),
        "stage": stages,
        "teacher": teacher,
        "model": model,
        "data": {
            "sources": [*sources, {"path": held_out, "use": "held_out"}],
            "image_root": str(demo.images),
            "cache_mb": 1_500,
        },
        "seed": seed,
        "log_steps": 20,
        "save_steps": demo.save_steps,
        "keep": 1,
        "threads": demo.threads,
    }
    cls = class_for(values) if isinstance(method, str) else config_class(method, OWN)
    return settings.build(cls, values)
