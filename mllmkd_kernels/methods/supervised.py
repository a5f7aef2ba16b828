"""What do methods start from? LLaVA's stages without a teacher, and the rates of its scripts."""

from __future__ import annotations

from typing import Any

from mllmkd_kernels.objective import Objective, RowTerm

#: Of the released scripts, where the projector alone trains and where the LM does too.
PRETRAINING = {"lr": 1e-3, "batch_size": 256}
TUNING = {"lr": 2e-5, "batch_size": 128}


def supervised(ce: float = 1.0, **settings: Any) -> Objective:
    """Cross-entropy of the answers alone; no teacher.

    Args:
        ce: its weight.
        **settings: see `Settings`.
    """
    return Objective(RowTerm("ce", ce, "response"), **settings)
