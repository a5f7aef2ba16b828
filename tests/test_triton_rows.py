"""Is Triton's row kernel right, with a row in one block and in many, and the chunked algorithm
around it?
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

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

#: 100 columns are 4 blocks of 32, the last one with 4, or one of 128.
BLOCKS = {"many-blocks": {"BLOCK": 32, "num_warps": 1}, "one-block": {"BLOCK": 128, "num_warps": 2}}
V = 100


@pytest.fixture(params=BLOCKS)
def launch(request: pytest.FixtureRequest) -> dict[str, int]:
    return BLOCKS[request.param]


class Block(NamedTuple):
    """Logits of 6 rows as the products made them; row 1 has no label, row 4 no weight at all."""

    z_s: Tensor  # (6, V)
    z_t: Tensor | None
    b_s: Tensor | None  # (V,)
    b_t: Tensor | None
    labels: Tensor | None  # (6,)
    ce_weight: Tensor | None
    kd_weight: Tensor | None


def block(device: torch.device) -> Block:
    z_s, z_t = (torch.randn(2, 6, V) * 3).to(device)
    labels = torch.tensor([3, -100, V - 1, 0, 17, 50])
    ce_weight, kd_weight = torch.rand(2, 6) + 0.5
    ce_weight[4] = kd_weight[4] = 0
    kd_weight[2] = ce_weight[3] = 0  # one of the two
    return Block(
        z_s, z_t, None, None, labels.to(device), ce_weight.to(device), kd_weight.to(device)
    )


class Terms(NamedTuple):
    ce: Tensor  # (6,)
    kd: Tensor  # (6,)
    dz: Tensor | None  # (6, V)


def run_rows(
    b: Block,
    divergence: str,
    launch: dict[str, int],
    dz_dtype: torch.dtype | None = torch.float32,
    temperature: float = 1.0,
    caps: tuple[float, float] = (0.0, 0.0),
    standardize: bool = False,
) -> Terms:
    """The kernel, on copies whose rows lie farther apart than they are long, with NaN between."""

    def spread(z: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        if z is None:
            return None
        copy = z.new_full((z.shape[0], rows.row_stride(V) + 16), math.nan, dtype=dtype)[:, :V]
        return copy.copy_(z)

    z_s = spread(b.z_s)
    assert z_s is not None
    ce, kd = (torch.zeros(z_s.shape[0], device=z_s.device) for _ in range(2))
    dz = None
    if dz_dtype is not None:  # fp32 in the place of the logits, 16 bits elsewhere
        dz = spread(b.z_s if dz_dtype != torch.float32 else None, dz_dtype)
        dz = z_s if dz is None else dz
    rows.row_losses(
        z_s, spread(b.z_t), b.b_s, b.b_t, b.labels, b.ce_weight, b.kd_weight, ce, kd, divergence,
        Divergence(divergence).param, temperature, *caps, -100, dz, launch,
        standardize=standardize,
    )  # fmt: skip
    if dz is not z_s:
        assert torch.equal(z_s, b.z_s)  # nobody asked for it to be overwritten
    return Terms(ce, kd, dz)


def definition(
    b: Block,
    divergence: str,
    dtype: torch.dtype = torch.float64,
    temperature: float = 1.0,
    caps: tuple[float, float] = (0.0, 0.0),
    standardize: bool = False,
) -> Terms:
    """The same by autograd of the reference."""

    def head(z: Tensor | None, bias: Tensor | None, cap: float) -> Tensor | None:
        if z is None:
            return None
        z = z if bias is None else z + bias[:V].to(dtype)
        return cap * torch.tanh(z / cap) if cap else z

    z = b.z_s.detach().clone().to(dtype).requires_grad_()
    z_s = head(z, b.b_s, caps[0])
    z_t = head(None if b.z_t is None else b.z_t.to(dtype), b.b_t, caps[1])
    assert z_s is not None
    hard, ce, _ = reference.linear_distill(
        z_s, None, b.labels, ce_weight=0.0 if b.ce_weight is None else b.ce_weight.to(dtype)
    )
    if standardize and z_t is not None:
        z_s, z_t = reference.standardize(z_s), reference.standardize(z_t)
    soft, _, kd = reference.linear_distill(
        z_s, z_t, kd_weight=0.0 if b.kd_weight is None else b.kd_weight.to(dtype),
        divergence=divergence, temperature=temperature,
    )  # fmt: skip
    (hard + soft).backward()
    return Terms(ce.detach(), kd.detach(), z.grad)


def check_terms(b: Block, divergence: str, launch: dict[str, int], **options: Any) -> None:
    got, want = run_rows(b, divergence, launch, **options), definition(b, divergence, **options)
    plain = definition(b, divergence, torch.float32, **options)
    check(got.ce, want.ce, "value", plain.ce, what="ce")
    check(got.kd, want.kd, "value", plain.kd, what="kd")
    assert got.dz is not None and want.dz is not None and plain.dz is not None
    check(got.dz, want.dz, "gradient", plain.dz, what="dz")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_block_of_logits(divergence: str, launch: dict[str, int], device: torch.device) -> None:
    check_terms(block(device), divergence, launch)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_everything_at_once(
    divergence: str, dtype: torch.dtype, launch: dict[str, int], device: torch.device
) -> None:
    """Biases longer than the vocabulary, soft-caps, a temperature."""
    bias = torch.randn(2, V + 3, device=device).to(dtype)
    b = block(device)._replace(b_s=bias[0], b_t=bias[1])
    check_terms(b, divergence, launch, temperature=1.7, caps=(4.0, 6.0))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_z_scored_logits(divergence: str, launch: dict[str, int], device: torch.device) -> None:
    """Of what biases and soft-caps make; beside a large mean nothing cancels. A broken row stays
    alone and silent, and one of equal logits, whose σ is 0, keeps its gradient.
    """
    bias = torch.randn(2, V + 3, device=device) + 40
    b = block(device)._replace(b_s=bias[0], b_t=bias[1])
    check_terms(b, divergence, launch, standardize=True)
    check_terms(b, divergence, launch, standardize=True, temperature=1.7, caps=(90.0, 60.0))
    assert b.z_t is not None
    b.z_s[4], b.z_t[4] = math.nan, math.inf  # of no weight
    b = b._replace(b_s=None, z_s=b.z_s.index_fill(0, torch.tensor(5, device=device), 0.0))
    got = run_rows(b, divergence, launch, standardize=True)
    assert got.dz is not None and not got.dz[4].any() and got.dz[5].isfinite().all()
    assert got.kd[4].isnan() and got.kd[:4].isfinite().all()


def test_cross_entropy_alone(launch: dict[str, int], device: torch.device) -> None:
    """Without a teacher the temperature has nothing to say."""
    b = block(device)._replace(z_t=None, kd_weight=None)
    check_terms(b, "forward_kl", launch)
    warm = run_rows(b, "forward_kl", launch, temperature=3.0)
    check(warm.ce, definition(b, "forward_kl").ce, "value")


@pytest.mark.parametrize("divergence", ["soft_cross_entropy", "reverse_kl"])
def test_a_teacher_alone(divergence: str, launch: dict[str, int], device: torch.device) -> None:
    b = block(device)._replace(labels=None, ce_weight=None)
    check_terms(b, divergence, launch, temperature=2.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_the_teacher_forbids(
    divergence: str, launch: dict[str, int], device: torch.device
) -> None:
    b_t = torch.zeros(V, device=device)
    b_t[::3] = -math.inf
    b = block(device)._replace(b_t=b_t)
    if divergence != "reverse_kl":
        check_terms(b, divergence, launch)
    else:  # q log(q/0)
        assert (run_rows(b, divergence, launch).kd == math.inf).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("cap", [0.0, 5.0], ids=["no-cap", "cap"])
def test_gradients_of_16_bits_are_rounded_once(
    divergence: str, cap: float, launch: dict[str, int], device: torch.device
) -> None:
    b = block(device)
    exact = run_rows(b, divergence, launch, caps=(cap, cap))
    rounded = run_rows(b, divergence, launch, torch.bfloat16, caps=(cap, cap))
    assert exact.dz is not None and rounded.dz is not None
    assert torch.equal(rounded.dz, exact.dz.bfloat16())
    assert torch.equal(rounded.kd, exact.kd) and torch.equal(rounded.ce, exact.ce)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_values_without_gradients(
    divergence: str, launch: dict[str, int], device: torch.device
) -> None:
    b = block(device)
    alone, beside = run_rows(b, divergence, launch, None), run_rows(b, divergence, launch)
    assert alone.dz is None
    assert torch.equal(alone.ce, beside.ce) and torch.equal(alone.kd, beside.kd)


@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("cap", [0.0, 5.0], ids=["no-cap", "cap"])
def test_a_broken_row_is_nan_and_silent_without_weight(
    divergence: str, value: float, cap: float, launch: dict[str, int], device: torch.device
) -> None:
    """Row 0 counts, row 4 does not; both hold what a hidden state with an inf or NaN leads to."""
    b, caps = block(device), (cap, cap)
    whole = run_rows(b, divergence, launch, caps=caps)
    b.z_s[[0, 4]] = value
    b.z_s[[0, 4], ::2] *= -1
    got = run_rows(b, divergence, launch, caps=caps)
    assert got.dz is not None and whole.dz is not None
    assert got.ce[0].isnan() and got.kd[0].isnan() and got.dz[0].isnan().any()
    assert not got.dz[4].any()
    others = [1, 2, 3, 5]
    assert torch.equal(got.kd[others], whole.kd[others])
    assert torch.equal(got.dz[others], whole.dz[others])


def test_equal_models_cost_nothing(launch: dict[str, int], device: torch.device) -> None:
    b = block(device)._replace(labels=None, ce_weight=None)
    b = b._replace(z_t=b.z_s.clone())
    for divergence in ("forward_kl", "reverse_kl", "jsd", "total_variation"):
        got = run_rows(b, divergence, launch)
        assert got.dz is not None and not got.kd.any() and not got.dz.any()


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
    b = block(device)
    assert b.z_t is not None
    with pytest.raises(ValueError, match=r"z_t: rows are 101 elements apart, those of z_s 100"):
        rows.row_losses(
            b.z_s, torch.empty(6, 101, device=device)[:, :V], None, None, b.labels, b.ce_weight,
            b.kd_weight, b.z_s[:, 0], b.z_s[:, 1], "forward_kl", 0.0, 1.0, 0.0, 0.0, -100, None,
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

    def add(grads: products.Gradients, rows: slice, dz: Tensor) -> None:
        folded.append(rows.stop - rows.start)
        real(grads, rows, dz)

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

    def rows_(*a: Any) -> tuple[Tensor, Tensor]:
        z_s, z_t, b_s, b_t, labels, ce_weight, kd_weight, broken_s, broken_t, *options = a
        assert z_s.stride() == z_t.stride() == (rows.row_stride(p.vocab), 1)
        assert not broken_s.any() and broken_t.dtype == torch.bool
        assert ce_weight.dtype == kd_weight.dtype == torch.float32
        divergence, param, temperature, cap_s, cap_t, ignore_index, dz = options
        ce, kd = (torch.zeros(z_s.shape[0], device=device) for _ in range(2))
        first = torch.empty(len(z_s), z_s.stride(0), dtype=dz.dtype, device=device)
        rows.row_losses(
            z_s, z_t, b_s, b_t, labels, ce_weight, kd_weight, ce, kd, divergence, param,
            temperature, cap_s, cap_t, ignore_index, first[:, : p.vocab],
        )  # fmt: skip
        dz.copy_(first[:, : p.vocab])  # which may lie in z_s: the CUDA kernel has read it by then
        return ce, kd

    monkeypatch.setattr(cuda, "rows_", rows_)
    p = problem("ragged", dtype)
    want = run_chunks(p, "jsd", device, chunk_rows=5)
    monkeypatch.setattr(chunk, "distill_rows", chunk.distill_rows_cuda)
    got = run_chunks(p, "jsd", device, chunk_rows=5)
    for name in ("loss", "ce", "kd", "dh", "dw"):
        check(getattr(got, name), getattr(want, name), "value", what=name)
