"""Which positions are distilled? Labels and image masks become row indices here, the one place that
shifts by one.

* Response rows are the positions whose *next* token has a label: position t predicts token t + 1.
* Visual rows are the image positions themselves, unshifted (LLaVA-KD distils what the head says
  *at* an image token).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def response_rows(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Flat indices into B·T of the rows that predict a label, and those labels.

    Args:
        labels: (B, T) int64, as Hugging Face has them: the label of a token stands at the token's
            own position.
        ignore_index: label of positions without one.

    Returns:
        indices (M,) int64 and next tokens (M,) int64.
    """
    following = next_tokens(labels, ignore_index).flatten()
    index = (following != ignore_index).nonzero().squeeze(1)
    return index, following[index]


def visual_rows(image_mask: Tensor) -> Tensor:
    """Flat indices (K,) int64 of the image positions of a (B, T) bool mask, not shifted."""
    return image_mask.reshape(-1).nonzero().squeeze(1)


def image_seqlens(image_mask: Tensor, image_lens: Tensor | list[int] | None = None) -> Tensor:
    """int32 prefix sum of visual rows per image.

    Args:
        image_mask: (B, T) bool.
        image_lens: rows of each image, in the order of the batch. None: each run of image positions
            is an image.

    Raises:
        ValueError: `image_lens` has a negative entry or does not sum to the number of image
            positions.
    """
    if image_lens is None:
        lens = _runs(image_mask)
    else:
        lens = torch.as_tensor(image_lens, dtype=torch.int64, device=image_mask.device)
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
