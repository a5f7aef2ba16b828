"""Which ids has a piece of text? Asked again and again, because templated questions repeat."""

from __future__ import annotations

from typing import Any

CACHED_PIECES = 1 << 16  # beyond this many texts nothing more is kept


class Pieces:
    """A tokenizer's ids of texts, without anything before or after them, remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of `text`, none for an empty one; `UnicodeEncodeError` at half a character."""
        ids = self._known.get(text)
        if ids is None:
            text.encode()  # a tokenizer calls a lone surrogate a wrong type
            ids = tuple(self.tokenizer(text, add_special_tokens=False).input_ids) if text else ()
            if len(self._known) < CACHED_PIECES:
                self._known[text] = ids
        return ids
