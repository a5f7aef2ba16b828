"""What can be made of the students' own labels without a teacher? New scenes of old photographs.

Whoever knows that a scene is four separate photographs, and what the questions are, can tell from
a student's own answers what is on some of them (all four of a caption, one of a `where`), cut those
out, lay them out anew and ask about them: as many true questions as one likes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.demo.config import DemoConfig
from training.demo.folder import Record, Source
from training.demo.garments import CLASSES, PHOTO
from training.demo.scenes import CELL, GRID, POSITIONS, write_split


def recomposed(demo: DemoConfig, questions: int) -> Source:
    """So many questions, as the split `data`."""

    def fill(root: Path) -> dict[str, list[Record]]:
        photos, names = zip(*labelled_photos(demo), strict=True)
        source = np.stack(photos), np.array([CLASSES.index(name) for name in names])
        return {"data": write_split(root, "recomposed", source, questions, 2).questions[:questions]}

    return Source({"data": "recomposed scenes", "questions": questions, "seed": 0}, fill)


def labelled_photos(demo: DemoConfig) -> Iterator[tuple[NDArray[np.uint8], str]]:
    """Photographs (28, 28) of the students' scenes, and what their own answers say is on them."""
    for entry in json.loads(demo.split("student_train").read_text(encoding="utf-8")):
        question, answer = (turn["value"] for turn in entry["conversations"])
        known = {}
        if entry["kind"] == "caption":
            known = dict(enumerate(answer.split()))
        elif entry["kind"] == "where":
            known = {i: answer for i, place in enumerate(POSITIONS) if question.endswith(place)}
        with Image.open(demo.images / entry["image"]) as image:
            scene = np.asarray(image.convert("L"))
        for cell, name in known.items():
            yield _cut_out(scene, cell), name


def _cut_out(scene: NDArray[np.uint8], cell: int) -> NDArray[np.uint8]:  # (64, 64) -> (28, 28)
    top, left = (CELL * at + (CELL - PHOTO) // 2 for at in divmod(cell, GRID))
    return scene[top : top + PHOTO, left : left + PHOTO]
