"""How does a loop of one's own distil, with accelerate around it? The loss becomes a module.

    accelerate launch -m examples.accelerate_loop chats.jsonl

What is prepared (wrapped) must have the loss in its forward, so student, heads and loss go into one
module. Each mean is over the rows of the whole optimiser step: they are counted before the first
micro-batch, over all ranks, and each micro-batch contributes its share. `# +` ends a line that is
there for distillation, `# -` starts one that it replaced.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from itertools import chain, islice, repeat
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllmkd_kernels as mk  # +
from examples.chat_data import ChatCollator, read_chats


class Step(torch.nn.Module):  # +
    """Its forward is the loss of a micro-batch."""  # +

    def __init__(self, student: Any, teacher: Any, loss: mk.LlavaKDLoss) -> None:  # +
        super().__init__()  # +
        self.student, self.loss = student, loss  # +
        self.teacher = (teacher.eval().requires_grad_(False),)  # + in a tuple: not wrapped

    def forward(self, batch: Any, counts: mk.RowCounts) -> mk.LlavaKDOutput:  # +
        return mk.distill_batch(self.loss, self.student, self.teacher[0], batch, counts)  # +


def main(
    data: str,
    out: str = "out",
    student: str = "llava-hf/llava-interleave-qwen-0.5b-hf",
    teacher: str = "llava-hf/llava-interleave-qwen-7b-hf",  # +
    epochs: int = 1,
    micro_batch: int = 2,
    accumulate: int = 16,
    lr: float = 2e-5,
) -> list[float]:
    """Train, save, and return the loss of each optimiser step."""
    # the tower's last layer is not used, and a micro-batch of text alone uses none of it
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(kwargs_handlers=[unused])
    model = AutoModelForImageTextToText.from_pretrained(student, dtype="float32")
    processor = AutoProcessor.from_pretrained(student)
    large = AutoModelForImageTextToText.from_pretrained(teacher, dtype="auto")  # +
    model = Step(model, large.to(accelerator.device), mk.LlavaKDLoss())  # +
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    loader = DataLoader(read_chats(data), micro_batch, collate_fn=ChatCollator(processor))  # pyright: ignore[reportArgumentType]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    token = processor.image_token_id  # +
    losses = []
    micro_batches = chain.from_iterable(repeat(loader, epochs))
    while batches := list(islice(micro_batches, accumulate)):
        counts = mk.sum_counts(mk.count_rows(batches, token), accelerator)  # +
        total = torch.zeros((), device=accelerator.device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(model), accelerator.autocast():
                # - loss = model(**batch).loss / len(batches)
                loss = model(batch, counts).loss * accelerator.num_processes  # +
            accelerator.backward(loss)
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(total, reduction="mean")))  # pyright: ignore[reportArgumentType]
        accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}")
    # - accelerator.unwrap_model(model).save_pretrained(out)
    accelerator.unwrap_model(model).student.save_pretrained(out)  # +
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
