"""How does a row of a HF data set become a sample?

The rows that most chat data sets have, with the names of the columns free::

    {"messages": [{"role": "user", "content": "what is it"},              # a string, or parts:
                  {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": "a coat"}, ...],
     "images": [PIL image, bytes, or path, ...]}                          # or one; may be absent

Images stand where their parts do, or where a string says ``<image>``. If no message says where,
they come first, as is the custom. A part may also name its image itself ({"type": "image", "image":
"a.png"}); then there is no column. A system message comes first and once, or is a column `system`.
Pairs of answers come in the forms of `training.data.preferences`. Anything else is a `DataError`
that says which row, message and part. What becomes of fields that are not read,
`training.data.fields` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.data.faults import Place, fault, shown
from training.data.fields import MESSAGE, PART
from training.data.preferences import Form, Told
from training.data.records import (
    IMAGE_MARK,
    Sample,
    conversation,
    images_first,
    same,
    unread_fields,
    worse_answer,
)

CHAT = Form("messages", "role", "content", ("user", "assistant"))
PATH_KEYS = ("image", "path", "url")
MESSAGE_READ = frozenset({"role", "content"})
PART_READ = frozenset({"type", "text", *PATH_KEYS})


def parse_messages(
    place: Place, talk: Told, n_images: int | None, system: str | None = None
) -> tuple[Sample, list[str]]:
    """A sample of a row's messages, and the paths that its parts name.

    Args:
        place: where the row stands.
        talk: the messages as the data set has them.
        n_images: how many images the row has besides, or None if that is not known yet.
        system: a system message that the row has besides.

    Raises:
        DataError: at the first fault.
    """
    form = CHAT._replace(messages=talk.name)
    paths: list[str] = []
    unread: list[str] = []
    said = _said(place, talk.messages, talk.name, paths, unread)
    system, turns = conversation(place, form, said, system)
    rejected = None
    if talk.rejected is not None:
        worse = _said(place, [talk.rejected], talk.answers[1], paths, unread)[0]
        rejected = worse_answer(place, form, talk.answers[1], worse, turns[-1][1])
    marks = sum(human.count(IMAGE_MARK) for human, _ in turns)
    expected = len(paths) if paths else n_images
    if marks == 0 and expected and not paths:
        turns, marks = images_first(turns, expected), expected
    if expected is not None and marks != expected:
        got = f"{marks} place(s) for {expected} image(s)"
        raise fault(place, talk.name, got, "one place per image")
    sample = Sample(
        place,
        ("",) * marks,
        turns,
        system=system,
        ordered=True,
        field=f"{talk.name}[{{}}].content",
        first=len(said) - 2 * len(turns),
        unread=same(tuple(dict.fromkeys(unread))),
        rejected=rejected,
        answers=talk.answers,
    )
    return sample, paths


def _said(
    place: Place, messages: Any, name: str, paths: list[str], unread: list[str]
) -> list[tuple[Any, str]]:
    """Role and text of each message; adds paths that parts name, and fields not read."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise fault(place, name, shown(messages), "a list of messages")
    said: list[tuple[Any, str]] = []
    for i, message in enumerate(messages):
        field = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise fault(place, field, shown(message), "an object with role and content")
        unread += unread_fields(place, f"{field}.", message, MESSAGE_READ, MESSAGE)
        text = _text(place, f"{field}.content", message.get("content"), paths, unread)
        said.append((message.get("role"), text))
    return said


def _text(place: Place, field: str, content: Any, paths: list[str], unread: list[str]) -> str:
    """A message's text with a mark for every image; adds paths that parts name, fields not read."""
    if isinstance(content, str):
        return content
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
