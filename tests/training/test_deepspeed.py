"""Do DeepSpeed's ZeRO-2 and ZeRO-3 learn what one process does? On two processes over gloo, where
DeepSpeed is installed; it is no requirement of this project, so elsewhere this is skipped.

ZeRO leaves no gradients to look at: loss, terms and gradient norm of two steps are compared, and
whole runs that are stopped and started again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mllmkd_kernels import learned
from tests.gloo import on_ranks
from tests.training import tiny
from tests.training.test_devices import (
    STAGES,
    as_launched,
    check_run,
    features_config,
    interrupted_run,
    one_step,
    run_config,
    sparse_config,
)
from training.config import Config
from training.settings import ConfigError

pytest.importorskip(
    "deepspeed", reason="DeepSpeed is not installed (pip install deepspeed); its runs were not made"
)

# ZeRO-3 needs an image in every micro-batch of a step, or in none.
ORDERS = {2: "uneven", 3: "images"}
# Four terms; experts, with their balance; a term with parameters of its own.
STEPS = {2: ("dft", "d2s", "kd"), 3: ("dft",)}
RUNS: dict[int, dict[str, Callable[[Path, Path], Config]]] = {
    2: {"plain": run_config, "experts": sparse_config, "own parameters": features_config},
    3: {"captions": lambda root, out: run_config(root, out, ("pt", "dpt"))},
}


def work(root: Path, zero: int) -> Any:
    """Every case of one stage of ZeRO on this rank."""
    as_launched(
        ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(zero),
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="auto", ACCELERATE_GRADIENT_CLIPPING="auto",
        ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true",
        ACCELERATE_DEEPSPEED_ZERO3_INIT="false", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    found: dict[Any, Any] = {}
    for name in STEPS[zero]:
        found[name] = one_step(root, root / "out", "zero", name, ORDERS[zero], 2)[1:]
    if zero == 3:
        with pytest.raises(ConfigError, match=r"\[False, False\], \[True, True\].*expected images"):
            one_step(root, root / "out", "zero", "dft", "no-image", 2)
    for name, made in RUNS[zero].items():
        found[name] = interrupted_run(made(root, root / f"{name}-{zero}"), lambda: None)
    return found


@pytest.fixture(scope="module", params=ORDERS)
def ranks(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The stage of ZeRO, the folder of the data, and what both ranks found."""
    root = tmp_path_factory.mktemp("root")
    tiny.run_config(root, root / "unused")
    found = on_ranks(2, work, tmp_path_factory.mktemp("ranks"), root, request.param)
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    return request.param, root, found


def test_zero_learns_what_one_process_does(ranks: Any) -> None:
    zero, root, (found, _) = ranks
    for name in STEPS[zero]:
        # a balance is of a micro-batch: the same ones are compared
        parts = 4 if name == "d2s" else 1
        _, history, _ = one_step(root, root / "out", "none", name, ORDERS[zero], parts)
        curve, kind = found[name]
        assert kind == "DEEPSPEED"
        for entry, its in zip(history[:2], curve, strict=False):
            for term in ("loss", "grad_norm", *STAGES[name].objective().names):
                assert its[term] == pytest.approx(entry[term], rel=1e-6, abs=1e-9), (name, term)


def test_a_stopped_run_goes_on(ranks: Any) -> None:
    zero, root, (found, _) = ranks
    for name, made in RUNS[zero].items():
        said, files, curves = found[name]
        config = made(root, root / f"{name}-{zero}")
        check_run(root, config, said, curves)
        assert (learned.FILE in files) == (name == "own parameters")
        weights = [load_file(path) for path in Path(config.out).glob("*/model/*.safetensors")]
        assert weights and not any(learned.PLACE in key for one in weights for key in one)
