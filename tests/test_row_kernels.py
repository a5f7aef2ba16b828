"""Is each row kernel right? Triton's, with a row in one block and in many, and the CUDA cluster
kernel, on the same rows against the fp64 reference.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.problems import DIVERGENCES
from tests.row_kernels import ALL, Kernel, Rows, compare, expected
from tests.tolerances import check

V = 100
SOME = ["forward_kl", "jsd"]  # dz in the sweep of the values, and after it


@pytest.fixture(params=ALL)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return ALL[request.param]


def rows(divergence: str = "forward_kl") -> Rows:
    """Logits of 6 rows as the products made them; row 1 has no label, row 4 no weight at all."""
    z_s, z_t = torch.randn(2, 6, V) * 3
    ce_weight, kd_weight = torch.rand(2, 6) + 0.5
    ce_weight[4] = kd_weight[4] = 0
    kd_weight[2] = ce_weight[3] = 0  # one of the two
    labels = torch.tensor([3, -100, V - 1, 0, 17, 50])
    return Rows(z_s, z_t, labels, ce_weight, kd_weight, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_block_of_logits(kernel: Kernel, divergence: str) -> None:
    compare(kernel, rows(divergence))


@pytest.mark.parametrize("divergence", SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_everything_at_once(kernel: Kernel, divergence: str, dtype: torch.dtype) -> None:
    """Biases longer than the vocabulary, soft-caps, a temperature."""
    bs, bt = torch.randn(2, V + 3).to(dtype)
    compare(kernel, rows(divergence)._replace(bs=bs, bt=bt, temperature=1.7, cap_s=4.0, cap_t=6.0))


@pytest.mark.parametrize("divergence", SOME)
def test_z_scored_logits(kernel: Kernel, divergence: str) -> None:
    """Of what biases and soft-caps make; beside a large mean nothing cancels. A broken row stays
    alone and silent, and one of equal logits, whose σ is 0, keeps its gradient.
    """
    bs, bt = torch.randn(2, V + 3) + 40
    r = rows(divergence)._replace(bs=bs, bt=bt, standardize=True)
    compare(kernel, r)
    compare(kernel, r._replace(labels=None, ce_weight=None, dz_bf16=True))
    compare(kernel, r._replace(temperature=1.7, cap_s=90.0, cap_t=60.0))
    assert r.zt is not None
    r.zs[4], r.zt[4] = math.nan, math.inf  # of no weight
    r = r._replace(bs=None, zs=r.zs.index_fill(0, torch.tensor(5), 0.0))
    got = kernel(r)
    assert not got.dz[4].any() and got.dz[5].isfinite().all()
    assert got.kd[4].isnan() and got.kd[:4].isfinite().all()


def test_cross_entropy_alone(kernel: Kernel) -> None:
    """Without a teacher the temperature has nothing to say."""
    r = rows()._replace(zt=None, kd_weight=None)
    compare(kernel, r)
    check(kernel(r._replace(temperature=3.0)).ce, expected(r).ce, "value")


@pytest.mark.parametrize("divergence", ["soft_cross_entropy", "reverse_kl"])
def test_a_teacher_alone(kernel: Kernel, divergence: str) -> None:
    compare(kernel, rows(divergence)._replace(labels=None, ce_weight=None, temperature=2.0))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_the_teacher_forbids(kernel: Kernel, divergence: str) -> None:
    bt = torch.zeros(V)
    bt[::3] = -math.inf
    r = rows(divergence)._replace(bt=bt)
    if divergence != "reverse_kl":
        compare(kernel, r)
    else:  # q log(q/0)
        assert (kernel(r).kd == math.inf).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("cap", [0.0, 5.0], ids=["no-cap", "cap"])
def test_gradients_of_16_bits_are_rounded_once(kernel: Kernel, divergence: str, cap: float) -> None:
    r = rows(divergence)._replace(cap_s=cap, cap_t=cap)
    exact, rounded = kernel(r), kernel(r._replace(dz_bf16=True))
    assert torch.equal(rounded.dz, exact.dz.bfloat16())
    assert torch.equal(rounded.kd, exact.kd) and torch.equal(rounded.ce, exact.ce)


@pytest.mark.parametrize("divergence", SOME)
def test_values_without_gradients_leave_the_logits_as_they_were(
    kernel: Kernel, divergence: str
) -> None:
    r = rows(divergence)
    alone, beside = kernel(r._replace(want_dz=False)), kernel(r)
    assert torch.equal(alone.dz, r.zs) and torch.equal(alone.ce, beside.ce)
    # the cluster kernel adds those of forward KL in the sweep that writes the gradient
    torch.testing.assert_close(alone.kd, beside.kd, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("whose", "value", "divergence", "cap"),
    [
        ("zs", math.nan, "forward_kl", 5.0), ("zs", math.inf, "total_variation", 0.0),
        ("zs", math.inf, "jsd", 5.0), ("zt", math.inf, "forward_kl", 5.0),
        ("zt", math.nan, "total_variation", 5.0), ("zt", math.inf, "jsd", 0.0),
    ],
)  # fmt: skip
def test_a_broken_row_is_nan_and_silent_without_weight(
    kernel: Kernel, whose: str, value: float, divergence: str, cap: float
) -> None:
    """Row 0 counts, row 4 does not; both hold what a hidden state with an inf or NaN leads to."""
    r = rows(divergence)._replace(cap_s=cap, cap_t=cap)
    whole = kernel(r)
    z = getattr(r, whose)
    z[[0, 4]] = value
    z[[0, 4], ::2] *= -1
    got = kernel(r)
    assert got.kd[[0, 4]].isnan().all() and got.dz[0].isnan().any() and not got.dz[4].any()
    assert got.ce[0].isnan() == (whose == "zs")
    others = [1, 2, 3, 5]
    assert torch.equal(got.kd[others], whole.kd[others])
    assert torch.equal(got.dz[others], whole.dz[others])


def test_equal_models_cost_nothing(kernel: Kernel) -> None:
    for divergence in ("forward_kl", "reverse_kl", "jsd", "total_variation"):
        r = rows(divergence)._replace(labels=None, ce_weight=None)
        got = kernel(r._replace(zt=r.zs.clone()))
        assert not got.kd.any() and not got.dz.any()
