"""An ordinary LLaVA folder on disk, written whole or not at all.

    images/{train,test}/*.png
    pretrain.json  train.json                    for the teacher: captions; all training questions
    student_pretrain.json  student_train.json    the limited subset students learn from
    student_questions.json                       more questions about its images, unanswered
    test.json                                    held out; every entry has its "kind"
    dev.json                                     training questions about other images, to choose
                                                 settings by: the students have not seen them
    dataset.json                                 what the folder was made from

A split without entries has no file: data of one's own (`training.demo.own`) may have no captions.

``student_pretrain.json`` holds only what ``student_train.json`` says too, so that a student with a
captioning stage has seen no more labels than one without. ``student_questions.json`` asks, of each
of the students' images, what is asked of any of them, and was drawn without looking at a label; the
teacher has to answer. A folder is written under another name
and renamed when complete; asked for again with the same settings it is reused, with others refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data.records import IMAGE_MARK
from training.demo.words import collect_words

Record = dict[str, Any]
LABELLED = ("pretrain", "train", "student_pretrain", "student_train", "test")
SPLITS = (*LABELLED, "dev", "student_questions")


@dataclass(frozen=True)
class LlavaFolder:
    """Paths of a finished folder; image paths in its json files are relative to ``root``."""

    root: Path

    def json(self, split: str) -> Path:
        """The json file of one of `SPLITS`."""
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
        return self.root / f"{split}.json"

    def settings(self) -> Record:
        """What the folder was made from, with the number of entries of each split."""
        return json.loads((self.root / "dataset.json").read_text(encoding="utf-8"))

    def words(self) -> list[str]:
        """Every word of its questions and answers, held-out ones included (they are templates)."""
        files = (self.json(split) for split in (*LABELLED, "dev"))
        return collect_words(*(file for file in files if file.is_file()))


def record(name: str, image: str, kind: str, question: str, answer: str) -> Record:
    """One entry of LLaVA's json: an image, one question about it, its answer."""
    turns = [
        {"from": "human", "value": f"{IMAGE_MARK}\n{question}"},
        {"from": "gpt", "value": answer},
    ]
    return {"id": name, "image": image, "kind": kind, "conversations": turns}


def images_of(entry: Record) -> Sequence[str]:
    """The paths of an entry's images."""
    image = entry["image"]
    return [image] if isinstance(image, str) else image


def unseen(train: Sequence[Record], student: Sequence[Record], limit: int = 2_000) -> list[Record]:
    """The last training questions, at most `limit`, about images that the students do not see."""
    seen = {image for entry in student for image in images_of(entry)}
    return [entry for entry in train if (own := images_of(entry)) and seen.isdisjoint(own)][-limit:]


def more_questions(entries: Sequence[Record], per_image: int, seed: int) -> list[Record]:
    """`per_image` different questions about each image of `entries`, as entries without an answer.

    They are questions that `entries` ask of any image, every kind as often as every other: neither
    what an image shows nor an answer is looked at.
    """
    rng = np.random.default_rng(seed)
    texts: dict[str, list[str]] = {}
    for entry in entries:
        found = texts.setdefault(entry["kind"], [])
        if (text := entry["conversations"][0]["value"]) not in found:
            found.append(text)
    kinds, limit = sorted(texts), min(per_image, sum(map(len, texts.values())))
    asked = []
    for image in dict.fromkeys(entry["image"] for entry in entries):
        chosen: dict[str, str] = {}
        while len(chosen) < limit:
            kind = kinds[rng.integers(len(kinds))]
            chosen[texts[kind][rng.integers(len(texts[kind]))]] = kind
        for i, (text, kind) in enumerate(chosen.items()):
            question = {"from": "human", "value": text}
            name = f"{Path(image).stem}-{i}"
            asked.append({"id": name, "image": image, "kind": kind, "conversations": [question]})
    return asked


def write_folder(
    out_dir: str | Path,
    settings: Record,
    fill: Callable[[Path], Mapping[str, Sequence[Record]]],
) -> LlavaFolder:
    """Make (or reuse) the folder ``out_dir``.

    Args:
        out_dir: the folder to write.
        settings: what its contents depend on; json values only.
        fill: given an empty folder, writes the images there and returns the entries of each split.

    Raises:
        FileExistsError: ``out_dir`` exists and was not made with these settings.
    """
    out_dir = Path(out_dir)
    folder = LlavaFolder(out_dir)
    if out_dir.exists():
        _check_same(folder, settings)
        return folder
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    partial.mkdir(parents=True)
    splits = {split: entries for split, entries in fill(partial).items() if entries}
    for split, made in splits.items():
        _write_json(partial / f"{split}.json", list(made))
    entries = {split: len(made) for split, made in splits.items()}
    _write_json(partial / "dataset.json", {**settings, "entries": entries})
    partial.rename(out_dir)
    return folder


def _check_same(folder: LlavaFolder, settings: Record) -> None:
    way_out = "name another folder or remove this one"
    try:
        made = folder.settings()
    except (OSError, json.JSONDecodeError):
        raise FileExistsError(
            f"out_dir: {folder.root} exists and is not a finished data folder; {way_out}"
        ) from None
    wanted = json.loads(json.dumps(settings))
    different = {key for key in wanted.keys() | made.keys() if wanted.get(key) != made.get(key)}
    for key in sorted(different - {"entries"}):
        raise FileExistsError(
            f"out_dir: {folder.root} was made with {key} = {made.get(key)!r}, "
            f"expected {wanted.get(key)!r}; {way_out}"
        )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
