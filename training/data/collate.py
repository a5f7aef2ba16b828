"""How do samples of different lengths, with and without images, become one batch?

Whatever has one value a token is padded on the right to the longest sample (causal attention never
looks there, and labels there are -100); prompts on the left, so that every answer starts where its
prompt ends. Whatever came of images is put end to end in the order of
the samples, which is how every class of model finds it again: images (LLaVA), tiles (InternVL),
patches with their `image_grid_thw` (Qwen). Where a class has an axis of tiles per image (OneVision)
or of images per sample (SmolVLM), that axis is filled up with zeros first, which those models leave
out themselves. Text-only samples bring no images, so they mix with the others freely; a batch of
text alone has no pixel_values. A batch of pairs is twice as long: the better answers, then the
worse ones in the same order, each with its images; `kind` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from mllmkd_kernels.models import TOKEN_TYPES
from mllmkd_kernels.rows import PAIR
from training.data.item import IGNORE, Item, apart
from training.settings import ConfigError

NOT_VISUAL = {*Item.__annotations__, *TOKEN_TYPES} - {"pixel_values"}


class Batch(TypedDict):
    """B samples padded to T tokens, and the visual entries the processor makes."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on tokens and 0 on padding
    labels: Tensor  # (B, T) int64
    image_lens: Tensor  # (images,) int64: image-token rows of each image
    sample_ids: list[str]  # of pairs one each
    kind: list[str]  # "" for a sample without one; of pairs "chosen" and "rejected"
    pixel_values: NotRequired[Tensor]  # absent when no sample has an image
    teacher: NotRequired[Any]  # a Batch of the same samples, made by the teacher's encoder


class Collator:
    """Pads `Item`s into a `Batch`.

    Args:
        processor: whose pad token fills short samples.
        teacher: the processor of the items' ``teacher`` items, if they have them.
        side: where short samples are filled, "right", or "left" for prompts.

    Raises:
        ConfigError: a processor's tokenizer has no pad token.
    """

    def __init__(self, processor: Any, teacher: Any = None, side: str = "right") -> None:
        self.pad_id = processor.tokenizer.pad_token_id
        if self.pad_id is None:
            raise ConfigError("processor: its tokenizer has no pad_token, which fills samples")
        self._padded = partial(pad_sequence, batch_first=True, padding_side=side)
        self.teacher = Collator(teacher) if teacher is not None else None

    def __call__(self, items: Sequence[Item]) -> Batch:
        """One batch of at least one item, in their order.

        Raises:
            ValueError: images of sizes that do not go together, or an entry that some
                items with images lack.
        """
        own = {}
        if self.teacher is not None:
            own["teacher"] = self.teacher([item["teacher"] for item in items])  # pyright: ignore[reportTypedDictNotRequiredAccess]
        names = [item["sample_id"] for item in items]
        kinds = [item.get("kind", "") for item in items]
        if "rejected" in items[0]:
            kinds = [kind for kind in PAIR for _ in items]
            items = apart(items)
        ids = [item["input_ids"] for item in items]
        batch: dict[str, Any] = {
            "input_ids": self._padded(ids, padding_value=self.pad_id),
            "attention_mask": self._padded([torch.ones_like(row) for row in ids]),
            "labels": self._padded([item["labels"] for item in items], padding_value=IGNORE),
            "image_lens": torch.cat([item["image_lens"] for item in items]),
            "sample_ids": names,
            "kind": kinds,
        }
        for name in TOKEN_TYPES:
            rows = [item[name] for item in items if name in item]  # pyright: ignore
            if rows:
                batch[name] = self._padded(rows)
        return batch | _visual(items) | own  # pyright: ignore[reportReturnType]


def _visual(items: Sequence[Item]) -> dict[str, Tensor]:
    """Every entry that came of images, put end to end."""
    shown = [item for item in items if len(item["image_lens"])]
    names = sorted({name for item in shown for name in item} - NOT_VISUAL)
    entries = {}
    for name in names:
        if any(name not in item for item in shown):
            raise ValueError(f"items: {name} in some with images and not in others")
        entries[name] = _end_to_end(name, [item[name] for item in shown])  # pyright: ignore
    return entries


def _end_to_end(name: str, tensors: list[Tensor]) -> Tensor:
    """Tensors (n, ...) as one (sum of n, ...); an axis of tiles or images is filled with zeros."""
    if tensors[0].dim() == 5 or name == "pixel_attention_mask":
        most = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
        tensors = [_grown(t, most) for t in tensors]
    sizes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(sizes) > 1:
        raise ValueError(f"items: got {name} of sizes {sorted(sizes)}, expected one size")
    return torch.cat(tensors)


def _grown(tensor: Tensor, sizes: list[int]) -> Tensor:
    """The tensor with axes 1 and later filled up to `sizes` at their ends."""
    missing = [most - size for most, size in zip(sizes, tensor.shape[1:], strict=True)]
    return pad(tensor, [n for size in reversed(missing) for n in (0, size)])
