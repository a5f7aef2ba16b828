"""Is the chunked algorithm around the row kernels right, and what is Triton's row kernel's alone?
What all row kernels share is in test_row_kernels.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mllmkd_kernels import Divergence, reference
from mllmkd_kernels.backends import cuda, products
from mllmkd_kernels.backends.calls import Options
from mllmkd_kernels.backends.triton import chunk, rows, tables
from tests.problems import (
    DIVERGENCES,
    PROBLEMS,
    Problem,
    Result,
    asked,
    check_result,
    expected,
    near_converged,
    problem,
)
from tests.tolerances import LADDER, check, ladder_bound, ladder_value_bound, relative_error


@pytest.mark.parametrize("extra", [0, 1], ids=["multiple", "one-more"])
def test_lengths_around_a_block(extra: int, device: torch.device) -> None:
    z_s, z_t = torch.randn(2, 6, 64 + extra, device=device)
    kd = torch.zeros(6, device=device)
    rows.row_losses(
        z_s, z_t, None, None, None, None, torch.ones_like(kd), kd, kd, "forward_kl", 0.0, 1.0,
        0.0, 0.0, -100, None, {"BLOCK": 16, "num_warps": 1},
    )  # fmt: skip
    check(kd, reference.divergence_rows(z_s.double(), z_t.double()), "value")


def test_blocks_of_different_strides_are_refused(device: torch.device) -> None:
    z_s, z_t = torch.zeros(6, 100, device=device), torch.zeros(6, 101, device=device)[:, :100]
    weight = z_s[:, 0]
    with pytest.raises(ValueError, match=r"z_t: rows are 101 elements apart, those of z_s 100"):
        rows.row_losses(
            z_s, z_t, None, None, None, None, weight, weight, weight, "forward_kl", 0.0, 1.0, 0.0,
            0.0, -100, None,
        )  # fmt: skip


def test_bytes_moved() -> None:
    """DESIGN's figures: 18 bytes a logit for forward KL with a bf16 gradient in two sweeps."""
    long, short = 151_936, 2048
    assert rows.bytes_moved(3, long, True, "forward_kl", 2) == 3 * long * 18
    assert rows.bytes_moved(3, long, True, "jsd", 2) == 3 * long * 26
    assert rows.bytes_moved(3, long, True, "jsd", 0) == 3 * long * 16
    assert rows.bytes_moved(3, long, False, "jsd", 4) == 3 * long * 12
    assert rows.bytes_moved(3, long, False, "jsd", 0) == 3 * long * 4
    assert rows.bytes_moved(3, short, True, "jsd", 2) == 3 * short * 10


# --- the chunked algorithm ------------------------------------------------------------------------


