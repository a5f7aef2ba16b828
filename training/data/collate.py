"""How do samples of different lengths, with and without images, become one batch?

Ids, attention mask and labels are padded on the right to the longest sample (causal attention
never looks there, and labels there are -100); images of all samples are stacked in the order of
their image tokens, which is how `LlavaForConditionalGeneration` expects them. Text-only samples
bring no images, so they mix with the others freely; a batch of text alone has no pixel_values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from transformers import LlavaProcessor

from training.data.dataset import Item
from training.data.template import IGNORE


class Batch(TypedDict):
    """B samples padded to T tokens; pixel_values is absent when no sample has an image."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on tokens and 0 on padding
    labels: Tensor  # (B, T) int64
    pixel_values: NotRequired[Tensor]  # (sum of n_images, 3, H, W) float32


class LlavaCollator:
    """Right-pads `Item`s into a `Batch`.

    Raises:
        ValueError: the processor's tokenizer has no pad token.
    """

    def __init__(self, processor: LlavaProcessor) -> None:
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("processor: its tokenizer has no pad_token, which fills short samples")
        self.pad_id: int = processor.tokenizer.pad_token_id

    def __call__(self, items: Sequence[Item]) -> Batch:
        """One batch of at least one item, in their order.

        Raises:
            ValueError: no items, or images of different sizes.
        """
        if not items:
            raise ValueError("items: got none, expected at least one")
        ids = [item["input_ids"] for item in items]
        batch = Batch(
            input_ids=_padded(ids, self.pad_id),
            attention_mask=_padded([torch.ones_like(row) for row in ids], 0),
            labels=_padded([item["labels"] for item in items], IGNORE),
        )
        pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
        if pixels:
            sizes = {tuple(image.shape[1:]) for image in pixels}
            if len(sizes) > 1:
                raise ValueError(f"items: got images of sizes {sorted(sizes)}, expected one size")
            batch["pixel_values"] = torch.cat(pixels)
        return batch


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
