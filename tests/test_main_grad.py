"""Does `main_grad` get what the weight's gradient would have been, unrounded, in backward or, where
`loss_gradient` is known, in forward: from every loss that takes one, on every backend?
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
from benchmarks import memory
from mllmkd_kernels import plan
from mllmkd_kernels.backends import cpu
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
    """One step gives what rounds to the ordinary gradient, and a second is added to it: the same in
    forward as in backward, and all other gradients as ever.
    """
    x, scale = leaves(backend, dtype), 0.3
    others = [x[k] for k in ("hs", "bs", "ce_weight") if k != "bs" or loss is not logit_mse]
    x["ce_weight"].requires_grad_()
    *want, dw = torch.autograd.grad(scale * loss(x), [*others, x["ws"]], allow_unused=True)
    sums = {}
    for known in (False, True):
        main_grad = torch.zeros(dw.shape, dtype=torch.promote_types(dtype, torch.float32))

        def step(by: float, main_grad: Tensor = main_grad, known: bool = known) -> None:
            given = {"loss_gradient": by} if known else {}
            for leaf in others:
                leaf.grad = None
            (by * loss(x, main_grad=main_grad, **given)).backward()

        step(scale)
        assert x["ws"].grad is None
        for leaf, gradient in zip(others, want, strict=True):
            assert leaf.grad is gradient or torch.equal(leaf.grad, gradient)  # pyright: ignore
        torch.testing.assert_close(main_grad.to(dtype), dw, rtol=1e-6, atol=1e-7)
        assert dtype != torch.bfloat16 or not torch.equal(main_grad.to(dtype).float(), main_grad)
        once = main_grad.clone()
        step(1.0)
        torch.testing.assert_close(main_grad, once * (1 + 1 / scale), rtol=1e-5, atol=1e-6)
        sums[known] = main_grad
    torch.testing.assert_close(sums[True], sums[False], rtol=1e-6, atol=1e-7)


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


@pytest.mark.parametrize("where", ["eager", "cpu"])
def test_what_is_added_in_forward_is_nowhere_else(where: str) -> None:
    """No sum of the head's gradient beside `main_grad`, neither in forward nor until backward."""
    if where == "cpu" and not cpu.available():
        pytest.skip(cpu.why_not())
    v, d, n = 2**16, 64, 96
    hs, ws = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    labels, main_grad = torch.randint(v, (n,)), torch.zeros(v, d)

    def step(**given: Any) -> None:
        mk.fused_linear_distill(
            hs, ws, labels=labels, ce_weight=1.0, backend=where, workspace_mb=1.0,
            main_grad=main_grad, **given,
        ).loss.backward()  # fmt: skip
        mk.release_workspace()

    step()  # the first call reads files
    rise = {known: memory.peak_rise(lambda g=g: step(**g)) for known, g in
            ((False, {}), (True, {"loss_gradient": 1.0}))}  # fmt: skip
    assert rise[False] - rise[True] > 0.8 * main_grad.nbytes


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("loss", [distill, logit_mse, vocab_parallel])
def test_a_promise_that_is_not_kept_is_an_error(loss: Loss) -> None:
    """Another gradient of the loss, a second backward, a graph of it, a forward that backward
    repeats. Without gradients there is none, and nothing is added.
    """
    x, main_grad = leaves(), torch.zeros(50, 10)
    given = {"main_grad": main_grad, "loss_gradient": 0.5}
    with torch.no_grad():
        loss(x, **given)
    with torch.inference_mode():
        loss(x, **given)
    assert not main_grad.any()
    with pytest.raises(RuntimeError, match=r"for a gradient of 0.5 of the loss, but backward brou"):
        loss(x, **given).backward()
    kept = 0.5 * loss(x, **given)
    with pytest.raises(RuntimeError, match="once, in forward; expected one backward, without cr"):
        torch.autograd.grad(kept, x["ws"], create_graph=True)
    kept.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once, in forward; expected one backward, without cr"):
        kept.backward()
    for reentrant in (False, True):
        with pytest.raises(RuntimeError, match="ran again in backward, as checkpointing does"):
            checkpoint(
                lambda hs: 0.5 * loss(x | {"hs": hs}, **given), x["hs"], use_reentrant=reentrant
            ).backward()


def test_what_is_added_in_forward_compiles() -> None:
    x, main_grad, want = leaves(), torch.zeros(50, 10), torch.zeros(50, 10)
    distill(x, main_grad=want).backward()
    torch._dynamo.reset()
    compiled = torch.compile(distill, fullgraph=True, backend="aot_eager")
    for times in (1, 2):
        x["hs"].grad = None
        compiled(x, main_grad=main_grad, loss_gradient=1.0).backward()
        torch.testing.assert_close(main_grad, times * want)
    with pytest.raises(RuntimeError, match="but backward brought another"):
        (2 * compiled(x, main_grad=main_grad, loss_gradient=1.0)).backward()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"loss_gradient": 1.0}, ValueError, r"expected None without a main_grad, got 1.0"),
        ({"loss_gradient": 0.0, "main_grad": True}, ValueError, "a positive number, got 0.0"),
        ({"loss_gradient": "1", "main_grad": True}, TypeError, "a positive number, got str"),
    ],
)
@pytest.mark.parametrize("loss", [distill, logit_mse])
def test_what_cannot_be_promised_is_named(
    loss: Loss, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "main_grad" in given:
        given = given | {"main_grad": torch.zeros(50, 10)}
    with pytest.raises(error, match=f"loss_gradient: .*{message}"):
        loss(leaves(), **given)
