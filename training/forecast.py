"""What is a stage about to do? A few lines before its first step: steps, what trains, the disk.

Bytes of a checkpoint are an estimate: weights, and the two moments of AdamW for what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal as size
from transformers import TrainingArguments

from training.anatomy import anatomy
from training.journal import free_bytes

MOMENTS = 2  # AdamW keeps as many numbers as there are trained parameters, twice


def forecast(student: torch.nn.Module, args: TrainingArguments, dataset: Any) -> Iterator[str]:
    """The lines, of a student whose trained parameters require gradients."""
    samples = f"{len(dataset):,}" if hasattr(dataset, "__len__") else "a stream of"
    micro, parts = args.per_device_train_batch_size, args.gradient_accumulation_steps
    yield (
        f"{args.max_steps:,} steps of {micro * parts * args.world_size:,} samples (micro-batch "
        f"{micro} x {parts} accumulated x {args.world_size} devices) over {samples} samples"
    )
    roles, named = anatomy(student).roles, dict(student.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    count = sum(p.numel() for p in trained.values())
    frozen = sum(p.numel() for p in named.values()) - count
    yield (
        f"{count:,} parameters train ({', '.join(sorted({roles[name] for name in trained}))}), "
        f"{frozen:,} of the student are frozen"
    )
    one = sum(
        p.numel() * p.element_size() * (1 + MOMENTS * p.requires_grad) for p in named.values()
    )
    kept = (args.save_total_limit or 1) + 1  # one more while the newest is written
    free = free_bytes(Path(args.output_dir or "."))
    yield (
        f"a checkpoint takes about {size(one)}, {kept} of them {size(kept * one)}; {size(free)} "
        f"are free{'' if free > kept * one else '; TOO LITTLE: free some, or keep fewer'}"
    )
