"""How fast and how large is a stage? Tokens per second and peak memory, measured the same way
everywhere.

On a GPU the peak is PyTorch's own. On a CPU it is the process's peak resident set, which Linux lets
a process reset, so each stage reports its own peak; where that is refused the peak is the process's
since its start, and `peak_is_since_start` says so.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Meter:
    """Counts tokens and seconds from its creation, and watches peak memory."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.tokens = 0
        self.start = time.perf_counter()
        self.peak_is_since_start = not self._reset_peak()

    def add(self, tokens: int) -> None:
        """Count the tokens of one batch (padding not among them)."""
        self.tokens += tokens

    @property
    def seconds(self) -> float:
        """Seconds since this meter was made."""
        return time.perf_counter() - self.start

    @property
    def tokens_per_second(self) -> float:
        """Tokens counted, by seconds passed."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def peak_gib(self) -> float:
        """Peak memory in GiB: of the GPU's allocator, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return _peak_kib() / 2**20

    def _reset_peak(self) -> bool:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            _CLEAR.write_text("5")  # 5: reset the peak resident set size to the current one
        except OSError:
            return False
        return True


def _peak_kib() -> int:
    """VmHWM, which `clear_refs` resets; getrusage's figure, which nothing resets, elsewhere."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
