"""What do the rows of hidden states lose at a head? The operators of a sweep over the vocabulary:
schema, fake implementation and autograd formula together.

The choice of backend and chunk is made inside an operator, from real shapes, so tracing never
depends on it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mllmkd_kernels import plan, squares
from mllmkd_kernels.backends import eager, products
from mllmkd_kernels.backends.calls import Head, Options, Targets
from mllmkd_kernels.divergence import Divergence
from mllmkd_kernels.registration import (
    gradients_formed_in_forward,
    head_added_in_forward,
    into,
    module_named,
    module_of,
    no_double_backward,
    operator,
)


def _linear_distill(
    hs: Tensor,
    ws: Tensor,
    bs: Tensor | None,
    ht: Tensor | None,
    wt: Tensor | None,
    bt: Tensor | None,
    labels: Tensor | None,
    ce_weight: Tensor | None,
    kd_weight: Tensor | None,
    divergence: str,
    param: float,
    temperature: float,
    cap_s: float,
    cap_t: float,
    vocab: int,
    ignore_index: int,
    want_dh: bool,
    want_dw: bool,
    want_db: bool,
    backend: str,
    workspace_mb: float,
    want_diagnostics: bool = False,
    factored: bool = False,
    standardize: bool = False,
    main_grad: Tensor | None = None,
    overlap: bool = False,
    loss_gradient: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, ce (N,), kd (N,), dh, dw, db, h, diagnostics): see `backends.eager.distill_rows`.

    With `factored`, which the backends "cpu" and "eager" know, dz takes the place of dw, which is
    its product with h (N, D): `plan.factored` says where. `main_grad` is for backward; with
    `loss_gradient` dw times that is added to it here, and dw empty.
    """
    added = into(main_grad, loss_gradient)
    operands = [x for x in (hs, ws, ht, wt) if x is not None]
    dtypes = {x.dtype for x in operands}
    shapes = plan.Shapes(
        hs.shape[0], vocab, hs.shape[1], 0 if ht is None else ht.shape[1], want_dh, want_dw,
        torch.float64 if torch.float64 in dtypes else ws.dtype, len(dtypes) == 1, divergence,
        None if main_grad is None else "backward" if added is None else "forward",
    )  # fmt: skip
    budget = workspace_mb if workspace_mb > 0 else None
    forced: Any = {"algorithm": "chunk"} if standardize else {}  # σ is of a whole row
    chosen = plan.distill_plan(shapes, hs.device, backend, budget, overlap=overlap, **forced)
    module, stream = module_named(chosen.backend), chosen.algorithm == "stream"
    acc = products.accumulation_dtype(hs, ws, bs, ht, wt, bt)
    found = hs.new_zeros((3, hs.shape[0]) if want_diagnostics else 0, dtype=acc)
    student = Head(hs, ws, bs, cap_s)
    teacher = None if ht is None or wt is None else Head(ht, wt, bt, cap_t)
    table = Divergence.with_param(divergence, param)
    targets = Targets(
        labels, ce_weight, kd_weight, table, temperature, ignore_index, standardize
    )  # fmt: skip
    options = Options(
        vocab, chosen.chunk_vocab if stream else chosen.chunk_rows, want_dh, want_dw, want_db,
        found if want_diagnostics else None, factored, chosen.fold_rows, chosen.beside, added,
    )  # fmt: skip
    alive = eager.alive(hs, targets) if factored else hs.new_empty(0)
    function = module.distill_stream if stream else module.distill_rows
    results = function(student, teacher, targets, options)
    if want_diagnostics:
        eager.settle_(found, hs, targets)
    return *results, alive, found


def _fake_linear_distill(
      hs, ws, bs, ht, wt, bt, labels, ce_weight, kd_weight, divergence, param, temperature, cap_s,
      cap_t, vocab, ignore_index, want_dh, want_dw, want_db, backend, workspace_mb,
      want_diagnostics=False, factored=False, standardize=False, main_grad=None,
      overlap=False, loss_gradient=None):  # fmt: skip
    acc = products.accumulation_dtype(hs, ws, bs, ht, wt, bt)
    rows = hs.new_empty(hs.shape[0], dtype=acc)
    dh = hs.new_empty(hs.shape if want_dh else (0,), dtype=acc)
    dw_shape = ws.shape if want_dw and loss_gradient is None else (0,)
    if factored:
        dw_shape = module_of(backend, hs, ws, ht, wt).dz_shape(hs.shape[0], vocab, acc)
    dw = ws.new_empty(dw_shape, dtype=acc)
    db = hs.new_empty(ws.shape[0] if want_db else 0, dtype=acc)
    found = hs.new_empty((3, hs.shape[0]) if want_diagnostics else 0, dtype=acc)
    alive = hs.new_empty(hs.shape if factored else (0,))
    loss, kd = hs.new_empty((), dtype=acc), torch.empty_like(rows)
    return loss, rows, kd, dh, dw, db, alive, found


_GRADIENT_OF = {0: 3, 1: 4, 2: 5, 7: 1, 8: 2}
linear_distill = operator("linear_distill")(_linear_distill)
linear_distill.register_fake(_fake_linear_distill)
gradients_formed_in_forward(linear_distill, 27, _GRADIENT_OF, factored=(6, 14), main_grad=24)
linear_distill_ = operator("linear_distill_", mutates=("main_grad",))(_linear_distill)
linear_distill_.register_fake(_fake_linear_distill)
linear_distill_added = head_added_in_forward(linear_distill_, _GRADIENT_OF)


# --- linear_logit_mse: squared distance of the logits of two heads ------------------------------


