"""Which positions are distilled? Row sets have names, and a batch says what is in them; this is the
one place that selects, counts and shifts by one.

================== ====================================================================
name               positions of the (B, T) of a batch
================== ====================================================================
response           whose *next* token has a label: position t predicts token t + 1
response:unshifted that have a label themselves
response:given     of `response`, in samples whose answer the student did not write
visual             of images, unshifted: what the head says *at* an image token
valid              all but padding
response:cot       of `response`, in samples of that kind: any set, any kind
================== ====================================================================

What else a mean may be over is counted here as well: images, samples, pairs of samples. A row set
of one's own is one more entry of `ROW_SETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Batch = Mapping[str, Any]  # labels (B, T), image_mask (B, T) bool, attention_mask, kind, image_lens
Counts = Mapping[str, Any]  # name of a row set or unit -> how many one optimiser step has


class RowCounts(NamedTuple):
    """How many rows one optimiser step has, over all its micro-batches and ranks: what the means
    divide by.

    Each may be a number or a tensor on the device of the loss.
    """

    response: int | Tensor
    visual: int | Tensor
    images: int | Tensor


IGNORE_INDEX = -100  # transformers' label of a position without one


def next_tokens(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The label that each position of (B, T) predicts, (B, T); at the last one `ignore_index`."""
    following = torch.full_like(labels, ignore_index)
    following[:, : labels.shape[1] - 1] = labels[:, 1:]
    return following


def by_name(counts: RowCounts | Counts) -> Counts:
    """Counts of either kind as a mapping."""
    return counts._asdict() if isinstance(counts, RowCounts) else counts


