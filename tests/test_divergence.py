"""Do the table's terms say the same as the definitions, and say it in fp32?"""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mllmkd_kernels import Divergence, reference
from mllmkd_kernels.divergence import PARAMETERS, Pair, gradients, values
from tests.problems import DIVERGENCES
from tests.tolerances import LADDER, check, relative_error

TABLE = [Divergence(d) for d in DIVERGENCES] + [
    Divergence("jsd", beta=0.05),
    Divergence("jsd", beta=0.95),
    Divergence("skew_forward_kl", lam=0.9),
    Divergence("skew_reverse_kl", lam=0.9),
]


def name_of(divergence: Divergence) -> str:
    return f"{divergence.name}-{divergence.param}"


def log_probs(scale: float, eps: float | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Two models' log-probabilities (2, 16, 50): 16 rows average the error of one, 50 tokens have
    both tails.
    """
    a = torch.randn(16, 50, dtype=torch.float64) * scale
    noise = torch.randn_like(a)
    b = noise * scale if eps is None else a + eps * noise
    return torch.stack((b, a)).log_softmax(-1).to(dtype)


def test_the_table_has_exactly_the_seven() -> None:
    assert tuple(PARAMETERS) == DIVERGENCES


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 300.0])
@pytest.mark.parametrize("divergence", TABLE, ids=name_of)
def test_values_and_gradients_are_the_definitions(divergence: Divergence, scale: float) -> None:
    log_p, log_q = log_probs(scale)
    a = log_q.clone().requires_grad_()  # log-probabilities are logits like any others
    want = reference.divergence_rows(a, log_p, divergence)
    want.sum().backward()
    assert a.grad is not None
    check(values(divergence, Pair(log_p, log_q)), want, "fp64", what="values")
    error = (gradients(divergence, Pair(log_p, log_q)) - a.grad).abs().max()
    assert error < 1e-12 * max(1.0, float(a.grad.abs().max()))


@pytest.mark.parametrize("eps", LADDER)
@pytest.mark.parametrize("divergence", TABLE, ids=name_of)
def test_sums_lose_nothing_near_convergence(divergence: Divergence, eps: float) -> None:
    """DESIGN 6: exact to 2e-6 given the log-probabilities, where the plain sum is not."""
    log_p, log_q = log_probs(2.0, eps, torch.float32)
    # The truth for these very numbers: unnormalised by fp32 rounding, the terms' own shift of
    # (q − p) and all, so from the same function in fp64, which the test above holds to the
    # definition.
    exact = log_p.double(), log_q.double()
    assert (
        relative_error(values(divergence, Pair(log_p, log_q)), values(divergence, Pair(*exact)))
        < 2e-6
    )
    got, want = gradients(divergence, Pair(log_p, log_q)), gradients(divergence, Pair(*exact))
    assert relative_error(got, want) < 2e-6


def test_the_plain_sum_does_lose_it() -> None:
    log_p, log_q = log_probs(2.0, 0.003, torch.float32)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1)
    want = values(Divergence(), Pair(log_p.double(), log_q.double()))
    assert relative_error(plain, want) > 1e-4


@pytest.mark.parametrize("divergence", TABLE, ids=name_of)
def test_equal_models(divergence: Divergence) -> None:
    log_q = log_probs(3.0, dtype=torch.float32)[1]
    if divergence.name != "soft_cross_entropy":
        assert not values(divergence, Pair(log_q, log_q)).any()
    assert not gradients(divergence, Pair(log_q, log_q)).any()


def logits(low: float, high: float) -> st.SearchStrategy[np.ndarray]:
    rows = hnp.arrays(np.float32, (2, 3, 12), elements=st.floats(low, high, width=32))
    return rows


@pytest.mark.parametrize("divergence", TABLE, ids=name_of)
@given(z=logits(-(2.0**14), 2.0**14))
def test_never_negative_never_nan(divergence: Divergence, z: np.ndarray) -> None:
    log_p, log_q = torch.from_numpy(z.copy()).log_softmax(-1)
    got, slope = values(divergence, Pair(log_p, log_q)), gradients(divergence, Pair(log_p, log_q))
    assert (got >= 0).all() and got.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("divergence", TABLE, ids=name_of)
def test_gradients_of_logits_sum_to_zero(divergence: Divergence) -> None:
    """Adding a constant to every logit changes nothing."""
    log_p, log_q = log_probs(2.0)
    assert gradients(divergence, Pair(log_p, log_q)).sum(-1).abs().max() < 1e-14


@pytest.mark.parametrize("divergence", TABLE, ids=name_of)
@pytest.mark.parametrize("which", [0, 1])
def test_nan_stays_nan(divergence: Divergence, which: int) -> None:
    both = log_probs(2.0)
    both[which, 3, 4] = torch.nan
    got = values(divergence, Pair(*both))
    assert got[3].isnan() and got.isnan().sum() == 1
    slope = gradients(divergence, Pair(*both))
    assert slope[3].isnan().any() and not slope[[0, 1, 2, 4]].isnan().any()


def test_of_accepts_a_name_or_itself() -> None:
    jsd = Divergence("jsd", beta=0.3)
    assert Divergence.of(jsd) is jsd and Divergence.of("jsd").param == 0.5
    assert Divergence.of("skew_forward_kl").param == Divergence.of("skew_reverse_kl").param == 0.1
    assert Divergence().name == "forward_kl" and Divergence().param == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "kl"}, r"divergence: got 'kl', expected one of forward_kl, reverse_kl, jsd, .*"),
        (
            {"name": "forward_kl", "beta": 0.5},
            r"'forward_kl' has no parameter 'beta' \(got beta=0.5",
        ),
        ({"name": "jsd", "lam": 0.5}, r"'jsd' has no parameter 'lam'"),
        ({"name": "jsd", "beta": 0.0}, r"beta of 'jsd' must lie in \(0, 1\), got 0.0"),
        ({"name": "jsd", "beta": 1.0}, r"beta of 'jsd' must lie in \(0, 1\), got 1.0"),
        ({"name": "jsd", "beta": torch.tensor(0.5)}, r"beta of 'jsd' must lie in \(0, 1\)"),
        ({"name": "skew_forward_kl", "lam": float("nan")}, r"lam of .* must lie in .* got nan"),
    ],
)
def test_bad_parameters(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Divergence(**arguments)


def test_neither_name_nor_divergence() -> None:
    with pytest.raises(TypeError, match=r"divergence: expected a name or a Divergence, got int"):
        Divergence.of(3)  # pyright: ignore[reportArgumentType]
