"""What can be set in demo and study, and where does lie what they make?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from training.settings import Section, section, setting

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
    image_size: int = setting(64, "pixels on a side of an image; 64 for scenes", gt=0)
    steps: int = setting(600, "optimiser steps", gt=0)
    batch_size: int = setting(128, "images a step", gt=0)
    lr: float = setting(1e-3, "peak learning rate", gt=0)
    seed: int = setting(0, "seed of weights and data order", ge=0)


class DemoConfig(Section):
    """Teacher, SFT students and distilled students on one data set, compared in
    OUT/report/report.md.

    Sizes and steps are such that it ends within minutes on two cores; given again, it continues.
    """

    out: str = setting("runs/demo", "folder for data, models and the report")
    seeds: int = setting(
        1, "students of each kind; with 3 or more the table has mean and spread", gt=0
    )
    data: str = setting(
        "scenes",
        "scenes; easy-vqa (a package to install); or a folder of your own with train.json and "
        'test.json (docs/training.md, "From scratch, on data of your own")',
    )
    held_out: Literal["test", "dev"] = setting(
        "test", "what is held out; dev: of the teacher's training questions, to choose settings by"
    )
    garments: str | None = setting(
        None, "scenes: folder of Fashion-MNIST's four files; null: the Debian package, fetched"
    )
    train_n: int = setting(40_000, "scenes: questions the teacher learns from", gt=0, multiple_of=2)
    test_n: int = setting(2_000, "scenes: held-out questions", gt=0, multiple_of=2)
    student_n: int = setting(
        1_000,
        "questions with labels that the students learn from (not where a folder says which)",
        gt=0,
    )
    per_image: int = setting(
        8,
        "questions about each of the students' images that the teacher answers (not of a folder)",
        gt=0,
    )
    labelled: float = setting(
        0.25, "distilled student: share of labelled samples, the rest is answered", gt=0, lt=1
    )
    batch_size: int = setting(64, "samples a step, teacher and students", gt=0)
    teacher_pt_steps: int = setting(40, "teacher: steps of pre-training (with captions)", gt=0)
    teacher_sft_steps: int = setting(1_200, "teacher: steps of fine-tuning", gt=0)
    teacher_lr: float = setting(5e-4, "teacher: peak learning rate", gt=0)
    dpt_steps: int = setting(20, "distilled student: steps of DPT; without captions of DFT", gt=0)
    sft_steps: int = setting(20, "distilled student: steps of SFT", gt=0)
    dft_steps: int = setting(
        560, "distilled student: steps of DFT; other students get as many as all three", gt=0
    )
    student_lr: float = setting(2e-3, "students: peak learning rate", gt=0)
    student_warmup: float = setting(
        0.2, "students: warm-up as a share of a stage's steps; shorter ones sometimes fail", ge=0
    )
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
        """Where that part of the data is (`training.demo.folder`); there is no such file if it
        does not have that part.
        """
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
    """The demo's student, trained in many ways, each with one that it is compared with, in
    OUT/study/report.md.

    With the defaults it takes hours; given again, it continues. In a demo's OUT it begins with that
    one's teacher and students.
    """

    seeds: int = setting(3, "students of each row", gt=0)
    rows: tuple[str, ...] = setting(
        (), "names of the rows, as the table has them: 'rows=[\"CE + KL\"]'; empty: all"
    )
    jobs: int = setting(
        min(os.cpu_count() or 1, 4),
        "students trained at the same time, each in a process with `threads` threads (null: one)",
        gt=0,
    )
