"""How does TRL's `SFTTrainer` distil? By the same base class as `transformers.Trainer`.

    python -m examples.trl_sft chats.jsonl

TRL reads the chats, renders them, collates text or images and masks the labels; its own loss (a
fused cross-entropy) is replaced by the four terms. `# +` ends a line that is there for
distillation, `# -` starts one that it replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Image, List, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

import mllmkd_kernels as mk  # +


class DistillTrainer(mk.DistillMixin, SFTTrainer):  # +
    """`SFTTrainer` with LLaVA-KD's loss."""  # +


def main(
    data: str,
    out: str = "out",
    student: str = "llava-hf/llava-interleave-qwen-0.5b-hf",
    teacher: str = "llava-hf/llava-interleave-qwen-7b-hf",  # +
    **options: Any,
) -> SFTTrainer:
    """Train and save; `options` are fields of `SFTConfig`."""
    folder = Path(data).parent
    chats = load_dataset("json", data_files=data, split="train")
    chats = chats.map(lambda chat: {"images": [str(folder / name) for name in chat["images"]]})
    chats = chats.cast_column("images", List(Image()))
    # - trainer = SFTTrainer(
    trainer = DistillTrainer(  # +
        model=AutoModelForImageTextToText.from_pretrained(student, dtype="float32"),
        args=SFTConfig(out, max_length=None, **options),
        train_dataset=chats,
        processing_class=AutoProcessor.from_pretrained(student),
        teacher=AutoModelForImageTextToText.from_pretrained(teacher, dtype="auto"),  # +
        kd_loss=mk.LlavaKDLoss(ce=1.0, response=1.0, visual=1.0, relation=0.5),  # +
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1], bf16=True, gradient_accumulation_steps=16, per_device_train_batch_size=2)
