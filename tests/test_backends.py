"""Do the backends keep to the plan: the same answer however rows are chunked, run after run, no
work for what nobody wants, no large tensor and no look at the data?
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import choose, plan, registration
from mllmkd_kernels.backends import cpu, eager, products
from mllmkd_kernels.backends.calls import Head, Options, Targets
from tests.problems import (
    DIVERGENCES,
    DTYPES,
    Problem,
    asked,
    expected,
    near_converged,
    problem,
    run,
)
from tests.tolerances import check, relative_error
from tests.watch import Watch, inside_operators

SIGNATURES = ("distill_rows", "logprob_rows", "logprob_grad", "relation_stats", "relation_grad")


@contextmanager
def spied(monkeypatch: pytest.MonkeyPatch, backend: str, function: str) -> Iterator[list]:
    """(arguments, result) of every call of a backend's function."""
    module = {"eager": eager, "cpu": cpu}[backend]
    calls, original = [], getattr(module, function)

    def spy(*arguments: Any, **written: Any) -> Any:
        result = original(*arguments, **written)
        calls.append((arguments, result))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, function, spy)
        yield calls


def test_every_backend_offers_the_same_functions() -> None:
    pytest.importorskip("triton")
    for backend, name in product(choose.BACKENDS, SIGNATURES):
        module = registration.module_named(backend)
        mine, want = (_required(getattr(m, name)) for m in (module, eager))
        assert mine == want, (backend, name)


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters without a default: a backend may have more, for tests and tuning."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [31, 32, 33, 64, 65, 97])
def test_a_workspace_changes_only_the_chunking(
    rows: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A budget of nothing means the smallest chunk, 32 rows: sizes on both sides of its multiples.
    p = near_converged(0.1, n=rows, v=130, d=16).to(dtype)
    with spied(monkeypatch, backend, "distill_rows") as calls:
        whole = run(p, backend)
        chunked = run(p, backend, workspace_mb=1e-6)
    assert [arguments[-1].chunk for arguments, _ in calls] == [rows, -(-rows // -(-rows // 32))]
    for name in ("loss", "ce", "kd", "dh"):
        check(getattr(chunked, name), getattr(whole, name), "value", what=name)
    row = "gradient" if dtype == torch.float32 else "16-bit gradient"
    check(chunked.dw, whole.dw, row)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("threads")
def test_the_same_bits_every_run(divergence: str, dtype: torch.dtype, backend: str) -> None:
    # 200 rows × 1,000 tokens: enough work for every thread to get a share of it.
    p = near_converged(0.1, n=200, v=1000).to(dtype)
    p = replace(p, ce_weight=torch.full((200,), 0.01))
    first = run(p, backend, divergence)
    for _ in range(3):
        again = run(p, backend, divergence)
        assert all(torch.equal(a, b) for a, b in zip(first[:5], again[:5], strict=True))


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)), ids=str)
def test_a_frozen_input_costs_nothing(
    wanted: tuple[bool, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = replace(problem("ragged"), bt=None)
    assert p.bs is not None
    leaves = [x.clone().requires_grad_(w) for x, w in zip((p.hs, p.ws, p.bs), wanted, strict=True)]
    with spied(monkeypatch, backend, "distill_rows") as calls:
        out = mk.fused_linear_distill(
            leaves[0], leaves[1], p.ht, p.wt, p.labels, ce_weight=1.0, student_bias=leaves[2],
            backend=backend,
        )  # fmt: skip
    (_, result), *others = calls
    assert not others and tuple(bool(g.numel()) for g in result[3:]) == wanted
    assert out.loss.requires_grad == any(wanted)
    if any(wanted):
        ones = torch.ones(13)
        full = run(replace(p, ce_weight=ones, kd_weight=ones, options={}), backend)
        out.loss.backward()
        for leaf, w, gradient in zip(leaves, wanted, (full.dh, full.dw, full.db), strict=True):
            assert (leaf.grad is not None) == w
            if leaf.grad is not None and gradient is not None:
                assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_forms_no_gradient(
    context: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem("aligned")
    with spied(monkeypatch, backend, "distill_rows") as calls, context():
        mk.fused_linear_distill(p.hs.requires_grad_(), p.ws, p.ht, p.wt, backend=backend)
    assert [g.numel() for g in calls[0][1][3:]] == [0, 0, 0]


@pytest.mark.parametrize(("grad_h", "grad_w"), list(product([False, True], repeat=2)))
@pytest.mark.parametrize("with_teacher", [False, True])
def test_products_are_those_of_the_plan(grad_h: bool, grad_w: bool, with_teacher: bool) -> None:
    """Counted, not believed: F = 2NV(D_s + D_t) + 2NV·D_s·(gradients wanted), and a frozen head or
    a missing teacher leaves its share out.
    """
    p = problem("aligned")
    d_t = 128 if with_teacher else 0
    shapes = plan.Shapes(32, 512, 64, d_t, grad_h, grad_w, torch.float32)
    chosen = plan.distill_plan(shapes, torch.device("cpu"), "eager")
    with Watch() as watch:
        _distill_rows(p, "forward_kl", (grad_h, grad_w, False), with_teacher)
    assert watch.tally.flops == chosen.flops == chosen.floor_flops


def _distill_rows(
    p: Problem, divergence: str, wants: tuple[bool, ...], with_teacher: bool = True
) -> None:
    """The eager kernel alone, 8 rows at a time."""
    ones = torch.ones(p.hs.shape[0])
    targets = Targets(p.labels, ones, ones if with_teacher else None, mk.Divergence(divergence))
    teacher = Head(p.ht, p.wt) if with_teacher else None
    want_dh, want_dw, want_db = wants
    options = Options(p.vocab, 8, want_dh, want_dw, want_db)
    eager.distill_rows(Head(p.hs, p.ws), teacher, targets, options)


def test_the_eager_backend_never_holds_the_logits() -> None:
    """The largest tensor is a chunk of them, 8 rows of 96, or dW: not N × V, not V × D again."""
    p = near_converged(0.1, n=96, v=2048, d=4)
    with Watch() as watch:
        _distill_rows(p, "jsd", (True, True, False))
    assert watch.tally.largest == 8 * 2048


def test_little_is_kept_of_what_widening_frees() -> None:
    """Of bf16 heads by the eager backend, in a process that has freed large tensors before, of
    which malloc learns to keep what is freed.
    """
    code = """
import torch
from benchmarks import memory
from benchmarks.shapes import fallback
torch.set_num_threads(2)
case = fallback("bf16").halved(2)
print(memory._extra("mk-eager", case, "cpu")["extra_bytes"] / 2**20)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**25), "OMP_NUM_THREADS": "2"}
    child = [sys.executable, "-c", code]
    done = subprocess.run(child, env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 32  # the largest slice in fp32, of 2,048 rows, was 16 MiB of 62


def _both_forms(
    p: Problem, monkeypatch: pytest.MonkeyPatch, backend: str, **options: Any
) -> list[tuple[Tensor, ...]]:
    """Loss, dh, dw and db with dW formed in backward, and in forward."""
    found = []
    for late in (True, False):
        monkeypatch.setattr(plan, "factored", lambda *_, late=late: late)
        leaves = [t.clone().requires_grad_() for t in (p.hs, p.ws, torch.zeros(p.ws.shape[0]))]
        hs, ws, bs = leaves
        ce_weight, kd_weight = p.weights()
        loss = mk.fused_linear_distill(
            hs, ws, p.ht, p.wt, p.labels, ce_weight=ce_weight, kd_weight=kd_weight,
            student_bias=bs, backend=backend, **options,
        ).loss  # fmt: skip
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves, torch.tensor(0.3))))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["aligned", "ragged"])
@pytest.mark.parametrize("workspace_mb", [None, 1e-6])
def test_a_head_gradient_formed_in_backward_is_the_one_formed_in_forward(
    name: str,
    dtype: torch.dtype,
    workspace_mb: float | None,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """Whatever the chunks, and with zeros where the vocabulary is shorter than the head."""
    p = problem(name).to(dtype)
    options: dict[str, Any] = {"student_softcap": 5.0, "workspace_mb": workspace_mb}
    vocab = min(p.ws.shape[0], p.wt.shape[0]) - 7
    late, early = _both_forms(p, monkeypatch, backend, vocab_size=vocab, **options)
    for a, b in zip((*late[:2], late[3]), (*early[:2], early[3]), strict=True):
        assert torch.equal(a, b)
    assert late[2].dtype == early[2].dtype and not late[2][vocab:].any()
    check(late[2], early[2].double(), "gradient" if dtype == torch.float32 else "16-bit gradient")


def test_of_few_rows_no_head_is_saved(backend: str) -> None:
    """Plain PyTorch saves N × V probabilities: so may we, and no fp32 dW of V × D beside the one
    that is returned.
    """
    saved: list[Tensor] = []
    hs, ws = torch.randn(16, 64, requires_grad=True), torch.randn(448, 64, requires_grad=True)
    teacher = torch.randn(16, 8), torch.randn(448, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        mk.fused_linear_distill(hs, ws, *teacher, backend=backend)
    assert sum(x.nbytes for x in saved) < 2 * 16 * 448 * 4 < ws.nbytes


def test_nan_in_a_row_without_weight_stays_out_of_both_forms(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    p = problem("aligned")
    hs, weight = p.hs.clone(), torch.ones(p.hs.shape[0])
    hs[3], weight[3] = torch.nan, 0
    p = replace(p, hs=hs, ce_weight=weight, kd_weight=weight)
    for _, *gradients in _both_forms(p, monkeypatch, backend):
        assert all(g.isfinite().all() for g in gradients)


def test_the_relation_never_holds_its_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """R of 300 rows has 90,000 entries, its logits 300 × 5,000: no tensor comes near either."""
    monkeypatch.setattr(eager, "RELATION_TILE", 64)
    monkeypatch.setattr(products, "VOCAB_SLICE", 500)
    hs, ht = torch.randn(300, 8, requires_grad=True), torch.randn(300, 12)
    ws, wt = torch.randn(5000, 8, requires_grad=True), torch.randn(5000, 12)
    for cap in (None, 3.0):
        with inside_operators() as seen:
            mk.fused_linear_relation(
                hs, ws, ht, wt, backend="eager", student_softcap=cap
            ).backward()
        # The largest: the heads' own gradient, or a vocabulary slice of one image's logits.
        assert 0 < seen.largest <= max(ws.numel(), 300 * 500)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_waits_for_the_device(divergence: str) -> None:
    """On tensors that have no data, as of a device that is still computing, any look at a value
    raises; shapes and dtypes come out as they do with data.
    """
    p = problem("ragged").on("meta")
    p = replace(p, options={"temperature": 2.0, "student_softcap": 5.0, "teacher_softcap": 4.0})
    student, teacher, targets = asked(p, mk.Divergence(divergence))
    options = Options(307, 8, True, True, True)
    out = eager.distill_rows(student, teacher, targets, options)
    assert [tuple(t.shape) for t in out] == [(), (13,), (13,), (13, 11), (307, 11), (307,)]
    logp, lse = eager.logprob_rows(student, targets, options)
    grads = eager.logprob_grad(logp, lse, student, targets, options)
    assert [tuple(t.shape) for t in grads] == [(13, 11), (307, 11), (307,)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_gradient_is_rounded_once_whatever_comes_in(
    dtype: torch.dtype, backend: str
) -> None:
    """Times 1 a rounded gradient stays as it is; times 1/3 it would be rounded again, which makes
    an error of 0.17% one of 0.23%.
    """
    p = near_converged(0.1, n=64, v=500).to(dtype)
    p = replace(p, ce_weight=torch.full((64,), 0.5))
    want, errors = expected(p), {}
    for incoming in (1.0, 1 / 3):
        hs, ws = p.hs.clone().requires_grad_(), p.ws.clone().requires_grad_()
        ce_weight, kd_weight = p.weights()
        loss = mk.fused_linear_distill(
            hs, ws, p.ht, p.wt, p.labels, ce_weight=ce_weight, kd_weight=kd_weight, backend=backend
        ).loss
        loss.backward(torch.tensor(incoming))
        assert hs.grad is not None and ws.grad is not None
        scale = torch.tensor(incoming).double()
        for name, gradient in (("dh", hs.grad), ("dw", ws.grad)):
            errors[name, incoming] = relative_error(gradient, getattr(want, name) * scale)
    for name in ("dh", "dw"):  # which bits are cut off is chance: 5% either way
        assert errors[name, 1 / 3] <= 1.05 * errors[name, 1.0], name


def test_a_loss_scale_rescues_gradients_below_fp16(backend: str) -> None:
    """Row weights of 1e-7 put every gradient below 2^-24, the smallest fp16 number: a loss scale
    must still find them, so nothing may be stored in fp16 before it is scaled.
    """
    p = replace(problem("aligned"), ce_weight=torch.full((32,), 1e-7), kd_weight=torch.zeros(32))
    p = p.to(torch.float16)
    hs, ws = p.hs.clone().requires_grad_(), p.ws.clone().requires_grad_()
    ce_weight, kd_weight = p.weights()
    out = mk.fused_linear_distill(
        hs, ws, p.ht, p.wt, p.labels, ce_weight=ce_weight, kd_weight=kd_weight, backend=backend
    )
    scale = 2.0**17
    (out.loss * scale).backward()
    want = expected(p)
    assert hs.grad is not None and ws.grad is not None
    check(hs.grad.double() / scale, want.dh, "16-bit gradient")
    check(ws.grad.double() / scale, want.dw, "16-bit gradient")
