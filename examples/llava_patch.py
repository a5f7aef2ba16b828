"""How does a code base in the style of LLaVA or TinyLLaVA distil? Two methods for its trainer.

Such a model takes `input_ids` with one −200 for an image and makes of it, in a method of its own
(`prepare_inputs_labels_for_multimodal`), embeddings of every row of the image and labels to match.
The losses need to know which positions those rows got. The method does not say, but it gives them
the label −100 and copies every other label; so if prompts have another label on the way in, what is
−100 on the way out, and not padding, is image.

    trainer = distilling(LLaVATrainer, rows=576)(model=student, teacher=teacher, kd_loss=..., ...)

`rows` of an image: 576 for CLIP-L/14 at 336 pixels, 729 for SigLIP at 384, of which TinyLLaVA's
tower drops the first (728). What is left out: images of different sizes (anyres), several towers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import mllmkd_kernels as mk  # +

IMAGE, UNLABELLED, PROMPT = -200, -100, -101


# + below
class LlavaStyle(mk.DistillMixin):
    """`DistillMixin` for models that expand their images themselves."""

    rows: int

    def distill(self, student: Any, batch: Any, counts: mk.RowCounts | None) -> mk.LlavaKDOutput:
        head_s, labels_s, images_s = expanded(student, batch)
        head_t = labels_t = images_t = None
        if self.teacher is not None:
            with torch.no_grad():
                head_t, labels_t, images_t = expanded(self.teacher, batch)
        return self.kd_loss(
            head_s,
            head_t,
            labels_s,
            images_s,
            num_items_in_batch=counts,
            image_lens=[self.rows] * int((batch["input_ids"] == IMAGE).sum()),
            teacher_labels=labels_t,
            teacher_image_mask=images_t,
        )

    def count_batches(self, batches: list[dict[str, Tensor]]) -> mk.RowCounts:
        labels = sum((b["labels"][:, 1:] != UNLABELLED).sum() for b in batches)
        images = sum((b["input_ids"] == IMAGE).sum() for b in batches)
        return mk.RowCounts(labels, images * self.rows, images)


def expanded(
    model: Any, batch: Mapping[str, Tensor]
) -> tuple[mk.HeadInputs, Tensor, Tensor]:  # labels and image mask are (B, T) after expansion
    """What enters the head of a LLaVA-style model, its expanded labels, where its images are."""
    marked = batch["labels"].masked_fill(batch["labels"] == UNLABELLED, PROMPT)
    _, positions, attention, _, embeds, marked = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, marked, batch["images"]
    )
    head = mk.head_inputs(
        getattr(model, "language_model", model),  # TinyLLaVA's is inside, LLaVA's is the model
        inputs_embeds=embeds,
        attention_mask=attention,
        position_ids=positions,
    )
    at_image = (marked == UNLABELLED) & attention.bool()
    return head, marked.masked_fill(marked == PROMPT, UNLABELLED), at_image


def distilling(trainer: type, rows: int) -> Any:
    """The code base's trainer class, distilling; `rows` of each image."""
    return type(f"Distilling{trainer.__name__}", (LlavaStyle, trainer), {"rows": rows})


# + above


def main(
    trainer: type, student: Any, teacher: Any, kd_loss: mk.LlavaKDLoss, rows: int, **options: Any
) -> Any:
    """What is left to change in the code base's train.py; `options` are its trainer's arguments."""
    # - run = LLaVATrainer(model=model, tokenizer=tokenizer, args=training_args, **data_module)
    run = distilling(trainer, rows)(model=student, teacher=teacher, kd_loss=kd_loss, **options)  # +
    run.train()
    return run
