"""Which tokens steer a model, so that no text may spell them out?

A tokenizer makes the one token of `<|im_end|>`, `</s>` or `<|video_pad|>` wherever it reads it:
typed by a user, or left in an answer by a crawler, it would end a turn or ask for pixels in the
middle of a text. So a text that spells out a special token is refused, whoever says it, by this one
check for every encoder. It is not encoded as mere text: chat templates would not do so either when
the model is used.

Only `GROUNDING` may be written: special tokens that data of boxes and regions is made of.
"""

from __future__ import annotations

import re
from typing import Any

from training.data.records import fault, shown
from training.data.sample import IMAGE_MARK, Sample

_REGIONS = ("box", "quad", "ref", "|box_{}|", "|quad_{}|", "|object_ref_{}|")
GROUNDING = frozenset(
    f"<{name.format(end)}>" if "{}" in name else f"<{slash}{name}>"
    for name in _REGIONS
    for slash, end in (("", "start"), ("/", "end"))
)
NAME = "_token"  # as in image_token, a processor's own even where its tokenizer does not know it


class Controls:
    """The control tokens of a processor and its tokenizer."""

    def __init__(self, processor: Any) -> None:
        named = {**processor.tokenizer.special_tokens_map, **vars(processor)}
        tokens = {v for k, v in named.items() if k.endswith(NAME) and isinstance(v, str)}
        tokens |= set(special_tokens(processor.tokenizer))
        ordered = sorted(tokens - GROUNDING - {""}, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered)))

    def check(self, sample: Sample) -> None:
        """Raise `DataError` at the first text of a sample that spells one out."""
        for field, text in sample.texts():
            if found := self.pattern.search(text.replace(IMAGE_MARK, " ")):
                got = f"{found.group()!r} in {shown(text)}"
                raise fault(sample.place, field, got, "text without the model's own tokens")


def special_tokens(tokenizer: Any) -> list[str]:
    """What a tokenizer calls special, as text."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
