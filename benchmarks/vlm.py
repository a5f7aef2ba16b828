"""Which models and which batch? A teacher and a student of a real class, with random weights.

`LlavaForConditionalGeneration` with a SigLIP tower (shared, frozen), a two-layer projector and a
Qwen2 language model whose embedding is also its head, as the published small models have it. A
time or a peak does not depend on what the weights are; the head's scale makes logits as peaked as
those of a language model, because an error does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

import mllmkd_kernels as mk
from benchmarks.problem import LOGIT_STD
from benchmarks.shapes import DTYPES, Sizes, StepCase, Vlm

#: Of the tokens, the last; the others are words.
IMAGE_TOKEN = -1
#: What a stage trains, parts of ``model.model``; the head is the language model's embedding.
TRAINED = {"dpt": ("multi_modal_projector",), "dft": ("multi_modal_projector", "language_model")}


@functools.lru_cache(maxsize=1)  # both stages of a pair train the same models
def pair(
    models: Vlm, device: str
) -> tuple[LlavaForConditionalGeneration, LlavaForConditionalGeneration]:
    """Student and teacher, in train mode with checkpointed layers and in eval mode."""
    torch.manual_seed(0)
    with torch.device(device):
        student, teacher = _model(models, models.student), _model(models, models.teacher)
    # the new name for what transformers before 5.23 calls gradient_checkpointing_enable
    new = getattr(student, "activation_checkpointing_enable", None)
    (new or student.gradient_checkpointing_enable)({"use_reentrant": False})
    student.train()
    teacher.model.vision_tower = student.model.vision_tower
    return student, teacher.requires_grad_(False).eval()


def _model(models: Vlm, sizes: Sizes) -> LlavaForConditionalGeneration:
    tower = SiglipVisionConfig(
        **_sizes(models.tower), intermediate_size=4 * models.tower.hidden,
        image_size=models.image, patch_size=models.patch, vision_use_head=False,
    )  # fmt: skip
    language = Qwen2Config(
        **_sizes(sizes), num_key_value_heads=sizes.heads,
        vocab_size=models.vocab, tie_word_embeddings=True,
        intermediate_size=-(-8 * sizes.hidden // 96) * 32,  # 8/3 D, up to a multiple of 32
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, vision_feature_layer=-2, vision_feature_select_strategy="full",
        text_config=language, image_token_index=models.vocab + IMAGE_TOKEN,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config, dtype=DTYPES[models.dtype])
    torch.nn.init.normal_(model.lm_head.weight, std=LOGIT_STD / sizes.hidden**0.5)
    return model


def _sizes(sizes: Sizes) -> dict[str, Any]:
    depth = {"num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads}
    return {"hidden_size": sizes.hidden} | depth


class Training:
    """A stage's training with one loss: `gradients` of a batch, whole optimiser `step`s."""

    def __init__(self, case: StepCase, loss: mk.LlavaKDLoss, device: str) -> None:
        self.loss = loss
        self._case, self._device = case, device
        self._student, self._teacher = pair(case.models, device)
        self._student.requires_grad_(False)
        parts = [self._student.model.get_submodule(name) for name in TRAINED[case.stage]]
        self.trained = [p.requires_grad_(True) for part in parts for p in part.parameters()]
        self._optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def batch(self, samples: int) -> dict[str, Tensor]:
        """Samples of an image, a question and an answer; in DPT all text is answer."""
        case, models, device = self._case, self._case.models, self._device
        rng = torch.Generator(device).manual_seed(1)
        shape = (samples, case.tokens)
        ids = torch.randint(3, models.vocab - 1, shape, generator=rng, device=device)
        ids[:, : models.image_rows] = models.vocab + IMAGE_TOKEN
        labels = torch.full_like(ids, -100)
        labels[:, -case.answer :] = ids[:, -case.answer :]
        images = (samples, 3, models.image, models.image)
        pixels = torch.randn(images, generator=rng, device=device).to(DTYPES[models.dtype])
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return text | {"pixel_values": pixels}

    def gradients(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss; gradients are left in ``trained``."""
        loss = mk.distill_batch(self.loss, self._student, self._teacher, inputs).loss
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
