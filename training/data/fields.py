"""Which fields say what is to be trained, though nothing here reads them?

Most fields that a data set has besides (a source, a licence, a width) only describe, and are left
alone: `data check` lists them. These decide what a model learns. Training without them would be
training on something else, so an entry that has one is refused by its name (`training.data.sample`
asks). Empty, as tables fill it in where a row has none, a field means nothing.
"""

from __future__ import annotations

_EMPTY = ("", "[]", "{}", [], (), {})
_WRITTEN = "no such field: what the model is to write belongs in the answer's text"
_TOOLS = "no such field: calls of tools are not trained"
_MEDIA = "no such field: only images are read"
_PAIRS = "no such field: pairs of answers are told by the entry"
_PLACED = "images named by the entry or by parts of the text"
_SIZE = "no such field: the processor decides the size"
_WEIGHT = "1, or no such field: every answer counts alike (a source can have a weight)"
ASIS = ("weight", "loss", "loss_scale", "train")  # where 1 or true is what is done anyway

_ANYWHERE = {"video": _MEDIA, "videos": _MEDIA, "audio": _MEDIA, "audios": _MEDIA}
# By where a field stands: the entry, one of its messages, one part of a message.
ENTRY = _ANYWHERE | {
    "tools": _TOOLS,
    "functions": _TOOLS,
    "rejected_images": "no such field: both answers are to the images of the entry",
    "chat_template_kwargs": "no such field: all entries are rendered alike",
    "weight": _WEIGHT,
}
MESSAGE = _ANYWHERE | {
    "tool_calls": _TOOLS,
    "tool_call_id": _TOOLS,
    "function_call": _TOOLS,
    "reasoning_content": _WRITTEN,
    "reasoning": _WRITTEN,
    "thinking": _WRITTEN,
    "image": _PLACED,
    "images": _PLACED,
    "rejected": _PAIRS,
    **dict.fromkeys(ASIS, _WEIGHT),
}
PART = _ANYWHERE | dict.fromkeys(
    ("min_pixels", "max_pixels", "resized_height", "resized_width", "detail"), _SIZE
)


def is_empty(value: object) -> bool:
    """Whether a field's value says that the entry has none."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and value in _EMPTY)
