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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.data.faults import DataError, Place, fault, shown
from training.data.fields import ENTRY, is_empty
from training.data.preferences import PROMPT, told
from training.data.sample import (
    LLAVA,
    Sample,
    placed,
    same,
    sample_of,
    system_of,
    unread_fields,
)

FILE = "a LLaVA json file"
READ = frozenset({"id", "kind", "image", "images", "system", LLAVA.messages})


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
        raise fault(Place(path), "file", "no such file", FILE)
    empty = True
    for entry in _read_lines(path) if path.suffix == ".jsonl" else _read_list(path):
        empty = False
        yield entry
    if empty:
        raise fault(Place(path), "file", "no entries", "at least one entry")


def _read_list(path: Path) -> Iterator[tuple[Place, Any]]:
    entries = parse_json(read_text(path, FILE), Place(path))
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


def read_text(path: Path, expected: str) -> str:
    """The text of a file, without a byte order mark; `DataError` if it is not there, saying what is
    expected, or not UTF-8."""
    if not path.is_file():
        raise fault(Place(path), "file", "no such file", expected)
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
    sample, _ = sample_of(place, talk, LLAVA, system_of(place, raw))
    sample = placed(sample, images, anywhere=talk.name in PROMPT)
    return replace(sample, kind=kind, unread=same((*unread, *sample.unread)))


def _label(place: Place, raw: Mapping[str, Any]) -> tuple[Place, str | None]:
    """The place with the entry's id, and its kind."""
    name, kind = raw.get("id"), raw.get("kind")
    if not (name is None or isinstance(name, (str, int))) or isinstance(name, bool):
        raise fault(place, "id", shown(name), "a string or an integer")
    place = Place(place.path, place.where, None if name is None else str(name))
    if not (kind is None or isinstance(kind, str)):
        raise fault(place, "kind", shown(kind), "a string")
    return place, kind


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
