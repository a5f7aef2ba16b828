"""What can be made of the students' own labels without a teacher? New scenes of old photographs.

Whoever knows that a scene is four separate photographs, and what the questions are, can tell from
a student's own answers what is on some of them (all four of a caption, one of a `where`), cut those
out, lay them out anew and ask about them: as many true questions as one likes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.bar import Bar
from training.demo.folder import LlavaFolder
from training.demo.garments import CLASSES, PHOTO
from training.demo.scenes import CELL, GRID, POSITIONS, QUESTIONS_PER_SCENE, write_split


def write_recomposed(folder: LlavaFolder, out: Path, questions: int, seed: int = 0) -> None:
    """Write ``data.json`` and its images to ``out``, unless it is there.

    Args:
        folder: of scenes.
        out: the folder to write.
        questions: how many, two a scene.
        seed: of photos, kinds and questions.
    """
    if out.is_dir():
        return
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    photos, names = zip(*labelled_photos(folder), strict=True)
    source = np.stack(photos), np.array([CLASSES.index(name) for name in names])
    scenes = -(-questions // QUESTIONS_PER_SCENE)
    with Bar("recomposing scenes", scenes, "scenes") as bar:
        split = write_split(partial, "recomposed", source, scenes, (seed, 2), bar)
    (partial / "data.json").write_text(json.dumps(split.questions[:questions]), encoding="utf-8")
    partial.rename(out)


def labelled_photos(folder: LlavaFolder) -> Iterator[tuple[NDArray[np.uint8], str]]:
    """Photographs (28, 28) of the students' scenes, and what their own answers say is on them."""
    for entry in json.loads(folder.json("student_train").read_text(encoding="utf-8")):
        question, answer = (turn["value"] for turn in entry["conversations"])
        known = {}
        if entry["kind"] == "caption":
            known = dict(enumerate(answer.split()))
        elif entry["kind"] == "where":
            known = {i: answer for i, place in enumerate(POSITIONS) if question.endswith(place)}
        with Image.open(folder.root / entry["image"]) as image:
            scene = np.asarray(image.convert("L"))
        for cell, name in known.items():
            yield _cut_out(scene, cell), name


def _cut_out(scene: NDArray[np.uint8], cell: int) -> NDArray[np.uint8]:  # (64, 64) -> (28, 28)
    top, left = (CELL * at + (CELL - PHOTO) // 2 for at in divmod(cell, GRID))
    return scene[top : top + PHOTO, left : left + PHOTO]
