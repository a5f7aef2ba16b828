"""Real garment photographs, four to a picture, with questions made from their labels.

A scene is a 64×64 RGB canvas of 2×2 cells, a 28×28 photo in the middle of each 32×32 cell. The
language is templated, as in CLEVR; the photographs and labels are real (`training.demo.garments`)
and ambiguous (shirt, t-shirt, pullover, coat), which is why a teacher has something to pass on.

    where     what is at the top left      one of ten garments
    count     how many bag                 0 to 4
    exist     is there any dress           yes and no in turn, so half of each
    caption   describe the image           four garments in reading order

30% of the questions are captions, the rest the other kinds in equal parts. Training scenes use
training photos only and held-out scenes test photos only, each photo about equally often. Scene n
of a split with seed s is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from training.bar import Bar
from training.demo.folder import (
    LlavaFolder,
    Record,
    more_questions,
    record,
    unseen,
    write_folder,
)
from training.demo.garments import CLASSES, PHOTO, Photos, photo_arrays

CELL, CANVAS, GRID = 32, 64, 2
CELLS = GRID * GRID
POSITIONS = ("top left", "top right", "bottom left", "bottom right")  # reading order
KINDS = ("where", "count", "exist", "caption")
CAPTION_QUESTION = "describe the image"
CAPTION_SHARE = 0.3
QUESTIONS_PER_SCENE = 2
PRESENT_SHARE = 0.5  # of `count` questions that name a garment in the scene; else most are "0"


class Question(NamedTuple):
    """A question about one scene and its answer."""

    kind: str
    text: str
    answer: str


def canvases(
    photos: NDArray[np.uint8],  # (M, 4, 28, 28)
) -> NDArray[np.uint8]:
    """Lay M × 4 photos out as M grey scenes (M, 64, 64), in reading order on black."""
    margin = (CELL - PHOTO) // 2
    cells = np.pad(photos, [(0, 0), (0, 0), (margin, margin), (margin, margin)])
    grid = cells.reshape(-1, GRID, GRID, CELL, CELL).transpose(0, 1, 3, 2, 4)
    return grid.reshape(-1, CANVAS, CANVAS)


def ask(names: Sequence[str], kind: str, rng: Generator, *, yes: bool = True) -> Question:
    """A question of one kind about a scene whose four garments, in reading order, are ``names``.

    ``yes`` is the answer an ``exist`` question is to have; the other kinds do not look at it.
    """
    present = sorted(set(names))
    absent = [name for name in CLASSES if name not in names]
    if kind == "caption":
        return Question(kind, CAPTION_QUESTION, " ".join(names))
    if kind == "where":
        cell = int(rng.integers(CELLS))
        return Question(kind, f"what is at the {POSITIONS[cell]}", names[cell])
    if kind == "exist":
        garment = _one_of(present if yes else absent, rng)
        return Question(kind, f"is there any {garment}", "yes" if yes else "no")
    if kind == "count":
        garment = _one_of(present if rng.random() < PRESENT_SHARE else CLASSES, rng)
        return Question(kind, f"how many {garment}", str(names.count(garment)))
    raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")


def write_scenes(
    out_dir: str | Path,
    *,
    train_n: int = 40_000,
    test_n: int = 4_000,
    student_n: int = 1_000,
    per_image: int = 8,
    seed: int = 0,
    progress: bool = True,
    photos: Photos | None = None,
    garments: str | Path | None = None,
) -> LlavaFolder:
    """Write scenes and questions as a LLaVA folder, or reuse the one there.

    Two questions share a scene; pretrain.json has one caption of every training scene. The
    student's examples are the first question of ``student_n`` training scenes, so that each shows
    four photos of its own.

    Args:
        out_dir: the folder to write.
        train_n: training questions; even.
        test_n: held-out questions; even.
        student_n: training questions that the student may see; at most one a scene.
        per_image: unanswered questions about each image of the student's.
        seed: of photos, kinds and questions.
        progress: show a bar.
        photos: the photographs, if they are at hand.
        garments: otherwise, the folder to read them from (see `photo_arrays`).

    Raises:
        ValueError: a size that cannot be had.
        FileExistsError: ``out_dir`` was made with other settings.
        GarmentError: the photographs cannot be had.
    """
    for name, value in (("train_n", train_n), ("test_n", test_n)):
        if value < QUESTIONS_PER_SCENE or value % QUESTIONS_PER_SCENE:
            expected = f"a positive multiple of {QUESTIONS_PER_SCENE} (questions to a scene)"
            raise ValueError(f"{name}: got {value}, expected {expected}")
    if not 1 <= student_n <= train_n // QUESTIONS_PER_SCENE:
        raise ValueError(f"student_n: got {student_n}, expected 1 to train_n / 2 = {train_n // 2}")
    sizes = {"train_n": train_n, "test_n": test_n, "student_n": student_n}
    sizes |= {"per_image": per_image, "seed": seed}

    def fill(root: Path) -> dict[str, Sequence[Record]]:
        source = photo_arrays(garments) if photos is None else photos
        train_scenes, test_scenes = train_n // QUESTIONS_PER_SCENE, test_n // QUESTIONS_PER_SCENE
        with Bar("writing scenes", train_scenes + test_scenes, "scenes", show=progress) as bar:
            train = write_split(root, "train", source[:2], train_scenes, (seed, 0), bar)
            test = write_split(root, "test", source[2:], test_scenes, (seed, 1), bar)
        student = train.questions[::QUESTIONS_PER_SCENE][:student_n]
        return {
            "pretrain": train.captions,
            "train": train.questions,
            "student_pretrain": [entry for entry in student if entry["kind"] == "caption"],
            "student_train": student,
            "student_questions": more_questions(student, per_image, seed),
            "dev": unseen(train.questions, student),
            "test": test.questions,
        }

    return write_folder(out_dir, {"data": "garment scenes", **sizes}, fill)


class Split(NamedTuple):
    """The entries of one split: its questions in scene order, a caption a scene."""

    questions: list[Record]
    captions: list[Record]


def write_split(
    root: Path,
    name: str,
    source: tuple[NDArray[np.uint8], NDArray[np.uint8]],  # (P, 28, 28), (P,)
    scenes: int,
    seed: tuple[int, int],
    bar: Bar,
) -> Split:
    """Write that many scenes of these photos, below ``root/images/name``."""
    images, labels = source
    rng = np.random.default_rng(seed)
    deals = -(-scenes * CELLS // len(labels))  # whole shuffled decks, so that use is even
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(deals)])
    split, yes = Split([], []), True
    (root / "images" / name).mkdir(parents=True)
    for n, chosen in enumerate(order[: scenes * CELLS].reshape(scenes, CELLS)):
        image = f"images/{name}/{n:06d}.png"
        _write_png(root / image, canvases(images[chosen][None])[0])
        names = [CLASSES[label] for label in labels[chosen]]
        for i, kind in enumerate(_kinds(rng)):
            question = ask(names, kind, rng, yes=yes)
            yes ^= kind == "exist"
            split.questions.append(record(f"{name}-{n}-{i}", image, *question))
        caption = ask(names, "caption", rng)
        split.captions.append(record(f"{name}-{n}-caption", image, *caption))
        bar.advance()
    return split


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
