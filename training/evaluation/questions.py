"""What does a benchmark ask? Its own published files in, a list of `Question`s out.

    vqav2      v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json
    textvqa    TextVQA_0.5.1_val.json
    gqa        testdev_balanced_questions.json
    pope       coco_pope_random.json (one question a line)
    scienceqa  problems.json; only questions with an image
    llava      LLaVA json: the first turn of each entry, its answer word for word
    coco       captions_val2014.json; also NoCaps' file, which has the same form
    karpathy   dataset_coco.json, one split of it
    chair      instances_val2014.json, and captions_val2014.json

Files and fields are checked as they are read: a fault names the file, the entry, the field, what
came and what was expected. Every image is looked for before a model answers anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from training.data.records import (
    DataError,
    Place,
    fault,
    parse_json,
    read_samples,
    read_text,
    shown,
)
from training.data.sample import IMAGE_MARK

T = TypeVar("T")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FILE = "the benchmark's own json file"


@dataclass(frozen=True, slots=True)
class Files:
    """Where a benchmark lies."""

    questions: Path
    images: Path  # the folder that its image names start from
    annotations: Path | None = None  # VQAv2's answers, CHAIR's captions
    split: str | None = None  # of a file that has several
    synonyms: Path | None = None  # CHAIR's words for categories


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask; `answers` is empty where the file does not give them away."""

    id: int | str
    text: str  # the benchmark's words; empty for a caption
    images: tuple[Path, ...] = ()
    answers: tuple[str, ...] = ()
    kind: str = ""  # for a breakdown of the score


def read_vqav2(files: Files) -> list[Question]:
    """VQAv2's questions, with the ten answers of each if `annotations` is given."""
    top, file = _Entry.of(files.questions), files.annotations
    subset = top.take("data_subtype", str).replace("test-dev", "test")
    known: dict[int, tuple[tuple[str, ...], str]] = {}
    for one in () if file is None else _Entry.of(file).entries("annotations"):
        said = tuple(each.take("answer", str) for each in one.entries("answers"))
        known[one.take("question_id", int)] = said, one.take("answer_type", str)
    found = []
    for entry in top.entries("questions"):
        image = files.images / f"COCO_{subset}_{entry.take('image_id', int):012d}.jpg"
        number = entry.take("question_id", int)
        if file is not None and number not in known:
            raise fault(entry.place, "question_id", number, f"a question that {file} answers")
        said, kind = known.get(number, ((), ""))
        found.append(Question(number, entry.take("question", str), (image,), said, kind))
    return found


def read_textvqa(files: Files) -> list[Question]:
    """TextVQA's questions; the test split has no answers."""
    return [
        Question(
            entry.take("question_id", int),
            entry.take("question", str),
            (files.images / f"{entry.take('image_id', str)}.jpg",),
            entry.strings("answers") if "answers" in entry.values else (),
        )
        for entry in _Entry.of(files.questions).entries("data")
    ]


def read_gqa(files: Files) -> list[Question]:
    """GQA's questions, by their structural type where the file tells it."""
    return [
        Question(
            number,
            entry.take("question", str),
            (files.images / f"{entry.take('imageId', str)}.jpg",),
            (entry.take("answer", str),) if "answer" in entry.values else (),
            entry.inner("types").take("structural", str) if "types" in entry.values else "",
        )
        for number, entry in _Entry.of(files.questions).by_id()
    ]


def read_pope(files: Files) -> list[Question]:
    """POPE's yes-no questions about what is in a picture, one a line."""
    found = []
    for at, line in enumerate(read_text(files.questions, FILE).split("\n"), 1):
        if not line.strip():
            continue
        place = Place(files.questions, f"line {at}")
        entry = _Entry(place, parse_json(line, place), "line")
        if (label := entry.take("label", str)) not in ("yes", "no"):
            raise fault(place, "label", repr(label), "'yes' or 'no'")
        image, number = files.images / entry.take("image", str), entry.take("question_id", int)
        found.append(Question(number, entry.take("text", str), (image,), (label,)))
    return found


def read_scienceqa(files: Files) -> list[Question]:
    """ScienceQA-IMG: the questions of one split (default test) that have an image."""
    split = files.split or "test"
    found = []
    for number, entry in _Entry.of(files.questions).by_id():
        if entry.take("split", str) != split or entry.values.get("image") is None:
            continue
        image = files.images / split / number / entry.take("image", str)
        choices, right = entry.strings("choices"), entry.take("answer", int)
        if not 0 <= right < len(choices):
            raise fault(entry.place, "answer", right, f"the place of one of {len(choices)} choices")
        hint = entry.take("hint", str)
        lines = [f"Context: {hint}"] if hint else []
        lines.append(entry.take("question", str))
        lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        kind = entry.take("subject", str)
        found.append(Question(number, "\n".join(lines), (image,), (LETTERS[right],), kind))
    return found


def read_llava(files: Files) -> list[Question]:
    """The first turn of each entry of a LLaVA json file, images before the words."""
    found = []
    for sample in read_samples(files.questions):
        if isinstance(sample, DataError):
            raise sample
        asked, answer = sample.turns[0]
        if sample.system:
            expected = "no system message: none is asked with"
            raise fault(sample.place, "system", shown(sample.system), expected)
        images = tuple(files.images / image for image in sample.images)
        if asked.count(IMAGE_MARK) != len(images):
            expected = f"all {len(images)} images in the first turn"
            raise fault(sample.place, "conversations[0].value", repr(asked), expected)
        text = asked.replace(IMAGE_MARK, "").strip()
        found.append(Question(sample.id, text, images, (answer,), sample.kind or ""))
    return found


