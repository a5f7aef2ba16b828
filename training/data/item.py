"""What does one sample look like on its way from an encoder to a batch?

An encoder sees a sample's images once (`Seen`: their tokens and tensors), then writes the ids
around them (`Item`). What the tensors of an image are called and shaped is the processor's
business; here only the names of those that have one value a token are known, because they are
padded like ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from mllmkd_kernels.models import TOKEN_TYPES
from training.data.sample import Sample

IGNORE = -100
PER_ITEM = {"input_ids", "labels", "image_lens", *TOKEN_TYPES}
OBJECT = 512  # about the bytes of a tensor beside its values


class Item(TypedDict):
    """One sample of T tokens, with whatever the processor made of its images besides."""

    input_ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, -100 on everything that is not an answer
    image_lens: Tensor  # (n_images,) int64: image-token rows of each image, in order
    sample_id: str
    kind: NotRequired[str]  # the sample's, where it has one
    pixel_values: NotRequired[Tensor]  # absent for text alone
    teacher: NotRequired[Any]  # the Item that the teacher's own encoder made of the same sample
    rejected: NotRequired[Any]  # of a pair, whose better answer this is, the Item of the worse one


@dataclass(frozen=True, slots=True)
class Seen:
    """What a processor made of a sample's images, ready to be put between pieces of text."""

    ids: list[list[int]] = field(default_factory=list)  # per image, with its borders
    lens: list[int] = field(default_factory=list)  # per image, image tokens among them
    extras: dict[str, list[list[int]]] = field(default_factory=dict)  # per image, like ids
    inputs: dict[str, Tensor] = field(default_factory=dict)  # pixel_values and its company

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in self.inputs.values())


def build_item(
    sample: Sample, ids: list[int], labels: list[int], seen: Seen, extras: dict[str, list[int]]
) -> Item:
    """The `Item` of finished lists, all of one value a token."""
    fixed = Item(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        image_lens=torch.tensor(seen.lens, dtype=torch.int64),
        sample_id=sample.id,
    )
    rest = {name: torch.tensor(row, dtype=torch.int64) for name, row in extras.items()}
    kind = {} if sample.kind is None else {"kind": sample.kind}
    return {**fixed, **kind, **rest, **seen.inputs}  # pyright: ignore[reportReturnType]


def apart(items: Sequence[Any]) -> list[Any]:
    """Of pairs the better answers and then the worse ones, as a batch has them; others as they
    are."""
    return [*items, *(item["rejected"] for item in items if "rejected" in item)]


def own_bytes(item: Mapping[str, Any]) -> int:
    """Memory of an item beside its images': its tokens and what holds them."""
    held = sum(OBJECT + item[name].nbytes for name in PER_ITEM & item.keys())
    return held + sum(own_bytes(item[name]) for name in ("teacher", "rejected") if name in item)
