"""Where do gradients leave? How a function becomes an operator of torch, and gets its autograd
formula; the operators themselves are in `ops` and `relation_ops`.

They are functional: they return the loss *and* the gradients of the tensors that want one,
formed in the same pass, and autograd only scales them. So a frozen tensor costs nothing (its
`want_` flag is false), a second backward over a retained graph gives the same gradient (saved
tensors are never modified), and `torch.compile` sees an ordinary differentiable operator.
Differentiating a gradient again raises: it would need the Hessian of the loss. So does forward mode
(`torch.func.jvp`): torch would drop the tangents, as of every operator without a formula for them.

Where the caller has an accumulator for a head's gradient, two kinds of operators write to it:
`add_gradient_` in backward, and those that form it in forward, if they are told by what backward
would multiply it. The latter know no autograd; `promised_loss` has it for them.

The choice of backend and chunk is made inside the operator, from real shapes, so tracing never
depends on it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mllmkd_kernels import plan
from mllmkd_kernels.backends import cpu, eager, products

_NAMESPACE = "mllmkd_kernels"

NO_DOUBLE_BACKWARD = (
    "mllmkd_kernels: a gradient of this loss was differentiated again; double backward is not "
    "supported. Use mllmkd_kernels.reference for second derivatives."
)

_NO_FORWARD_MODE = (
    "mllmkd_kernels: forward-mode differentiation is not supported, its tangents would be lost; "
    "use torch.autograd.grad, or mllmkd_kernels.reference"
)


def module_named(backend: str) -> ModuleType:
    """The module of a backend. Triton is imported when it is first used: it takes a second, and a
    machine without a GPU need not have it.
    """
    if backend == "triton":
        return importlib.import_module("mllmkd_kernels.backends.triton")
    if backend == "cuda":
        return importlib.import_module("mllmkd_kernels.backends.triton.clustered")
    return {"eager": eager, "cpu": cpu}[backend]


def module_of(backend: str, *operands: Tensor | None) -> ModuleType:
    """The module that computes with these tensors, for a backend or "auto"."""
    dtypes = tuple(x.dtype for x in operands if x is not None)
    device = next(x.device for x in operands if x is not None)
    return module_named(plan.choose_backend(backend, device, dtypes)[0])


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


def operator(name: str, mutates: tuple[str, ...] = ()) -> Any:
    """Register an operator: it runs inside `computing`, and its tensors come contiguous, since
    kernels read them by pointer. Those named in `mutates` are written, and have to be contiguous.
    """

    def register(f: Any) -> Any:
        @functools.wraps(f)
        def run(*arguments: Any) -> Any:
            if forward_ad._current_level >= 0:  # the arguments have no tangents here any more
                raise RuntimeError(_NO_FORWARD_MODE)
            device = next(x.device for x in arguments if isinstance(x, Tensor))
            with computing(device):
                return f(*contiguous(*arguments))

        return torch.library.custom_op(f"{_NAMESPACE}::{name}", mutates_args=mutates)(run)

    return register


def no_double_backward(op: Any) -> None:
    """Register an autograd formula that refuses: `op` computes a gradient."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(NO_DOUBLE_BACKWARD)

    op.register_autograd(refuse)


@operator("scale_gradient")
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


no_double_backward(scale_gradient)


@operator("head_gradient")
def head_gradient(
    dz: Tensor, h: Tensor, grad: Tensor, rows: int, vocab: int, dtype: torch.dtype
) -> Tensor:
    """dW = grad · dzᵀ h, (rows, D), rounded once, to `dtype`: the last step where dz was saved in
    the place of dW, (N, vocab) or the C++ kernels' tiles of it.
    """
    grad = grad.to(dz.dtype)
    if dz.ndim > 2:
        return cpu.head_gradient(dz, h, grad, rows, vocab, dtype)
    return products.head_gradient(dz, h.to(dz.dtype) * grad, rows, dtype)


@head_gradient.register_fake
def _(dz, h, grad, rows, vocab, dtype):
    return dz.new_empty(rows, h.shape[1], dtype=dtype)


no_double_backward(head_gradient)


@operator("add_gradient_", mutates=("main_grad",))
def add_gradient_(
    main_grad: Tensor, saved: Tensor, h: Tensor | None, grad: Tensor, vocab: int
) -> None:
    """main_grad += saved · grad; with h (N, D), whose `saved` is dz, += grad · dzᵀ h. In the place
    of the last step of a head's gradient: nothing is rounded, and no gradient is left.
    """
    grad = grad.to(saved.dtype)
    if h is None:
        main_grad.addcmul_(saved, grad)
    elif saved.ndim > 2:
        cpu.add_head_gradient_(main_grad, saved, h, grad, vocab)
    else:
        products.add_product(main_grad[: saved.shape[1]], saved.mT, h.to(saved.dtype) * grad)


@add_gradient_.register_fake
def _(main_grad, saved, h, grad, vocab):
    return None