def run_chunks(
    p: Problem,
    divergence: str,
    device: torch.device,
    chunk_rows: int = 1000,
    wanted: tuple[bool, bool, bool] | None = None,
) -> Result:
    """`chunk.distill_rows`, gradients in the dtypes of what they are for."""
    wanted = wanted or (True, True, p.bs is not None)
    student, teacher, targets = asked(p.on(device), Divergence(divergence))
    out = chunk.distill_rows(student, teacher, targets, Options(p.vocab, chunk_rows, *wanted))
    loss, ce, kd, dh, dw, db = (x.cpu() for x in out)
    return Result(loss, ce, kd, dh.to(p.hs.dtype), dw.to(p.ws.dtype), None if p.bs is None else db)


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # A row of up to 1,024 tokens in one block: in the interpreter each block costs the same,
    # however long. `test_16_bits_in_chunks` takes several.
    monkeypatch.setattr(tables, "launch", lambda *_: {"BLOCK": 1024, "num_warps": 1})


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem(name: str, device: torch.device) -> None:
    p = problem(name)
    check_result(run_chunks(p, "jsd", device), p, "jsd", torch.float32)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_in_chunks(
    divergence: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "launch", lambda *_: {"BLOCK": 128, "num_warps": 1})
    p = problem("ragged", dtype)
    check_result(run_chunks(p, divergence, device, chunk_rows=5), p, divergence, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_be_folded_several_chunks_at_a_time(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 rows as 3 + 3, 3 + 3, 1; with an fp32 dz, which has no block of its own, as 3 each. What
    is not written holds NaN.
    """
    p, empty, folded = problem("ragged", dtype), torch.empty, []

    def add(grads: products.Gradients, rows: slice, dz: Tensor, **dead: Any) -> None:
        folded.append(rows.stop - rows.start)
        real(grads, rows, dz, **dead)

    real = products.Gradients.add
    monkeypatch.setattr(products.Gradients, "add", add)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    student, teacher, targets = asked(p.on(device), Divergence("jsd"))
    options = Options(p.vocab, 3, want_dh=True, want_dw=True, want_db=True, fold=6)
    out = chunk.distill_rows(student, teacher, targets, options)
    monkeypatch.undo()
    loss, ce, kd, dh, dw, db = (x.cpu() for x in out)
    got = Result(loss, ce, kd, dh.to(dtype), dw.to(dtype), db)
    check_result(got, p, "jsd", dtype)
    assert folded == ([6, 6, 1] if dtype == torch.bfloat16 else [3, 3, 3, 3, 1])


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("shape", [(9000, 40, 24), (40, 9000, 24)], ids=["dw", "dh"])
def test_a_product_in_bf16_parts_is_as_exact_as_fp16_asks(
    shape: tuple[int, int, int], write: bool
) -> None:
    m, k, n = shape
    a, b = torch.randn(m, k) * 1e-7, torch.randn(k, n).half()  # fp16 would hold nothing of a
    out = torch.full((m, n), 1e-5)
    want = a.double() @ b.double() + (0 if write else out.double())
    products.fold_in_parts(out, a, b, write)
    assert relative_error(out, want) < 2e-5


@pytest.mark.parametrize("eps", LADDER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_near_convergence(
    divergence: str, dtype: torch.dtype, eps: float, device: torch.device
) -> None:
    p = near_converged(eps, two_sided=divergence == "total_variation").to(dtype)
    got, want = run_chunks(p, divergence, device), expected(p, divergence)
    bound = ladder_bound(dtype, eps)
    for name in ("dh", "dw"):
        error = relative_error(getattr(got, name), getattr(want, name))
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"
    assert not (got.kd < 0).any()
    assert relative_error(got.kd, want.kd) <= ladder_value_bound(divergence, eps)


@pytest.mark.parametrize("wanted", [(False,) * 3, (True, False, False), (False, True, True)])
def test_a_frozen_input_costs_nothing(wanted: tuple, device: torch.device) -> None:
    p = problem("ragged")
    whole, got = run_chunks(p, "jsd", device), run_chunks(p, "jsd", device, wanted=wanted)
    assert torch.equal(got.loss, whole.loss) and torch.equal(got.kd, whole.kd)
    for w, name in zip(wanted, ("dh", "dw", "db"), strict=True):
        mine, want = getattr(got, name), getattr(whole, name)
        assert torch.equal(mine, want) if w else not mine.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_weight_may_hold_anything(dtype: torch.dtype, device: torch.device) -> None:
    p = problem("zero_weight_rows", dtype)
    broken = replace(p, hs=p.hs.clone(), ht=p.ht.clone())
    broken.hs[2], broken.ht[5] = math.nan, math.inf
    whole, got = run_chunks(p, "jsd", device), run_chunks(broken, "jsd", device)
    for name in ("loss", "dh", "dw"):
        assert torch.equal(getattr(got, name), getattr(whole, name)), name
    assert got.ce[2].isnan() and got.kd[2].isnan() and got.kd[5].isnan()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_same_bits_every_run(divergence: str, device: torch.device) -> None:
    p = problem("ragged", torch.bfloat16)
    first, again = (run_chunks(p, divergence, device, chunk_rows=4) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first[:5], again[:5], strict=True))


def test_fp64_is_refused(device: torch.device) -> None:
    with pytest.raises(TypeError, match="got fp64 inputs; use backend='eager'"):
        run_chunks(problem("one_row", torch.float64), "forward_kl", device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cuda_kernel_is_called_as_it_is_documented(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Triton's kernel behind the CUDA kernel's signature both drivers give the same bits."""

    def rows_(*a: Any, standardize: bool) -> tuple[Tensor, Tensor]:
        z_s, z_t, b_s, b_t, labels, ce_weight, kd_weight, broken_s, broken_t, *options = a
        assert z_s.stride() == z_t.stride() == (rows.row_stride(p.vocab), 1)
        assert not broken_s.any() and broken_t.dtype == torch.bool
        assert ce_weight.dtype == kd_weight.dtype == torch.float32
        divergence, param, temperature, cap_s, cap_t, ignore_index, dz = options
        ce, kd = (torch.zeros(z_s.shape[0], device=device) for _ in range(2))
        first = torch.empty(len(z_s), z_s.stride(0), dtype=dz.dtype, device=device)
        rows.row_losses(
            z_s, z_t, b_s, b_t, labels, ce_weight, kd_weight, ce, kd, divergence, param,
            temperature, cap_s, cap_t, ignore_index, first[:, : p.vocab], standardize=standardize,
        )  # fmt: skip
        dz.copy_(first[:, : p.vocab])  # which may lie in z_s: the CUDA kernel has read it by then
        return ce, kd

    monkeypatch.setattr(cuda, "rows_", rows_)
    p = problem("ragged", dtype)
    p = replace(p, options=p.options | {"standardize": True})
    want = run_chunks(p, "jsd", device, chunk_rows=5)
    monkeypatch.setattr(chunk, "distill_rows", chunk.distill_rows_cuda)
    got = run_chunks(p, "jsd", device, chunk_rows=5)
    for name in ("loss", "ce", "kd", "dh", "dw"):
        check(getattr(got, name), getattr(want, name), "value", what=name)
