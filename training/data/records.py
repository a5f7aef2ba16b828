"""What is in a LLaVA json file, and is every entry well formed?

LLaVA's format is a list (``.json``) or one object per line (``.jsonl``) of::

    {"id": "a17", "image": "images/a17.png",             # str, [str, ...], or nothing: text alone
     "conversations": [{"from": "human", "value": "<image>\\nwhat is it"},
                       {"from": "gpt", "value": "a coat"}, ...]}

``images`` is another name of ``image``. A system message is a first turn from ``system`` or a field
``system``; ``kind`` is a word for reports and for rows of one kind (`mllmkd_kernels.rows`). Other
fields are not read: `training.data.fields` says which of them are refused, the rest is listed by
`data check`.

An entry becomes a `Sample` or a `DataError` that names file, place, id, field, what came and what
was expected. Nothing is repaired: a trainer that guesses at malformed data trains on something
nobody wrote. Images are only named here; `training.data.dataset` opens them.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from training.data.fields import ENTRY, MESSAGE, is_empty, not_read

IMAGE_MARK = "<image>"  # LLaVA's mark for "an image goes here", whatever the tokenizer calls it
READ = frozenset({"id", "kind", "image", "images", "system", "conversations"})
MESSAGE_READ = frozenset({"from", "value"})
_NUMBER = re.compile(r"\[\d+\]")


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

    ``system`` is a system message of its own, perhaps an empty one; ``ordered`` says that images
    stay where they are in a turn, where LLaVA would put a turn's only image first. ``field`` names
    a message of the entry and ``first`` is the first question's number among them. ``unread`` are
    names of fields that nobody reads.
    """

    place: Place
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    kind: str | None = None
    system: str | None = None
    ordered: bool = False
    field: str = "conversations[{}].value"
    first: int = 0
    unread: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The entry's id, or its place in the file when it has none."""
        return self.place.id if self.place.id is not None else self.place.where

    def asked(self, said: Sequence[str] = ()) -> Sample:
        """The conversation as far as the question after so many answers, which are `said` in place
        of its own; the answer to that question is empty."""
        questions = [human for human, _ in self.turns[: len(said) + 1]]
        images = self.images[: sum(human.count(IMAGE_MARK) for human in questions)]
        return replace(self, images=images, turns=tuple(zip(questions, (*said, ""), strict=True)))

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every message, the system's first, with the field that it stands in."""
        if self.system is not None:
            yield (self.field.format(0) if self.first else "system"), self.system
        for i, text in enumerate(text for turn in self.turns for text in turn):
            yield self.field.format(i + self.first), text


def read_samples(path: str | Path) -> Iterator[Sample | DataError]:
    """Yield each entry of a LLaVA file in order, a faulty one as its (unraised) `DataError`;
    raises as `read_entries`."""
    for entry in read_entries(path):
        yield entry if isinstance(entry, DataError) else checked(*entry)


def read_entries(path: str | Path) -> Iterator[tuple[Place, Any] | DataError]:
    """Yield each entry of a LLaVA file as it stands there, with its place.

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
        yield entry
    if empty:
        raise fault(Place(path), "file", "no entries", "at least one entry")


def _read_list(path: Path) -> Iterator[tuple[Place, Any]]:
    entries = parse_json(read_text(path), Place(path))
    if not isinstance(entries, list):
        raise fault(Place(path), "file", shown(entries), "a list of entries")
    for index, raw in enumerate(entries):
        yield Place(path, f"index {index}"), raw


def _read_lines(path: Path) -> Iterator[tuple[Place, Any] | DataError]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            place = Place(path, f"line {number}")
            try:
                yield place, parse_json(line.decode("utf-8"), place)
            except UnicodeDecodeError as error:
                yield fault(place, "json", str(error), "UTF-8 text")
            except DataError as error:
                yield error


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark; `DataError` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise fault(Place(path), "file", str(error), "UTF-8 text") from None


def parse_json(text: str, place: Place) -> Any:
    """What a json text says; `DataError` if it is not json, or an object has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if not place.where else ""
        got = f"{error.msg} at {line}column {error.colno}"
        raise fault(place, "json", got, "valid json (is the file cut short?)") from None
    except _Twice as error:
        raise fault(place, str(error), "it twice in one object", "every key once") from None


class _Twice(Exception):
    """A key that an object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return made


def checked(place: Place, raw: Any) -> Sample | DataError:
    """`parse_sample`, a fault unraised."""
    try:
        return parse_sample(place, raw)
    except DataError as error:
        return error


def parse_sample(place: Place, raw: Any) -> Sample:
    """Validate one decoded entry; raises `DataError` at its first fault."""
    if not isinstance(raw, dict):
        raise fault(place, "entry", shown(raw), "a json object")
    place, kind = _label(place, raw)
    unread = unread_fields(place, "", raw, READ, ENTRY)
    images = _images(place, raw)
    said, more = _said(place, raw)
    system, turns = conversation(place, LLAVA, said, system_of(place, raw))
    marks = sum(human.count(IMAGE_MARK) for human, _ in turns)
    if marks != len(images):
        got = f"{marks} {IMAGE_MARK} mark(s) for {len(images)} image(s)"
        raise fault(place, "conversations", got, f"one {IMAGE_MARK} per image")
    first = len(said) - 2 * len(turns)
    return Sample(place, images, turns, kind, system, first=first, unread=same((*unread, *more)))


def _label(place: Place, raw: Mapping[str, Any]) -> tuple[Place, str | None]:
    """The place with the entry's id, and its kind."""
    name, kind = raw.get("id"), raw.get("kind")
    if not (name is None or isinstance(name, (str, int))) or isinstance(name, bool):
        raise fault(place, "id", shown(name), "a string or an integer")
    place = Place(place.path, place.where, None if name is None else str(name))
    if not (kind is None or isinstance(kind, str)):
        raise fault(place, "kind", shown(kind), "a string")
    return place, kind


