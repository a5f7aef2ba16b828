"""What is a stage about to do? A few lines before the first step, from the first micro-batch.

Sizes that are exact: parameters, steps, samples a step, the plan of the losses (`mk.explain`, for
the rows of the first micro-batch). Sizes that are estimates: tokens a sample (the first micro-batch
again), bytes of a checkpoint (weights, and the two moments of AdamW for what is trained).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import mllmkd_kernels as mk
from training.anatomy import anatomy
from training.watch import sizes_of

MOMENTS = 2  # AdamW keeps as many numbers as there are trained parameters, twice


class Forecast:
    """Tells a stage's sizes once: when its first micro-batch reaches the loss.

    Args:
        student: what is trained.
        objective: what is minimised; a hook on it sees both heads, and is then removed.
        args: of the trainer.
        title: of the stage.
        dataset: the training data.
        say: how it is told; only the first process does.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        objective: mk.Objective,
        args: TrainingArguments,
        title: str,
        dataset: Any,
        say: Callable[[str], None],
    ) -> None:
        self.student, self.objective, self.args = student, objective, args
        self.title, self.dataset, self.say = title, dataset, say
        self._batch: dict[str, Any] | None = None
        self._hook = objective.register_forward_pre_hook(self._tell)

    def first_batch(self, inputs: dict[str, Any]) -> None:
        """Note the micro-batch that is about to be run; only the first counts."""
        if self._batch is None:
            self._batch = inputs

    def _tell(self, objective: Any, args: tuple[Any, ...]) -> None:
        if self._batch is None:
            return  # called outside of training
        self._hook.remove()
        if self.args.process_index == 0:
            for line in (
                self._steps(),
                self._parameters(),
                self._tokens(self._batch),
                self._losses(*args[:3]),
                self._disk(),
            ):
                self.say(f"{self.title}: {line}")
        self._batch = {}

    def _steps(self) -> str:
        a, samples = self.args, "a stream of"
        if hasattr(self.dataset, "__len__"):
            samples = f"{len(self.dataset):,}"
        micro, parts = a.per_device_train_batch_size, a.gradient_accumulation_steps
        size = micro * parts * a.world_size
        return (
            f"{a.max_steps:,} steps of {size:,} samples (micro-batch {micro} x {parts} accumulated "
            f"x {a.world_size} devices) over {samples} samples"
        )

    def _parameters(self) -> str:
        sizes = {True: 0, False: 0}
        parts = anatomy(self.student).roles
        trained = set()
        for name, parameter in self.student.named_parameters():
            sizes[parameter.requires_grad] += parameter.numel()
            if parameter.requires_grad:
                trained.add(parts[name])
        return (
            f"{sizes[True]:,} parameters train ({', '.join(sorted(trained))}), "
            f"{sizes[False]:,} of the student are frozen"
        )

    def _tokens(self, batch: dict[str, Any]) -> str:
        tokens, places, samples = sizes_of(batch).tolist()
        trained = mk.response_rows(batch["labels"])[0].numel()
        return (
            f"about {tokens / samples:,.0f} tokens a sample, {trained / samples:,.0f} of them "
            f"trained, {1 - tokens / places:.0%} padding (first micro-batch)"
        )

    def _losses(
        self, student: mk.HeadInputs, teacher: mk.HeadInputs | None, batch: dict[str, Any]
    ) -> str:
        terms = [t for t in self.objective.terms.values() if isinstance(t, mk.RowTerm)]
        view, settings = self.objective.view(student, teacher, batch), self.objective.settings
        names = {term.rows for term in terms} or self.objective.needs.rows
        rows = sum(len(view.rows(name).labels) for name in names)
        divergence = next((t.divergence for t in terms if t.divergence), "forward_kl")
        d_s = student.weight.shape[1]
        d_t = 0 if teacher is None else teacher.weight.shape[1]
        plan = mk.explain(
            rows,
            view.vocab,
            d_s,
            d_t,
            train_head=student.weight.requires_grad,
            dtype=student.weight.dtype,
            divergence=mk.Divergence.of(divergence).name,
            device=student.hidden.device,
            backend=settings.backend,
            workspace_mb=settings.workspace_mb,
        )
        widths = f"{d_s:,}" + (f" and {d_t:,}" if d_t else "")
        shape = f"{rows:,} rows x {view.vocab:,} columns, D {widths}"
        return f"losses of a micro-batch ({shape}): {str(plan).splitlines()[0]}"

    def _disk(self) -> str:
        size = checkpoint_bytes(self.student)
        kept = (self.args.save_total_limit or 1) + 1  # one more while the newest is written
        folder = Path(self.args.output_dir or ".")
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        enough = "" if free > kept * size else "; TOO LITTLE: free some, or keep fewer"
        return (
            f"a checkpoint takes about {_gib(size)}, {kept} of them {_gib(kept * size)}; "
            f"{_gib(free)} are free in {folder}{enough}"
        )


def checkpoint_bytes(module: torch.nn.Module) -> int:
    """About how large a checkpoint of it is: weights, and AdamW's state of the trained ones."""
    return sum(
        p.numel() * p.element_size() * (1 + MOMENTS * p.requires_grad) for p in module.parameters()
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size > 2**28 else f"{size / 2**20:.1f} MiB"
