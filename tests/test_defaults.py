"""Does what a process has set elsewhere change anything? The default dtype, the default device, and
settings of matrix products are the caller's: results have the same bits whatever they are, and they
come back as they were.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels.backends import products
from tests.test_layouts import READS, _alone, operands, outcome, same, vocab_parallel_distill
from tests.test_layouts import backend as backend  # each, and each algorithm

__all__ = ["_alone"]

PACKAGE = Path(mk.__file__).parent
#: Makers of tensors that take dtype and device from the process where they are not told.
MAKERS = {
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def _makers(file: Path) -> Iterator[tuple[int, set[str]]]:
    """(line, keywords) of every call of ``torch.<maker>`` in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(ast.Attribute(ast.Name("torch"), name), _, keywords) if name in MAKERS:
                yield node.lineno, {str(k.arg) for k in keywords}


def test_every_allocation_says_its_dtype_and_device() -> None:
    silent = [
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for line, keywords in _makers(file)
        if not {"dtype", "device"} <= keywords
    ]
    assert not silent, silent


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def other_default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Call it to set another default dtype for the rest of the test."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


def check_default(
    loss: Callable[..., Tensor], backend: str, other_default: Callable[[], None]
) -> None:
    x = operands(backend)
    want = outcome(loss, x, backend)
    other_default()
    assert same(outcome(loss, x, backend), want)


@pytest.mark.parametrize("name", READS)
def test_the_default_dtype_changes_nothing(
    name: str, backend: str, other_default: Callable[[], None]
) -> None:
    check_default(READS[name][0], backend, other_default)


@pytest.mark.usefixtures("_alone")
def test_the_default_dtype_changes_no_cut_head(other_default: Callable[[], None]) -> None:
    check_default(vocab_parallel_distill, "", other_default)


def test_diagnostics_and_numbers_as_weights_with_another_default_dtype(
    backend: str, other_default: Callable[[], None]
) -> None:
    x = operands(backend)

    def call() -> list[Tensor]:
        out = mk.fused_linear_distill(
            x["hs"], x["ws"], x["ht"], x["wt"], x["labels"], ce_weight=0.3, kd_weight=0.1,
            backend=backend, diagnostics=True,
        )  # fmt: skip
        return [out.loss, out.ce, out.kd, *out.diagnostics.values()]

    want = call()
    other_default()
    assert same(call(), want)


@pytest.mark.parametrize("name", READS)
def test_the_default_device_changes_nothing(name: str, backend: str) -> None:
    """On meta there would be no numbers, and on another GPU no access."""
    x, loss = operands(backend), READS[name][0]
    want = outcome(loss, x, backend)
    with torch.device("meta"):
        got = outcome(loss, x, backend)
    assert same(got, want)


def test_settings_that_round_are_held_by_all_threads_together() -> None:
    """A second thread enters while a first is inside, and leaves after it: neither sees a setting
    that rounds, and the caller's come back. (An autograd thread of another GPU is such a second.)
    """
    library = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), library.allow_fp16_accumulation
    inside, leave, seen = threading.Event(), threading.Event(), []

    def state() -> tuple[Any, Any]:
        return library.fp32_precision, library.allow_fp16_accumulation

    def second() -> None:
        with products.full_fp32():
            inside.set()
            leave.wait(10)
            seen.append(state())

    thread = threading.Thread(target=second)
    torch.set_float32_matmul_precision("high")
    library.allow_fp16_accumulation = True
    try:
        with products.full_fp32():
            thread.start()
            assert inside.wait(10)
            seen.append(state())
        seen.append(state())
        leave.set()
        thread.join(10)
        assert seen == [("ieee", False)] * 3
        assert state() == ("tf32", True)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        leave.set()
        torch.set_float32_matmul_precision(before[0])
        library.allow_fp16_accumulation = before[1]
