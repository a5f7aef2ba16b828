"""Are the preference losses and the balance loss those of their definitions?"""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import reference
from mllmkd_kernels.preference import KINDS
from tests.problems import DTYPES
from tests.tolerances import check


def pairs(n: int, dtype: torch.dtype = torch.float32, size: float = 30.0) -> list[Tensor]:
    """Sums of log-probabilities: tens of nats below 0."""
    generator = torch.Generator().manual_seed(n)
    return [-(torch.rand(n, generator=generator) * size).to(dtype) for _ in range(4)]


def found(x: list[Tensor], function: Any) -> tuple[Tensor, ...]:
    given = [t.clone().requires_grad_(i < 2) for i, t in enumerate(x)]
    loss = function(*given)
    return loss.detach(), *torch.autograd.grad(loss, given[:2])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 5])
def test_values_and_gradients(
    n: int, kind: str, beta: float, detach: bool, dtype: torch.dtype
) -> None:
    x = pairs(n, dtype, 8.0)

    def defined(c: Tensor, r: Tensor, ref_c: Tensor, ref_r: Tensor) -> Tensor:
        return reference.preference(c - ref_c, r - ref_r, kind, beta, detach)

    def ours(*given: Tensor) -> Tensor:
        return mk.preference_loss(*given, kind=kind, beta=beta, detach_baseline=detach)

    want, plain = (found([t.to(d) for t in x], defined) for d in (torch.float64, torch.float32))
    got = found(x, ours)
    half = dtype in (torch.bfloat16, torch.float16)
    for i, (a, b, c) in enumerate(zip(got, want, plain, strict=True)):
        row = "value" if i == 0 else "16-bit gradient" if half else "gradient"
        check(a, b, row, c, cancels=1e-6, what=f"{kind} {i}")
        assert a.dtype == (dtype if i or dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_by_finite_differences(kind: str) -> None:
    x = [t.requires_grad_(i < 2) for i, t in enumerate(pairs(4, torch.float64, 3.0))]
    assert torch.autograd.gradcheck(
        lambda c, r: mk.preference_loss(c, r, *x[2:], kind=kind, detach_baseline=False), x[:2]
    )


def test_by_hand() -> None:
    """r_c = 2 and −4, r_r = 1 and −5: K_c = max(0, −1) = 0 and K_r = 0."""
    x = [torch.tensor(v) for v in ([-1.0, -9.0], [-2.0, -9.0], [-3.0, -5.0], [-3.0, -4.0])]
    sigma = lambda v: 1 / (1 + math.exp(-v))  # noqa: E731
    kto = sum(1 - sigma(0.1 * r) for r in (2, -4)) + sum(1 - sigma(-0.1 * r) for r in (1, -5))
    assert float(mk.preference_loss(*x)) == pytest.approx(kto / 4, rel=1e-6)
    dpo = -math.log(sigma(0.1))  # both margins are 1
    assert float(mk.preference_loss(*x, kind="sigmoid")) == pytest.approx(dpo, rel=1e-6)
    assert float(mk.preference_loss(*x, kind="hinge")) == pytest.approx(0.9, rel=1e-6)
    assert float(mk.preference_loss(*x, kind="ipo")) == pytest.approx(16.0, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_extreme_likelihood(kind: str) -> None:
    """Thousands of nats apart: no overflow, and a loss that a wrong preference still moves."""
    far, zero = torch.tensor([-1e5]), torch.zeros(1)
    for c, r in ((far, zero), (zero, far)):
        loss, *grads = found([c, r, zero, zero], lambda *x: mk.preference_loss(*x, kind=kind))
        assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert float(mk.preference_loss(far, zero, zero, zero, kind="sigmoid")) == pytest.approx(1e4)


def test_no_pairs_and_bad_input() -> None:
    for kind in KINDS:
        loss, *grads = found(pairs(0), lambda *x, kind=kind: mk.preference_loss(*x, kind=kind))
        assert float(loss) == 0 and all(g.shape == (0,) for g in grads)
    x = pairs(3)
    with pytest.raises(ValueError, match="kind: got 'dpo', expected one of kto_pair, sigmoid, hin"):
        mk.preference_loss(*x, kind="dpo")
    with pytest.raises(ValueError, match="rejected: has 2 rows, but chosen has 3"):
        mk.preference_loss(x[0], x[1][1:], *x[2:])
    with pytest.raises(ValueError, match="beta: expected a positive number, got 0"):
        mk.preference_loss(*x, beta=0)


# --- balance --------------------------------------------------------------------------------------


def routers(tokens: int, *experts: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, e, generator=generator).to(dtype) for e in experts]


def balance(x: list[Tensor], function: Any, **options: Any) -> tuple[Tensor, ...]:
    given = [t.clone().requires_grad_() for t in x]
    loss = function(given, **options)
    return loss.detach(), *torch.autograd.grad(loss, given)


@given(st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=3),
       st.sampled_from(DTYPES))  # fmt: skip
def test_balance_of_any_shape(tokens: int, experts: list[int], dtype: torch.dtype) -> None:
    x = routers(tokens, *experts, dtype=dtype)
    want, plain = (
        balance([t.to(d) for t in x], reference.balance) for d in (torch.float64, torch.float32)
    )
    for i, (a, b, c) in enumerate(zip(balance(x, mk.balance_loss), want, plain, strict=True)):
        row = "value" if i == 0 else "gradient" if dtype == torch.float32 else "16-bit gradient"
        check(a, b, row, c, cancels=1.0, what=str(i))


def test_balance_is_least_where_shares_are_equal_and_layers_are_not_pooled() -> None:
    even = [torch.eye(4) * 1e-6] * 3
    assert float(mk.balance_loss(even)) == pytest.approx(3.0, abs=1e-5)
    collapsed = [torch.tensor([[50.0, 0.0]]).expand(6, 2), torch.tensor([[0.0, 50.0]]).expand(6, 2)]
    assert float(mk.balance_loss(collapsed)) == pytest.approx(4.0)  # pooled it would be the least


def test_masked_tokens_count_for_nothing() -> None:
    x, mask = routers(6, 4, 3), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    want = balance([t[mask] for t in x], mk.balance_loss)
    for hole in (0.0, float("nan"), float("inf")):
        y = [t.masked_fill(~mask[:, None], hole) for t in x]
        got = balance(y, mk.balance_loss, mask=mask)
        check(got[0], want[0], "value")
        for a, b in zip(got[1:], want[1:], strict=True):
            check(a[mask], b, "gradient")
            assert not a[~mask].any()
    assert float(mk.balance_loss(x, torch.zeros(6).bool())) == 0


def test_bad_routers_are_named() -> None:
    x = routers(6, 4, 3)
    with pytest.raises(ValueError, match="router_logits: got none, expected a list"):
        mk.balance_loss([])
    with pytest.raises(ValueError, match="router_logits: got a tensor, expected a list"):
        mk.balance_loss(x[0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mask: has 5 rows, but router_logits"):
        mk.balance_loss(x, torch.ones(5).bool())
    with pytest.raises(
        ValueError, match=r"mask: expected bool of shape \(tokens,\), got torch.int"
    ):
        mk.balance_loss(x, torch.ones(6, dtype=torch.int64))
