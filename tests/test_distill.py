"""Is the loss of `fused_linear_distill`, and every gradient, what the definitions say?"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import mllmkd_kernels as mk
from mllmkd_kernels.backends import cpu
from tests.problems import (
    BACKENDS,
    DIVERGENCES,
    DTYPES,
    PROBLEMS,
    Result,
    _random,
    check_result,
    expected,
    naive,
    problem,
    run,
)
from tests.tolerances import check


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_terms_and_gradients(
    name: str, divergence: str, dtype: torch.dtype, backend: str
) -> None:
    if dtype == torch.float16 and name == "near_converged":
        pytest.skip("gradients below the smallest fp16 number; test_ladder scales them")
    p = problem(name, dtype)
    got = run(p, backend, divergence)
    check_result(got, p, divergence, dtype)
    assert got.loss.dtype == got.ce.dtype == got.kd.dtype == torch.float32
    assert got.dh.dtype == got.dw.dtype == dtype
    if divergence != "soft_cross_entropy":
        assert not (got.kd < 0).any()  # a divergence has no negative value, rounding or not


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["ragged", "larger_student", "one_row"])
def test_in_double_precision(name: str, divergence: str, backend: str) -> None:
    p = problem(name, torch.float64)
    got = run(p, backend, divergence)
    check_result(got, p, divergence, torch.float64)
    assert got.loss.dtype == got.dh.dtype == torch.float64


@pytest.mark.parametrize("parameter", [0.1, 0.9])
@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_parameter_of_a_divergence(name: str, parameter: float, backend: str) -> None:
    key = "beta" if name == "jsd" else "lam"
    table = mk.Divergence(name, **{key: parameter})
    p = problem("ragged")
    got, want, plain = run(p, backend, table), expected(p, table), naive(p, table)
    for field in Result._fields:
        row = "value" if field in ("loss", "ce", "kd") else "gradient"
        check(getattr(got, field), getattr(want, field), row, getattr(plain, field), what=field)
    other = run(p, backend, mk.Divergence(name, **{key: 1 - parameter}))
    assert not torch.allclose(other.kd, got.kd)  # the parameter is not ignored


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_models_are_at_distance_zero(
    divergence: str, dtype: torch.dtype, backend: str
) -> None:
    got = run(problem("identical", dtype), backend, divergence)
    if divergence == "soft_cross_entropy":
        assert (got.kd > 0).all()  # the entropy of the teacher
    else:
        assert torch.equal(got.kd, torch.zeros_like(got.kd)) and got.loss == 0


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_tokens_masked_by_both_do_not_exist(divergence: str, backend: str) -> None:
    p = problem("aligned")
    keep = torch.ones(512, dtype=torch.bool)
    keep[5::4] = False
    bias = torch.where(keep, 0.0, -torch.inf)
    masked = replace(p, bs=bias, bt=bias, labels=torch.where(keep[p.labels], p.labels, -100))
    labels = torch.where(masked.labels < 0, -100, keep.cumsum(0)[masked.labels] - 1)
    bare = replace(p, ws=p.ws[keep], wt=p.wt[keep], labels=labels)
    got, want, plain = run(masked, backend, divergence), expected(bare, divergence), naive(bare)
    check(got.loss, want.loss, "value", plain.loss)
    check(got.kd, want.kd, "value")
    check(got.dh, want.dh, "gradient", plain.dh)
    check(got.dw[keep], want.dw, "gradient", plain.dw)
    assert not got.dw[~keep].any() and got.db is not None and not got.db[~keep].any()


def test_reverse_kl_to_a_masked_token_is_infinite(backend: str) -> None:
    p = problem("masked")
    with torch.no_grad():
        out = mk.fused_linear_distill(
            p.hs, p.ws, p.ht, p.wt, teacher_bias=p.bt, divergence="reverse_kl", backend=backend
        )
    assert torch.equal(out.kd, torch.full_like(out.kd, torch.inf)) and out.loss == torch.inf


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_broken_hidden_state_is_never_a_number(
    side: str, bad: float, softcap: float | None, divergence: str, backend: str
) -> None:
    p = problem("zero_weight_rows")
    hidden = (p.hs if side == "student" else p.ht).clone()
    hidden[1, 3] = bad
    p = replace(p, **{"hs" if side == "student" else "ht": hidden})
    options = {"student_softcap": softcap, "teacher_softcap": softcap}
    got = run(p, backend, divergence, **options)
    others = torch.arange(8) != 1
    assert got.kd[1].isnan() and got.loss.isnan()
    assert got.kd[others].isfinite().all() and got.ce[others].isfinite().all()
    assert got.ce[1].isnan() == (side == "student")
    assert got.dh[1].isnan().all() and got.dh[others].isfinite().all() and got.dw.isnan().any()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_weight_zero_contributes_exactly_nothing(
    bad: float, softcap: float | None, backend: str
) -> None:
    p = replace(problem("zero_weight_rows"), options={"student_softcap": softcap})
    clean = run(p, backend)
    hs, ht = p.hs.clone(), p.ht.clone()
    hs[2], ht[5, 0] = bad, bad
    got = run(replace(p, hs=hs, ht=ht), backend)
    for name in ("loss", "dh", "dw"):
        assert torch.equal(getattr(got, name), getattr(clean, name)), name
    assert not got.dh[2].any() and not got.dh[5].any()


@pytest.mark.parametrize("name", ["larger_student", "larger_teacher", "small_vocab_size"])
def test_mismatched_heads_equal_the_sliced_ones(name: str, backend: str) -> None:
    p = problem(name)
    v = p.vocab
    sliced = replace(p, ws=p.ws[:v].clone(), wt=p.wt[:v].clone(), options={})
    got, want = run(p, backend), run(sliced, backend)
    for field in ("loss", "ce", "kd", "dh"):
        check(getattr(got, field), getattr(want, field), "value", what=field)
    check(got.dw[:v], want.dw, "gradient")
    assert not got.dw[v:].any()


def test_ce_alone_reads_no_teacher(backend: str) -> None:
    p = problem("aligned")
    alone = mk.fused_linear_distill(p.hs, p.ws, labels=p.labels, ce_weight=0.5, backend=backend)
    both = mk.fused_linear_distill(
        p.hs, p.ws, p.ht * torch.nan, p.wt, p.labels, ce_weight=0.5, kd_weight=0.0, backend=backend
    )
    assert torch.equal(alone.loss, both.loss) and torch.equal(alone.ce, both.ce)
    assert not alone.kd.any() and not both.kd.any()


def test_a_number_stands_for_every_row(backend: str) -> None:
    p = problem("aligned")
    rows = torch.full((32,), 0.25)
    number = run(p, backend, ce_weight=0.25, kd_weight=0.25)
    tensor = run(p, backend, ce_weight=rows, kd_weight=rows)
    assert all(torch.equal(a, b) for a, b in zip(number[:5], tensor[:5], strict=True))


def test_another_ignore_index(backend: str) -> None:
    p = problem("aligned")
    moved = replace(
        p, labels=torch.where(p.labels == -100, 7, p.labels), options={"ignore_index": 7}
    )
    seven = p.labels == 7
    assert not seven.any()  # no row of the problem has the label 7 itself
    assert torch.equal(run(moved, backend).loss, run(p, backend).loss)


def shapes() -> st.SearchStrategy[tuple[int, int, int, int, int]]:
    sizes = st.integers(1, 40)
    return st.tuples(st.integers(0, 70), sizes.map(lambda v: 2 * v), sizes.map(lambda v: 3 * v),
                     st.integers(1, 33), st.integers(1, 33))  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=shapes(), divergence=st.sampled_from(DIVERGENCES), dtype=st.sampled_from(DTYPES))
def test_any_shape(
    backend: str, shape: tuple[int, ...], divergence: str, dtype: torch.dtype
) -> None:
    """Rows 0 to 70 cross the smallest chunk (32 rows), vocabularies differ both ways."""
    if backend == "cpu" and not cpu.available():
        pytest.skip(f"backend 'cpu': {cpu.why_not()}")
    p = _random(*shape, seed=shape[0]).to(dtype)
    p = replace(p, options={"workspace_mb": 1e-6})
    check_result(run(p, backend, divergence), replace(p, options={}), divergence, dtype)


@pytest.mark.parametrize("dtype_t", [*DTYPES, torch.float64], ids=lambda d: f"teacher-{str(d)[6:]}")
@pytest.mark.parametrize("dtype_w", DTYPES, ids=lambda d: f"head-{str(d)[6:]}")
@pytest.mark.parametrize("dtype_h", DTYPES, ids=lambda d: f"hidden-{str(d)[6:]}")
def test_any_mix_of_dtypes(
    dtype_h: torch.dtype, dtype_w: torch.dtype, dtype_t: torch.dtype, backend: str
) -> None:
    p = problem("aligned")
    p = replace(
        p, hs=p.hs.to(dtype_h), ws=p.ws.to(dtype_w), ht=p.ht.to(dtype_t), wt=p.wt.to(dtype_w)
    )
    got, want, plain = run(p, backend), expected(p), naive(p)
    check(got.loss, want.loss, "value", plain.loss)
    for gradient, like, dtype, name in (
        (got.dh, want.dh, dtype_h, "dh"), (got.dw, want.dw, dtype_w, "dw"),
    ):  # fmt: skip
        assert gradient.dtype == dtype
        # A 16-bit input anywhere lets a backend round the gradient block to 16 bits.
        exact = {dtype_h, dtype_w, dtype_t} <= {torch.float32, torch.float64}
        check(gradient, like, "gradient" if exact else "16-bit gradient", what=name)
    assert got.loss.dtype == (torch.float64 if dtype_t == torch.float64 else torch.float32)
