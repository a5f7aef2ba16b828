"""Can the definitions be differentiated, and do they vanish where they should?

Their values are compared with formulas written by hand in test_independent.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mllmkd_kernels import reference
from tests.problems import DIVERGENCES

# 4 rows of 7 tokens: gradcheck evaluates the function twice for each of 28 entries.
N, V = 4, 7


def pair(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, N, V, dtype=torch.float64) * scale
    return a.requires_grad_(), b


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_autograd_differentiates_every_divergence(divergence: str) -> None:
    a, b = pair()
    assert torch.autograd.gradcheck(lambda a: reference.divergence_rows(a, b, divergence), a)
    assert torch.autograd.gradgradcheck(lambda a: reference.divergence_rows(a, b, divergence), a)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_are_finite_where_one_token_has_all_the_mass(divergence: str) -> None:
    a, b = pair(1e4)
    reference.divergence_rows(a, b, divergence).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "soft_cross_entropy"])
def test_a_divergence_vanishes_for_equal_models_and_only_there(divergence: str) -> None:
    a, b = pair()
    torch.testing.assert_close(
        reference.divergence_rows(a, a.detach() + 3.0, divergence), torch.zeros_like(a[:, 0])
    )  # softmax does not see the shift
    assert (reference.divergence_rows(a, b, divergence) > 0.01).all()