def add_to(main_grad: Tensor, saved: Tensor, h: Tensor | None, grad: Tensor, vocab: int) -> None:
    """`add_gradient_` of a backward that keeps no graph, or RuntimeError."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "main_grad: what is added to it has no graph; expected backward without create_graph"
        )
    add_gradient_(main_grad, saved, h, grad, vocab)


def into(main_grad: Tensor | None, gradient: float | None) -> products.Into | None:
    """What a head's gradient is added to in forward, where the gradient of the loss is known.

    Raises:
        RuntimeError: in backward. A forward that is repeated there has added to it before.
    """
    if main_grad is None or gradient is None:
        return None
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "loss_gradient: the forward that adds to main_grad ran again in backward, as "
            "checkpointing does; expected one that runs once, or None"
        )
    return products.Into(main_grad, gradient)


@operator("promised_loss")
def promised_loss(
    loss: Tensor, weight: Tensor, inputs: list[Tensor], formed: list[Tensor], gradient: float
) -> Tensor:
    """`loss`, whose gradients with regard to `inputs` are `formed`, and whose gradient with regard
    to a head's `weight` was added to an accumulator, times the `gradient` of the loss. If backward
    brings another one, or comes twice, it raises (another one on a GPU: a device-side assertion).
    """
    return loss.clone()


@promised_loss.register_fake
def _(loss, weight, inputs, formed, gradient):
    return torch.empty_like(loss)


def _promised_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, leaves, formed, ctx.gradient = inputs
    ctx.kept, ctx.dtypes = False, [x.dtype for x in leaves]
    ctx.save_for_backward(*formed)


def _promised_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled() or ctx.kept:
        raise RuntimeError(
            "loss_gradient: main_grad was added to once, in forward; expected one backward, "
            "without create_graph"
        )
    ctx.kept, saved = True, ctx.saved_tensors
    torch.ops.aten._assert_async.msg(
        (grad - ctx.gradient).abs() <= 1e-6 * ctx.gradient,
        f"loss_gradient: main_grad was added to for a gradient of {ctx.gradient} of the loss, "
        "but backward brought another",
    )
    grads = [
        scale_gradient(x, grad, dtype) if needed else None
        for x, dtype, needed in zip(saved, ctx.dtypes, ctx.needs_input_grad[2], strict=True)
    ]
    return None, None, grads, [None] * len(saved), None


promised_loss.register_autograd(_promised_backward, setup_context=_promised_context)


def head_added_in_forward(op: Any, gradient_of: dict[int, int]) -> Callable[..., Any]:
    """An `op` whose last argument is the gradient of its loss, for which it adds that of input 1, a
    head, to an accumulator: the same function, differentiable. Otherwise as in
    `gradients_formed_in_forward`.
    """

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        bare = (x.detach() if isinstance(x, Tensor) else x for x in arguments)
        loss, *others = found = op(*bare)
        pairs = [(arguments[i], found[o]) for i, o in gradient_of.items() if i != 1]
        there = [pair for pair in pairs if pair[0] is not None]
        inputs, formed = ([pair[k] for pair in there] for k in (0, 1))
        return promised_loss(loss, arguments[1], inputs, formed, arguments[-1]), *others

    return call


def gradients_formed_in_forward(
    op: Any,
    arguments: int,
    gradient_of: dict[int, int],
    factored: tuple[int, int] | None = None,
    main_grad: int | None = None,
) -> None:
    """Autograd of an `op` whose output 0 is the loss and `gradient_of[i]` d loss / d input i.

    Backward only scales; the outputs besides the loss are not differentiable. In the place of the
    gradient of input 1, a head, there may be dz, to be multiplied by h (N, D): `factored` says
    which output h is, empty where there is none, and which input the vocabulary. Where input
    `main_grad` is a tensor, the head's gradient is added to it, and is None to autograd.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # an unused output must not cost a V x D tensor of zeros
        ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in gradient_of]
        ctx.late, ctx.sizes = False, (0, 0)
        outputs = list(gradient_of.values())
        if factored is not None and output[factored[0]].ndim == 2:
            ctx.late, ctx.sizes = True, (inputs[1].shape[0], inputs[factored[1]])
            outputs.append(factored[0])
        # not saved for backward: other calls may add to it meanwhile
        ctx.main_grad = None if main_grad is None else inputs[main_grad]
        ctx.save_for_backward(*(output[o] for o in outputs))

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
                h = saved[-1] if ctx.late else None
                if i == 1 and ctx.main_grad is not None:
                    add_to(ctx.main_grad, formed, h, grad, ctx.sizes[1])
                elif i == 1 and h is not None:
                    grads[i] = head_gradient(formed, h, grad, *ctx.sizes, dtype)
                else:
                    grads[i] = scale_gradient(formed, grad, dtype)
        return tuple(grads)

    op.register_autograd(backward, setup_context=setup_context)
