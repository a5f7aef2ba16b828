"""What is in easy-VQA, a published set? Somebody else's images, questions and split.

5,000 pictures of one coloured shape (64×64) and 48,248 questions with 13 answers (MIT licence),
in the PyPI package ``easy-vqa``, version 1.0. Its train / test split is kept as published and its
questions are not reworded. Kinds, told apart by the question's words:

    colour    what color is the shape?              one of eight colours
    shape     what shape is in the image?           circle, rectangle or triangle
    yesno     is there a red shape?                 yes or no
    negated   is there not a circle in the image?   yes or no

The set has no captions, so a caption is put together from what an image's own answers say ("blue
rectangle", or one word where only one is known). The student's captions come from the student's
own questions only, so a captioning stage shows it no label that its questions do not.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from training.bar import track
from training.demo.config import DemoConfig
from training.demo.folder import Record, Source, more_questions, record, unseen
from training.settings import ConfigError


def easy_vqa(demo: DemoConfig) -> Source:
    """Its entries; students learn from `student_n` training questions drawn at random.

    Raises:
        ConfigError: the package is not installed, or has fewer questions.
    """
    package = _package()
    train = _entries("train", *package.get_train_questions())
    if demo.student_n > len(train):
        raise ConfigError(f"student_n: got {demo.student_n}, expected up to {len(train)}")

    def fill(root: Path) -> dict[str, list[Record]]:
        _copy(package.get_train_image_paths(), root / "images" / "train")
        _copy(package.get_test_image_paths(), root / "images" / "test")
        student = [
            train[i] for i in np.random.default_rng(0).permutation(len(train))[: demo.student_n]
        ]
        return {
            "pretrain": captions(train),
            "train": train,
            "student_pretrain": captions(student),
            "student_train": student,
            "student_questions": more_questions(student, demo.per_image),
            "dev": unseen(train, student),
            "test": _entries("test", *package.get_test_questions()),
        }

    sizes = {"student_n": demo.student_n, "per_image": demo.per_image, "seed": 0}
    return Source({"data": "easy-vqa 1.0", **sizes}, fill)


def _package() -> ModuleType:
    try:
        import easy_vqa  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "data: got 'easy-vqa', which is not installed: pip install --no-deps easy-vqa==1.0"
        ) from error
    return easy_vqa


def _copy(images: dict[int, str], folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, path in track(images.items(), f"copying {folder.name} images", "images"):
        shutil.copyfile(path, folder / f"{number}.png")


def _entries(
    split: str, texts: Sequence[str], answers: Sequence[str], images: Sequence[int]
) -> list[Record]:
    return [
        record(f"{split}-{i}", f"images/{split}/{image}.png", question_kind(text), text, answer)
        for i, (text, answer, image) in enumerate(zip(texts, answers, images, strict=True))
    ]


def question_kind(question: str) -> str:
    """The kind of a question, by its words."""
    words = question.rstrip("?").split()
    if words[:1] == ["what"]:
        # "what is the color of the shape" asks for a colour, "what is the blue shape" for a shape
        return "colour" if "color" in words else "shape"
    return "negated" if {"not", "no"} & set(words) else "yesno"


def captions(entries: Iterable[Record]) -> list[Record]:
    """One caption an image, colour first, of what ``entries`` answer about it."""
    known: dict[str, dict[str, str]] = {}
    for entry in entries:
        if entry["kind"] in ("colour", "shape"):
            answer = entry["conversations"][1]["value"]
            known.setdefault(entry["image"], {})[entry["kind"]] = answer
    return [
        record(f"{image}-caption", image, "caption", "describe the image", " ".join(words))
        for image, facts in known.items()
        if (words := [facts[kind] for kind in ("colour", "shape") if kind in facts])
    ]
