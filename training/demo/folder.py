"""What does a finished data folder hold? LLaVA's json and images, written whole or not at all.

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
teacher has to answer. A folder is written under another name and renamed when complete; asked for
again with the same settings it is reused, with others refused.

Each kind of data (scenes, easy-vqa, a folder of one's own) is a function of the demo's
configuration that gives a `Source`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.data.sample import IMAGE_MARK

Record = dict[str, Any]
LABELLED = ("pretrain", "train", "student_pretrain", "student_train", "test")
SPLITS = (*LABELLED, "dev", "student_questions")


class Source(NamedTuple):
    """Where the entries of a folder come from.

    Attributes:
        settings: what they depend on; json values only.
        fill: given an empty folder, writes the images there and returns the entries by split.
    """

    settings: Record
    fill: Callable[[Path], Mapping[str, Sequence[Record]]]


def write_folder(out: Path, source: Source) -> None:
    """Make the folder `out`, or reuse it.

    Raises:
        FileExistsError: it is there and was not made with these settings.
    """
    if out.exists():
        _check_same(out, source.settings)
        return
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    partial.mkdir(parents=True)
    splits = {split: list(made) for split, made in source.fill(partial).items() if made}
    counts = {split: len(made) for split, made in splits.items()}
    for name, content in {**splits, "dataset": {**source.settings, "entries": counts}}.items():
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (partial / f"{name}.json").write_text(text, encoding="utf-8")
    partial.rename(out)


def _check_same(out: Path, settings: Record) -> None:
    way_out = "name another folder or remove this one"
    try:
        made = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        raise FileExistsError(
            f"out: {out} exists and is not a finished data folder; {way_out}"
        ) from None
    for key in sorted((settings.keys() | made.keys()) - {"entries"}):
        if settings.get(key) != made.get(key):
            raise FileExistsError(
                f"out: {out} was made with {key} = {made.get(key)!r}, "
                f"expected {settings.get(key)!r}; {way_out}"
            )


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


def more_questions(entries: Sequence[Record], per_image: int, seed: int = 0) -> list[Record]:
    """`per_image` different questions about each image of `entries`, as entries without an answer.

    They are questions that `entries` ask of any image, every kind as often as every other: neither
    what an image shows nor an answer is looked at.
    """
    rng = np.random.default_rng(seed)
    texts: dict[str, dict[str, None]] = {}
    for entry in entries:
        texts.setdefault(entry["kind"], {})[entry["conversations"][0]["value"]] = None
    kinds, limit = sorted(texts), min(per_image, sum(map(len, texts.values())))
    choices = {kind: list(asked) for kind, asked in texts.items()}
    made = []
    for image in dict.fromkeys(entry["image"] for entry in entries):
        chosen: dict[str, str] = {}
        while len(chosen) < limit:
            kind = kinds[rng.integers(len(kinds))]
            chosen[choices[kind][rng.integers(len(choices[kind]))]] = kind
        for i, (text, kind) in enumerate(chosen.items()):
            question = {"from": "human", "value": text}
            name = f"{Path(image).stem}-{i}"
            made.append({"id": name, "image": image, "kind": kind, "conversations": [question]})
    return made
