"""What happens to one batch? Tower once → both projectors and LMs, up to their heads → the loss.

    pixel_values (I, 3, H, W) ── tower, frozen, once ──► features (I, P, C)
                                   ├── student's projector ─► student LM ─► hidden (B, T, Ds) ─┐
                                   └── teacher's projector ─► teacher LM ─► hidden (B, T, Dt) ─┤
    labels (B, T), image mask (B, T) ──────────────────────────────────────── LlavaKDLoss ◄────┘

I images, P rows each. Neither `lm_head` is ever called: the loss takes the hidden states and both
head weights. The step is one `nn.Module`, so that a data-parallel wrapper sees a forward; the
teacher hides in a tuple, which keeps it out of `parameters()`, `state_dict()` and every wrapper.
What it leaves out: sharded models (FSDP, ZeRO-3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

import mllmkd_kernels as mk
from training.models import image_features, share_tower

TERMS = ("ce", "response_kl", "visual_kl", "relation")


class DistillStep(nn.Module):
    """Student (trained) and teacher (frozen, may be absent) as one module whose forward is the
    loss."""

    accepts_loss_kwargs = True  # tells transformers.Trainer that the loss is normalised already

    def __init__(
        self,
        student: LlavaForConditionalGeneration,
        teacher: LlavaForConditionalGeneration | None,
        loss: mk.LlavaKDLoss,
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.shared = teacher is not None and share_tower(student, teacher)
        self._teacher = (teacher.eval().requires_grad_(False),) if teacher is not None else ()

    def train(self, mode: bool = True) -> DistillStep:
        """Train mode for the student's LM and projector; the frozen tower stays in eval mode."""
        super().train(mode)
        self.student.model.vision_tower.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,  # (B, T)
        attention_mask: torch.Tensor,  # (B, T)
        labels: torch.Tensor,  # (B, T)
        pixel_values: torch.Tensor | None = None,  # (I, 3, H, W)
        counts: mk.RowCounts | None = None,
    ) -> Any:
        """The `LlavaKDOutput` of the batch; `counts` are the rows of the whole optimiser step."""
        text = {"input_ids": input_ids, "attention_mask": attention_mask}
        features_s, features_t = self._features(pixel_values)
        student = _hidden(self.student, text, features_s)
        teacher = None
        for model in self._teacher:
            nn.Module.to(model, input_ids.device)
            with torch.no_grad():
                teacher = _hidden(model, text, features_t)
        image_lens = None
        if features_s is not None:
            n_images, rows = features_s.shape[:2]
            image_lens = torch.full((n_images,), rows, device=input_ids.device)
        return self.loss(
            student,
            teacher,
            labels,
            input_ids == self.student.config.image_token_id,
            num_items_in_batch=counts,
            image_lens=image_lens,
        )

    @torch.no_grad()
    def _features(
        self,
        pixel_values: torch.Tensor | None,  # (I, 3, H, W)
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Student's and teacher's view of the images, (I, P, C) each; one tower pass where both
        agree."""
        if pixel_values is None:
            return None, None
        ours = image_features(self.student, pixel_values)
        if self.shared or not self._teacher:
            return ours, ours
        return ours, image_features(self._teacher[0], pixel_values)


def _hidden(
    model: LlavaForConditionalGeneration,
    text: dict[str, torch.Tensor],
    features: torch.Tensor | None,  # (I, P, C)
) -> mk.HeadInputs:
    """The model run up to its head, given the tower's output."""
    if features is None:
        return mk.head_inputs(model, **text)
    input_ids = text["input_ids"]
    embedded = model.get_input_embeddings()(input_ids)
    at_image = (input_ids == model.config.image_token_id).unsqueeze(-1)
    projected = model.model.multi_modal_projector(features).to(embedded.dtype)
    embedded = embedded.masked_scatter(at_image.expand_as(embedded), projected)
    return mk.head_inputs(model, inputs_embeds=embedded, attention_mask=text["attention_mask"])


def count_rows(batches: list[dict[str, torch.Tensor]], image_token_id: int) -> mk.RowCounts:
    """The rows that each mean in the loss is over, counted over every micro-batch of an
    optimiser step."""
    response = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    visual = sum(int((batch["input_ids"] == image_token_id).sum()) for batch in batches)
    images = sum(len(batch["pixel_values"]) for batch in batches if "pixel_values" in batch)
    return mk.RowCounts(response, visual, images)
