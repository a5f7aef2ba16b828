"""What do the losses read of a model? Its last hidden states, and the head they go into.

The rows that a loss selects from them (`mllmkd_kernels.rows`) are taken here, and it is checked
here that labels, masks and hidden states are of one batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recorded:
    """What was seen inside a model on the way to its head, see `record.recording`.

    Attributes:
        layers: by index of the decoder's layers, what they give, (B, T, D) before the final norm.
        attention: by index their attention, (B, heads, T, T).
        router: logits of each mixture of experts, layer after layer, (B·T, E).
    """

    layers: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    router: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class HeadInputs:
    """What enters a model's ``lm_head``, and the head itself.

    Attributes:
        hidden: (B, T, D) last hidden states, after the final norm; of a teacher also (N, D), rows
            that are selected already.
        weight: (V, D).
        bias: (V,) or None.
        softcap: c of ``c·tanh(z/c)`` on the logits, or None.
        rows: of which row sets the N selected rows are: all of the first, each in the order of the
            batch, then all of the next. The last ones may be missing where no term reads them.
        recorded: what else was asked for.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    rows: tuple[str, ...] = ("response", "visual")
    recorded: Recorded = Recorded()


def take_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, T, D) or (N', D) by flat index (N,), packed (N, D)."""
    return hidden.flatten(0, -2)[index]


def check_images(student: Tensor, teacher: Tensor) -> None:
    """Images of equal rows on both sides: totals may agree where the splits do not."""
    ours, theirs = student.diff().tolist(), teacher.diff().tolist()
    if ours != theirs:
        raise ValueError(
            f"teacher_image_mask: its images have {theirs} rows, the student's {ours}; if they "
            "correspond all the same, say so with image_lens"
        )


def check_batch(head: HeadInputs, labels: Tensor, image_mask: Tensor | None, who: str = "") -> None:
    """Hidden states (B, T, D) with labels (B, T) int64 and a bool mask (B, T)."""
    if head.hidden.ndim != 3:
        raise ValueError(
            f"{who or 'student.'}hidden: expected (B, T, D), got shape {tuple(head.hidden.shape)}"
        )
    expected = tuple(head.hidden.shape[:2])
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"{who}labels: expected shape {expected} as of the hidden states, "
            f"got {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"{who}labels: expected int64, got {labels.dtype}")
    if image_mask is not None and (
        tuple(image_mask.shape) != expected or image_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"{who}image_mask: expected bool of shape {expected}, "
            f"got {image_mask.dtype} {tuple(image_mask.shape)}"
        )
