"""How does a script around `transformers.Trainer` distil? One more base class.

    python -m examples.transformers_trainer chats.jsonl

`# +` ends a line that is there for distillation, `# -` starts one that it replaced. Several GPUs:
`accelerate launch -m examples.transformers_trainer chats.jsonl`.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import mllmkd_kernels as mk  # +
from examples.chat_data import ChatCollator, read_chats


class DistillTrainer(mk.DistillMixin, Trainer):  # +
    """`Trainer` with LLaVA-KD's loss."""  # +


def main(
    data: str,
    out: str = "out",
    student: str = "llava-hf/llava-interleave-qwen-0.5b-hf",
    teacher: str = "llava-hf/llava-interleave-qwen-7b-hf",  # +
    **options: Any,
) -> Trainer:
    """Train and save; `options` are fields of `TrainingArguments`."""
    model = AutoModelForImageTextToText.from_pretrained(student, dtype="float32")
    processor = AutoProcessor.from_pretrained(student)
    # - trainer = Trainer(
    trainer = DistillTrainer(  # +
        model=model,
        args=TrainingArguments(out, remove_unused_columns=False, **options),
        train_dataset=read_chats(data),  # pyright: ignore[reportArgumentType]
        data_collator=ChatCollator(processor),
        processing_class=processor,
        teacher=AutoModelForImageTextToText.from_pretrained(teacher, dtype="auto"),  # +
        kd_loss=mk.LlavaKDLoss(ce=1.0, response=1.0, visual=1.0, relation=0.5),  # +
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1], bf16=True, gradient_accumulation_steps=16, per_device_train_batch_size=2)
