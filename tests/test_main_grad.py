"""Does `main_grad` get what the weight's gradient would have been, unrounded: from every loss that
takes one, on every backend?
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mllmkd_kernels as mk
from mllmkd_kernels import plan
from tests.test_layouts import _alone, operands
from tests.test_layouts import backend as backend  # each, and each algorithm
from tests.watch import Watch

__all__ = ["_alone"]
Loss = Callable[..., Tensor]


def distill(x: dict[str, Tensor], **options: Any) -> Tensor:
    return mk.fused_linear_distill(
        x["hs"], x["ws"], x["ht"], x["wt"], x["labels"], ce_weight=x["ce_weight"],
        kd_weight=x["kd_weight"], divergence="jsd", student_bias=x["bs"], **options,
    ).loss  # fmt: skip


def logit_mse(x: dict[str, Tensor], **options: Any) -> Tensor:
    return mk.fused_linear_logit_mse(x["hs"], x["ws"], x["ht"], x["wt"], **options)[0]


def vocab_parallel(x: dict[str, Tensor], **options: Any) -> Tensor:
    return mk.vocab_parallel_distill(
        x["hs"], x["ws"], x["ht"], x["wt"], x["labels"], ce_weight=x["ce_weight"], **options
    ).loss


def leaves(backend: str = "", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x = operands(backend)
    x |= {k: x[k].to(dtype) for k in ("hs", "ws", "bs", "ht", "wt")}
    return x | {k: x[k].requires_grad_() for k in ("hs", "ws", "bs")}


def check(loss: Loss, dtype: torch.dtype, backend: str = "") -> None:
    """One step gives what rounds to the ordinary gradient, and a second is added to it."""
    x, scale = leaves(backend, dtype), 0.3
    dh, dw = torch.autograd.grad(scale * loss(x), [x["hs"], x["ws"]])
    main_grad = torch.zeros(dw.shape, dtype=torch.promote_types(dtype, torch.float32))
    (scale * loss(x, main_grad=main_grad)).backward()
    assert x["ws"].grad is None and torch.equal(x["hs"].grad, dh)  # pyright: ignore
    torch.testing.assert_close(main_grad.to(dtype), dw, rtol=1e-6, atol=1e-7)
    assert dtype != torch.bfloat16 or not torch.equal(main_grad.to(dtype).float(), main_grad)
    once = main_grad.clone()
    loss(x, main_grad=main_grad).backward()
    torch.testing.assert_close(main_grad, once * (1 + 1 / scale), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_gets_the_gradient_and_keeps_what_it_had(backend: str, dtype: torch.dtype) -> None:
    check(functools.partial(distill, backend=backend), dtype, backend)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", [logit_mse, vocab_parallel])
def test_other_losses_take_one(loss: Loss, dtype: torch.dtype) -> None:
    check(loss, dtype)


def test_a_gradient_formed_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "factored", lambda *_: True)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check(functools.partial(distill, backend="eager"), dtype)


@pytest.mark.parametrize("late", [False, True])
def test_backward_makes_no_gradient_of_the_head(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the weight's dtype nor in another: nothing of its size."""
    monkeypatch.setattr(plan, "factored", lambda *_: late)
    made = {}
    for given in (False, True):
        x = leaves(dtype=torch.bfloat16)
        main_grad = torch.zeros(x["ws"].shape, dtype=torch.float32)
        loss = distill(x, backend="eager", main_grad=main_grad if given else None)
        with Watch() as tally:
            loss.backward()
        made[given] = tally.tally.ours_made
    assert made[False] - made[True] == x["ws"].nbytes


def test_it_is_added_to_as_often_as_backward_runs() -> None:
    """Twice over a retained graph, once through a checkpoint, once in a compiled call; not at all
    without a graph, nor by a forward whose loss nobody differentiates.
    """
    x, main_grad = leaves(), torch.zeros(50, 10)
    loss = distill(x, main_grad=main_grad)
    with torch.no_grad():
        distill(x, main_grad=main_grad)
    assert not main_grad.any()
    loss.backward(retain_graph=True)
    once = main_grad.clone()
    loss.backward()
    assert once.any() and torch.equal(main_grad, once + once)
    torch._dynamo.reset()
    compiled = torch.compile(distill, fullgraph=True, backend="aot_eager")
    again = functools.partial(checkpoint, distill, use_reentrant=False)
    for call in (compiled, again):
        main_grad.zero_()
        call(x, main_grad=main_grad).backward()
        torch.testing.assert_close(main_grad, once)


def test_a_graph_of_it_is_refused() -> None:
    x, main_grad = leaves(), torch.zeros(50, 10)
    loss = distill(x, main_grad=main_grad)
    with pytest.raises(RuntimeError, match="main_grad: what is added to it has no graph"):
        torch.autograd.grad(loss, x["ws"], create_graph=True)
    assert not main_grad.any()


@pytest.mark.parametrize(
    ("main_grad", "error", "message"),
    [
        (torch.zeros(10, 50), ValueError, r"expected the shape \(50, 10\) of student_weight, got"),
        (torch.zeros(50, 10).bfloat16(), TypeError, "expected torch.float32, in which"),
        (torch.zeros(50, 10).double(), TypeError, "expected torch.float32, in which"),
        (torch.zeros(50, 10, device="meta"), ValueError, "is on meta, but student_weight is on"),
        (torch.zeros(50, 10, requires_grad=True), ValueError, "that requires no gradient"),
        (torch.zeros(10, 50).mT, ValueError, "a contiguous buffer"),
        ([0.0], TypeError, "expected a tensor, got list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("loss", [distill, logit_mse])
def test_what_cannot_be_added_to_is_named(
    loss: Loss, main_grad: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"main_grad: .*{message}"):
        loss(leaves(), main_grad=main_grad)
