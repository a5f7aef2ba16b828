"""Is `fused_linear_logprob` the log-probability of the tokens, and its gradient the gradient?"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import reference
from mllmkd_kernels.backends import cpu
from tests.problems import BACKENDS, DTYPES, Problem, _random, problem
from tests.tolerances import check

Out = tuple[Tensor, Tensor, Tensor]
NAMES = [
    "aligned",
    "ragged",
    "peaked",
    "masked",
    "one_row",
    "empty",
    "constant",
    "huge",
    "one_token",
]


def run(p: Problem, weights: Tensor, backend: str, **options) -> Out:
    """logp and the gradients of Σ weights · logp."""
    h, w = p.hs.clone().requires_grad_(), p.ws.clone().requires_grad_()
    logp = mk.fused_linear_logprob(h, w, p.labels, bias=p.bs, backend=backend, **options)
    (weights * logp).sum().backward()
    assert h.grad is not None and w.grad is not None
    return logp.detach(), h.grad, w.grad


def expected(p: Problem, weights: Tensor, dtype: torch.dtype = torch.float64, **options) -> Out:
    p = p.to(dtype)
    h, w = p.hs.clone().requires_grad_(), p.ws.clone().requires_grad_()
    z = reference.logits(h, w, p.bs, options.get("softcap"), options.get("vocab_size"))
    logp = reference.linear_logprob(z, p.labels, options.get("temperature", 1.0))
    (weights.to(dtype) * logp).sum().backward()
    assert h.grad is not None and w.grad is not None
    return logp.detach(), h.grad, w.grad


def check_all(p: Problem, dtype: torch.dtype, backend: str, **options) -> None:
    weights = torch.linspace(-1, 2, p.hs.shape[0])
    naive_options = {k: v for k, v in options.items() if k != "workspace_mb"}
    got = run(p, weights, backend, **options)
    want, plain = (
        expected(p, weights, **naive_options),
        expected(p, weights, torch.float32, **naive_options),
    )
    row = "gradient" if dtype == torch.float32 else "16-bit gradient"
    size = float(p.ws.double().norm()) * 2
    check(got[0], want[0], "value", plain[0], what="logp")
    check(got[1], want[1], row, plain[1], cancels=size, what="dh")
    check(got[2], want[2], row, plain[2], cancels=size, what="dw")
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype
    assert not got[0][p.labels == -100].any() and (got[0] <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, dtype: torch.dtype, backend: str) -> None:
    check_all(problem(name, dtype), dtype, backend)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"temperature": 3.0}, {"softcap": 5.0}, {"vocab_size": 200},
     {"temperature": 2.0, "softcap": 2.0, "vocab_size": 200}],
    ids=str,
)  # fmt: skip
def test_options(options: dict, backend: str) -> None:
    p = problem("ragged")
    check_all(replace(p, labels=p.labels.clamp(max=199)), torch.float32, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@given(st.integers(0, 70), st.integers(1, 90), st.integers(1, 20), st.sampled_from(DTYPES))
def test_any_shape(backend: str, n: int, v: int, d: int, dtype: torch.dtype) -> None:
    """Rows 0 to 70 cross the smallest chunk of 32 rows."""
    if backend == "cpu" and not cpu.available():
        pytest.skip(f"backend 'cpu': {cpu.why_not()}")
    check_all(_random(n, v, v, d, d, seed=n).to(dtype), dtype, backend, workspace_mb=1e-6)


def test_a_wide_teacher_beside_a_narrow_student_may_be_fp64(backend: str) -> None:
    p = problem("ragged", torch.float64)
    got = run(p, torch.ones(13), backend)
    for x, y in zip(got, expected(p, torch.ones(13)), strict=True):
        assert x.dtype == torch.float64
        check(x, y, "fp64")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_broken_row_is_nan_and_alone(bad: float, softcap: float | None, backend: str) -> None:
    p = problem("aligned")
    hs = p.hs.clone()
    hs[0, 5], hs[3, 5] = bad, bad  # row 3 has no label
    got = run(replace(p, hs=hs), torch.ones(32), backend, softcap=softcap)
    assert got[0][0].isnan() and got[0][1:].isfinite().all() and got[0][3] == 0
    assert got[1][0].isnan().any() and not got[1][3].any() and got[1][4:].isfinite().all()
    assert got[2].isnan().any()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_broken_row_that_nobody_asks_for_reaches_no_weight(
    softcap: float | None, backend: str
) -> None:
    p = problem("aligned")
    hs = p.hs.clone()
    hs[3] = torch.nan  # row 3 has no label
    got = run(replace(p, hs=hs), torch.ones(32), backend, softcap=softcap)
    clean = run(p, torch.ones(32), backend, softcap=softcap)
    assert torch.equal(got[2], clean[2]) and torch.equal(got[0], clean[0])
    assert torch.equal(got[1], clean[1])


def test_frozen_inputs_get_nothing(backend: str) -> None:
    p = problem("aligned")
    w = p.ws.clone().requires_grad_()
    mk.fused_linear_logprob(p.hs, w, p.labels, backend=backend).sum().backward()
    assert p.hs.grad is None and w.grad is not None
    check(w.grad, run(p, torch.ones(32), backend)[2], "gradient")


def test_the_sum_over_a_sequence_as_in_dpo(backend: str) -> None:
    """Two models' log-ratios of two sequences, differentiated through both sums."""
    p = problem("aligned")
    with torch.no_grad():
        base = mk.fused_linear_logprob(p.ht, p.wt, p.labels, backend=backend)
    h = p.hs.clone().requires_grad_()
    ratio = mk.fused_linear_logprob(h, p.ws, p.labels, backend=backend) - base
    margin = ratio[:16].sum() - ratio[16:].sum()
    torch.nn.functional.logsigmoid(0.01 * margin).backward()
    exact = p.to(torch.float64)
    g = exact.hs.clone().requires_grad_()
    rows = [
        reference.linear_logprob(reference.logits(*head), p.labels)
        for head in ((g, exact.ws), (exact.ht, exact.wt))
    ]
    want = rows[0] - rows[1]
    torch.nn.functional.logsigmoid(0.01 * (want[:16].sum() - want[16:].sum())).backward()
    assert h.grad is not None and g.grad is not None
    check(h.grad, g.grad, "gradient")
