"""Does Triton's table say the same as Python's?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from mllmkd_kernels import Divergence  # noqa: E402
from mllmkd_kernels import divergence as div  # noqa: E402
from mllmkd_kernels.backends.triton import divergence, tiles  # noqa: E402
from tests.test_divergence import TABLE, log_probs, name_of  # noqa: E402
from tests.tolerances import LADDER, relative_error  # noqa: E402

#: Parameters near their ends.
ENDS = [
    Divergence(name, **{key: end})
    for name, (key, _) in div.PARAMETERS.items()
    if key is not None
    for end in (1e-3, 0.999)
]

#: A whole tensor's error where log-probabilities are given: that of `tests.test_divergence`.
EXACT = 2e-6


@triton.jit
def _table(log_p, log_q, out, means, param, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """value, slope and gradient of n tokens, each with a mean of its own."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lp = tl.load(log_p + i, i < n, other=-float("inf"))
    lq = tl.load(log_q + i, i < n, other=-float("inf"))
    value, slope = divergence.terms(lp, lq, param, NAME)
    mean = tl.load(means + i, i < n, other=0.0)
    tl.store(out + i, value, i < n)
    tl.store(out + n + i, slope, i < n)
    tl.store(out + 2 * n + i, divergence.gradient(lp, lq, slope, mean, NAME), i < n)


def table(d: Divergence, log_p: Tensor, log_q: Tensor, means: Tensor) -> Tensor:
    """(value, slope, gradient) of each token, (3, ...)."""
    n = log_p.numel()
    out = torch.empty(3, *log_p.shape, device=log_p.device)
    constants = divergence.constants_of(d.name, d.param)
    _table[(triton.cdiv(n, 64),)](
        log_p, log_q, out, means.contiguous(), constants, n, NAME=d.name, BLOCK=64
    )
    return out


@triton.jit
def _elementary(x, out, n: tl.constexpr, FUNCTION: tl.constexpr):
    i = tl.arange(0, n)
    y = tl.load(x + i)
    if FUNCTION == "log1p":
        y = tiles.log1p(y)
    elif FUNCTION == "log2":
        y = tiles.log2(y)
    elif FUNCTION == "tanh":
        y = tiles.tanh(y)
    else:
        y = tiles.expm1_near(y)
    tl.store(out + i, y)


def spread(low: float, high: float) -> Tensor:
    """512 numbers of either sign, evenly spread in their logarithm."""
    x = torch.logspace(math.log10(low), math.log10(high), 256)
    return torch.cat((x, -x))


@pytest.mark.parametrize(
    ("function", "x", "want"),
    [
        ("log1p", torch.cat((spread(1e-7, 0.999), spread(1e-7, 1e6).abs())), torch.log1p),
        ("tanh", spread(1e-7, 1e3), torch.tanh),
        ("expm1", spread(1e-7, 0.5), torch.expm1),
    ],
)
def test_elementary_functions(function: str, x: Tensor, want, device: torch.device) -> None:
    x, out = x.to(device), torch.empty_like(x, device=device)
    _elementary[(1,)](x, out, n=x.numel(), FUNCTION=function)
    exact = want(x.double())
    assert ((out - exact) / exact).abs().max() < 4e-7


def test_a_logarithm_is_as_near_as_its_argument_is_known(device: torch.device) -> None:
    x = torch.cat((spread(1e-36, 1e36).abs(), 1 + spread(1e-6, 0.4))).to(device)
    out = torch.empty_like(x)
    _elementary[(1,)](x, out, n=x.numel(), FUNCTION="log2")
    exact = torch.log2(x.double())
    assert ((out - exact).abs() <= 4e-7 * exact.abs().clamp(min=1)).all()


def test_elementary_functions_keep_nan_and_ends(device: torch.device) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0], device=device)
    out = torch.empty_like(x)
    _elementary[(1,)](x, out, n=4, FUNCTION="tanh")
    assert out[0].isnan() and out[1:].tolist() == [1.0, -1.0, 0.0]
    _elementary[(1,)](x[[0, 0, 0, 3]], out, n=4, FUNCTION="log1p")
    assert out[:3].isnan().all() and out[3] == 0


def test_the_names_are_those_of_the_table() -> None:
    plain = {"forward_kl", "soft_cross_entropy"}
    assert set(div.PARAMETERS) - plain == divergence.NEEDS_MEAN


