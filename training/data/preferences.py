"""Which of two answers is better? The forms in which public data says so, made into one.

Under one prompt, with the images of the entry, which both answers are to::

    conversations or messages, and `rejected`              LLaVA; `rejected_response` and
                                                           `rejected_messages` of ms-swift
    conversations or messages or `prompt`, and `chosen` and `rejected`      TRL, LLaMA-Factory
    `chosen` and `rejected`, each a whole conversation     LLaVA-MoD, TRL, UltraFeedback
    `question` (or `prompt`), `chosen`, `rejected`: texts  RLAIF-V, MMPR
    conversations, `output_1`, `output_2`, `preference`    LLaVA-RLHF

An answer is a text, a message, or a list of messages that ends with it. Ratings of many answers
(VLFeedback) are no pairs: which to take of them is for who trains to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from training.data.faults import Place, fault, shown
from training.data.fields import is_empty

REJECTED = ("rejected", "rejected_response", "rejected_messages")
PROMPT = ("prompt", "question")
NUMBERED = ("output_1", "output_2", "preference")
#: Every field that a pair may be told in.
FIELDS = frozenset({*REJECTED, *PROMPT, *NUMBERED, "chosen"})


class Form(NamedTuple):
    """What a format calls its messages, their two fields, and the two who speak; whether a text may
    be a list of parts."""

    messages: str
    role: str
    text: str
    roles: tuple[str, str]
    parts: bool = False


class Told(NamedTuple):
    """A conversation as the data has it, the better answer its last, and perhaps a worse one.

    Attributes:
        messages: not looked at yet.
        name: the field that they stand in.
        rejected: the message with the worse answer, or None.
        answers: where the two answers stand; "" for the last of `messages`.
        read: fields of the entry that this was made of.
    """

    messages: Any
    name: str
    rejected: Any = None
    answers: tuple[str, str] = ("", "")
    read: frozenset[str] = frozenset()


def told(place: Place, raw: Mapping[str, Any], form: Form, column: str) -> Told:
    """What an entry says.

    Args:
        place: where it stands.
        raw: its fields.
        form: of its messages.
        column: the field of its messages, where it has one.

    Raises:
        DataError: only one answer of a pair is there, or the two are not to one prompt.
    """
    chosen, rejected = _named(place, raw)
    if not rejected:
        return Told(raw.get(column), column)
    before = next((n for n in (column, *PROMPT) if not is_empty(raw.get(n))), column)
    prompt = _messages(raw.get(before), form, form.roles[0])
    worse = _messages(raw[rejected], form, form.roles[1])
    messages, name, answer = prompt, before, ""
    if chosen:
        messages = better = _messages(raw[chosen], form, form.roles[1])
        if len(better) == 1:
            messages, answer = [*prompt, *better], chosen
        elif isinstance(raw.get(before), str) or better[: len(prompt)] == prompt:
            name = chosen
        else:
            expected = f"what {chosen!r} begins with, or no such field"
            raise fault(place, before, shown(raw[before]), expected)
    if len(worse) > 1 and worse[:-1] != messages[:-1]:
        got = f"other messages before the last than {chosen or name!r}"
        raise fault(place, rejected, got, "two answers to one prompt")
    read = {chosen, rejected, name, *(NUMBERED if chosen in NUMBERED else ())}
    return Told(messages, name, worse[-1], (answer, rejected), frozenset(read))


def _named(place: Place, raw: Mapping[str, Any]) -> tuple[str, str]:
    """The fields of the better and the worse answer, "" for what is not there."""
    if not any(is_empty(raw.get(name)) for name in NUMBERED):
        if (better := raw["preference"]) not in (1, 2):
            raise fault(place, "preference", shown(better), "1 or 2")
        return f"output_{better}", f"output_{3 - better}"
    worse = [name for name in REJECTED if not is_empty(raw.get(name))]
    chosen = "" if is_empty(raw.get("chosen")) else "chosen"
    if len(worse) > 1:
        expected = f"no such field besides {worse[0]!r}"
        raise fault(place, worse[1], shown(raw[worse[1]]), expected)
    if chosen and not worse:
        expected = "the answer that is worse than 'chosen'"
        raise fault(place, "rejected", shown(raw.get("rejected")), expected)
    return chosen, "".join(worse)


def _messages(value: Any, form: Form, role: str) -> list[Any]:
    """A text, a message or a list of them, as a list of messages."""
    if is_empty(value):
        return []
    if isinstance(value, str):
        return [{form.role: role, form.text: value}]
    return list(value) if isinstance(value, (list, tuple)) else [value]
