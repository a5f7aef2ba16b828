"""What does a training step ask of a teacher? Its hidden states and head for one batch.

`Teacher` is that question. `OnlineTeacher` answers it by running a model; whatever else can say
what entered the teacher's head for these samples (hidden states stored before) is a teacher as
well. A teacher is no `nn.Module`, which keeps the frozen model out of the step's `parameters()` and
`state_dict()` and out of every wrapper.

A batch may bring the teacher's own view of the samples under `teacher`: a whole batch made by the
teacher's processor, where it makes other ids or other pixels of them than the student's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

import mllmkd_kernels as mk
from mllmkd_kernels.batch import BESIDES
from training.anatomy import image_token_id
from training.shared_tower import share_tower

# What a batch carries for the step, the loss or the log, and no model takes.
_NOT_FOR_MODELS = (*BESIDES, "labels", "teacher_hidden")
Batch = Mapping[str, Any]


class Teacher(Protocol):
    """The frozen side of a `DistillStep`.

    Attributes:
        image_token_id: marks the image positions in the teacher's own `input_ids`.
        processor: makes the teacher's own batches; None where it takes the student's.
    """

    image_token_id: int
    processor: Any

    def share(self, student: nn.Module) -> bool:
        """Whether the student's tower output serves this teacher, which then expects it."""
        ...

    def __call__(
        self,
        batch: Batch,
        shared_features: torch.Tensor | None,  # (I, P, C)
    ) -> mk.HeadInputs:
        """What enters the teacher's head for this micro-batch, without gradients."""
        ...


class OnlineTeacher:
    """A model, run on every batch.

    Args:
        model: any image-text-to-text model of transformers; frozen and put into eval mode here.
        processor: its own, if it sees other ids or pixels of a sample than the student does.
    """

    def __init__(self, model: Any, processor: Any = None) -> None:
        self.processor = processor
        self.model = model.eval().requires_grad_(False)
        self.image_token_id = image_token_id(model)

    def share(self, student: nn.Module) -> bool:
        """True for two LLaVAs with equal towers; the teacher's is then the student's."""
        ours = LlavaForConditionalGeneration
        if not isinstance(student, ours) or not isinstance(self.model, ours):
            return False
        return share_tower(student, self.model)

    @torch.no_grad()
    def __call__(
        self,
        batch: Batch,
        shared_features: torch.Tensor | None = None,  # (I, P, C)
    ) -> mk.HeadInputs:
        """Run the model up to its head, on its own batch where there is one."""
        own = batch.get("teacher") or batch
        nn.Module.to(self.model, own["input_ids"].device)
        return run_to_head(self.model, own, shared_features)


def run_to_head(
    model: Any,
    batch: Batch,
    features: torch.Tensor | None = None,  # (I, P, C)
) -> mk.HeadInputs:
    """`mk.head_inputs` of a batch; of a LLaVA given its tower's output, without the tower."""
    inputs = {key: value for key, value in batch.items() if key not in _NOT_FOR_MODELS}
    if features is None:
        return mk.head_inputs(model, **inputs)
    del inputs["pixel_values"]
    input_ids = inputs.pop("input_ids")  # (B, T)
    embedded = model.get_input_embeddings()(input_ids)  # (B, T, D)
    projector = model.model.multi_modal_projector
    projected = projector(features.to(projector.linear_1.weight.dtype)).to(embedded.dtype)
    mask = model.model.get_placeholder_mask(input_ids, embedded, projected)
    embedded = embedded.masked_scatter(mask.expand_as(embedded), projected)
    return mk.head_inputs(model, inputs_embeds=embedded, **inputs)
