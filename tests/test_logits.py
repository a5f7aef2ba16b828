"""Are spread, z-scores and squared distances of logits those of the definitions?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import reference
from tests.problems import DTYPES, Problem, _random, near_converged, problem
from tests.tolerances import LADDER, check, ladder_bound, ladder_value_bound, relative_error

NAMES = [
    "aligned", "peaked", "one_row", "empty", "constant", "huge", "larger_student",
    "larger_teacher", "small_vocab_size", "zero_weight_rows", "one_token",
]  # fmt: skip
Found = tuple[Tensor, ...]


def leaves(p: Problem) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in (p.hs, p.ws, p.bs) if x is not None]


def gradients(loss: Tensor, p: Problem, x: list[Tensor]) -> Found:
    found = torch.autograd.grad(loss, x, allow_unused=True)
    return tuple(torch.zeros_like(a) if g is None else g for g, a in zip(found, x, strict=True))


def weight_of(p: Problem) -> Tensor:
    return torch.linspace(0, 1, len(p.hs)) if p.kd_weight is None else p.kd_weight


def mse(p: Problem, **options: Any) -> Found:
    x = leaves(p)
    loss, rows = mk.fused_linear_logit_mse(
        x[0], x[1], p.ht, p.wt, row_weight=weight_of(p), vocab_size=p.vocab,
        student_bias=x[2] if len(x) > 2 else None, teacher_bias=p.bt, **options,
    )  # fmt: skip
    assert not rows.requires_grad
    return loss.detach(), rows, *gradients(loss, p, x)


def mse_of_logits(p: Problem, dtype: torch.dtype = torch.float64) -> Found:
    p = p.to(dtype)
    x = leaves(p)
    z_s = reference.logits(x[0], x[1], x[2] if len(x) > 2 else None, vocab_size=p.vocab)
    z_t = reference.logits(p.ht, p.wt, p.bt, vocab_size=p.vocab)
    loss, rows = reference.linear_logit_mse(z_s, z_t, weight_of(p).to(dtype))
    return loss.detach(), rows.detach(), *gradients(loss, p, x)


def std(p: Problem) -> Found:
    x = leaves(p)
    found = mk.logit_std(*x, vocab_size=p.vocab)
    return found.detach(), *gradients((found * weight_of(p)).sum(), p, x)


def std_of_logits(p: Problem, dtype: torch.dtype = torch.float64) -> Found:
    p = p.to(dtype)
    x = leaves(p)
    found = reference.logit_std(
        reference.logits(x[0], x[1], x[2] if len(x) > 2 else None, vocab_size=p.vocab)
    )
    return found.detach(), *gradients((found * weight_of(p).to(dtype)).sum(), p, x)


def check_all(got: Found, want: Found, plain: Found, values: int, p: Problem) -> None:
    """Values and gradients; where models or tokens are equal they vanish but for rounding."""
    dtype, size = p.hs.dtype, float(p.ws.double().norm()) * 2
    row = "gradient" if dtype == torch.float32 else "16-bit gradient"
    for i, (x, y, z) in enumerate(zip(got, want, plain, strict=True)):
        check(x, y, "value" if i < values else row, z, cancels=size, what=str(i))
        assert x.dtype == (torch.float32 if i < values else dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    p = problem(name, dtype)
    if name == "huge" and dtype == torch.float16:
        p = replace(p, kd_weight=torch.full((6,), 1e-4))  # or the gradient is beyond 65,504
    check_all(mse(p), mse_of_logits(p), mse_of_logits(p, torch.float32), 2, p)
    if name not in ("constant", "one_token"):  # where the spread is 0
        check_all(std(p), std_of_logits(p), std_of_logits(p, torch.float32), 1, p)


def with_biases(p: Problem) -> Problem:
    generator = torch.Generator().manual_seed(5)
    b = [torch.randn(len(w), generator=generator).to(w.dtype) for w in (p.ws, p.wt)]
    return replace(p, bs=b[0], bt=b[1], options={})


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("which", ["both", "student", "teacher"])
def test_a_bias_is_one_more_column(which: str, dtype: torch.dtype) -> None:
    p = with_biases(problem("larger_teacher")).to(dtype)
    p = replace(p, bs=None if which == "teacher" else p.bs, bt=None if which == "student" else p.bt)
    check_all(mse(p), mse_of_logits(p), mse_of_logits(p, torch.float32), 2, p)
    check_all(std(p), std_of_logits(p), std_of_logits(p, torch.float32), 1, p)


@given(
    st.integers(0, 9), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9),
    st.integers(1, 9), st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(n: int, v_s: int, v_t: int, d_s: int, d_t: int, dtype: torch.dtype) -> None:
    p = _random(n, v_s, v_t, d_s, d_t, seed=n).to(dtype)
    check_all(mse(p), mse_of_logits(p), mse_of_logits(p, torch.float32), 2, p)
    if p.vocab > 1:
        check_all(std(p), std_of_logits(p), std_of_logits(p, torch.float32), 1, p)


@pytest.mark.parametrize("eps", LADDER)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
def test_the_ladder(eps: float, dtype: torch.dtype) -> None:
    p = near_converged(eps).to(dtype)
    got, want = mse(p), mse_of_logits(p)
    assert relative_error(got[0], want[0]) < ladder_value_bound("logit_mse", eps)
    for i in (2, 3):
        assert relative_error(got[i], want[i]) < ladder_bound(dtype, eps)


def test_many_chunks_are_one_loss() -> None:
    """As many rows at a time as the budget allows, never all V columns of all rows."""
    p = problem("larger_teacher")
    p = replace(p, hs=p.hs.repeat(9, 1), ht=p.ht.repeat(9, 1), kd_weight=None)
    few, whole = mse(p, workspace_mb=1e-6), mse(p)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(few, whole, strict=True))


def test_a_spread_of_zero_has_no_gradient() -> None:
    for p in (problem("one_token"), replace(problem("aligned"), hs=torch.zeros(32, 64))):
        assert not any(x.any() for x in std(p))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_is_alone_and_without_weight_reaches_nothing(bad: float) -> None:
    p = replace(problem("aligned"), kd_weight=torch.ones(32))
    broken = p.hs.clone()
    broken[3, 5] = bad
    b = replace(p, hs=broken)
    for got in (mse(b)[1:], std(b)):
        assert got[0][3].isnan() and got[0].isfinite().sum() == 31 and got[1][4:].isfinite().all()
    weight = torch.ones(32).index_fill(0, torch.tensor(3), 0)
    dead, clean = (replace(x, kd_weight=weight) for x in (b, p))
    for f in (mse, standard):
        got, want = f(dead), f(clean)
        assert all(torch.equal(got[i], want[i]) for i in (0, 2, 3)) and not got[2][3].any()


def test_autocast_rounds_what_enters_and_no_more() -> None:
    p = problem("aligned")
    with torch.autocast("cpu", torch.bfloat16):
        got = *mse(p)[:2], std(p)[0]
    q = p.to(torch.bfloat16)
    for x, y in zip(got, (*mse(q)[:2], std(q)[0]), strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)


# --- z-scored logits ------------------------------------------------------------------------------


def standard(p: Problem, backend: str = "eager", **options: Any) -> Found:
    x = leaves(p)
    given = {"kd_weight": weight_of(p), "vocab_size": p.vocab, "backend": backend, **options}
    out = mk.fused_linear_distill(x[0], x[1], p.ht, p.wt, p.labels, standardize=True, **given)
    return out.loss.detach(), out.kd, *gradients(out.loss, p, x), out.ce


def standard_of_logits(
    p: Problem, dtype: torch.dtype = torch.float64, ce_weight: float = 0.0, **options: Any
) -> Found:
    """From the logits, z-scored with torch's own functions."""
    p = p.to(dtype)
    x = leaves(p)
    z_s = reference.logits(x[0], x[1], x[2] if len(x) > 2 else None, vocab_size=p.vocab)
    z_t = reference.logits(p.ht, p.wt, vocab_size=p.vocab)
    ce = F.cross_entropy(z_s, p.labels, reduction="none")
    weight = weight_of(p).to(dtype)
    scored = (reference.standardize(z) for z in (z_s, z_t))
    loss, _, kd = reference.linear_distill(*scored, kd_weight=weight, **options)
    loss = loss + ce_weight * ce.sum()
    return loss.detach(), kd.detach(), *gradients(loss, p, x), ce.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["aligned", "one_row", "larger_student", "small_vocab_size"])
