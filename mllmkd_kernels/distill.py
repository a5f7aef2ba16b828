"""How far is the student from the labels and from the teacher, without the whole logits?

Hidden states enter here: `fused_linear_distill` checks its arguments, settles the vocabulary and
the row weights and calls the operator in `ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllmkd_kernels import casting, checks, ops, plan
from mllmkd_kernels.backends.products import accumulation_dtype
from mllmkd_kernels.casting import wants
from mllmkd_kernels.choose import choose_backend
from mllmkd_kernels.divergence import Divergence


@dataclass(frozen=True)
class DistillOutput:
    """What `fused_linear_distill` returns.

    Attributes:
        loss: scalar, fp32 (fp64 for fp64 inputs), differentiable.
        ce: (N,) cross-entropy of every row in nats, detached; 0 where there is no label.
        kd: (N,) divergence of every row, detached; 0 without a teacher.
        student_entropy, teacher_entropy: (N,) −Σ q log q and −Σ p log p in nats, of the softmaxes
            that the divergence sees: of ``z/T``, of ``z`` without a divergence. Only with
            ``diagnostics=True``, else None; detached, and 0 in a row without any weight.
        agreement: (N,) 1.0 where some token is the most likely of both models (one in common is
            enough where several tie), else 0.0; NaN where an entropy is. Likewise.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    agreement: Tensor | None = None

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """The last three by name, those that are there."""
        named = ("student_entropy", "teacher_entropy", "agreement")
        found = {name: getattr(self, name) for name in named}
        return {name: x for name, x in found.items() if x is not None}


def fused_linear_distill(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor | None = None,  # (N, D_t)
    teacher_weight: Tensor | None = None,  # (V_t, D_t)
    labels: Tensor | None = None,  # (N,)
    *,
    ce_weight: float | Tensor = 0.0,
    kd_weight: float | Tensor = 1.0,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    ignore_index: int = -100,
    student_bias: Tensor | None = None,  # (V_s,)
    teacher_bias: Tensor | None = None,  # (V_t,)
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    workspace_mb: float | None = None,
    diagnostics: bool = False,
    standardize: bool = False,
    main_grad: Tensor | None = None,  # (V_s, D_s)
    loss_gradient: float | None = None,
    overlap: bool = False,
) -> DistillOutput:
    """Cross-entropy and distillation of N tokens from hidden states and heads (LLaVA-KD, eq. 2–3).

    ``L = Σ_n ce_weight[n]·CE_n + kd_weight[n]·D_n``. The weights carry the normalisation: for a
    mean over the valid tokens of a whole optimiser step pass ``1 / number_of_them``. Rows whose
    weight is 0 contribute exactly 0. Tensors may lie in memory as they like; one that is not
    contiguous is copied for the call, even a head.

    Args:
        student_hidden, student_weight: last hidden states (after the final norm) and
            ``lm_head.weight``. Floating, in any mix of fp32, bf16, fp16 (or fp64); products
            accumulate in fp32 and logits stay fp32.
        teacher_hidden, teacher_weight: likewise; they never receive gradients. Both None for
            cross-entropy alone.
        labels: int64 next tokens of the rows, already shifted; `ignore_index` rows have no
            cross-entropy.
        ce_weight: weight of each row's cross-entropy, a number or (N,). Labels are needed where it
            is not 0.
        kd_weight: weight of each row's divergence. Multiply by T² here for Hinton's scaling; it is
            never applied silently.
        divergence: a name or a `Divergence`; its docstring has the definitions and conventions.
        temperature: T of ``softmax(z/T)`` in the divergence, both models. The cross-entropy takes
            none.
        student_bias, teacher_bias: biases of the heads; −inf masks a token where no soft-cap
            follows.
        student_softcap, teacher_softcap: c of ``c·tanh(z/c)``, as in Gemma 2.
        vocab_size: the real vocabulary; default the smaller head. Columns beyond it belong to
            neither distribution: both heads are sliced and renormalised, gradients there are zero.
        backend: "auto", "cpu" (C++) or "eager".
        workspace_mb: budget in MiB for the logits that exist at one time, and on a GPU for their
            gradient where it is bf16; default `plan.WORKSPACE_MB`, there `WORKSPACE_MB_GPU`. What
            is saved for backward is not among them: unscaled gradients, or what `plan.factored`
            names.
        diagnostics: also return entropies and top-1 agreement of the rows, from the same sweeps.
            The teacher's, and the agreement, are None where no divergence is computed: without a
            teacher, or with ``kd_weight=0``. The backend "cuda" has none.
        standardize: the divergence sees each row's logits z-scored, (z − μ)/(σ + 1e-7) with their
            population standard deviation, gradient through σ included (LLAVADI's `norm_logits`);
            the temperature divides them. μ and σ are of the logits at hand, after bias and
            soft-cap, so a masked token (−inf) makes its row NaN. The cross-entropy sees the logits
            as they are.
        main_grad: an accumulator of the caller's for the gradient of `student_weight`, contiguous,
            fp32 (fp64 for fp64), like Megatron's ``weight.main_grad``: backward adds dW to it in
            its dtype, unrounded, and forms no gradient in the weight's. To autograd the gradient of
            `student_weight` is then None: its ``.grad`` stays as it is, hooks on it are not called,
            and the optimiser has to be given ``main_grad``, which the caller zeroes. Nothing is
            added under ``torch.no_grad``, and twice by two backwards over a retained graph.
        loss_gradient: what backward will multiply the gradient of this loss by, where that is known
            now: 1.0 for ``loss.backward()``, 1/steps where the loss is divided by them, the scale
            of a `GradScaler`. Then dW is added to `main_grad` in forward, and no dW exists beside
            it, not even until backward. It is added whether or not backward follows, so evaluate
            under ``torch.no_grad``. A backward that brings another gradient raises RuntimeError (on
            a GPU a device-side assertion), and so do a second one, and a forward that backward
            repeats (checkpointing).
        overlap: on a GPU the row passes of a chunk run on a stream of their own beside the products
            of the next, in two of each block within the budget; products leave multiprocessors to
            them where PyTorch has green contexts. The same numbers. Never chosen by itself: no GPU
            has timed it yet. Of backends "triton" and "cuda".

    Returns:
        `DistillOutput` with the loss and the per-row terms. Gradients come in the dtype of what
        they are for.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device, named with what was
            expected.
        IndexError: a label outside the vocabulary (on the CPU; a device-side assertion elsewhere).
        RuntimeError: a gradient of the loss is differentiated again, or the loss in forward mode;
            backward with a `main_grad` is asked to keep its graph, or brings another gradient than
            `loss_gradient`.
    """
    hs, ws, bs, ht, wt, bt, tokens, ce_rows, kd_rows = operands(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        labels, ce_weight, kd_weight,
    )  # fmt: skip
    heads = [w for w in (student_weight, teacher_weight) if w is not None]
    vocab = checks.vocabulary(vocab_size, *(w.shape[0] for w in heads))
    table, temperature = Divergence.of(divergence), checks.temperature(temperature)
    acc = accumulation_dtype(hs, ws, bs, ht, wt, bt)
    want_dh, want_dw, want_db = wants(hs, ws, bs)
    known = checks.loss_gradient(loss_gradient, main_grad, want_dw)
    late = want_dw and known is None and _factored(checks.backend(backend), hs, acc)
    compute = ops.linear_distill if known is None else ops.linear_distill_added
    loss, ce, kd, *_, found = compute(
        hs, ws, bs, ht, wt, bt, tokens, ce_rows, kd_rows, table.name, table.param,
        1.0 if ht is None else temperature,  # it is the divergence's alone
        checks.softcap("student_softcap", student_softcap),
        checks.softcap("teacher_softcap", teacher_softcap),
        vocab, checks.integer("ignore_index", ignore_index), want_dh,
        want_dw, want_db, checks.backend(backend), checks.workspace(workspace_mb),
        diagnostics, late, standardize and ht is not None,
        checks.main_grad(main_grad, student_weight, acc), overlap, known,
    )  # fmt: skip
    shown = found.detach().unbind()[: 1 if ht is None else 3] if diagnostics else ()
    return DistillOutput(loss, ce.detach(), kd.detach(), *shown)