def unread_fields(
    place: Place,
    where: str,
    fields: Mapping[str, Any],
    read: Set[str],
    refused: Mapping[str, str],
) -> list[str]:
    """Names of the fields that are not read; one that must not be passed over is a fault."""
    names: list[str] = []
    if fields.keys() <= read:  # as most are
        return names
    for name, value in not_read(fields, read):
        if name in refused:
            raise fault(place, f"{where}{name}", shown(value), refused[name])
        names.append(f"{_NUMBER.sub('[]', where)}{name}" if where else name)
    return names


@cache
def same(names: tuple[str, ...]) -> tuple[str, ...]:
    """`names`, one tuple in memory for all entries alike."""
    return names


def system_of(place: Place, raw: Mapping[str, Any]) -> str | None:
    """The system message that an entry has in a field of its own."""
    system = raw.get("system")
    if is_empty(system):
        return None
    if not isinstance(system, str):
        raise fault(place, "system", shown(system), "a string")
    return system


def _images(place: Place, raw: dict[str, Any]) -> tuple[str, ...]:
    fields = [name for name in ("image", "images") if not is_empty(raw.get(name))]
    if not fields:
        return ()
    if len(fields) == 2:
        raise fault(place, "images", shown(raw["images"]), "no such field besides 'image'")
    field, images = fields[0], raw[fields[0]]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list):
        expected = "a path, a list of paths, or no such field (text only)"
        raise fault(place, field, shown(images), expected)
    for i, image in enumerate(images):
        if not isinstance(image, str) or not image:
            raise fault(place, f"{field}[{i}]", shown(image), "a path")
    return tuple(images)


def _said(place: Place, raw: dict[str, Any]) -> tuple[list[tuple[Any, str]], list[str]]:
    """Who says what, and the fields that are not read."""
    messages = raw.get("conversations")
    if not isinstance(messages, list) or not messages:
        got = shown(messages) if "conversations" in raw else "nothing"
        raise fault(place, "conversations", got, "a list of human and gpt messages")
    said, unread = [], []
    for i, message in enumerate(messages):
        field = f"conversations[{i}]"
        if not isinstance(message, dict):
            raise fault(place, field, shown(message), "an object with 'from' and 'value'")
        unread += unread_fields(place, f"{field}.", message, MESSAGE_READ, MESSAGE)
        value = message.get("value")
        if not isinstance(value, str):
            raise fault(place, f"{field}.value", shown(value), "some text")
        said.append((message.get("from"), value))
    return said, list(dict.fromkeys(unread))


class Form(NamedTuple):
    """What a format calls its messages, their two fields, and the two who speak."""

    messages: str
    role: str
    text: str
    roles: tuple[str, str]


LLAVA = Form("conversations", "from", "value", ("human", "gpt"))


def conversation(
    place: Place, form: Form, said: list[tuple[Any, str]], system: str | None = None
) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """The system message, if there is one, and the turns of question and answer.

    Args:
        place: where the entry stands.
        form: how its fields are called.
        said: role and text of each message, at least one; a mark for each image.
        system: a system message that stands elsewhere.

    Raises:
        DataError: the two do not alternate, nothing is said, or an image is where none can be.
    """
    first = int(said[0][0] == "system")
    if first and system is not None:
        raise fault(place, "system", shown(system), f"no such field besides {form.messages}[0]")
    if first:
        system = said[0][1]
    if IMAGE_MARK in (system or ""):
        field = f"{form.messages}[0].{form.text}" if first else "system"
        raise fault(place, field, shown(system), f"no {IMAGE_MARK} in a system message")
    for i, (role, text) in enumerate(said[first:]):
        _check_turn(place, form, i, i + first, role, text)
    texts = [text for _, text in said[first:]]
    if len(texts) % 2 or not texts:
        got = f"{len(texts)} messages{' besides the system message' * first}"
        raise fault(place, form.messages, got, "an answer to every question")
    return system, tuple(zip(texts[::2], texts[1::2], strict=True))


def _check_turn(place: Place, form: Form, i: int, at: int, role: Any, text: str) -> None:
    """Message i after the system's, number `at` of all: the two alternate, and say something."""
    field, (human, gpt) = f"{form.messages}[{at}]", form.roles
    if role != (wanted := form.roles[i % 2]):
        expected = f"{wanted!r} ({human} and {gpt} alternate, {human} first)"
        raise fault(place, f"{field}.{form.role}", shown(role), expected)
    if not text.strip():
        raise fault(place, f"{field}.{form.text}", shown(text), "some text")
    if role == gpt and IMAGE_MARK in text:
        raise fault(place, f"{field}.{form.text}", shown(text), f"no {IMAGE_MARK} in an answer")


def shown(value: object) -> str:
    """``repr`` of a value with its type, cut to a readable length."""
    return f"{type(value).__name__} {short(repr(value), 60)}"


def short(text: str, most: int = 200) -> str:
    """A text of at most about `most` letters; of a longer one the beginning and the end."""
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]}... {len(text):,} letters ...{text[-most // 6 :]}"