def test_z_scored_logits(name: str, dtype: torch.dtype, backend: str) -> None:
    p = problem(name, dtype)
    options = {"ce_weight": 0.3, "divergence": "jsd", "temperature": 2.0}
    plain = standard_of_logits(p, torch.float32, **options)
    got, want = standard(p, backend, **options), standard_of_logits(p, **options)
    check_all((*got[:2], got[4], *got[2:4]), (*want[:2], want[4], *want[2:4]),
              (*plain[:2], plain[4], *plain[2:4]), 3, p)  # fmt: skip
    assert not standard(p, backend)[4].any()


def test_the_released_z_score_is_a_temperature(backend: str) -> None:
    """LLAVADI's code divides by the sample standard deviation, of V − 1."""
    p = problem("aligned", torch.float64)
    got = standard(p, backend, temperature=(512 / 511) ** 0.5)
    z = [reference.logits(h, w) for h, w in ((p.hs, p.ws), (p.ht, p.wt))]
    z = [(x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7) for x in z]
    want = F.kl_div(z[0].log_softmax(-1), z[1].softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(got[1], want, rtol=1e-9, atol=0)


def test_z_scores_see_no_scale() -> None:
    p = problem("aligned")
    out = [
        mk.fused_linear_distill(p.hs * s, p.ws, p.ht, p.wt, standardize=True, backend="eager").kd
        for s in (1.0, 1e3)
    ]
    torch.testing.assert_close(*out, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES[:2], torch.float64], ids=lambda d: str(d)[6:])
