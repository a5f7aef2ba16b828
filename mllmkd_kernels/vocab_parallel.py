"""And where no rank holds a whole head? The losses of heads that are cut by rows over the ranks.

A head of V × D is the largest matrix of a small model, so tensor-parallel training cuts it: each
rank keeps the rows of some tokens (`vocab_slices`). The hidden states are the same on all ranks.
The losses here combine what each rank knows to the result of the whole heads, on every rank the
same:

* `vocab_parallel_distill`: row statistics of each chunk are exchanged, ``dh`` is summed once
  (`backends.sharded`); no rank holds more than C × V/R logits.
* `vocab_parallel_relation`: ``G = Σ_r W_rᵀ W_r``, one exchange of D × D, none in backward:
  ``dW_r = W_r (dG + dGᵀ)``.

As elsewhere in tensor parallelism, every rank runs backward on the same loss, and gets the whole
gradient of the hidden states and that of its own rows of the head. All ranks must make the same
calls with the same tensors requiring gradients, or they wait for each other for ever.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mllmkd_kernels import checks, plan, relation, relation_ops
from mllmkd_kernels.backends import sharded
from mllmkd_kernels.backends.calls import Head, Options, Targets
from mllmkd_kernels.backends.products import accumulation_dtype
from mllmkd_kernels.casting import autocast, wants
from mllmkd_kernels.distill import DistillOutput, operands
from mllmkd_kernels.divergence import Divergence
from mllmkd_kernels.registration import (
    NO_DOUBLE_BACKWARD,
    add_to,
    computing,
    contiguous,
    head_added_in_forward,
    into,
    scale_gradient,
)
from mllmkd_kernels.vocab_slices import VocabSlice, vocab_slice


def vocab_parallel_distill(
    student_hidden: Tensor,  # (N, D_s), the same on every rank
    student_weight: Tensor,  # (V_s of this rank, D_s)
    teacher_hidden: Tensor | None = None,  # (N, D_t), the same on every rank
    teacher_weight: Tensor | None = None,  # (V_t of this rank, D_t)
    labels: Tensor | None = None,  # (N,)
    *,
    ce_weight: float | Tensor = 0.0,
    kd_weight: float | Tensor = 1.0,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    ignore_index: int = -100,
    student_bias: Tensor | None = None,  # (V_s of this rank,)
    teacher_bias: Tensor | None = None,  # (V_t of this rank,)
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    workspace_mb: float | None = None,
    standardize: bool = False,
    main_grad: Tensor | None = None,  # (V_s of this rank, D_s)
    loss_gradient: float | None = None,
    group: dist.ProcessGroup | None = None,
    held: VocabSlice | None = None,
) -> DistillOutput:
    """`fused_linear_distill` of heads that are cut by rows over the ranks of a process group.

    Exchanged in forward: at most 32 bytes a row (64 in fp64) in three all-reduces a chunk, with
    `standardize` 40 bytes more in four, and the N × D_s gradient of the hidden states once, in
    fp32. Nothing in backward.

    Args:
        student_hidden, teacher_hidden: all N rows, on every rank.
        student_weight, teacher_weight, student_bias, teacher_bias: this rank's rows of the heads,
            which may be uneven or none, cut at the same tokens (`vocab_rows` cuts them so).
        labels: tokens of the whole vocabulary.
        ce_weight, kd_weight, divergence, temperature, ignore_index, student_softcap,
            teacher_softcap, standardize: as in `fused_linear_distill`, the same on every rank.
        vocab_size: the shared vocabulary; default the smaller of the two whole heads.
        workspace_mb: budget in MiB for the logits that exist at one time on a rank.
        main_grad, loss_gradient: as in `fused_linear_distill`, for this rank's rows of the head.
        group: the process group; None is the default one.
        held: what `vocab_slice` answered for these heads. None asks the ranks at each call, which
            waits for the device.

    Returns:
        `DistillOutput`, the same on every rank. The loss gives every rank the whole gradient of
        `student_hidden` and of the weights, and that of its own rows of the head.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `fused_linear_distill`; and where
            the slices of the heads do not line up, or `held` is of other heads.
    """
    given = operands(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        labels, ce_weight, kd_weight,
    )  # fmt: skip
    held = _held(held, student_weight, teacher_weight, vocab_size, group)
    hs, ws, bs, ht, wt, bt, labels, ce_rows, kd_rows = contiguous(*given)
    blocks = plan.EAGER_BLOCKS_CE if ht is None else plan.EAGER_BLOCKS
    budget = None if workspace_mb is None else checks.workspace(workspace_mb)
    cap_s = checks.softcap("student_softcap", student_softcap)
    cap_t = checks.softcap("teacher_softcap", teacher_softcap)
    targets = Targets(
        labels, ce_rows, kd_rows, Divergence.of(divergence), checks.temperature(temperature),
        checks.integer("ignore_index", ignore_index), standardize,
    )  # fmt: skip
    itemsize = accumulation_dtype(*given[:6]).itemsize
    chunk = plan.chunk_rows("eager", hs.shape[0], held.widest, blocks, itemsize, budget)
    want_dh, want_dw, want_db = wants(hs, ws, bs)
    main_grad = checks.main_grad(main_grad, student_weight, accumulation_dtype(*given[:6]))
    known = checks.loss_gradient(loss_gradient, main_grad, want_dw)
    added = into(main_grad, known)
    options = Options(held.vocab, chunk, want_dh, want_dw, want_db, into=added)
    teacher_head = None if ht is None else Head(ht, wt, bt, cap_t)
    call = sharded.Call(teacher_head, targets, options, held, group)
    leaves = hs, ws, bs, ce_rows, kd_rows
    if known is not None:
        loss, ce, kd, *_ = _distill_added(*leaves, cap_s, call, known)
    else:
        loss, ce, kd = _Distill.apply(*leaves, cap_s, call, main_grad)
    return DistillOutput(loss, ce, kd)


def vocab_parallel_relation(
    student_hidden: Tensor,  # (rows, D_s) or (B, P, D_s), the same on every rank
    student_weight: Tensor,  # (V_s of this rank, D_s)
    teacher_hidden: Tensor,  # (rows, D_t) or (B, P, D_t), the same on every rank
    teacher_weight: Tensor,  # (V_t of this rank, D_t)
    cu_seqlens: Tensor | None = None,  # (images + 1,)
    *,
    student_gram: Tensor | None = None,  # (D_s, D_s)
    teacher_gram: Tensor | None = None,  # (D_t, D_t)
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab_size: int | None = None,
    joint: bool = False,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
    held: VocabSlice | None = None,
) -> Tensor:
    """`fused_linear_relation` of heads that are cut by rows over the ranks of a process group.

    Exchanged: D_s² + D_t² numbers in forward, less what is cached; nothing in backward.

    Args:
        student_hidden, teacher_hidden, cu_seqlens, joint, backend: as in `fused_linear_relation`,
            the same on every rank.
        student_weight, teacher_weight, student_bias, teacher_bias, vocab_size, group, held: as in
            `vocab_parallel_distill`.
        student_gram, teacher_gram: cached `vocab_parallel_gram` of a frozen head.

    Raises:
        TypeError, ValueError: as `fused_linear_relation` and `vocab_parallel_distill`. A
            soft-capped head has no Gram and cannot be cut here.
    """
    pair = relation.Pair.of(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        cu_seqlens,
    )  # fmt: skip
    held = _held(held, student_weight, teacher_weight, vocab_size, group)

    def gram(weight: Tensor, bias: Tensor | None) -> Tensor:
        return vocab_parallel_gram(weight, bias, held=held, group=group)

    return pair.relation(student_gram, teacher_gram, gram, joint, backend)


def vocab_parallel_gram(
    weight: Tensor,  # (V of this rank, D)
    bias: Tensor | None = None,  # (V of this rank,)
    *,
    held: VocabSlice,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`head_gram` of a head that is cut by rows: the same on every rank, (D, D) fp32.

    Args:
        weight, bias: this rank's rows; a trainable one makes G differentiable.
        held: what `vocab_slice` answered for the pair of heads.
        group: the process group; None is the default one.
    """
    local = relation_ops.head_gram(*autocast(weight, bias), held.stop - held.start)
    return _Sum.apply(local, group)  # pyright: ignore[reportReturnType]