@pytest.mark.parametrize("d", TABLE, ids=name_of)
def test_rows_are_pythons(d: Divergence, device: torch.device) -> None:
    log_p, log_q = (x.to(device) for x in log_probs(3.0, dtype=torch.float32))
    exact = log_p.double(), log_q.double()
    values, slopes, _ = table(d, log_p, log_q, torch.zeros_like(log_q))
    assert relative_error(values.double().sum(-1), div.values(d, div.Pair(*exact))) < EXACT
    mean = (log_q.double().exp() * slopes.double()).sum(-1, keepdim=True).float()
    got = table(d, log_p, log_q, mean.expand_as(log_q))[2]
    assert relative_error(got, div.gradients(d, div.Pair(*exact))) < EXACT


@pytest.mark.parametrize("eps", LADDER)
@pytest.mark.parametrize("d", TABLE, ids=name_of)
def test_nothing_is_lost_near_convergence(d: Divergence, eps: float, device: torch.device) -> None:
    log_p, log_q = (x.to(device) for x in log_probs(2.0, eps, torch.float32))
    exact = log_p.double(), log_q.double()
    values, slopes, _ = table(d, log_p, log_q, torch.zeros_like(log_q))
    assert relative_error(values.double().sum(-1), div.values(d, div.Pair(*exact))) < EXACT
    mean = (log_q.double().exp() * slopes.double()).sum(-1, keepdim=True).float()
    got = table(d, log_p, log_q, mean.expand_as(log_q))[2]
    assert relative_error(got, div.gradients(d, div.Pair(*exact))) < EXACT


@pytest.mark.parametrize("d", TABLE + ENDS, ids=name_of)
def test_each_token_far_and_near(d: Divergence, device: torch.device) -> None:
    """u from 1e-6 to 100 of either sign, one token at a time, where no sum hides an error."""
    u = spread(1e-6, 100.0)
    u = torch.cat((torch.zeros(1), u))
    high = torch.full_like(u, -0.1)  # the larger of the two log-probabilities
    log_p = torch.where(u < 0, high, high - u).to(device)
    log_q = torch.where(u < 0, high + u, high).to(device)
    value, slope, da = table(d, log_p, log_q, torch.zeros_like(log_q))
    exact = log_p.double()[:, None], log_q.double()[:, None]
    want = div.values(d, div.Pair(*exact))
    # Beyond |u| = 1 a term is a sum in p and q, whose rounding is that of the larger.
    size = torch.maximum(exact[0], exact[1]).exp().squeeze(1) * u.abs().to(device).clamp(max=1.0)
    assert ((value - want).abs() <= 1e-6 * size + 2e-6 * want.abs()).all()
    assert value[0] == 0 or d.name == "soft_cross_entropy"
    if d.name in divergence.NEEDS_MEAN:
        want, q = div.slopes(d, div.Pair(*exact)).squeeze(1), exact[1].exp().squeeze(1)
        bound = 1e-6 * u.abs().to(device).clamp(max=1.0) + 2e-6 * want.abs()
        assert ((slope - want).abs() <= bound)[log_q > -60].all()  # less has no weight
        assert relative_error(da, q * slope.double()) < EXACT
    else:
        want = exact[1].exp().squeeze(1) - exact[0].exp().squeeze(1)
        assert ((da - want).abs() <= EXACT * want.abs()).all()


@pytest.mark.parametrize("d", TABLE, ids=name_of)
def test_masked_tokens(d: Divergence, device: torch.device) -> None:
    """Masked by the teacher, by the student, by both; and NaN from either."""
    inf, nan = math.inf, math.nan
    log_p = torch.tensor([-inf, -1.0, -inf, nan, -1.0], device=device)
    log_q = torch.tensor([-1.0, -inf, -inf, -1.0, nan], device=device)
    value, slope, da = table(d, log_p, log_q, torch.full_like(log_q, 0.25))
    want = div.values(d, div.Pair(log_p.double()[:, None], log_q.double()[:, None]))
    assert torch.equal(value.isfinite(), want.isfinite())
    finite = want.isfinite()
    assert (value[finite] - want[finite]).abs().max() < 1e-6
    assert torch.equal(value[~finite].isnan(), want[~finite].isnan())
    assert value[2] == slope[2] == da[2] == 0
    assert value[3:].isnan().all() and da[3:].isnan().all() and not da[1:3].isnan().any()