def test_z_scores_are_of_what_bias_and_soft_cap_make(dtype: torch.dtype, backend: str) -> None:
    """And diagnostics of the softmaxes that the divergence sees."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("fp32 alone")
    p = with_biases(problem("larger_teacher")).to(dtype)
    x, size = leaves(p), float(p.ws.double().norm()) * 2

    def defined(dtype: torch.dtype) -> tuple[Found, Found]:
        q = p.to(dtype)
        y = leaves(q)
        logits = [reference.logits(h, w, b, 4.0, q.vocab) for h, w, b in (y, (q.ht, q.wt, q.bt))]
        z = [reference.standardize(x) / 1.5 for x in logits]
        loss, _, kd = reference.linear_distill(*z, divergence="reverse_kl")
        seen = tuple(reference.entropy(a) for a in z)
        return (loss.detach(), kd.detach(), *gradients(loss, q, y)), seen

    out = mk.fused_linear_distill(
        x[0], x[1], p.ht, p.wt, student_bias=x[2], teacher_bias=p.bt, student_softcap=4.0,
        teacher_softcap=4.0, vocab_size=p.vocab, divergence="reverse_kl", temperature=1.5,
        standardize=True, diagnostics=True, backend=backend,
    )  # fmt: skip
    (want, entropies), (plain, _) = defined(torch.float64), defined(torch.float32)
    got = out.loss.detach(), out.kd, *gradients(out.loss, p, x)
    row = {torch.float32: "gradient", torch.float64: "fp64"}.get(dtype, "16-bit gradient")
    for i, (a, b, c) in enumerate(zip(got, want, plain, strict=True)):
        check(a, b, "value" if i < 2 else row, c, cancels=size, what=str(i))
    for a, b in zip((out.student_entropy, out.teacher_entropy), entropies, strict=True):
        assert a is not None
        torch.testing.assert_close(a.double(), b.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", LADDER)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
def test_the_ladder_of_z_scores(eps: float, dtype: torch.dtype, backend: str) -> None:
    p = near_converged(eps).to(dtype)
    for name in ("forward_kl", "jsd"):
        got, want = standard(p, backend, divergence=name), standard_of_logits(p, divergence=name)
        assert relative_error(got[0], want[0]) < ladder_value_bound(name, eps)
        for i in (2, 3):
            assert relative_error(got[i], want[i]) < ladder_bound(dtype, eps)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_spread_beside_a_large_mean(offset: float, backend: str) -> None:
    """σ is that of deviations, not a difference of squares: logits all high change nothing."""
    p = problem("aligned")
    bias = torch.full((p.ws.shape[0],), offset)
    kd = mk.fused_linear_distill(
        p.hs, p.ws, p.ht, p.wt, student_bias=bias, standardize=True, backend=backend
    ).kd
    torch.testing.assert_close(kd, standard(p, backend)[1], rtol=1e-3, atol=0)


def rounding_of_capped_logits(
    y_s: Tensor, y_t: Tensor, divergence: str
) -> tuple[Found, Found, Tensor]:
    """D (N,) and its gradient (N, V) for the logits tanh(y), z-scored, in fp64; how far each and
    the scores move, row by row, for an error of 1 in tanh(y) and in its slope.
    """
    y, t = y_s.double(), y_t.double().tanh()
    z, slope = y.tanh().requires_grad_(), y.cosh() ** -2
    a, b = reference.standardize(z), reference.standardize(t)
    loss, _, kd = reference.linear_distill(a, b, kd_weight=1.0, divergence=divergence)
    (dz,) = torch.autograd.grad(loss, z)
    a, p, q, kd = a.detach(), b.softmax(-1), a.detach().softmax(-1), kd.detach()
    sigma = reference.logit_std(z.detach())
    moved = 1 + 1 / torch.minimum(sigma, reference.logit_std(t))  # a score, by 1/σ
    along = ((p + q) * a.abs()).sum(-1, keepdim=True)
    terms = slope * (p + q + a.abs() * along / y.shape[1])  # of which the gradient is a sum
    bounds = (
        moved * ((q - p).abs().sum(-1) + kd),
        moved * terms.norm(dim=-1) / sigma + dz.norm(dim=-1),
    )
    return (kd, dz * slope), bounds, moved


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_z_scores_of_saturated_logits_lose_what_rounding_them_loses(
    dtype: torch.dtype, divergence: str, backend: str
) -> None:
    """Where a soft-cap saturates a whole row σ is small, down to 1e-6 of the cap: errors of 1 are
    possible in fp32. All of it is that of a logit and a slope that are correct to the last place or
    two: the very same code has it in fp64, 5e8 times smaller.
    """
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("fp32 alone")
    steep, side = torch.logspace(-0.5, 1, 24)[:, None], torch.arange(3.0).repeat(8)[:, None]
    y_s, y_t = ((steep * (side + torch.randn(24, 64))).to(dtype) for _ in range(2))
    want, bounds, moved = rounding_of_capped_logits(y_s, y_t, divergence)
    head = torch.eye(64, dtype=dtype)  # the hidden states are the logits
    out = mk.fused_linear_distill(
        y_s.requires_grad_(), head, y_t, head, student_softcap=1.0, teacher_softcap=1.0,
        divergence=divergence, standardize=True, backend=backend,
    )  # fmt: skip
    got = out.kd, *torch.autograd.grad(out.loss, y_s)
    place = torch.finfo(dtype).eps / 2
    representable = place * moved < 1e-2  # the scores are; else nothing is left to compare
    assert representable.sum() > 12
    for x, truth, bound, times in zip(got, want, bounds, (16, 6), strict=True):
        error = (x - truth).view(24, -1).norm(dim=-1) / (place * bound)
        assert error[representable].max() < times


def test_rows_without_any_spread(backend: str) -> None:
    """Constant logits score 0: the softmax is uniform, and nothing goes back through σ."""
    p = replace(problem("aligned"), hs=torch.zeros(32, 64))
    got = standard(p, backend)
    z = reference.standardize(reference.logits(p.ht.double(), p.wt.double()))
    want = math.log(p.vocab) - reference.entropy(z)
    torch.testing.assert_close(got[1].double(), want, rtol=1e-4, atol=0)
    assert got[2].isfinite().all() and not got[3].any()


def test_bad_input_is_named() -> None:
    p = problem("larger_teacher")
    heads: dict[str, Any] = {"student_hidden": p.hs, "student_weight": p.ws, "teacher_hidden": p.ht,
             "teacher_weight": p.wt}  # fmt: skip
    faults: list[tuple[dict[str, Any], str]] = [
        ({"teacher_hidden": None}, "teacher_hidden: expected a tensor, got NoneType"),
        ({"teacher_hidden": p.ht[1:]}, "teacher_hidden: has 9 rows, but student_hidden has 10"),
        ({"row_weight": torch.ones(3)}, r"row_weight: expected a number or shape \(10,\), got"),
        ({"vocab_size": 191}, "vocab_size: got 191, expected 1 to 190"),
        ({"teacher_bias": torch.ones(3)}, "teacher_bias: got 3 entries for a head of 211 tokens"),
    ]
    for change, message in faults:
        with pytest.raises((TypeError, ValueError), match=message):
            mk.fused_linear_logit_mse(**heads | change)
    with pytest.raises(ValueError, match="weight: its rows have 24 entries, but hidden has size"):
        mk.logit_std(p.hs, p.wt)
