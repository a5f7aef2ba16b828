"""How does a row of a HF data set become a sample?

The rows that most chat data sets have, with the names of the columns free::

    {"messages": [{"role": "user", "content": "what is it"},              # a string, or parts:
                  {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": "a coat"}, ...],
     "images": [PIL image, bytes, or path, ...]}                          # or one; may be absent

Images stand where their parts do, or where a string says ``<image>``. If no message says where,
they come first, as is the custom. A part may also name its image itself ({"type": "image", "image":
"a.png"}); then there is no column. A system message comes first and once. Anything else is a
`DataError` that says which row, message and part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.data.records import IMAGE_MARK, Place, Sample, fault, shown

PATH_KEYS = ("image", "path", "url")


def parse_messages(place: Place, messages: Any, n_images: int | None) -> tuple[Sample, list[str]]:
    """A sample of a row's messages, and the paths that its parts name.

    Args:
        place: where the row stands.
        messages: the messages as the data set has them.
        n_images: how many images the row has besides, or None if that is not known yet.

    Raises:
        DataError: at the first fault.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise fault(place, "messages", shown(messages), "a list of messages")
    texts: list[tuple[str, str]] = []
    paths: list[str] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise fault(place, f"messages[{i}]", shown(message), "an object with role and content")
        text = _text(place, f"messages[{i}].content", message.get("content"), paths)
        texts.append((str(message.get("role")), text))
    system = texts.pop(0)[1] if texts[0][0] == "system" else None
    turns = _turns(place, texts, 0 if system is None else 1)
    marks = sum(human.count(IMAGE_MARK) for human, _ in turns)
    expected = len(paths) if paths else n_images
    if marks == 0 and expected and not paths:
        first = f"{IMAGE_MARK * expected}{turns[0][0]}"
        turns, marks = [(first, turns[0][1]), *turns[1:]], expected
    if expected is not None and marks != expected:
        got = f"{marks} place(s) for {expected} image(s)"
        raise fault(place, "messages", got, "one place per image")
    sample = Sample(place, ("",) * marks, tuple(turns), system=system, ordered=True)
    return sample, paths


def _turns(place: Place, texts: list[tuple[str, str]], start: int) -> list[tuple[str, str]]:
    for i, (role, text) in enumerate(texts):
        wanted = ("user", "assistant")[i % 2]
        if role != wanted:
            expected = f"{wanted!r} (user and assistant alternate, user first)"
            raise fault(place, f"messages[{i + start}].role", repr(role), expected)
        if not text.strip():
            raise fault(place, f"messages[{i + start}].content", shown(text), "some text")
        if role == "assistant" and IMAGE_MARK in text:
            expected = f"no {IMAGE_MARK} in an answer"
            raise fault(place, f"messages[{i + start}].content", shown(text), expected)
    if len(texts) % 2 or not texts:
        got = f"{len(texts)} messages besides the system's"
        raise fault(place, "messages", got, "an answer to every question")
    pairs = [text for _, text in texts]
    return list(zip(pairs[::2], pairs[1::2], strict=True))


def _text(place: Place, field: str, content: Any, paths: list[str]) -> str:
    """A message's text with a mark for every image; paths named by parts are added to `paths`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise fault(place, field, shown(content), "a string or a list of parts")
    texts = []
    for i, part in enumerate(content):
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
