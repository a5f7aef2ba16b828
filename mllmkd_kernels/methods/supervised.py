"""What do methods start from? LLaVA's stages without a teacher, and the rates of its scripts."""

from __future__ import annotations

from typing import Any

from mllmkd_kernels.objective import Objective, RowTerm
from mllmkd_kernels.terms.smoothing import Smoothing

#: Of the released scripts, where the projector alone trains and where the LM does too.
PRETRAINING = {"lr": 1e-3, "batch_size": 256}
TUNING = {"lr": 2e-5, "batch_size": 128}


def supervised(ce: float = 1.0, smoothing: float = 0.0, **settings: Any) -> Objective:
    """Cross-entropy of the answers alone; no teacher.

    Args:
        ce: its weight.
        smoothing: share of it that goes to smoothed labels, 0 to 1.
        **settings: see `Settings`.

    Raises:
        ValueError: smoothing is no share.
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing: got {smoothing}, expected 0 to 1")
    return Objective(
        RowTerm("ce", ce * (1 - smoothing), "response"),
        Smoothing("smoothing", ce * smoothing),
        **settings,
    )