def _distill(
    hs: Tensor,
    ws: Tensor,
    bs: Tensor | None,
    ce_rows: Tensor | None,  # the weights of `call` again, as inputs that may want a gradient
    kd_rows: Tensor | None,
    cap: float,
    call: sharded.Call,
    gradient: float | None = None,
) -> tuple[Tensor, ...]:
    with torch.no_grad(), computing(hs.device):
        return sharded.distill_rows(Head(hs, ws, bs, cap), call)


_GRADIENT_OF = {0: 3, 1: 4, 2: 5, 3: 1, 4: 2}
_distill_added = head_added_in_forward(_distill, _GRADIENT_OF)


class _Distill(torch.autograd.Function):
    """The loss with its gradients formed in forward; backward scales them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *operands, ctx.main_grad = arguments
        loss, ce, kd, *_ = found = _distill(*operands)
        leaves = operands[: len(_GRADIENT_OF)]
        ctx.save_for_backward(*leaves, *(found[o] for o in _GRADIENT_OF.values()))
        ctx.mark_non_differentiable(ce, kd)
        ctx.set_materialize_grads(False)
        return loss, ce, kd

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, *_ = grad_outputs
        saved = ctx.saved_tensors  # read once, as checkpointing allows
        scaled: list[Tensor | None] = [None] * len(_GRADIENT_OF)
        for i, needed in enumerate(ctx.needs_input_grad[: len(scaled)]):
            if not needed or grad is None:
                continue
            like, formed = saved[i], saved[len(scaled) + i]
            if i == 1 and ctx.main_grad is not None:
                add_to(ctx.main_grad, formed, None, grad, 0)
            else:
                scaled[i] = _Once.apply(like, scale_gradient(formed, grad, like.dtype))
        return *scaled, None, None, None


class _Once(torch.autograd.Function):
    """A gradient of `like`, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None]:
        raise RuntimeError(NO_DOUBLE_BACKWARD)


class _Sum(torch.autograd.Function):
    """Σ over ranks. Every rank has the same gradient of the sum, so it is that of each term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def _held(
    held: VocabSlice | None,
    student_weight: Tensor,
    teacher_weight: Tensor | None,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
) -> VocabSlice:
    """The slice that was given, if it fits these heads; else the ranks are asked."""
    if held is None:
        return vocab_slice(student_weight, teacher_weight, vocab_size=vocab_size, group=group)
    if vocab_size not in (None, held.vocab):
        raise ValueError(f"vocab_size: got {vocab_size}, but held is of {held.vocab} tokens")
    for name, weight in (("student_weight", student_weight), ("teacher_weight", teacher_weight)):
        if weight is not None and weight.shape[0] < held.stop - held.start:
            raise ValueError(
                f"held: tokens {held.start} to {held.stop}, but {name} has {weight.shape[0]} rows"
            )
    return held
