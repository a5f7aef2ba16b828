"""Which models and which batch? A teacher and a student of a real class, with random weights.

`LlavaForConditionalGeneration` with a SigLIP tower (shared, frozen), a two-layer projector and a
Qwen2 language model whose embedding is also its head, as the published small models have it. A
time or a peak does not depend on what the weights are; the head's scale makes logits as peaked as
those of a language model, because an error does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from training.stages import STAGES, freeze
from training.step import DistillStep
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from benchmarks.problem import LOGIT_STD
from benchmarks.shapes import DTYPES, Sizes, StepCase, Vlm

#: Of the tokens, the last; the others are words.
IMAGE_TOKEN = -1

Step = Callable[[], Tensor]


@functools.lru_cache(maxsize=1)  # both stages of a pair train the same models
def pair(
    models: Vlm, device: str
) -> tuple[LlavaForConditionalGeneration, LlavaForConditionalGeneration]:
    """Student and teacher, in train mode with checkpointed layers and in eval mode."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[models.dtype])
    try:
        with torch.device(device):
            student, teacher = _model(models, models.student), _model(models, models.teacher)
    finally:
        torch.set_default_dtype(before)
    teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    # the new name for what transformers before 5.23 calls gradient_checkpointing_enable
    new = getattr(student, "activation_checkpointing_enable", None)
    (new or student.gradient_checkpointing_enable)({"use_reentrant": False})
    return student.train(), teacher.eval()


def _model(models: Vlm, sizes: Sizes) -> LlavaForConditionalGeneration:
    tower = SiglipVisionConfig(
        hidden_size=models.tower.hidden,
        intermediate_size=4 * models.tower.hidden,
        num_hidden_layers=models.tower.layers,
        num_attention_heads=models.tower.heads,
        image_size=models.image,
        patch_size=models.patch,
        vision_use_head=False,
    )
    language = Qwen2Config(
        vocab_size=models.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=-(-8 * sizes.hidden // 96) * 32,  # 8/3 D, up to a multiple of 32
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=language,
        image_token_index=models.vocab + IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight, std=LOGIT_STD / sizes.hidden**0.5)
    return model


def batch(case: StepCase, samples: int, device: str) -> dict[str, Tensor]:
    """`samples` samples of an image, a question and an answer; in DPT all text is answer."""
    models = case.models
    rng = torch.Generator(device).manual_seed(1)
    ids = torch.randint(3, models.vocab - 1, (samples, case.tokens), generator=rng, device=device)
    ids[:, : models.image_rows] = models.vocab + IMAGE_TOKEN
    labels = torch.full_like(ids, -100)
    labels[:, -case.answer :] = ids[:, -case.answer :]
    shape = (samples, 3, models.image, models.image)
    pixels = torch.randn(shape, generator=rng, device=device).to(DTYPES[models.dtype])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "pixel_values": pixels,
    }  # fmt: skip


class Training:
    """A stage's training with one loss: `gradients` of a batch, whole optimiser `step`s."""

    def __init__(self, case: StepCase, loss: Any, device: str) -> None:
        student, teacher = pair(case.models, device)
        self._case, self._device = case, device
        freeze(student, STAGES[case.stage])
        self._module = DistillStep(student, teacher, loss).train()
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def batch(self, samples: int) -> dict[str, Tensor]:
        """A batch of the case's kind."""
        return batch(self._case, samples, self._device)

    def gradients(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss; gradients are left in ``trained``."""
        loss = self._module(**inputs).loss
        loss.backward()
        return loss.detach()

    def step(self, inputs: dict[str, Tensor]) -> Tensor:
        """Forward of teacher and student, losses, backward, optimiser step; returns the loss."""
        loss = self.gradients(inputs)
        self._optimizer.step()
        self.forget()
        return loss

    def forget(self) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad(set_to_none=True)