def _factored(backend: str, hs: Tensor, acc: torch.dtype) -> bool:
    """See `plan.factored`. Not where the call is traced: there all N share one graph."""
    if torch.compiler.is_compiling():
        return False
    return plan.factored(choose_backend(backend, hs.device, (acc,))[0], *hs.shape)


def operands(
    student: tuple[Tensor, Tensor, Tensor | None],  # hidden states, weight, bias
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None],
    labels: Tensor | None,
    ce_weight: float | Tensor,
    kd_weight: float | Tensor,
) -> tuple[Any, ...]:
    """Nine tensors or None, in this order, checked and cast; the teacher's detached, weights (N,)
    in the accumulation dtype. What a weight of 0 leaves unread is None: labels, the teacher's head.
    """
    rows, hidden = checks.pair(*student, *teacher), student[0]
    ce_rows = checks.row_weight("ce_weight", ce_weight, rows, hidden)
    kd_rows = checks.row_weight("kd_weight", kd_weight, rows, hidden)
    if labels is not None:
        checks.labels("labels", labels, rows, hidden)
    elif ce_rows is not None:
        raise ValueError("labels: expected next tokens, because ce_weight is not 0; got None")
    if teacher[0] is None or kd_rows is None:
        teacher, kd_rows = (None, None, None), None
    heads = casting.heads(student, teacher)
    acc = accumulation_dtype(*heads)
    ce_rows, kd_rows = (None if w is None else w.to(acc) for w in (ce_rows, kd_rows))
    return *heads, None if ce_rows is None else labels, ce_rows, kd_rows
