"""Where do gradients leave? Every operator of the package: schema, fake implementation and autograd
formula together.

The operators are functional: they return the loss *and* the gradients of the tensors that want one,
formed in the same pass, and autograd only scales them. So a frozen tensor costs nothing (its
`want_` flag is false), a second backward over a retained graph gives the same gradient (saved
tensors are never modified), and `torch.compile` sees an ordinary differentiable operator.
Differentiating a gradient again raises: it would need the Hessian of the loss.

The choice of backend and chunk is made inside the operator, from real shapes, so tracing never
depends on it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mllmkd_kernels import cells, gram, plan, softcapped
from mllmkd_kernels.backends import cpu, eager, products
from mllmkd_kernels.backends.calls import Head, Options, Targets
from mllmkd_kernels.divergence import Divergence

_NAMESPACE = "mllmkd_kernels"

NO_DOUBLE_BACKWARD = (
    "mllmkd_kernels: a gradient of this loss was differentiated again; double backward is not "
    "supported. Use mllmkd_kernels.reference for second derivatives."
)


def _named(backend: str) -> ModuleType:
    """The module of a backend. Triton is imported when it is first used: it takes a second, and a
    machine without a GPU need not have it.
    """
    if backend == "triton":
        return importlib.import_module("mllmkd_kernels.backends.triton")
    if backend == "cuda":
        return importlib.import_module("mllmkd_kernels.backends.triton.clustered")
    return {"eager": eager, "cpu": cpu}[backend]


def _module(backend: str, *operands: Tensor | None) -> ModuleType:
    dtypes = tuple(x.dtype for x in operands if x is not None)
    device = next(x.device for x in operands if x is not None)
    return _named(plan.choose_backend(backend, device, dtypes)[0])


def contiguous(*arguments: Any) -> tuple[Any, ...]:
    """Tensors among the arguments laid out as their shapes say; one that is not is copied, even a
    head, for this call alone.
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in arguments)


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """Around all that computes. Triton launches on the current device, which need not be that of
    the tensors. Autocast ends here: public functions cast their arguments as it would, and from
    then on products are fp32, or the logits would be rounded to 16 bits after all. For the same
    reason TF32 ends here.
    """
    here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with here, torch.autocast(device.type, enabled=False), products.full_fp32():
        yield


def _operator(name: str) -> Any:
    """Register an operator: it runs inside `computing`, and its tensors come contiguous, since
    kernels read them by pointer.
    """

    def register(f: Any) -> Any:
        @functools.wraps(f)
        def run(*arguments: Any) -> Any:
            device = next(x.device for x in arguments if isinstance(x, Tensor))
            with computing(device):
                return f(*contiguous(*arguments))

        return torch.library.custom_op(f"{_NAMESPACE}::{name}", mutates_args=())(run)

    return register


def _no_double_backward(op: Any) -> None:
    """Register an autograd formula that refuses: `op` computes a gradient."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(NO_DOUBLE_BACKWARD)

    op.register_autograd(refuse)


# --- what all of them share ----------------------------------------------------------------------


@_operator("scale_gradient")
def scale_gradient(saved: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """saved · grad, a new tensor rounded once, to `dtype`: the last step of every backward here."""
    grad = grad.to(saved.dtype)
    if saved.device.type == "cpu" and cpu.available():
        return cpu.scaled(saved, grad, dtype)
    out = torch.empty_like(saved, dtype=dtype)
    for rows in products.chunks(saved.shape[0], products.VOCAB_SLICE):
        torch.mul(saved[rows], grad, out=out[rows])
    return out


@scale_gradient.register_fake
def _(saved, grad, dtype):
    return torch.empty_like(saved, dtype=dtype, memory_format=torch.contiguous_format)


_no_double_backward(scale_gradient)


@_operator("head_gradient")
def head_gradient(slope: Tensor, h: Tensor, grad: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """dW = grad · dzᵀ h, (rows, D), rounded once, to `dtype`: the last step where dz (N, V) was
    saved in the place of dW.
    """
    return products.head_gradient(slope, h.to(slope.dtype) * grad.to(slope.dtype), rows, dtype)


@head_gradient.register_fake
def _(slope, h, grad, rows, dtype):
    return slope.new_empty(rows, h.shape[1], dtype=dtype)


_no_double_backward(head_gradient)


def _gradients_formed_in_forward(
    op: Any, arguments: int, gradient_of: dict[int, int], factors: tuple[int, int] | None = None
) -> None:
    """Autograd of an `op` whose output 0 is the loss and `gradient_of[i]` d loss / d input i.

    Backward only scales; the outputs besides the loss are not differentiable. Input 1, a head, may
    find its gradient in two outputs, `factors`, instead: dz (N, V) and h (N, D).
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # an unused output must not cost a V x D tensor of zeros
        ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in gradient_of]
        ctx.factored = factors is not None and output[factors[0]].ndim == 2
        ctx.rows = inputs[1].shape[0] if ctx.factored else 0
        ctx.save_for_backward(*(output[o] for o in (*gradient_of.values(), *(factors or ()))))

    def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        if any(g is not None for g in others):
            raise RuntimeError("mllmkd_kernels: only the loss is differentiable, not its terms")
        grads: list[Tensor | None] = [None] * arguments
        if grad is not None:
            # read once: checkpointing unpacks saved tensors at every look, and allows one
            saved = ctx.saved_tensors
            for i, formed, dtype in zip(gradient_of, saved, ctx.dtypes, strict=False):
                if not ctx.needs_input_grad[i]:
                    continue
                if i == 1 and ctx.factored:
                    grads[i] = head_gradient(*saved[-2:], grad, ctx.rows, dtype)
                else:
                    grads[i] = scale_gradient(formed, grad, dtype)
        return tuple(grads)

    op.register_autograd(backward, setup_context=setup_context)