def read_coco(files: Files) -> list[Question]:
    """Images of a COCO caption file with what people wrote of each (NoCaps: the same form)."""
    top = _Entry.of(files.questions)
    captions = _captions(top) if "annotations" in top.values else {}
    found = []
    for entry in top.entries("images"):
        number = entry.take("id", int)
        if captions and number not in captions:
            raise fault(entry.place, "id", number, "an image that annotations describe")
        image = files.images / entry.take("file_name", str)
        found.append(Question(number, "", (image,), tuple(captions.get(number, ()))))
    return found


def read_karpathy(files: Files) -> list[Question]:
    """One split (default test) of Karpathy's division of COCO."""
    return [
        Question(
            entry.take("cocoid", int),
            "",
            (files.images / entry.take("filepath", str) / entry.take("filename", str),),
            tuple(one.take("raw", str) for one in entry.entries("sentences")),
        )
        for entry in _Entry.of(files.questions).entries("images")
        if entry.take("split", str) == (files.split or "test")
    ]


def read_categories(files: Files) -> dict[int, str]:
    """The names of the categories of a COCO file of instances."""
    entries = _Entry.of(files.questions).entries("categories")
    return {entry.take("id", int): entry.take("name", str) for entry in entries}


def read_chair(files: Files) -> list[Question]:
    """Images of a COCO file of instances; their answers are the names of what is there, and the
    captions of a second file.
    """
    top = _Entry.of(files.questions)
    names, there = read_categories(files), dict[int, dict[str, None]]()
    for entry in top.entries("annotations"):
        number = entry.take("category_id", int)
        if number not in names:
            raise fault(entry.place, "category_id", number, "one of the file's categories")
        there.setdefault(entry.take("image_id", int), {})[names[number]] = None
    said = {} if files.annotations is None else _captions(_Entry.of(files.annotations))
    found = []
    for entry in top.entries("images"):
        number = entry.take("id", int)
        if said and number not in said:
            raise fault(entry.place, "id", number, f"an image that {files.annotations} describes")
        texts = (*there.get(number, ()), *said.get(number, ())) or ("",)  # nothing there: known too
        found.append(Question(number, "", (files.images / entry.take("file_name", str),), texts))
    return found


def checked(questions: list[Question], files: Files) -> list[Question]:
    """The questions, if there are some, no two have one id, and every image is there.

    Raises:
        DataError: naming how many are at fault and the first of them.
    """
    place = Place(files.questions)
    if not questions:
        split = f" of split {files.split!r}" if files.split else ""
        raise fault(place, "file", f"no questions{split}", "at least one")
    seen: set[str] = set()
    for question in questions:
        if str(question.id) in seen:
            raise fault(place, "question_id", f"{question.id!r} twice", "each id once")
        seen.add(str(question.id))
    images = dict.fromkeys(image for question in questions for image in question.images)
    missing = [image for image in images if not image.is_file()]
    if missing:
        got = f"{len(missing)} of {len(images)} files missing, the first {missing[0]}"
        raise fault(place, "image", got, f"every image below {files.images}")
    return questions


Reader = Callable[[Files], list[Question]]


class _Entry:
    """A json object in a benchmark's file, and where it stands; fields are checked as they are
    taken."""

    def __init__(self, place: Place, values: Any, name: str = "entry") -> None:
        self.place, self.values = place, _expect(values, dict, name, place)

    @classmethod
    def of(cls, path: Path) -> _Entry:
        """The object that a file holds."""
        return cls(Place(path), parse_json(read_text(path, FILE), Place(path)), "file")

    def take(self, name: str, kind: type[T]) -> T:
        """The field of that name, which must be of that type."""
        if name not in self.values:
            got = f"nothing (there is {', '.join(list(self.values)[:8])})"
            raise fault(self.place, name, got, kind.__name__)
        return _expect(self.values[name], kind, name, self.place)

    def inner(self, name: str) -> _Entry:
        """The object in a field."""
        return _Entry(self.place, self.take(name, dict), name)

    def strings(self, name: str) -> tuple[str, ...]:
        """The texts in a list."""
        return tuple(_expect(one, str, name, self.place) for one in self.take(name, list))

    def entries(self, name: str) -> Iterator[_Entry]:
        """The objects in a list; those of the file itself are told apart by their places."""
        for i, entry in enumerate(self.take(name, list)):
            own = Place(self.place.path, f"{name}[{i}]")
            yield _Entry(self.place if self.place.where else own, entry)

    def by_id(self) -> Iterator[tuple[str, _Entry]]:
        """The objects in this one, with their names."""
        for number, entry in self.values.items():
            yield number, _Entry(Place(self.place.path, id=number), entry)


def _captions(top: _Entry) -> dict[int, list[str]]:
    """By image what people wrote of it."""
    found: dict[int, list[str]] = {}
    for entry in top.entries("annotations"):
        found.setdefault(entry.take("image_id", int), []).append(entry.take("caption", str))
    return found


def _expect(value: Any, kind: type[T], name: str, place: Place) -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise fault(place, name, f"{type(value).__name__} {value!r:.60}", kind.__name__)
    return value