def _linear_logit_mse(
    hs: Tensor,
    ws: Tensor,
    bs: Tensor | None,
    ht: Tensor,
    wt: Tensor,
    bt: Tensor | None,
    row_weight: Tensor,
    vocab: int,
    want_dh: bool,
    want_dw: bool,
    want_db: bool,
    workspace_mb: float,
    main_grad: Tensor | None = None,
    loss_gradient: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, mean squares (N,), dh, dw, db): see `squares.logit_mse`."""
    acc, budget = row_weight.dtype, workspace_mb if workspace_mb > 0 else None
    name = "triton" if hs.is_cuda else "eager"  # the budget of the device
    chunk = plan.chunk_rows(name, hs.shape[0], vocab, 2, acc.itemsize, budget)
    added = into(main_grad, loss_gradient)
    options = Options(vocab, chunk, want_dh, want_dw, want_db, into=added)
    return squares.logit_mse(Head(hs, ws, bs), Head(ht, wt, bt), row_weight, options)


def _fake_linear_logit_mse(
      hs, ws, bs, ht, wt, bt, row_weight, vocab, want_dh, want_dw, want_db, workspace_mb,
      main_grad=None, loss_gradient=None):  # fmt: skip
    dh = row_weight.new_empty(hs.shape if want_dh else (0,))
    dw = row_weight.new_empty(ws.shape if want_dw and loss_gradient is None else (0,))
    db = row_weight.new_empty(ws.shape[0] if want_db else 0)
    return row_weight.new_empty(()), torch.empty_like(row_weight), dh, dw, db


_GRADIENT_OF_MSE = {0: 2, 1: 3, 2: 4, 6: 1}
linear_logit_mse = operator("linear_logit_mse")(_linear_logit_mse)
linear_logit_mse.register_fake(_fake_linear_logit_mse)
gradients_formed_in_forward(linear_logit_mse, 14, _GRADIENT_OF_MSE, main_grad=12)
linear_logit_mse_ = operator("linear_logit_mse_", mutates=("main_grad",))(_linear_logit_mse)
linear_logit_mse_.register_fake(_fake_linear_logit_mse)
linear_logit_mse_added = head_added_in_forward(linear_logit_mse_, _GRADIENT_OF_MSE)


# --- linear_logprob: log-probability of given tokens ----------------------------------------------


def _logprob_chunk(
    h: Tensor, vocab: int, acc: torch.dtype, module: ModuleType, workspace_mb: float
) -> int:
    name = module.__name__.rpartition(".")[2].replace("clustered", "cuda")
    blocks = 3 if name == "eager" else 1
    budget = workspace_mb if workspace_mb > 0 else None
    return plan.chunk_rows(name, h.shape[0], vocab, blocks, acc.itemsize, budget)


@operator("linear_logprob")
def linear_logprob(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    labels: Tensor,
    temperature: float,
    cap: float,
    vocab: int,
    ignore_index: int,
    want_dh: bool,
    want_dw: bool,
    want_db: bool,
    backend: str,
    workspace_mb: float,
) -> tuple[Tensor, Tensor]:
    """(log-probability (N,), log-sum-exp (N,)): see `backends.eager.logprob_rows`."""
    module = module_of(backend, h, w, b)
    chunk = _logprob_chunk(h, vocab, products.accumulation_dtype(h, w, b), module, workspace_mb)
    targets = Targets(labels, temperature=temperature, ignore_index=ignore_index)
    return module.logprob_rows(Head(h, w, b, cap), targets, Options(vocab, chunk))


@linear_logprob.register_fake
def _(h, w, b, labels, temperature, cap, vocab, ignore_index, want_dh, want_dw, want_db, backend,
      workspace_mb):  # fmt: skip
    logp = h.new_empty(h.shape[0], dtype=products.accumulation_dtype(h, w, b))
    return logp, torch.empty_like(logp)


@operator("linear_logprob_backward")
def linear_logprob_backward(
    grad: Tensor,
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    temperature: float,
    cap: float,
    vocab: int,
    ignore_index: int,
    want_dh: bool,
    want_dw: bool,
    want_db: bool,
    backend: str,
    workspace_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, dw, db in the dtypes of h, w, b: see `backends.eager.logprob_grad`."""
    module = module_of(backend, h, w, b)
    chunk = _logprob_chunk(h, vocab, lse.dtype, module, workspace_mb)
    targets = Targets(labels, temperature=temperature, ignore_index=ignore_index)
    options = Options(vocab, chunk, want_dh, want_dw, want_db)
    head = Head(h, w, b, cap)
    dh, dw, db = module.logprob_grad(grad.to(lse.dtype), lse, head, targets, options)
    return dh.to(h.dtype), dw, db if b is None else db.to(b.dtype)


@linear_logprob_backward.register_fake
def _(grad, h, w, b, labels, lse, temperature, cap, vocab, ignore_index,
      want_dh, want_dw, want_db, backend, workspace_mb):  # fmt: skip
    db = h.new_empty(w.shape[0] if want_db else 0, dtype=lse.dtype if b is None else b.dtype)
    return h.new_empty(h.shape if want_dh else (0,)), w.new_empty(w.shape if want_dw else (0,)), db


def _logprob_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h, w, b, labels, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, w, b, labels, output[1])


def _logprob_backward(
    ctx: Any, grad: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 13
    if grad is None:
        return tuple(grads)
    h, w, b, labels, lse = ctx.saved_tensors
    dh, dw, db = linear_logprob_backward(grad, h, w, b, labels, lse, *ctx.options)
    want_dh, want_dw, want_db = ctx.options[4:7]
    grads[:3] = dh if want_dh else None, dw if want_dw else None, db if want_db else None
    return tuple(grads)


linear_logprob.register_autograd(_logprob_backward, setup_context=_logprob_context)
no_double_backward(linear_logprob_backward)
