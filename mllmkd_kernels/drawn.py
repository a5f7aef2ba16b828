"""What becomes of a micro-batch when it is drawn? What a view makes of it, `view(batch, moment)`.

A view is called once a micro-batch, in the order in which they are drawn, without gradients and
under the trainer's autocast. Whatever it gives is what is counted, run and logged, so the means of
a step are over the rows of the batches that it made. All micro-batches of a step are drawn before
the first is run: with the same weights. What is random in it comes of `Moment.random`, and so a run
that goes on decides as it would have.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mllmkd_kernels.pieces import zero_stage
from mllmkd_kernels.rows import IGNORE_INDEX

if TYPE_CHECKING:  # importing the package must not import transformers
    from transformers import Trainer
else:
    Trainer = object


@dataclass(frozen=True)
class Moment:
    """Where a run is when a micro-batch is drawn.

    Attributes:
        student: what is trained, not wrapped.
        teacher: what it is compared with.
        processor: of the trainer (`processing_class`): a processor, a tokenizer, or None.
        seed: of the run.
        step, part: optimiser steps made before, and micro-batches drawn of this one.
        rank: of this process.
        training: False in evaluation.
        whole: whether every process has the student's weights whole.
        ignore_index: label of positions without one.
        notes: totals for the log; each rank has to note the same names in the same order.
    """

    student: Any
    teacher: Any = None
    processor: Any = None
    seed: int = 0
    step: int = 0
    part: int = 0
    rank: int = 0
    training: bool = True
    whole: bool = True
    ignore_index: int = IGNORE_INDEX
    notes: Counter[str] = field(default_factory=Counter)

    def random(self, *more: object) -> random.Random:
        """Random numbers of this micro-batch, on all ranks alike unless `more` tells them apart."""
        return random.Random(":".join(map(str, (self.seed, self.step, self.part, *more))))


class BatchView(Protocol):
    """What a stage or a `DistillMixin` takes for `view`."""

    def __call__(self, batch: Any, moment: Moment, /) -> Any:
        """The batch that is counted and run; the one it was given must stay as it is."""
        ...


class DrawsThroughView(Trainer):
    """For a trainer whose batches a view sees before they are counted."""

    view: BatchView | None
    teacher: Any
    objective: Any
    notes: Counter[str]  # of the view, since the last log entry

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        """The micro-batches of a step, seen by the view, and their counts."""
        seen = (self.seen(batch, part) for part, batch in enumerate(epoch_iterator))
        return super().get_batch_samples(seen, num_batches, device)

    def seen(self, batch: Any, part: int = 0, training: bool = True) -> Any:
        """What the view makes of a batch."""
        if self.view is None:
            return batch
        settings = getattr(self.objective, "settings", self.objective)
        moment = Moment(
            self.accelerator.unwrap_model(self.model), self.teacher, self.processing_class,
            self.args.seed, self.state.global_step, part, self.args.process_index, training,
            whole=not self.is_fsdp_enabled and zero_stage(self.accelerator) < 3,
            ignore_index=settings.ignore_index, notes=self.notes if training else Counter(),
        )  # fmt: skip
        with torch.no_grad(), self.accelerator.autocast():
            return self.view(self._prepare_inputs(batch), moment)

    def noted(self) -> dict[str, Any]:
        """All ranks' notes since this was asked last."""
        notes = dict(self.notes)
        self.notes.clear()
        if not notes:
            return {}
        local = torch.tensor(list(notes.values()), dtype=torch.int64, device=self.args.device)
        total: Any = self.accelerator.reduce(local, reduction="sum")
        return dict(zip(notes, total.tolist(), strict=True))
