"""Does the student prefer the better answer by more than its reference does? (LLaVA-MoD's
preference distillation, in which the reference is the teacher)

With ``r = log p(answer) − log p_reference(answer)``, c the chosen and r the rejected answer:

    sigmoid (DPO)  −log σ(β (r_c − r_r))
    hinge          max(0, 1 − β (r_c − r_r))
    ipo            (r_c − r_r − 1/(2β))²
    kto_pair       ½ (1 − σ(β (r_c − K_r))) + ½ (1 − σ(β (K_c − r_r))),  K = max(0, batch mean of r)
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from mllmkd_kernels import checks
from mllmkd_kernels.backends.products import accumulation_dtype

#: By name, of the margin r_c − r_r and β.
_OF_MARGIN: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": lambda margin, beta: -F.logsigmoid(beta * margin),
    "hinge": lambda margin, beta: F.relu(1 - beta * margin),
    "ipo": lambda margin, beta: (margin - 1 / (2 * beta)).square(),
}
KINDS = ("kto_pair", *_OF_MARGIN)


def check_kind(kind: str, beta: float) -> float:
    """β of a loss of that kind; `ValueError`, `TypeError` where there is no such kind or β."""
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    return checks.positive("beta", beta)


def preference_loss(
    chosen: Tensor,  # (B,)
    rejected: Tensor,  # (B,)
    reference_chosen: Tensor,  # (B,)
    reference_rejected: Tensor,  # (B,)
    *,
    kind: str = "kto_pair",
    beta: float = 0.1,
    detach_baseline: bool = True,
) -> Tensor:
    """Mean over pairs of the loss of that kind: a scalar, fp32 (fp64 for fp64), 0 without pairs.

    A few operations on B numbers, so plain PyTorch on every device: what costs, the products with
    the heads, is in `fused_linear_logprob`.

    Args:
        chosen, rejected: the student's log-probability of each whole answer, summed over its
            tokens: see `fused_linear_logprob`.
        reference_chosen, reference_rejected: the reference's; they receive no gradient.
        kind: "kto_pair", "sigmoid" (DPO), "hinge" or "ipo".
        beta: β > 0.
        detach_baseline: of "kto_pair": no gradient through K, which LLaVA-MoD's released code has.

    Raises:
        TypeError, ValueError: arguments that do not fit, named with what was expected.
    """
    given = {
        "chosen": chosen, "rejected": rejected, "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
    }  # fmt: skip
    for name, x in given.items():
        checks.floating(name, x, 1)
        checks.same_rows(name, x.shape[0], "chosen", chosen.shape[0])
        checks.same_device(name, x, "chosen", chosen)
    beta, acc = check_kind(kind, beta), accumulation_dtype(*given.values())
    r_c = chosen.to(acc) - reference_chosen.detach().to(acc)
    r_r = rejected.to(acc) - reference_rejected.detach().to(acc)
    pairs = max(chosen.shape[0], 1)
    if kind != "kto_pair":
        return _OF_MARGIN[kind](r_c - r_r, beta).sum() / pairs
    k_c, k_r = ((r.sum() / pairs).clamp(min=0) for r in (r_c, r_r))
    if detach_baseline:
        k_c, k_r = k_c.detach(), k_r.detach()
    missed = (beta * (k_r - r_c)).sigmoid() + (beta * (r_r - k_c)).sigmoid()  # 1 − σ(x) = σ(−x)
    return missed.sum() / (2 * pairs)
