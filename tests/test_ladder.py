"""Does the gradient stay exact while the student converges? The contract of DESIGN section 6.

The teacher is the student plus noise of ε in its logits. The gradient is then a small difference of
two softmaxes: whoever rounds logits to 16 bits loses it (23% at ε = 0.03, 70% at 0.01).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.problems import DIVERGENCES, DTYPES, expected, near_converged, run
from tests.tolerances import LADDER, ladder_bound, ladder_value_bound, relative_error


@pytest.mark.parametrize("workspace_mb", [None, 1e-6], ids=["one-chunk", "many-chunks"])
@pytest.mark.parametrize("eps", LADDER)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_and_values_near_convergence(
    divergence: str, dtype: torch.dtype, eps: float, workspace_mb: float | None, backend: str
) -> None:
    # 70 rows are three of the smallest chunks. Weights of 1,000 keep fp16 gradients, which have no
    # exponent below 2^-24, in range as a loss scale does; they change no relative error.
    p = near_converged(eps, n=70, two_sided=divergence == "total_variation")
    p = replace(p, kd_weight=torch.full((70,), 1000.0)).to(dtype)
    got, want = run(p, backend, divergence, workspace_mb=workspace_mb), expected(p, divergence)
    bound = ladder_bound(dtype, eps)
    for name in ("dh", "dw"):
        error = relative_error(getattr(got, name), getattr(want, name))
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"
    assert not (got.kd < 0).any()
    bound = ladder_value_bound(divergence, eps)
    for name in ("kd", "loss"):
        error = relative_error(getattr(got, name), getattr(want, name))
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


@pytest.mark.parametrize("eps", [0.1, 0.01])
def test_the_ladder_would_catch_logits_of_16_bits(eps: float) -> None:
    """The contract is not met by chance: the shortcut it forbids breaks it on these inputs."""
    p = near_converged(eps).to(torch.bfloat16)
    hs = p.hs.clone().requires_grad_()
    z_s, z_t = hs @ p.ws.T, p.ht @ p.wt.T
    kl = torch.nn.functional.kl_div(
        z_s.float().log_softmax(-1), z_t.float().log_softmax(-1), reduction="sum", log_target=True
    )
    (kl / 24).backward()
    assert hs.grad is not None
    assert relative_error(hs.grad, expected(p).dh) > 5 * ladder_bound(torch.bfloat16, eps)