# --- linear_distill: CE and a divergence of two heads ---------------------------------------------


@_operator("linear_distill")
def linear_distill(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, ce (N,), kd (N,), dh, dw, db, dz, h, diagnostics): see `backends.eager.distill_rows`.

    With `factored`, which the eager backend alone knows, dz (N, vocab) and h (N, D) take the place
    of dw, which is their product: `plan.factored` says where.
    """
    operands = [x for x in (hs, ws, ht, wt) if x is not None]
    dtypes = {x.dtype for x in operands}
    shapes = plan.Shapes(
        hs.shape[0], vocab, hs.shape[1], 0 if ht is None else ht.shape[1], want_dh, want_dw,
        torch.float64 if torch.float64 in dtypes else ws.dtype, len(dtypes) == 1, divergence,
    )  # fmt: skip
    budget = workspace_mb if workspace_mb > 0 else None
    chosen = plan.distill_plan(shapes, hs.device, backend, budget)
    module, stream = _named(chosen.backend), chosen.algorithm == "stream"
    acc = products.accumulation_dtype(hs, ws, bs, ht, wt, bt)
    found = hs.new_zeros((3, hs.shape[0]) if want_diagnostics else 0, dtype=acc)
    slope, alive = hs.new_empty((hs.shape[0], vocab) if factored else 0, dtype=acc), hs.new_empty(0)
    student = Head(hs, ws, bs, cap_s)
    teacher = None if ht is None or wt is None else Head(ht, wt, bt, cap_t)
    table = Divergence.with_param(divergence, param)
    targets = Targets(labels, ce_weight, kd_weight, table, temperature, ignore_index)
    options = Options(
        vocab, chosen.chunk_vocab if stream else chosen.chunk_rows, want_dh, want_dw, want_db,
        found if want_diagnostics else None, slope if factored else None, chosen.fold_rows,
    )  # fmt: skip
    if factored:
        alive = eager.alive(hs, targets)
    function = module.distill_stream if stream else module.distill_rows
    results = function(student, teacher, targets, options)
    if want_diagnostics:
        eager.settle_(found, hs, targets)
    return *results, slope, alive, found


@linear_distill.register_fake
def _(hs, ws, bs, ht, wt, bt, labels, ce_weight, kd_weight, divergence, param, temperature, cap_s,
      cap_t, vocab, ignore_index, want_dh, want_dw, want_db, backend, workspace_mb,
      want_diagnostics=False, factored=False):  # fmt: skip
    acc = products.accumulation_dtype(hs, ws, bs, ht, wt, bt)
    rows = hs.new_empty(hs.shape[0], dtype=acc)
    dh = hs.new_empty(hs.shape if want_dh else (0,), dtype=acc)
    dw = ws.new_empty(ws.shape if want_dw else (0,), dtype=acc)
    db = hs.new_empty(ws.shape[0] if want_db else 0, dtype=acc)
    found = hs.new_empty((3, hs.shape[0]) if want_diagnostics else 0, dtype=acc)
    slope = hs.new_empty((hs.shape[0], vocab) if factored else 0, dtype=acc)
    alive = hs.new_empty(hs.shape if factored else (0,))
    loss, kd = hs.new_empty((), dtype=acc), torch.empty_like(rows)
    return loss, rows, kd, dh, dw, db, slope, alive, found


_gradients_formed_in_forward(linear_distill, 23, {0: 3, 1: 4, 2: 5, 7: 1, 8: 2}, factors=(6, 7))


# --- linear_logprob: log-probability of given tokens ----------------------------------------------


def _logprob_chunk(
    h: Tensor, vocab: int, acc: torch.dtype, module: ModuleType, workspace_mb: float
) -> int:
    name = module.__name__.rpartition(".")[2].replace("clustered", "cuda")
    blocks = 3 if name == "eager" else 1
    budget = workspace_mb if workspace_mb > 0 else None
    return plan.chunk_rows(name, h.shape[0], vocab, blocks, acc.itemsize, budget)


@_operator("linear_logprob")
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
    module = _module(backend, h, w, b)
    chunk = _logprob_chunk(h, vocab, products.accumulation_dtype(h, w, b), module, workspace_mb)
    targets = Targets(labels, temperature=temperature, ignore_index=ignore_index)
    return module.logprob_rows(Head(h, w, b, cap), targets, Options(vocab, chunk))


@linear_logprob.register_fake
def _(h, w, b, labels, temperature, cap, vocab, ignore_index, want_dh, want_dw, want_db, backend,
      workspace_mb):  # fmt: skip
    logp = h.new_empty(h.shape[0], dtype=products.accumulation_dtype(h, w, b))
    return logp, torch.empty_like(logp)


@_operator("linear_logprob_backward")
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
    module = _module(backend, h, w, b)
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
_no_double_backward(linear_logprob_backward)


# --- head_gram and the relation losses ------------------------------------------------------------


@_operator("head_gram")
def head_gram(w: Tensor, b: Tensor | None, vocab: int, double: bool = False) -> Tensor:
    """G = WᵀW, (D, D), or (D + 1, D + 1) with a bias: see `gram.gram`."""
    return gram.gram(w, b, vocab, double)


@head_gram.register_fake
def _(w, b, vocab, double=False):
    size = w.shape[1] + (b is not None)
    acc = torch.float64 if double else products.accumulation_dtype(w, b)
    return w.new_empty(size, size, dtype=acc)


@_operator("head_gram_backward")
def head_gram_backward(
    dg: Tensor, w: Tensor, b: Tensor | None, vocab: int
) -> tuple[Tensor, Tensor]:
    """dW and db of `head_gram`: see `gram.gram_backward`."""
    return gram.gram_backward(dg, w, b, vocab)


@head_gram_backward.register_fake
def _(dg, w, b, vocab):
    return w.new_empty(w.shape), w.new_empty(0) if b is None else b.new_empty(b.shape)


def _gram_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w, b, ctx.vocab, _ = inputs
    ctx.save_for_backward(w, b)


def _gram_backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
    w, b = ctx.saved_tensors
    dw, db = head_gram_backward(dg, w, b, ctx.vocab)
    return dw, None if b is None else db, None, None


head_gram.register_autograd(_gram_backward, setup_context=_gram_context)
_no_double_backward(head_gram_backward)


@_operator("grams")
def grams(
    ws: Tensor, bs: Tensor | None, wt: Tensor, bt: Tensor | None, vocab: int
) -> tuple[Tensor, Tensor]:
    """G = W_sᵀ W_s and C = W_sᵀ W_t, fp64, differentiable in W_s: see `gram.grams`."""
    return gram.grams(ws, bs, wt, bt, vocab)


@grams.register_fake
def _(ws, bs, wt, bt, vocab):
    d_s, d_t = ws.shape[1] + (bs is not None), wt.shape[1] + (bt is not None)
    double = torch.float64
    return ws.new_empty(d_s, d_s, dtype=double), ws.new_empty(d_s, d_t, dtype=double)


@_operator("grams_backward")
def grams_backward(
    dg: Tensor,
    dc: Tensor,
    ws: Tensor,
    bs: Tensor | None,
    wt: Tensor,
    bt: Tensor | None,
    vocab: int,
) -> tuple[Tensor, Tensor]:
    """dW_s and db_s of `grams`: see `gram.grams_backward`."""
    return gram.grams_backward(dg, dc, ws, bs, wt, bt, vocab)


@grams_backward.register_fake
def _(dg, dc, ws, bs, wt, bt, vocab):
    return ws.new_empty(ws.shape), ws.new_empty(0) if bs is None else bs.new_empty(bs.shape)


def _grams_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *heads, ctx.vocab = inputs
    ctx.save_for_backward(*heads)


def _grams_backward(ctx: Any, dg: Tensor, dc: Tensor) -> tuple[Tensor | None, ...]:
    ws, bs, wt, bt = ctx.saved_tensors
    dw, db = grams_backward(dg, dc, ws, bs, wt, bt, ctx.vocab)
    return dw, None if bs is None else db, None, None, None


grams.register_autograd(_grams_backward, setup_context=_grams_context)
_no_double_backward(grams_backward)


@_operator("affinity")
def affinity(
    visual_s: Tensor,
    response_s: Tensor,
    visual_t: Tensor,
    response_t: Tensor,
    cu_visual: Tensor,
    cu_response: Tensor,
    joint: bool,
    want_visual: bool,
    want_response: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d visual_s, d response_s): see `cells.affinity`."""
    return cells.affinity(
        visual_s, response_s, visual_t, response_t, cu_visual, cu_response, joint,
        want_visual, want_response,
    )  # fmt: skip


