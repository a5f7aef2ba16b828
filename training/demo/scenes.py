"""What is asked about real garment photographs, four to a picture?

A scene is a 64×64 RGB canvas of 2×2 cells, a 28×28 photo in the middle of each 32×32 cell. The
language is templated, as in CLEVR; the photographs and labels are real (`training.demo.garments`)
and ambiguous (shirt, t-shirt, pullover, coat), which is why a teacher has something to pass on.

    where     what is at the top left      one of ten garments
    count     how many bag                 0 to 4
    exist     is there any dress           yes and no in turn, so half of each
    caption   describe the image           four garments in reading order

30% of the questions are captions, the rest the other kinds in equal parts. Training scenes use
training photos only and held-out scenes test photos only, each photo about equally often. Scene n
of a split is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from training.bar import track
from training.demo.config import DemoConfig
from training.demo.folder import Record, Source, more_questions, record, unseen
from training.demo.garments import CLASSES, PHOTO, photo_arrays
from training.settings import ConfigError

CELL, CANVAS, GRID = 32, 64, 2
CELLS = GRID * GRID
POSITIONS = ("top left", "top right", "bottom left", "bottom right")  # reading order
KINDS = ("where", "count", "exist", "caption")
CAPTION_SHARE = 0.3
QUESTIONS_PER_SCENE = 2
PRESENT_SHARE = 0.5  # of `count` questions that name a garment in the scene; else most are "0"


class Question(NamedTuple):
    """A question about one scene and its answer."""

    kind: str
    text: str
    answer: str


class Split(NamedTuple):
    """The entries of one split: its questions in scene order, a caption a scene."""

    questions: list[Record]
    captions: list[Record]


def scenes(demo: DemoConfig) -> Source:
    """Two questions share a scene; pretrain.json has one caption of every training scene. The
    student's examples are the first question of `student_n` training scenes, so that each shows
    four photos of its own.

    Raises:
        ConfigError: the student is to see more scenes than there are.
        GarmentError: when it is filled: the photographs cannot be had.
    """
    most = demo.train_n // QUESTIONS_PER_SCENE
    if demo.student_n > most:
        raise ConfigError(f"student_n: got {demo.student_n}, expected up to train_n / 2 = {most}")

    def fill(root: Path) -> dict[str, Sequence[Record]]:
        photos = photo_arrays(demo.garments)
        train = write_split(root, "train", photos[:2], demo.train_n, 0)
        student = train.questions[::QUESTIONS_PER_SCENE][: demo.student_n]
        return {
            "pretrain": train.captions,
            "train": train.questions,
            "student_pretrain": [entry for entry in student if entry["kind"] == "caption"],
            "student_train": student,
            "student_questions": more_questions(student, demo.per_image),
            "dev": unseen(train.questions, student),
            "test": write_split(root, "test", photos[2:], demo.test_n, 1).questions,
        }

    sizes = {name: getattr(demo, name) for name in ("train_n", "test_n", "student_n", "per_image")}
    return Source({"data": "garment scenes", **sizes, "seed": 0}, fill)


def write_split(
    root: Path,
    name: str,
    photos: tuple[NDArray[np.uint8], NDArray[np.uint8]],  # (P, 28, 28), labels (P,)
    questions: int,
    stream: int,
) -> Split:
    """Write the scenes of so many questions below ``root/images/name``.

    Args:
        root, name, photos, questions: of the split.
        stream: of random numbers: photos, kinds and questions.
    """
    images, labels = photos
    scenes = -(-questions // QUESTIONS_PER_SCENE)
    rng = np.random.default_rng((0, stream))
    deals = -(-scenes * CELLS // len(labels))  # whole shuffled decks, so that use is even
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(deals)])
    split, yes = Split([], []), True
    (root / "images" / name).mkdir(parents=True)
    for n in track(range(scenes), f"writing {name} scenes", "scenes"):
        chosen = order[n * CELLS : (n + 1) * CELLS]
        image = f"images/{name}/{n:06d}.png"
        _write_png(root / image, canvases(images[chosen][None])[0])
        names = [CLASSES[label] for label in labels[chosen]]
        for i, kind in enumerate(_kinds(rng)):
            question = ask(names, kind, rng, yes=yes)
            yes ^= kind == "exist"
            split.questions.append(record(f"{name}-{n}-{i}", image, *question))
        caption = ask(names, "caption", rng)
        split.captions.append(record(f"{name}-{n}-caption", image, *caption))
    return split


def canvases(
    photos: NDArray[np.uint8],  # (M, 4, 28, 28)
) -> NDArray[np.uint8]:
    """Lay M × 4 photos out as M grey scenes (M, 64, 64), in reading order on black."""
    margin = (CELL - PHOTO) // 2
    cells = np.pad(photos, [(0, 0), (0, 0), (margin, margin), (margin, margin)])
    grid = cells.reshape(-1, GRID, GRID, CELL, CELL).transpose(0, 1, 3, 2, 4)
    return grid.reshape(-1, CANVAS, CANVAS)


def ask(names: Sequence[str], kind: str, rng: Generator, *, yes: bool = True) -> Question:
    """A question of one of `KINDS` about a scene whose four garments, in reading order, are
    ``names``.

    ``yes`` is the answer an ``exist`` question is to have; the other kinds do not look at it.
    """
    present = sorted(set(names))
    if kind == "caption":
        return Question(kind, "describe the image", " ".join(names))
    if kind == "where":
        cell = int(rng.integers(CELLS))
        return Question(kind, f"what is at the {POSITIONS[cell]}", names[cell])
    if kind == "exist":
        absent = [name for name in CLASSES if name not in names]
        garment = _one_of(present if yes else absent, rng)
        return Question(kind, f"is there any {garment}", "yes" if yes else "no")
    garment = _one_of(present if rng.random() < PRESENT_SHARE else CLASSES, rng)
    return Question("count", f"how many {garment}", str(names.count(garment)))


def _kinds(rng: Generator) -> list[str]:
    """Two different kinds for a scene; over many, CAPTION_SHARE captions and the rest even."""
    kinds = list(rng.permutation(KINDS[:-1])[:QUESTIONS_PER_SCENE])
    if rng.random() < QUESTIONS_PER_SCENE * CAPTION_SHARE:
        kinds[rng.integers(QUESTIONS_PER_SCENE)] = "caption"
    return [str(kind) for kind in kinds]


def _one_of(names: Sequence[str], rng: Generator) -> str:
    return names[int(rng.integers(len(names)))]


def _write_png(path: Path, canvas: NDArray[np.uint8]) -> None:
    """Grey as RGB; compression 1, because twenty thousand files should take seconds."""
    Image.fromarray(canvas).convert("RGB").save(path, compress_level=1)