def response_rows(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Flat indices into B·T of the rows that predict a label, and those labels.

    Args:
        labels: (B, T) int64, as Hugging Face has them: the label of a token stands at the token's
            own position.
        ignore_index: label of positions without one.

    Returns:
        indices (M,) int64 and next tokens (M,) int64.
    """
    following = next_tokens(labels, ignore_index)
    index = flat(following != ignore_index)
    return index, following.flatten()[index]


def visual_rows(image_mask: Tensor) -> Tensor:
    """Flat indices (K,) int64 of the image positions of a (B, T) bool mask, not shifted."""
    return flat(image_mask)


def image_seqlens(image_mask: Tensor, image_lens: Tensor | list[int] | None = None) -> Tensor:
    """int32 prefix sum of visual rows per image.

    Args:
        image_mask: (B, T) bool.
        image_lens: rows of each image, in the order of the batch. None: each run of image positions
            is an image.

    Raises:
        ValueError: `image_lens` is no list of whole numbers, has a negative one or does not sum to
            the number of image positions.
    """
    if image_lens is None:
        lens = _runs(image_mask)
    else:
        given = torch.as_tensor(image_lens, device=image_mask.device)
        lens = given.to(torch.int64)
        if given.ndim != 1 or (lens != given).any():
            raise ValueError(f"image_lens: expected whole numbers (images,), got {given.tolist()}")
        if (lens < 0).any():
            raise ValueError(f"image_lens: expected lengths of at least 0, got {lens.tolist()}")
        rows = int(image_mask.sum())
        if int(lens.sum()) != rows:
            raise ValueError(
                f"image_lens: sums to {int(lens.sum())} rows over {lens.numel()} images, "
                f"but image_mask marks {rows} positions"
            )
    zero = lens.new_zeros(1)
    return torch.cat((zero, lens.cumsum(0))).to(torch.int32)


def _runs(image_mask: Tensor) -> Tensor:
    """Lengths of the maximal runs of True in the rows of a (B, T) mask; a run never crosses a
    sequence.
    """
    padded = torch.nn.functional.pad(image_mask.to(torch.int8), (1, 1))
    steps = padded.diff(dim=1)
    starts, ends = (steps == 1).nonzero(), (steps == -1).nonzero()
    return ends[:, 1] - starts[:, 1]


# --- row sets by name -----------------------------------------------------------------------------


def _response(batch: Batch, ignore_index: int) -> Tensor:
    return next_tokens(entry(batch, "labels"), ignore_index) != ignore_index


def _unshifted(batch: Batch, ignore_index: int) -> Tensor:
    return entry(batch, "labels") != ignore_index


def _given(batch: Batch, ignore_index: int) -> Tensor:
    return targets(batch, ignore_index) != ignore_index


def _visual(batch: Batch, ignore_index: int) -> Tensor:
    return entry(batch, "image_mask")


def _valid(batch: Batch, ignore_index: int) -> Tensor:
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(entry(batch, "labels"), dtype=torch.bool)
    return mask.bool()


#: name -> (a batch, ignore_index) -> (B, T) bool
ROW_SETS: dict[str, Callable[[Batch, int], Tensor]] = {
    "response": _response,
    "response:unshifted": _unshifted,
    "response:given": _given,
    "visual": _visual,
    "valid": _valid,
}

#: Kinds of the two answers of a pair; a batch of pairs has all of one, then all of the other.
PAIR = ("chosen", "rejected")

#: What a mean may be over besides rows.
UNITS: dict[str, Callable[[Batch], int]] = {
    "images": lambda batch: images(batch),
    "samples": lambda batch: len(entry(batch, "labels")),
    "pairs": lambda batch: len(entry(batch, "labels")) // len(PAIR),
}


def kind_of(name: str) -> tuple[str, str]:
    """A row set, checked, as one of `ROW_SETS` and a kind of samples, "" for all.

    Raises:
        ValueError: no such set.
    """
    if name in ROW_SETS:
        return name, ""
    base, _, kind = name.rpartition(":")
    if base not in ROW_SETS or not kind:
        raise ValueError(
            f"rows: got {name!r}, expected one of {', '.join(ROW_SETS)}, or one of these and a "
            "kind of samples: 'response:cot'"
        )
    return base, kind


def row_mask(name: str, batch: Batch, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """(B, T) bool, True at the positions of a row set."""
    base, kind = kind_of(name)
    mask = ROW_SETS[base](batch, ignore_index)
    if not kind:
        return mask
    chosen = [each == kind for each in entry(batch, "kind")]
    if len(chosen) != len(mask):  # of samples that are packed nobody knows where they end
        raise ValueError(
            f"kind: got {len(chosen)} words for a batch of {len(mask)} rows, expected one each"
        )
    return mask & torch.tensor(chosen, dtype=torch.bool, device=mask.device)[:, None]


def select(name: str, batch: Batch, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Flat indices (N,) into B·T of a row set, and their `targets` (N,)."""
    index = flat(row_mask(name, batch, ignore_index))
    return index, targets(batch, ignore_index).flatten()[index]


def targets(batch: Batch, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """(B, T), the next tokens that cross-entropy teaches: none, `ignore_index`, that the student
    wrote itself.
    """
    following, own = next_tokens(entry(batch, "labels"), ignore_index), batch.get("on_policy")
    return following if own is None else following.masked_fill(own[:, None], ignore_index)


def count(name: str, batch: Batch, ignore_index: int = IGNORE_INDEX) -> int | Tensor:
    """How many rows, or units, a batch has; never waits for the device, unless runs of image
    positions have to be counted.
    """
    return UNITS[name](batch) if name in UNITS else row_mask(name, batch, ignore_index).sum()


def images(batch: Batch) -> int:
    """Images of a batch, by `image_lens` or by the runs of its `image_mask`."""
    lens = batch.get("image_lens")
    return len(_runs(entry(batch, "image_mask")) if lens is None else lens)


def entry(batch: Batch, key: str) -> Any:
    """What a batch has under a key; `ValueError` where it has nothing."""
    if batch.get(key) is None:
        there = sorted(name for name, value in batch.items() if value is not None)
        raise ValueError(f"{key}: missing; the batch has {', '.join(there)}")
    return batch[key]


def flat(mask: Tensor) -> Tensor:
    """Flat indices (N,) int64 of the True in a (B, T) mask."""
    return mask.reshape(-1).nonzero().squeeze(1)
