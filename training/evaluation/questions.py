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
    IMAGE_MARK,
    DataError,
    Place,
    fault,
    parse_json,
    read_samples,
    read_text,
    shown,
)

T = TypeVar("T")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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
    place, top = _object(files.questions)
    subset = _take(top, "data_subtype", str, place).replace("test-dev", "test")
    answers = {} if files.annotations is None else _vqav2_answers(files.annotations)
    found = []
    for at, entry in _entries(top, "questions", place):
        name = f"COCO_{subset}_{_take(entry, 'image_id', int, at):012d}.jpg"
        number = _take(entry, "question_id", int, at)
        if files.annotations is not None and number not in answers:
            expected = f"a question that {files.annotations} answers"
            raise fault(at, "question_id", number, expected)
        said, kind = answers.get(number, ((), ""))
        text = _take(entry, "question", str, at)
        found.append(Question(number, text, (files.images / name,), said, kind))
    return found


def read_textvqa(files: Files) -> list[Question]:
    """TextVQA's questions; the test split has no answers."""
    place, top = _object(files.questions)
    found = []
    for at, entry in _entries(top, "data", place):
        number = _take(entry, "question_id", int, at)
        image = files.images / f"{_take(entry, 'image_id', str, at)}.jpg"
        answers = tuple(_strings(entry, "answers", at)) if "answers" in entry else ()
        found.append(Question(number, _take(entry, "question", str, at), (image,), answers))
    return found


def read_gqa(files: Files) -> list[Question]:
    """GQA's questions, by their structural type where the file tells it."""
    place, top = _object(files.questions)
    found = []
    for number, entry in top.items():
        at = Place(place.path, id=number)
        _expect(entry, dict, "question", at)
        image = files.images / f"{_take(entry, 'imageId', str, at)}.jpg"
        answers = (_take(entry, "answer", str, at),) if "answer" in entry else ()
        kind = _take(entry["types"], "structural", str, at) if "types" in entry else ""
        text = _take(entry, "question", str, at)
        found.append(Question(number, text, (image,), answers, kind))
    return found


def read_pope(files: Files) -> list[Question]:
    """POPE's yes-no questions about what is in a picture."""
    found = []
    for at, entry in _lines(files.questions):
        label = _take(entry, "label", str, at)
        if label not in ("yes", "no"):
            raise fault(at, "label", repr(label), "'yes' or 'no'")
        image = files.images / _take(entry, "image", str, at)
        number = _take(entry, "question_id", int, at)
        found.append(Question(number, _take(entry, "text", str, at), (image,), (label,)))
    return found


def read_scienceqa(files: Files) -> list[Question]:
    """ScienceQA-IMG: the questions of one split (default test) that have an image."""
    split = files.split or "test"
    place, top = _object(files.questions)
    found = []
    for number, entry in top.items():
        at = Place(place.path, id=number)
        _expect(entry, dict, "problem", at)
        if _take(entry, "split", str, at) != split or entry.get("image") is None:
            continue
        image = files.images / split / number / _take(entry, "image", str, at)
        choices = _strings(entry, "choices", at)
        right = _take(entry, "answer", int, at)
        if not 0 <= right < len(choices):
            raise fault(at, "answer", right, f"the place of one of {len(choices)} choices")
        hint = _take(entry, "hint", str, at)
        lines = [f"Context: {hint}"] if hint else []
        lines.append(_take(entry, "question", str, at))
        lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        kind = _take(entry, "subject", str, at)
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
            raise fault(
                sample.place,
                "system",
                shown(sample.system),
                "no system message: none is asked with",
            )
        images = tuple(files.images / image for image in sample.images)
        if asked.count(IMAGE_MARK) != len(images):
            expected = f"all {len(images)} images in the first turn"
            raise fault(sample.place, "conversations[0].value", repr(asked), expected)
        text = asked.replace(IMAGE_MARK, "").strip()
        found.append(Question(sample.id, text, images, (answer,), sample.kind or ""))
    return found


def read_coco(files: Files) -> list[Question]:
    """Images of a COCO caption file with what people wrote of each (NoCaps: the same form)."""
    place, top = _object(files.questions)
    captions = _captions(top, place) if "annotations" in top else {}
    found = []
    for at, entry in _entries(top, "images", place):
        number = _take(entry, "id", int, at)
        if captions and number not in captions:
            raise fault(at, "id", number, "an image that annotations describe")
        image = files.images / _take(entry, "file_name", str, at)
        found.append(Question(number, "", (image,), tuple(captions.get(number, ()))))
    return found


