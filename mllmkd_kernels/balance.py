"""Do the experts of each layer get equal shares of the tokens? (LLaVA-MoD, MoE-LLaVA; the balance
loss of DeepSpeed's gates)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mllmkd_kernels import checks
from mllmkd_kernels.backends.products import accumulation_dtype


def balance_loss(
    router_logits: Sequence[Tensor],  # (tokens, E) of each layer
    mask: Tensor | None = None,  # (tokens,)
) -> Tensor:
    """Σ over layers of ``E · Σ_e share_e · mean_e``: share_e of the tokens have e for their first
    expert, mean_e is the mean of the router's softmax. A scalar, fp32 (fp64 for fp64).

    At its least, with all shares equal, it is the number of layers. Layers are not pooled: two that
    send all their tokens to one expert each, another one, would look balanced.

    Args:
        router_logits: one a layer; E may differ. Gradients go through the means.
        mask: bool, True for tokens that count; default all. Without any the loss is 0.

    Raises:
        TypeError, ValueError: arguments that do not fit, named with what was expected.
    """
    if isinstance(router_logits, Tensor) or not len(router_logits):
        got = "a tensor" if isinstance(router_logits, Tensor) else "none"
        raise ValueError(f"router_logits: got {got}, expected a list of (tokens, E), one a layer")
    for i, x in enumerate(router_logits):
        checks.floating(f"router_logits[{i}]", x, 2)
        _check_mask(mask, f"router_logits[{i}]", x)
    return torch.stack([_of_layer(x, mask) for x in router_logits]).sum()


def _of_layer(logits: Tensor, mask: Tensor | None) -> Tensor:
    acc = accumulation_dtype(logits)
    counts = logits.new_ones(logits.shape[0], dtype=acc) if mask is None else mask.to(acc)
    counts = (counts / counts.sum().clamp(min=1))[:, None]
    if mask is not None:  # what is masked may hold NaN
        logits = logits.masked_fill(~mask[:, None], 0)
    experts = logits.shape[1]
    first = F.one_hot(logits.argmax(-1), experts)
    share, mean = (first * counts).sum(0), (logits.softmax(-1, dtype=acc) * counts).sum(0)
    return experts * (share * mean).sum()


def _check_mask(mask: Tensor | None, name: str, logits: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 1:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
        raise ValueError(f"mask: expected bool of shape (tokens,), got {got}")
    checks.same_rows("mask", mask.shape[0], name, logits.shape[0])
    checks.same_device("mask", mask, name, logits)
