"""What is in a LLaVA json file, and is every entry well formed?

LLaVA's format is a list (``.json``) or one object per line (``.jsonl``) of::

    {"id": "a17", "image": "images/a17.png",                    # str, [str, ...], or left out
     "conversations": [{"from": "human", "value": "<image>\\nwhat is it"},
                       {"from": "gpt", "value": "a coat"}, ...]}

An entry becomes a `Sample` or a `DataError` that names file, place, id, field, what came and what
was expected. Nothing is repaired: a trainer that guesses at malformed data trains on something
nobody wrote. Keys that LLaVA does not define are ignored, except ``kind`` (a label for reports).
Images are only named here; `training.data.dataset` opens them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_MARK = "<image>"  # LLaVA's mark for "an image goes here", whatever the tokenizer calls it
ROLES = ("human", "gpt")


class DataError(ValueError):
    """A fault in training data; built by `fault`, which words every message the same way.

    Takes one string so that a data-loader worker can hand it to the parent process unchanged.
    """

    id: str | None = None  # the faulty entry's id, where it has one


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry stands: file, ``index 3`` or ``line 4``, its id when it has one."""

    path: Path
    where: str = ""
    id: str | None = None

    def __str__(self) -> str:
        name = f" (id {short(repr(self.id))})" if self.id is not None else ""
        return f"{self.path}{', ' if self.where else ''}{self.where}{name}"


def fault(place: Place, field: str, got: object, expected: str) -> DataError:
    """The one wording of a data fault: place, field, what came (cut if long), what was expected."""
    got = short(str(got), 400)
    text = f"{place}: field {field!r}: got {got}, expected {expected}"
    error = DataError(text.encode("utf-8", "backslashreplace").decode())  # can be printed anywhere
    error.id = place.id
    return error


@contextmanager
def named(place: Place, field: str, expected: str, what: str = "") -> Iterator[None]:
    """Whatever a library or the system raises within, as the `DataError` of a sample.

    The one place where errors on a sample's way are turned into faults; a `StopIteration` too,
    which a data loader would take for the end of the data. `what` came before the error's words.
    """
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        got = f"{short(what)}: " if what else ""
        got += f"{type(error).__name__}: {short(str(error))}"
        raise fault(place, field, got, expected) from error


@dataclass(frozen=True, slots=True)
class Sample:
    """One validated entry: image paths as written, and (human, gpt) turns in order.

    ``system`` is a system message of its own; ``ordered`` says that images stay where they are in
    a turn, where LLaVA would put a turn's only image first.
    """

    place: Place
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    kind: str | None = None
    system: str | None = None
    ordered: bool = False

    @property
    def id(self) -> str:
        """The entry's id, or its place in the file when it has none."""
        return self.place.id if self.place.id is not None else self.place.where


