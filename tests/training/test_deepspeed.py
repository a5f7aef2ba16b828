"""Do DeepSpeed's ZeRO-2 and ZeRO-3 learn what one process does? On two processes over gloo, where
DeepSpeed is installed; it is no requirement of this project, so elsewhere this is skipped.

ZeRO leaves no gradients to look at: loss, terms and gradient norm of two steps are compared, and
whole runs that are stopped and started again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mllmkd_kernels.llava_kd import TERMS
from tests.gloo import on_ranks
from tests.training import tiny
from tests.training.test_devices import (
    as_launched,
    check_run,
    interrupted_run,
    one_step,
    run_config,
)
from training.settings import ConfigError

pytest.importorskip(
    "deepspeed", reason="DeepSpeed is not installed (pip install deepspeed); its runs were not made"
)

# ZeRO-3 needs an image in every micro-batch of a step, or in none.
CASES = {2: ("dft", "no-image", 2), 3: ("dft", "images", 2)}
STAGES = {2: ("dpt", "dft"), 3: ("pt", "dpt")}


def work(root: Path, stage: int) -> Any:
    """Every case of one stage of ZeRO on this rank."""
    as_launched(
        ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage),
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="auto", ACCELERATE_GRADIENT_CLIPPING="auto",
        ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true",
        ACCELERATE_DEEPSPEED_ZERO3_INIT="false", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    found = {"step": one_step(root, root / "out", "zero", *CASES[stage])[1:]}
    if stage == 3:
        with pytest.raises(ConfigError) as error:
            one_step(root, root / "out", "zero", "dft", "no-image", 2)
        found["refused"] = str(error.value)
    config = run_config(root, root / f"zero{stage}", STAGES[stage])
    found["run"] = interrupted_run(config, lambda: None)
    return found


@pytest.mark.parametrize("stage", CASES)
def test_zero_learns_what_one_process_does(tmp_path: Path, stage: int) -> None:
    root = tmp_path / "root"
    tiny.run_config(root, root / "unused")
    ranks = on_ranks(2, work, tmp_path, root, stage)
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    name, order, _ = CASES[stage]
    _, history, _ = one_step(root, root / "out", "none", name, order, 1)
    curve, kind = ranks[0]["step"]
    assert kind == "DEEPSPEED"
    for entry, its in zip(history[:2], curve, strict=False):
        for term in ("loss", "grad_norm", *TERMS):
            assert its[term] == pytest.approx(entry[term], rel=1e-6, abs=1e-9), term
    if stage == 3:
        assert "in [[False, False], [True, True]]; expected images" in ranks[1]["refused"]
    said, _, curves = ranks[0]["run"]
    check_run(root, run_config(root, root / f"zero{stage}", STAGES[stage]), said, curves)
