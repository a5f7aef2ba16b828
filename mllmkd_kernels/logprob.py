"""How likely does the model find these tokens? Log-probabilities for preference losses and
evaluation, without logits.
"""

from __future__ import annotations

from torch import Tensor

from mllmkd_kernels import checks, ops
from mllmkd_kernels.casting import autocast, wants


def fused_linear_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    workspace_mb: float | None = None,
) -> Tensor:
    """log softmax(z/T)[label] of every row: (N,) fp32 (fp64 for fp64), differentiable; 0 where the
    label is ignored.

    The logits of a chunk of rows are made and dropped; backward makes them again, since the weight
    of each row is only known then. Sum over the rows of a sequence for the terms of DPO and KTO
    (LLaVA-MoD's preference distillation).

    Args:
        hidden, weight, bias, softcap: the head and its input, as in `fused_linear_distill`.
        labels: int64 tokens, already shifted.
        temperature: T > 0.
        vocab_size: columns that take part; default all rows of `weight`.
        backend, workspace_mb: as in `fused_linear_distill`.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as in `fused_linear_distill`.
    """
    checks.head("", hidden, weight, bias)
    checks.in_memory("hidden", hidden)
    checks.labels("labels", labels, hidden.shape[0], hidden)
    vocab = checks.vocabulary(vocab_size, weight.shape[0])
    h, w, b = autocast(hidden, weight, bias)
    assert h is not None and w is not None
    logp, _ = ops.linear_logprob(
        h, w, b, labels, checks.temperature(temperature), checks.softcap("softcap", softcap),
        vocab, checks.integer("ignore_index", ignore_index), *wants(h, w, b),
        checks.backend(backend), checks.workspace(workspace_mb),
    )  # fmt: skip
    return logp