def read_samples(path: str | Path) -> Iterator[Sample | DataError]:
    """Yield each entry of a LLaVA file in order, a faulty one as its (unraised) `DataError`.

    Raises:
        DataError: the file is missing, is neither .json nor .jsonl, is not text, is not json
            (``.json`` only: there a syntax error leaves no entries to skip) or holds no entries.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise fault(Place(path), "file name", repr(path.suffix), "a .json or .jsonl file")
    if not path.is_file():
        raise fault(Place(path), "file", "no such file", "a LLaVA json file")
    empty = True
    for entry in _read_lines(path) if path.suffix == ".jsonl" else _read_list(path):
        empty = False
        yield entry if isinstance(entry, DataError) else _checked(*entry)
    if empty:
        raise fault(Place(path), "file", "no entries", "at least one entry")


def _read_list(path: Path) -> Iterator[tuple[Place, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise fault(Place(path), "file", str(error), "UTF-8 text") from None
    except json.JSONDecodeError as error:
        place = Place(path, f"line {error.lineno} column {error.colno}")
        raise fault(place, "json", error.msg, "valid json (is the file cut short?)") from None
    if not isinstance(entries, list):
        raise fault(Place(path), "file", shown(entries), "a list of entries")
    for index, raw in enumerate(entries):
        yield Place(path, f"index {index}"), raw


def _read_lines(path: Path) -> Iterator[tuple[Place, Any] | DataError]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = Place(path, f"line {number}")
            try:
                yield place, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield fault(place, "json", str(error), "UTF-8 text")
            except json.JSONDecodeError as error:
                got = f"{error.msg} at column {error.colno}"
                yield fault(place, "json", got, "one valid json object on the line")


def _checked(place: Place, raw: Any) -> Sample | DataError:
    try:
        return parse_sample(place, raw)
    except DataError as error:
        return error


def parse_sample(place: Place, raw: Any) -> Sample:
    """Validate one decoded entry; raises `DataError` at its first fault."""
    if not isinstance(raw, dict):
        raise fault(place, "entry", shown(raw), "a json object")
    name = raw.get("id")
    if not (name is None or isinstance(name, (str, int))) or isinstance(name, bool):
        raise fault(place, "id", shown(name), "a string or an integer")
    place = Place(place.path, place.where, None if name is None else str(name))
    kind = raw.get("kind")
    if not (kind is None or isinstance(kind, str)):
        raise fault(place, "kind", shown(kind), "a string")
    images = _images(place, raw)
    turns = _turns(place, raw)
    marks = sum(human.count(IMAGE_MARK) for human, _ in turns)
    if marks != len(images):
        got = f"{marks} {IMAGE_MARK} mark(s) for {len(images)} image(s)"
        raise fault(place, "conversations", got, f"one {IMAGE_MARK} per image")
    return Sample(place, images, turns, kind)


def _images(place: Place, raw: dict[str, Any]) -> tuple[str, ...]:
    if "image" not in raw:
        return ()
    images = raw["image"]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not images:
        expected = "a path, a list of paths, or no such field (text only)"
        raise fault(place, "image", shown(raw["image"]), expected)
    for i, image in enumerate(images):
        if not isinstance(image, str) or not image:
            raise fault(place, f"image[{i}]", shown(image), "a path")
    return tuple(images)


def _turns(place: Place, raw: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    messages = raw.get("conversations")
    if not isinstance(messages, list) or not messages:
        got = shown(messages) if "conversations" in raw else "nothing"
        raise fault(place, "conversations", got, "a list of human and gpt messages")
    for i, message in enumerate(messages):
        _check_message(place, i, message)
    if len(messages) % 2:
        got = f"{len(messages)} messages, the last from 'human'"
        raise fault(place, "conversations", got, "an answer to every question")
    values = [message["value"] for message in messages]
    return tuple(zip(values[::2], values[1::2], strict=True))


def _check_message(place: Place, i: int, message: Any) -> None:
    """Human and gpt alternate, human first; an answer is some text without an image in it."""
    role, field = ROLES[i % 2], f"conversations[{i}]"
    if not isinstance(message, dict):
        raise fault(place, field, shown(message), "an object with 'from' and 'value'")
    if message.get("from") != role:
        got = shown(message.get("from"))
        raise fault(place, f"{field}.from", got, f"{role!r} (human and gpt alternate, human first)")
    value = message.get("value")
    if not isinstance(value, str) or not value.strip():
        raise fault(place, f"{field}.value", shown(value), "some text")
    if role == "gpt" and IMAGE_MARK in value:
        raise fault(place, f"{field}.value", shown(value), f"no {IMAGE_MARK} in an answer")


def shown(value: object) -> str:
    """``repr`` of a value with its type, cut to a readable length."""
    return f"{type(value).__name__} {short(repr(value), 60)}"


def short(text: str, most: int = 200) -> str:
    """A text of at most about `most` letters; of a longer one the beginning and the end."""
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]}... {len(text):,} letters ...{text[-most // 6 :]}"
