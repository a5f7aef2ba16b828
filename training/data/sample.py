"""What is one sample, and how is it made of an entry's messages? One reader for all forms of data.

LLaVA's turns are texts with ``<image>`` in them; messages of other data sets (`CHAT`) may be lists
of parts, an image a part of its own. Whoever reads a file or a table finds the messages
(`training.data.preferences` for pairs of answers), and gives the images (`placed`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from training.data.faults import Place, fault, shown
from training.data.fields import ASIS, MESSAGE, PART, is_empty
from training.data.preferences import Form, Told

IMAGE_MARK = "<image>"  # LLaVA's mark for "an image goes here", whatever the tokenizer calls it
LLAVA = Form("conversations", "from", "value", ("human", "gpt"))
CHAT = Form("messages", "role", "content", ("user", "assistant"), parts=True)
PATH_KEYS = ("image", "path", "url")
PART_READ = frozenset({"type", "text", *PATH_KEYS})
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


def sample_of(
    place: Place, talk: Told, form: Form, system: str | None = None
) -> tuple[Sample, list[str]]:
    """A sample of an entry's messages, and the paths that its parts name.

    Args:
        place: where the entry stands.
        talk: its messages as the data has them.
        form: how their fields are called.
        system: a system message that the entry has besides.

    Raises:
        DataError: at the first fault: question and answer do not alternate, nothing is said, or an
            image is where none can be.
    """
    form = form._replace(messages=talk.name)
    paths: list[str] = []
    unread: list[str] = []
    said = _said(place, talk.messages, form, paths, unread)
    system, turns = _turns(place, form, said, system)
    rejected = None
    if talk.rejected is not None:
        other = form._replace(messages=talk.answers[1])
        ((role, rejected),) = _said(place, [talk.rejected], other, paths, unread)
        _check_turn(place, other, 1, 0, role, rejected)
        if rejected.strip() == turns[-1][1].strip():
            expected = "another answer than the chosen one"
            raise fault(place, other.messages, shown(rejected), expected)
    sample = Sample(
        place,
        ("",) * sum(human.count(IMAGE_MARK) for human, _ in turns),
        turns,
        system=system,
        ordered=form.parts,
        field=f"{talk.name}[{{}}].{form.text}",
        first=len(said) - 2 * len(turns),
        unread=same(tuple(dict.fromkeys(unread))),
        rejected=rejected,
        answers=talk.answers,
    )
    return sample, paths


def placed(sample: Sample, images: tuple[str, ...], anywhere: bool) -> Sample:
    """The sample with these images, one at each mark; where no message says where, and `anywhere`
    will do, before the first question. `DataError` where they are more or fewer."""
    turns, marks = sample.turns, len(sample.images)
    if not marks and anywhere:
        (human, answer), *others = turns
        turns = ((f"{IMAGE_MARK * len(images)}{human}", answer), *others)
    elif marks != len(images):
        got = f"{marks} {IMAGE_MARK} mark(s) for {len(images)} image(s)"
        raise fault(sample.place, sample.field.split("[")[0], got, f"one {IMAGE_MARK} per image")
    return replace(sample, turns=turns, images=images)


def _said(
    place: Place, messages: Any, form: Form, paths: list[str], unread: list[str]
) -> list[tuple[Any, str]]:
    """Role and text of each message; adds paths that parts name, and fields not read."""
    if not isinstance(messages, (list, tuple)) or not messages:
        got = "nothing" if messages is None else shown(messages)
        raise fault(place, form.messages, got, f"a list of {' and '.join(form.roles)} messages")
    said: list[tuple[Any, str]] = []
    for i, message in enumerate(messages):
        field = f"{form.messages}[{i}]"
        if not isinstance(message, Mapping):
            expected = f"an object with {form.role!r} and {form.text!r}"
            raise fault(place, field, shown(message), expected)
        unread += unread_fields(place, f"{field}.", message, {form.role, form.text}, MESSAGE)
        text = _text(place, f"{field}.{form.text}", message.get(form.text), form, paths, unread)
        said.append((message.get(form.role), text))
    return said


def _text(
    place: Place, field: str, content: Any, form: Form, paths: list[str], unread: list[str]
) -> str:
    """A message's text with a mark for every image; adds paths that parts name, fields not read."""
    if isinstance(content, str):
        return content
    if not form.parts:
        raise fault(place, field, shown(content), "some text")
    if not isinstance(content, (list, tuple)):
        raise fault(place, field, shown(content), "a string or a list of parts")
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, Mapping):
            unread += unread_fields(place, f"{field}[{i}].", part, PART_READ, PART)
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image":
            texts.append(IMAGE_MARK)
            named = [part[key] for key in PATH_KEYS if isinstance(part.get(key), str)]
            paths += named[:1]
        else:
            expected = "a text part with its text, or an image part"
            raise fault(place, f"{field}[{i}]", shown(part), expected)
    return "".join(texts)


def _turns(
    place: Place, form: Form, said: list[tuple[Any, str]], system: str | None
) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """The system message, perhaps one that stands elsewhere, and the turns of question and
    answer."""
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
    for name, value in fields.items():
        if name in read or is_empty(value) or (name in ASIS and value == 1):
            continue
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
