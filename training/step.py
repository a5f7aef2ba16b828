"""What happens to one batch? Student and teacher, up to their heads → the loss.

    batch ──────────── student ─► hidden (B, T, Ds), head (Vs, Ds) ──┐
      └─ its "teacher" ─ or ───┐                                     ├─► LlavaKDLoss
         the same batch  teacher ─► hidden (B, T', Dt), head (Vt, Dt)┘
    labels, image mask, image_lens ──────────────────────────────────┘

Any two image-text-to-text models of transformers will do. Two LLaVAs with equal towers share it:
`pixel_values (I, 3, H, W)` go through it once, to `features (I, P, C)`, and each model applies its
own projector. Neither `lm_head` is ever called: the loss takes the hidden states and both head
weights. The step is one `nn.Module`, so that a data-parallel wrapper sees a forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import mllmkd_kernels as mk
from training.anatomy import anatomy, image_token_id
from training.shared_tower import image_features
from training.teacher import OnlineTeacher, Teacher, run_to_head

TERMS = ("ce", "response_kl", "visual_kl", "relation")


class DistillStep(nn.Module):
    """Student (trained) and teacher (frozen, may be absent) as one module whose forward is the
    loss."""

    accepts_loss_kwargs = True  # tells transformers.Trainer that the loss is normalised already

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | Teacher | None,
        loss: mk.LlavaKDLoss,
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.teacher: Teacher | None = (
            OnlineTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
        )
        self.shared = self.teacher is not None and self.teacher.share(student)
        self.image_token_id = image_token_id(student)
        self._modules_of = anatomy(student).modules  # walks every name, so not in each step

    def train(self, mode: bool = True) -> DistillStep:
        """Train mode for the student's LM and projector; the frozen tower stays in eval mode."""
        super().train(mode)
        for path in self._modules_of["vision"]:
            self.student.get_submodule(path).eval()
        for path in self._modules_of["projector"]:  # which may lie inside the tower
            self.student.get_submodule(path).train(mode)
        return self

    def forward(self, counts: mk.RowCounts | None = None, **batch: Any) -> mk.LlavaKDOutput:
        """The loss of one micro-batch.

        Args:
            counts: the rows of the whole optimiser step; None: of this batch.
            **batch: `labels` (B, T), what the student's forward takes, and optionally `image_lens`
                (I,) int64 with the rows of each image, `sample_ids`, and `teacher`, a batch of the
                teacher's own (the same keys, of the same samples).

        Raises:
            ValueError: the two views of the batch have other images, or select other rows.
        """
        own: Mapping[str, Any] = batch.get("teacher") or {}
        features = None
        if self.shared and not own and batch.get("pixel_values") is not None:
            with torch.no_grad():
                features = image_features(self.student, batch["pixel_values"])  # pyright: ignore[reportArgumentType]
        student = run_to_head(self.student, batch, features)
        teacher = self.teacher(batch, features) if self.teacher is not None else None
        # Without a visual term the rows of the images need not correspond: there are none.
        with_images = bool(self.loss.visual or self.loss.relation)
        mask = (batch["input_ids"] == self.image_token_id) & with_images  # (B, T)
        image_lens = lens_of(batch, mask) if with_images else None
        teacher_mask = None
        if own and self.teacher is not None:
            teacher_mask = (own["input_ids"] == self.teacher.image_token_id) & with_images
            if with_images:
                _same_images(image_lens, lens_of(own, teacher_mask))
        return self.loss(
            student,
            teacher,
            batch["labels"],
            mask,
            num_items_in_batch=counts,
            image_lens=image_lens,
            teacher_labels=own.get("labels"),
            teacher_image_mask=teacher_mask,
        )


def lens_of(
    batch: Mapping[str, Any],
    mask: torch.Tensor,  # (B, T) bool, True at image positions
) -> torch.Tensor | None:  # (I,)
    """Rows of each image of a batch, in order, or None where each run of image positions is one.

    A batch that does not say (`image_lens`) but has its images stacked, (I, 3, H, W), has equal
    rows for each of them.
    """
    if batch.get("image_lens") is not None:
        return batch["image_lens"]
    pixels = batch.get("pixel_values")
    if pixels is None or pixels.dim() != 4:
        return None
    rows = mask.sum() // len(pixels)
    return rows.expand(len(pixels))


def count_rows(batches: Sequence[Mapping[str, Any]], image_token_id: int) -> mk.RowCounts:
    """The rows that each mean in the loss is over, counted over every micro-batch of an
    optimiser step."""
    response, visual, images = 0, 0, 0
    for batch in batches:
        mask = batch["input_ids"] == image_token_id
        response += int((batch["labels"][:, 1:] != -100).sum())
        visual += int(mask.sum())
        images += len(mk.image_seqlens(mask, lens_of(batch, mask))) - 1
    return mk.RowCounts(response, visual, images)


def _same_images(student: torch.Tensor | None, teacher: torch.Tensor | None) -> None:
    """The totals are compared by the loss; here each image, so that none moves into another."""
    if student is None or teacher is None:
        return
    ours, theirs = student.tolist(), teacher.tolist()
    if ours != theirs:
        raise ValueError(
            f"teacher.image_lens: the teacher's images have {theirs} rows, the student's {ours}; "
            "set loss.visual and loss.relation to 0, or take a teacher whose images have as many"
        )
