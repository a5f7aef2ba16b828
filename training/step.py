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

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import mllmkd_kernels as mk
from mllmkd_kernels.batch import batch_loss
from training.anatomy import anatomy, image_token_id
from training.sharding import touch, units
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
        self.parts = anatomy(student)  # walks every name, so not in each step
        self._projector = self.parts.parameters("projector")
        self._no_split_modules = units(student, self.parts)  # asked for by accelerate

    def train(self, mode: bool = True) -> DistillStep:
        """Train mode for the student's LM and projector; the frozen tower stays in eval mode."""
        super().train(mode)
        for path in self.parts.modules["vision"]:
            self.student.get_submodule(path).eval()
        for path in self.parts.modules["projector"]:  # which may lie inside the tower
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
        # Without an image the projector takes no part; other processes wait for its gradient.
        zero = touch(self.student, self._projector)
        features = None
        if self.shared and not batch.get("teacher") and batch.get("pixel_values") is not None:
            with torch.no_grad():
                features = image_features(self.student, batch["pixel_values"])  # pyright: ignore[reportArgumentType]
        student = run_to_head(self.student, batch, features)
        teacher = self.teacher(batch, features) if self.teacher is not None else None
        output = batch_loss(
            self.loss,
            student,
            teacher,
            batch,
            image_token=self.image_token_id,
            teacher_image_token=self.teacher.image_token_id if self.teacher is not None else None,
            counts=counts,
        )
        return output._replace(loss=output.loss + zero)
