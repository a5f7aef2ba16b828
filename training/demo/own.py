"""A folder of one's own for `demo` and `study`: what has to be in it, and what stands for the rest?

    train.json             what the teacher learns from, and the tower: its entries of one image
    test.json              held out
    student_train.json     the few labels that students learn from; else `student_n` of train.json
    student_questions.json more about the students' images, for the teacher to answer; else what
                           train.json asks of these images and student_train.json does not answer
    dev.json               what settings are chosen by; else train.json's questions about other
                           images than the students'
    pretrain.json, student_pretrain.json
                           captions; without them no stage trains a projector alone

Only the first two must be there. All are LLaVA's json (`training.data.records`), with image paths
relative to the folder; ``kind``, a word beside an entry's ``conversations``, is what accuracies are
told apart by. The images stay where they are; the splits are written to the demo's own folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.data.dataset import present
from training.data.faults import Place, fault
from training.data.records import DataError
from training.data.rewrite import LlavaEntries
from training.data.sample import LLAVA, Sample
from training.data.sources import LlavaSource
from training.demo.config import MADE, DemoConfig
from training.demo.folder import SPLITS, Record, Source, images_of, unseen
from training.fingerprint import of_file
from training.settings import ConfigError

REQUIRED, QUESTIONS = ("train", "test"), "student_questions"


def own(demo: DemoConfig) -> Source:
    """The entries of the folder `demo.data`, described above.

    Raises:
        ConfigError: there is no such folder.
        DataError: a file or, when it is filled, an image is missing, an entry is faulty, or nothing
            can stand for a file that is not there.
    """
    folder = Path(demo.data)
    if not folder.is_dir():
        expected = f"{', '.join(MADE)} or a folder that is there"
        raise ConfigError(f"data: got {demo.data!r}, expected {expected}")
    every = {split: folder / f"{split}.json" for split in SPLITS}
    files = {split: path for split, path in every.items() if path.is_file()}
    for split in REQUIRED:
        if split not in files:
            raise _missing(every[split], " and ".join(f"{s}.json" for s in REQUIRED))

    def fill(_: Path) -> dict[str, list[Record]]:
        found = {split: _read(path) for split, path in files.items()}
        train = found["train"]
        if "student_train" not in found:
            found["student_train"] = _drawn(files["train"], train, demo.student_n)
        student = found["student_train"]
        for split, made, about in (
            (QUESTIONS, _asked_of(train, student), "more about the images of student_train.json"),
            ("dev", unseen(train, student), "about other images than student_train.json"),
        ):
            if not found.setdefault(split, made):
                raise _missing(every[split], f"it, or that train.json asks {about}")
        return found

    settings: Record = {"data": str(folder.resolve())}
    settings |= {path.name: of_file(path) for path in files.values()}
    if "student_train" not in files:
        settings["student_n"] = demo.student_n
    return Source(settings, fill)


def _missing(path: Path, expected: str) -> DataError:
    return fault(Place(path), "file", "no such file", expected)


def _read(path: Path) -> list[Record]:
    """The entries of a file, all sound and their images there; of questions for the teacher the
    last may be open."""
    source, faults = LlavaSource(path, path.parent), {}
    asked = path.stem == QUESTIONS
    entries = LlavaEntries(source).samples() if asked else source.samples()
    records = [_record(present(source, entry, faults)) for entry in entries]
    return [_open(record) for record in records] if asked else records


def _record(sample: Sample) -> Record:
    turns = [
        {"from": role, "value": text}
        for turn in sample.turns
        for role, text in zip(LLAVA.roles, turn, strict=True)
    ]
    named = {"kind": sample.kind, "system": sample.system}
    record = {"id": sample.id, "image": list(sample.images), "conversations": turns}
    return record | {name: value for name, value in named.items() if value is not None}


def _open(record: Record) -> Record:
    """Without its last answer; the teacher writes the others anew, too."""
    return record | {"conversations": record["conversations"][:-1]}


def _drawn(path: Path, train: Sequence[Record], student_n: int) -> list[Record]:
    if student_n >= len(train):
        got = f"{len(train)} entries, of which the students are to see student_n = {student_n}"
        expected = "more entries, a smaller student_n, or a student_train.json"
        raise fault(Place(path), "file", got, expected)
    return [train[i] for i in np.random.default_rng(0).permutation(len(train))[:student_n]]


def _asked_of(train: Sequence[Record], student: Sequence[Record]) -> list[Record]:
    """What `train` asks of the images of `student` alone, and that does not answer."""
    seen = {image for entry in student for image in images_of(entry)}
    known = {_question(entry) for entry in student}
    return [
        _open(entry)
        for entry in train
        if entry["image"] and seen.issuperset(entry["image"]) and _question(entry) not in known
    ]


def _question(entry: Record) -> tuple[str, ...]:
    return (*entry["image"], *(turn["value"] for turn in entry["conversations"][::2]))
