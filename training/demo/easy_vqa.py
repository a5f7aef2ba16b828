"""easy-VQA, a published set, as a LLaVA folder: somebody else's images, questions and split.

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

from training.bar import Bar
from training.demo.folder import LlavaFolder, Record, more_questions, record, unseen, write_folder
from training.settings import ConfigError

KINDS = ("colour", "shape", "yesno", "negated")
CAPTION_QUESTION = "describe the image"


def load_package() -> ModuleType:
    """Import ``easy_vqa``; raises `ConfigError` saying how to install it."""
    try:
        import easy_vqa  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "data: got 'easy-vqa', which is not installed: pip install --no-deps easy-vqa==1.0"
        ) from error
    return easy_vqa


def question_kind(question: str) -> str:
    """The kind of a question, by its words.

    Raises:
        ValueError: it is no question of easy-VQA.
    """
    words = question.rstrip("?").split()
    if words[:1] == ["what"]:
        # "what is the color of the shape" asks for a colour, "what is the blue shape" for a shape
        return "colour" if "color" in words else "shape"
    if words[:1] in (["is"], ["does"]):
        return "negated" if {"not", "no"} & set(words) else "yesno"
    raise ValueError(f"question: got {question!r}, expected one that begins what, is or does")


def write_easy_vqa(
    out_dir: str | Path,
    *,
    student_n: int = 1_000,
    per_image: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> LlavaFolder:
    """Write easy-VQA as a LLaVA folder (`training.demo.folder`), or reuse the one there.

    Args:
        out_dir: the folder to write.
        student_n: training questions that the student may see, drawn at random.
        per_image: unanswered questions about each image of the student's.
        seed: of that draw.
        progress: show a bar.

    Raises:
        ConfigError: the package is not installed.
        ValueError: student_n is not in 1 to the number of training questions.
        FileExistsError: ``out_dir`` was made with other settings.
    """
    package = load_package()

    def fill(root: Path) -> dict[str, Sequence[Record]]:
        paths = {"train": package.get_train_image_paths(), "test": package.get_test_image_paths()}
        with Bar("copying images", sum(map(len, paths.values())), "images", show=progress) as bar:
            for split, images in paths.items():
                _copy(root, split, images, bar)
        train = _questions("train", *package.get_train_questions())
        if not 1 <= student_n <= len(train):
            raise ValueError(f"student_n: got {student_n}, expected 1 to {len(train)}")
        drawn = np.random.default_rng(seed).permutation(len(train))[:student_n]
        student = [train[i] for i in drawn]
        return {
            "pretrain": captions(train),
            "train": train,
            "student_pretrain": captions(student),
            "student_train": student,
            "student_questions": more_questions(student, per_image, seed),
            "dev": unseen(train, student),
            "test": _questions("test", *package.get_test_questions()),
        }

    settings = {"data": "easy-vqa 1.0", "student_n": student_n, "per_image": per_image}
    settings |= {"seed": seed}
    return write_folder(out_dir, settings, fill)


def captions(entries: Iterable[Record]) -> list[Record]:
    """One caption an image, colour first, of what ``entries`` answer about it."""
    known: dict[str, dict[str, str]] = {}
    for entry in entries:
        if entry["kind"] in ("colour", "shape"):
            answer = entry["conversations"][1]["value"]
            known.setdefault(entry["image"], {})[entry["kind"]] = answer
    return [
        record(f"{image}-caption", image, "caption", CAPTION_QUESTION, " ".join(words))
        for image, facts in known.items()
        if (words := [facts[kind] for kind in ("colour", "shape") if kind in facts])
    ]


def _questions(
    split: str, texts: Sequence[str], answers: Sequence[str], images: Sequence[int]
) -> list[Record]:
    return [
        record(f"{split}-{i}", f"images/{split}/{image}.png", question_kind(text), text, answer)
        for i, (text, answer, image) in enumerate(zip(texts, answers, images, strict=True))
    ]


def _copy(root: Path, split: str, images: dict[int, str], bar: Bar) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    for number, path in images.items():
        shutil.copyfile(path, folder / f"{number}.png")
        bar.advance()