def read_karpathy(files: Files) -> list[Question]:
    """One split (default test) of Karpathy's division of COCO."""
    split = files.split or "test"
    place, top = _object(files.questions)
    found = []
    for at, entry in _entries(top, "images", place):
        if _take(entry, "split", str, at) != split:
            continue
        image = files.images / _take(entry, "filepath", str, at) / _take(entry, "filename", str, at)
        said = [_take(one, "raw", str, at) for one in _take(entry, "sentences", list, at)]
        found.append(Question(_take(entry, "cocoid", int, at), "", (image,), tuple(said)))
    return found


def read_categories(files: Files) -> dict[int, str]:
    """The names of the categories of a COCO file of instances."""
    place, top = _object(files.questions)
    return {
        _take(entry, "id", int, at): _take(entry, "name", str, at)
        for at, entry in _entries(top, "categories", place)
    }


def read_chair(files: Files) -> list[Question]:
    """Images of a COCO file of instances; their answers are the names of what is there, and the
    captions of a second file.
    """
    place, top = _object(files.questions)
    names, there = read_categories(files), dict[int, dict[str, None]]()
    for at, entry in _entries(top, "annotations", place):
        number = _take(entry, "category_id", int, at)
        if number not in names:
            raise fault(at, "category_id", number, "one of the file's categories")
        there.setdefault(_take(entry, "image_id", int, at), {})[names[number]] = None
    said = {} if files.annotations is None else _captions(*reversed(_object(files.annotations)))
    found = []
    for at, entry in _entries(top, "images", place):
        number = _take(entry, "id", int, at)
        if said and number not in said:
            raise fault(at, "id", number, f"an image that {files.annotations} describes")
        image = files.images / _take(entry, "file_name", str, at)
        texts = (*there.get(number, ()), *said.get(number, ()))
        found.append(Question(number, "", (image,), texts or ("",)))  # nothing is there: known too
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


def _vqav2_answers(path: Path) -> dict[int, tuple[tuple[str, ...], str]]:
    place, top = _object(path)
    found = {}
    for at, entry in _entries(top, "annotations", place):
        answers = [_take(one, "answer", str, at) for one in _take(entry, "answers", list, at)]
        kind = _take(entry, "answer_type", str, at)
        found[_take(entry, "question_id", int, at)] = tuple(answers), kind
    return found


def _captions(top: dict[str, Any], place: Place) -> dict[int, list[str]]:
    """By image what people wrote of it."""
    found: dict[int, list[str]] = {}
    for at, entry in _entries(top, "annotations", place):
        image = _take(entry, "image_id", int, at)
        found.setdefault(image, []).append(_take(entry, "caption", str, at))
    return found


def _object(path: Path) -> tuple[Place, dict[str, Any]]:
    """The json object in a file."""
    place = Place(path)
    return place, _expect(parse_json(_text(path), place), dict, "file", place)


def _lines(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            place = Place(path, f"line {number}")
            yield place, _expect(parse_json(line, place), dict, "line", place)


def _text(path: Path) -> str:
    if not path.is_file():
        raise fault(Place(path), "file", "no such file", "the benchmark's own json file")
    return read_text(path)


def _entries(top: dict[str, Any], name: str, place: Place) -> Iterator[tuple[Place, Any]]:
    for index, entry in enumerate(_take(top, name, list, place)):
        at = Place(place.path, f"{name}[{index}]")
        yield at, _expect(entry, dict, "entry", at)


def _strings(entry: dict[str, Any], name: str, place: Place) -> list[str]:
    return [_expect(one, str, name, place) for one in _take(entry, name, list, place)]


def _take(entry: Any, name: str, kind: type[T], place: Place) -> T:
    """The field of that name, which must be of that type."""
    if not isinstance(entry, dict) or name not in entry:
        have = ", ".join(list(entry)[:8]) if isinstance(entry, dict) else type(entry).__name__
        raise fault(place, name, f"nothing (there is {have})", kind.__name__)
    return _expect(entry[name], kind, name, place)


def _expect(value: Any, kind: type[T], name: str, place: Place) -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise fault(place, name, f"{type(value).__name__} {value!r:.60}", kind.__name__)
    return value
