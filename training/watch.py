"""Which batch made the loss NaN? Every micro-batch is watched; the host looks once a step.

`see` notes a micro-batch's loss and terms, and a hook on the loss how many rows of each model's
hidden states are not finite: a few numbers that stay on the device. `close`, called when the
gradients of an optimiser step are complete and before they are used, is the one place that waits.
If any number of any rank, or the gradient norm, is not finite, the step is not made: the weights
never see it. The batch is written to ``bad_batch.pt``, and a `NonFiniteError` names step,
micro-batch, rank, samples, terms and model.

``torch.load("bad_batch.pt")`` gives ``batches`` and ``counts``, as `mllmkd_kernels.distill_batch`
takes them; the newest checkpoint has the weights of a few steps
earlier. What it leaves out: repairing anything. A loss scaled down by a filter is still wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device

import mllmkd_kernels as mk
from mllmkd_kernels.rows import Counts
from training.journal import whole
from training.meter import Meter

BAD_BATCH = "bad_batch.pt"
MODELS = ("student", "teacher")


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or infinite; the message names the batch."""


@dataclass(frozen=True)
class Seen:
    """A micro-batch of the optimiser step in hand."""

    inputs: dict[str, Any]
    counts: Counts | None
    values: torch.Tensor  # (n names,) fp32: loss, terms
    sizes: torch.Tensor  # (3,) int64: tokens, places, samples
    rows: torch.Tensor  # (2, 2) int64: of student and teacher, rows not finite and rows


class Watch:
    """The guard of one stage.

    Args:
        loss: the objective; a hook on it looks at the hidden states.
        names: ``loss``, and the objective's terms.
        accelerator: of the trainer.
        folder: where ``bad_batch.pt`` goes.
        say: how it is told that this could not be written.
    """

    def __init__(
        self,
        loss: torch.nn.Module,
        names: tuple[str, ...],
        accelerator: Accelerator,
        folder: Path,
        say: Callable[[str], None] = print,
    ) -> None:
        self.names, self.accelerator, self.folder, self.say = names, accelerator, folder, say
        self._seen: list[Seen] = []
        self._rows = torch.zeros(2, 2, dtype=torch.int64)
        loss.register_forward_pre_hook(self._look)

    def see(self, inputs: dict[str, Any], counts: Counts | None, output: mk.Losses) -> None:
        """Note a micro-batch and what the objective gave; never waits for the device."""
        found = {"loss": output.loss.detach(), **output.terms}
        values = torch.stack([found[name].float() for name in self.names])
        self._seen.append(Seen(inputs, counts, values, sizes_of(inputs), self._rows))

    def close(
        self, step: int, grad_norm: torch.Tensor | float | None, meter: Meter, stop: int
    ) -> int:
        """End optimiser step number `step`, whose update may be made; the largest `stop` of any
        rank (a signal number, or 0).

        Raises `NonFiniteError`, on every rank alike.
        """
        seen, self._seen = self._seen, []
        values = torch.stack([s.values for s in seen])
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=values.device)
        flags = torch.stack([~values.isfinite().all(), ~norm.isfinite().all()]).int()
        flags = torch.cat([flags, flags.new_tensor([stop])])
        gathered: Any = self.accelerator.gather(flags[None])
        bad_loss, bad_gradient, stop = gathered.amax(0).tolist()
        if bad_loss or bad_gradient:
            self._refuse(step, seen, values, float(norm))
        meter.add(values.sum(0), torch.stack([s.sizes for s in seen]).sum(0))
        return stop

    def _look(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Before the loss: how many rows of either model's hidden states are not finite."""
        heads = args[: len(MODELS)]
        rows = [_rows(head.hidden) for head in heads if head is not None]
        self._rows = torch.stack(rows + [torch.zeros_like(rows[0])] * (len(heads) - len(rows)))

    def _refuse(self, step: int, seen: list[Seen], values: torch.Tensor, norm: float) -> None:
        """Write the batch down, and raise."""
        guilty = [i for i, row in enumerate(values.isfinite().all(1).tolist()) if not row]
        rank = self.accelerator.process_index
        everyone: list[Any] = gather_object([(rank, self._finding(i, seen)) for i in guilty])
        first = min((rank for rank, _ in everyone), default=0)
        texts = [text for _, text in everyone]
        if not texts:
            texts = [f"the gradient norm is {norm} although every term is finite; {_names(seen)}"]
        file = self.folder / BAD_BATCH
        if rank == first:
            try:
                self._write(step, texts, [seen[i] for i in guilty] or seen)
            except (OSError, RuntimeError) as error:  # which is not what is to be told
                self.say(f"{file} is not kept: {error}")
        message = f"step {step}: {'; '.join(texts[:4])}"
        message += f" (and {len(texts) - 4} more micro-batches)" if len(texts) > 4 else ""
        raise NonFiniteError(f"{message}. The weights have not seen it. The batch is in {file}")

    def _finding(self, i: int, seen: list[Seen]) -> str:
        """One guilty micro-batch in words."""
        micro = seen[i]
        terms = [f"{n} {v:.4g}" for n, v in zip(self.names, micro.values.tolist(), strict=True)]
        hidden = [
            f"{who}'s hidden states: {bad} of {rows} rows not finite"
            for who, (bad, rows) in zip(MODELS, micro.rows.tolist(), strict=True)
            if rows
        ]
        where = f"micro-batch {i + 1} of {len(seen)}, rank {self.accelerator.process_index}"
        return f"{where}: {', '.join([*terms, *hidden])}; {_names([micro])}"

    def _write(self, step: int, texts: list[str], seen: list[Seen]) -> None:
        counts = {name: int(count) for name, count in (seen[0].counts or {}).items()}
        batches = send_to_device([micro.inputs for micro in seen], "cpu")
        with whole(self.folder / BAD_BATCH) as staged:
            torch.save({"step": step, "why": texts, "batches": batches, "counts": counts}, staged)


def sizes_of(inputs: dict[str, Any]) -> torch.Tensor:  # (3,) int64
    """Tokens, places (tokens and padding) and samples of a batch, on its device."""
    places = inputs["labels"].numel()
    mask = inputs.get("attention_mask")  # none: no padding, as in a packed row
    samples = len(inputs.get("sample_ids", inputs["labels"]))
    sizes = inputs["labels"].new_tensor([places, places, samples])
    if mask is not None:
        sizes[0] = mask.count_nonzero()
    return sizes


def _rows(hidden: torch.Tensor) -> torch.Tensor:  # (..., D) -> (2,)
    bad = (~hidden.detach().isfinite().all(-1)).count_nonzero()
    return torch.stack([bad, bad.new_tensor(math.prod(hidden.shape[:-1]))])


def _names(seen: list[Seen]) -> str:
    ids = [str(name) for micro in seen for name in micro.inputs.get("sample_ids", ())]
    return f"samples {', '.join(ids)}" if ids else "samples without ids"
