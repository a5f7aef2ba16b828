"""Are the definitions themselves right? Against torch's own losses, second derivatives and limits.

What is compared with formulas written by hand stands in test_independent.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mllmkd_kernels import Divergence, reference
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


def test_torch_agrees() -> None:
    a, b = pair()
    log_q, log_p = a.log_softmax(-1), b.log_softmax(-1)

    def kl(x: Tensor, y: Tensor) -> Tensor:  # KL(x ‖ y); torch names the second argument first
        return F.kl_div(y, x, log_target=True, reduction="none").sum(-1)

    rows = {d: reference.divergence_rows(a, b, d) for d in DIVERGENCES}
    m = torch.log((log_p.exp() + log_q.exp()) / 2)
    torch.testing.assert_close(rows["forward_kl"], kl(log_p, log_q))
    torch.testing.assert_close(rows["reverse_kl"], kl(log_q, log_p))
    torch.testing.assert_close(rows["jsd"], (kl(log_p, m) + kl(log_q, m)) / 2)
    soft = F.cross_entropy(a, b.softmax(-1), reduction="none")
    torch.testing.assert_close(rows["soft_cross_entropy"], soft)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(soft, rows["forward_kl"] + entropy)
    torch.testing.assert_close(
        rows["total_variation"],
        F.l1_loss(a.softmax(-1), b.softmax(-1), reduction="none").sum(-1) / 2,
    )


def test_conventions_of_the_parameters() -> None:
    """β is the teacher's share of the mixture, λ that of the first argument: not the reverse."""
    a, b = pair()
    p, q = b.softmax(-1), a.softmax(-1)

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return (x * (x / y).log()).sum(-1)

    m = 0.1 * p + 0.9 * q
    rows = reference.divergence_rows
    torch.testing.assert_close(
        rows(a, b, Divergence("jsd", beta=0.1)), 0.1 * kl(p, m) + 0.9 * kl(q, m)
    )
    torch.testing.assert_close(rows(a, b, "skew_forward_kl"), kl(p, m))
    torch.testing.assert_close(rows(a, b, "skew_reverse_kl"), kl(q, 0.9 * p + 0.1 * q))
    for name, limit in (("skew_forward_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        near = rows(a, b, Divergence(name, lam=1e-9))
        torch.testing.assert_close(near, rows(a, b, limit), rtol=1e-6, atol=1e-8)


def test_the_loss_is_the_weighted_sum_of_the_terms() -> None:
    a, b = pair()
    labels, w = torch.tensor([1, -100, 6, 0]), torch.tensor([0.5, 9.0, 0.0, 2.0])
    loss, ce, kd = reference.linear_distill(
        a, b, labels, ce_weight=w, kd_weight=0.25, temperature=2
    )
    nll = -a.log_softmax(-1)
    torch.testing.assert_close(ce, torch.stack((nll[0, 1], nll[0, 1] * 0, nll[2, 6], nll[3, 0])))
    torch.testing.assert_close(kd, reference.divergence_rows(a / 2, b / 2))
    torch.testing.assert_close(loss, 0.5 * ce[0] + 2 * ce[3] + 0.25 * kd.sum())


def test_logits_slice_bias_and_soft_cap() -> None:
    h, w, b = torch.randn(3, 5), torch.randn(9, 5), torch.randn(9)
    z = reference.logits(h, w, b, softcap=2.0, vocab_size=6)
    torch.testing.assert_close(z, 2 * torch.tanh(F.linear(h, w, b)[:, :6] / 2))
    assert z.abs().max() < 2


def test_relation_of_one_image_is_the_cosine_of_two_matrices() -> None:
    y_s, y_t = torch.randn(5, 3), torch.randn(5, 8)
    got = reference.relation_cosine(y_s, y_t, torch.tensor([0, 2, 5]))
    want = [
        1 - F.cosine_similarity((s @ s.T).reshape(1, -1), (t @ t.T).reshape(1, -1))
        for s, t in ((y_s[:2], y_t[:2]), (y_s[2:], y_t[2:]))
    ]
    torch.testing.assert_close(got, torch.cat(want).mean())


def test_log_probabilities() -> None:
    a, _ = pair()
    labels = torch.tensor([1, -100, 6, 0])
    got = reference.linear_logprob(a, labels, temperature=3.0)
    want = (a / 3).log_softmax(-1)
    torch.testing.assert_close(
        got, torch.stack((want[0, 1], want[0, 1] * 0, want[2, 6], want[3, 0]))
    )
