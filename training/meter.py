"""How fast and how large is a stage, and what are its means? Sums that survive a restart.

A `Meter` adds up what each optimiser step gives: the loss and its terms, tokens, samples. `entry`
turns the steps since the last entry into one line of the loss curve; `summary` is the whole stage.
The sums stay on the device, so that adding never waits for it. `state` and `load` take everything
through a checkpoint: an entry begun before a kill comes out as if there had been none.

Peak memory is PyTorch's own on a GPU. On a CPU it is the process's peak resident set, which Linux
lets a process reset, so each stage reports its own peak; where that is refused, the process's since
its start.
"""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")

Reduce = Callable[[torch.Tensor], torch.Tensor]


class Meter:
    """Sums of a stage, from its creation on.

    Args:
        names: what each step's values are called, in order.
        device: where those values are, and whose memory is watched.
    """

    def __init__(self, names: tuple[str, ...] = (), device: torch.device | str = "cpu") -> None:
        self.names, self.device = names, torch.device(device)
        self.tokens = self.samples = 0  # of the stage, up to the last entry, over all ranks
        self._values = torch.zeros(len(names), device=self.device)
        self._counts = torch.zeros(3, dtype=torch.int64, device=self.device)
        self._steps = 0
        self._before = self._last = 0.0  # seconds: of earlier processes; at the last entry
        self._peak = 0.0
        self._start = time.perf_counter()
        self._reset_peak()

    def add(
        self,
        values: torch.Tensor,  # (len(names),)
        counts: torch.Tensor,  # (3,) int64: tokens, places of the batch, samples
    ) -> None:
        """Count one optimiser step of this rank."""
        self._counts += counts
        self._values += values
        self._steps += 1

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a restart included."""
        return self._before + time.perf_counter() - self._start

    @property
    def peak_gib(self) -> float:
        """Peak memory in GiB: of the GPU's allocator, or of the process on a CPU."""
        cuda = self.device.type == "cuda"
        now = torch.cuda.max_memory_allocated(self.device) / 2**30 if cuda else _peak_kib() / 2**20
        return max(self._peak, now)

    def entry(self, total: Reduce = lambda t: t, most: Reduce = lambda t: t) -> dict[str, float]:
        """Means and rates since the last entry; `total` and `most` combine a tensor over ranks."""
        means = (total(self._values) / self._steps).tolist()
        tokens, places, samples = total(self._counts).tolist()
        now = self.seconds
        took = max(now - self._last, 1e-9)
        peak = most(torch.tensor([self.peak_gib], device=self.device)).item()
        self.tokens, self.samples = self.tokens + tokens, self.samples + samples
        self._values.zero_()
        self._counts.zero_()
        self._steps, self._last = 0, now
        return dict(zip(self.names, means, strict=True)) | {
            "tokens_per_second": tokens / took,
            "samples_per_second": samples / took,
            "padding": 1 - tokens / max(places, 1),
            "peak_gib": peak,
            "seconds": now,
        }

    def summary(self) -> dict[str, float]:
        """The stage so far, up to the last entry."""
        took = max(self._last, 1e-9)
        return {
            "seconds": self._last,
            "tokens_per_second": self.tokens / took,
            "samples_per_second": self.samples / took,
            "peak_gib": self.peak_gib,
        }

    def state(self) -> dict[str, Any]:
        """Everything as plain values, exact: an fp32 sum is a double without rounding."""
        return {
            "values": dict(zip(self.names, self._values.tolist(), strict=True)),
            "counts": self._counts.tolist(),
            "steps": self._steps,
            "tokens": self.tokens,
            "samples": self.samples,
            "seconds": self.seconds,
            "last": self._last,
            "peak_gib": self.peak_gib,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; values it does not have count as 0."""
        self._values = torch.tensor(
            [state["values"].get(name, 0.0) for name in self.names], device=self.device
        )
        self._counts = torch.tensor(state["counts"], device=self.device)
        self._steps, self.tokens = state["steps"], state["tokens"]
        self.samples, self._last = state["samples"], state["last"]
        self._before, self._peak = state["seconds"], state["peak_gib"]
        self._start = time.perf_counter()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # 5: reset the peak resident set size to the current one
                Path("/proc/self/clear_refs").write_text("5")


def _peak_kib() -> int:
    """VmHWM, which `clear_refs` resets; getrusage's figure, which nothing resets, elsewhere."""
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+)", _STATUS.read_text())):
        return int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
