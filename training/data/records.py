"""What is in a LLaVA json file, and is every entry well formed?

LLaVA's format is a list (``.json``) or one object per line (``.jsonl``) of::

    {"id": "a17", "image": "images/a17.png",             # str, [str, ...], or nothing: text alone
     "conversations": [{"from": "human", "value": "<image>\\nwhat is it"},
                       {"from": "gpt", "value": "a coat"}, ...]}

``images`` is another name of ``image``. A system message is a first turn from ``system`` or a field
``system``; ``kind`` is a word for reports and for rows of one kind (`mllmkd_kernels.rows`). Of two
answers to the last question, ``rejected`` is the worse one; `training.data.preferences` has other
forms of that. Further fields are not read: `training.data.fields` says which of them are refused,
the rest is listed by `data check`.

An entry becomes a `Sample` or a `DataError` that names file, place, id, field, what came and what
was expected. Nothing is repaired: a trainer that guesses at malformed data trains on something
nobody wrote. Images are only named here; `training.data.dataset` opens them.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from training.data.faults import DataError, Place, fault, shown
from training.data.fields import ENTRY, MESSAGE, is_empty, not_read
from training.data.preferences import PROMPT, Form, told

IMAGE_MARK = "<image>"  # LLaVA's mark for "an image goes here", whatever the tokenizer calls it
READ = frozenset({"id", "kind", "image", "images", "system", "conversations"})
MESSAGE_READ = frozenset({"from", "value"})
_NUMBER = re.compile(r"\[\d+\]")


@dataclass(frozen=True, slots=True)
class Sample:
    """One validated entry: image paths as written, and (human, gpt) turns in order.

    ``system`` is a system message of its own, perhaps an empty one; ``ordered`` says that images
    stay where they are in a turn, where LLaVA would put a turn's only image first. ``field`` names
    a message of the entry and ``first`` is the first question's number among them. ``unread`` are
    names of fields that nobody reads. ``rejected`` is an answer that is worse than the last one;
    ``answers`` names the fields of these two, "" for the last message.
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
    rejected: str | None = None
    answers: tuple[str, str] = ("", "rejected")

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
            yield self.field_of(i), text

    def field_of(self, i: int) -> str:
        """The field of message i after the system's."""
        last = i + 1 == 2 * len(self.turns)
        return (self.answers[0] if last else "") or self.field.format(i + self.first)

    def apart(self) -> tuple[Sample, ...]:
        """Of a pair the sample with each answer alone, the better first; else itself."""
        if self.rejected is None:
            return (self,)
        worse = (*self.turns[:-1], (self.turns[-1][0], self.rejected))
        fields = (self.answers[1], "")
        return replace(self, rejected=None), replace(
            self, turns=worse, rejected=None, answers=fields
        )


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
    talk = told(place, raw, LLAVA, LLAVA.messages)
    unread = unread_fields(place, "", raw, READ | talk.read, ENTRY)
    images = _images(place, raw)
    said, more = _said(place, talk.messages, talk.name)
    form = LLAVA._replace(messages=talk.name)
    system, turns = conversation(place, form, said, system_of(place, raw))
    rejected = None
    if talk.rejected is not None:
        worse, _ = _said(place, [talk.rejected], talk.answers[1])
        rejected = worse_answer(place, form, talk.answers[1], worse[0], turns[-1][1])
    marks = sum(human.count(IMAGE_MARK) for human, _ in turns)
    if not marks and talk.name in PROMPT:
        turns, marks = images_first(turns, len(images)), len(images)
    if marks != len(images):
        got = f"{marks} {IMAGE_MARK} mark(s) for {len(images)} image(s)"
        raise fault(place, "conversations", got, f"one {IMAGE_MARK} per image")
    first = len(said) - 2 * len(turns)
    field = f"{talk.name}[{{}}].{LLAVA.text}"
    unread = same((*unread, *more))
    return Sample(
        place, images, turns, kind, system, False, field, first, unread, rejected, talk.answers
    )


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


def _said(place: Place, messages: Any, name: str) -> tuple[list[tuple[Any, str]], list[str]]:
    """Who says what, and the fields that are not read."""
    if not isinstance(messages, list) or not messages:
        got = "nothing" if messages is None else shown(messages)
        raise fault(place, name, got, "a list of human and gpt messages")
    said, unread = [], []
    for i, message in enumerate(messages):
        field = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise fault(place, field, shown(message), "an object with 'from' and 'value'")
        unread += unread_fields(place, f"{field}.", message, MESSAGE_READ, MESSAGE)
        value = message.get("value")
        if not isinstance(value, str):
            raise fault(place, f"{field}.value", shown(value), "some text")
        said.append((message.get("from"), value))
    return said, list(dict.fromkeys(unread))


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


def worse_answer(place: Place, form: Form, field: str, said: tuple[Any, str], chosen: str) -> str:
    """The text of a rejected answer: something that the chosen one does not say."""
    _check_turn(place, form._replace(messages=field), 1, 0, *said)
    if said[1].strip() == chosen.strip():
        raise fault(place, field, shown(said[1]), "another answer than the chosen one")
    return said[1]


def images_first(turns: tuple[tuple[str, str], ...], n: int) -> tuple[tuple[str, str], ...]:
    """The turns with so many images before the first question."""
    (human, answer), *rest = turns
    return ((f"{IMAGE_MARK * n}{human}", answer), *rest)


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