@affinity.register_fake
def _(visual_s, response_s, visual_t, response_t, cu_visual, cu_response, joint, want_visual,
      want_response):  # fmt: skip
    dv = visual_s.new_empty(visual_s.shape if want_visual else (0,))
    dr = response_s.new_empty(response_s.shape if want_response else (0,))
    return visual_s.new_empty(()), dv, dr


_gradients_formed_in_forward(affinity, 9, {0: 1, 1: 2})


@_operator("relation")
def relation(
    hs: Tensor,
    gs: Tensor | None,
    ht: Tensor,
    gt: Tensor | None,
    cu_seqlens: Tensor,
    want_dh: bool,
    want_dg: bool,
    backend: str,
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dh, dg): see `gram.relation`."""
    module = _module(backend, hs, gs, ht, gt)
    return gram.relation(module, hs, gs, ht, gt, cu_seqlens, want_dh, want_dg, joint)


@relation.register_fake
def _(hs, gs, ht, gt, cu_seqlens, want_dh, want_dg, backend, joint):
    acc = products.accumulation_dtype(hs, gs, ht, gt)
    d = hs.shape[1]
    dh = hs.new_empty(hs.shape if want_dh else (0,), dtype=acc)
    return hs.new_empty((), dtype=acc), dh, hs.new_empty((d, d) if want_dg else (0,), dtype=acc)


_gradients_formed_in_forward(relation, 9, {0: 1, 1: 2})


@_operator("relation_softcapped")
def relation_softcapped(
    hs: Tensor,
    ws: Tensor,
    bs: Tensor | None,
    ht: Tensor,
    wt: Tensor,
    bt: Tensor | None,
    cu_seqlens: Tensor,
    cap_s: float,
    cap_t: float,
    vocab: int,
    want_dh: bool,
    want_dw: bool,
    want_db: bool,
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dh, dw, db): see `softcapped.relation`."""
    acc = products.accumulation_dtype(hs, ws, bs, ht, wt, bt)
    student = softcapped.Head(hs, ws, bs, cap_s, vocab, acc)
    teacher = softcapped.Head(ht, wt, bt, cap_t, vocab, acc)
    return softcapped.relation(student, teacher, cu_seqlens, want_dh, want_dw, want_db, joint)


@relation_softcapped.register_fake
def _(hs, ws, bs, ht, wt, bt, cu_seqlens, cap_s, cap_t, vocab, want_dh, want_dw, want_db, joint):
    acc = products.accumulation_dtype(hs, ws, bs, ht, wt, bt)
    dh = hs.new_empty(hs.shape if want_dh else (0,), dtype=acc)
    db = hs.new_empty(ws.shape[0] if want_db else 0, dtype=acc)
    dw = ws.new_empty(ws.shape if want_dw else (0,), dtype=acc)
    return hs.new_empty((), dtype=acc), dh, dw, db


_gradients_formed_in_forward(relation_softcapped, 14, {0: 1, 1: 2, 2: 3})
