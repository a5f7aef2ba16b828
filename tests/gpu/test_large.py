"""Is it right at the sizes of real models, where a GPU is needed to compute the truth at all?

Vocabularies of 32k and 152k, blocks of more than 2^31 elements, memory against the plan, the same
bits twice, and no waiting for the device.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import plan, reference
from mllmkd_kernels.backends.calls import Head, Options, Targets
from tests.problems import expected, near_converged, run
from tests.tolerances import TOLERANCES, ladder_bound, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: Past this index arithmetic of 32 bits is wrong: 14,336 × 151,936 is 2^31.02.
VOCAB, MANY_ROWS = 151936, 14336


@pytest.fixture(autouse=True)
def _empty_gpu() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.fixture(params=["chunk", "stream"])
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each algorithm in turn, whatever the plan would take."""
    forced = functools.partial(plan.distill_plan, algorithm=request.param)
    monkeypatch.setattr(plan, "distill_plan", forced)
    return request.param


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Logits of two of these, over D, have a standard deviation of 2."""
    rng = _generator(seed + len(shape) + shape[0])
    x = torch.randn(shape, generator=rng, device="cuda", dtype=torch.float32)
    return x.mul_((4 / shape[-1]) ** 0.25).to(dtype)


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.1, 0.003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("vocab", [32000, VOCAB])
def test_the_ladder_with_a_real_vocabulary(
    vocab: int, divergence: str, dtype: torch.dtype, eps: float, algorithm: str
) -> None:
    p = near_converged(eps, n=64, v=vocab, d=128)
    p = replace(p, kd_weight=torch.full((64,), 1000.0)).to(dtype).on("cuda")
    got, want = run(p, "triton", divergence), expected(p, divergence)
    for name in ("dh", "dw"):
        error = relative_error(getattr(got, name), getattr(want, name))
        assert error <= ladder_bound(dtype, eps), f"{name}: {error:.2e}"


@pytest.mark.parametrize("eps", [0.1, 0.003])
def test_logits_do_not_drift_with_the_hidden_size(eps: float, algorithm: str) -> None:
    """A student of D 1,024 and a teacher whose hidden states are copies of the student's side by
    side, and whose weights add up to the student's but for a few: nearly the same logits at four
    times the K. An accumulator that truncates is then off by more for the teacher than for the
    student, where near convergence equal errors would cancel: emulated, by 0.9% of dh with half
    this vocabulary, and 0.02% in segments of 512.
    """
    n, v, d, copies = 64, VOCAB, 1024, 4
    hs, ws = _normal(n, d), _normal(v, d)
    noise = _normal(v, copies * d, dtype=torch.float32, seed=3)
    few = torch.rand(noise.shape, device="cuda", generator=_generator(4)) < 0.05
    ht, wt = hs.repeat(1, copies), ws.repeat(1, copies) / copies
    wt += (noise * few * (4 * eps / copies)).bfloat16()
    h = hs.clone().requires_grad_()
    mk.fused_linear_distill(h, ws, ht, wt, kd_weight=1000.0, backend="triton").loss.backward()
    exact = hs.double().requires_grad_()
    z_s, z_t = (reference.logits(a, b.double()) for a, b in ((exact, ws), (ht.double(), wt)))
    reference.linear_distill(z_s, z_t, None, ce_weight=0.0, kd_weight=1000.0)[0].backward()
    assert h.grad is not None and exact.grad is not None
    assert relative_error(h.grad, exact.grad) <= ladder_bound(torch.bfloat16, eps)


# --- sizes ----------------------------------------------------------------------------------------


def _checked_rows(call: Callable[..., tuple[Tensor, ...]], at_a_time: int) -> None:
    """One call on MANY_ROWS rows; first, middle and last ones against the definition in fp64."""
    hs, ht = _normal(MANY_ROWS, 64), _normal(MANY_ROWS, 64, seed=1)
    ws, wt = _normal(VOCAB, 64), _normal(VOCAB, 64, seed=1)
    labels = torch.arange(MANY_ROWS, device="cuda") * 10  # the last are near the end of V
    weight = torch.ones(MANY_ROWS, device="cuda")
    _, ce, kd, dh, *_ = call(
        Head(hs, ws),
        Head(ht, wt),
        Targets(labels, weight, weight),
        Options(VOCAB, at_a_time, want_dh=True),
    )
    rows = torch.tensor([0, 1, MANY_ROWS // 2, MANY_ROWS - 2, MANY_ROWS - 1], device="cuda")
    h = hs[rows].double().requires_grad_()
    z_s = reference.logits(h, ws.double())
    z_t = reference.logits(ht[rows].double(), wt.double())
    loss, want_ce, want_kd = reference.linear_distill(
        z_s, z_t, labels[rows], ce_weight=1.0, kd_weight=1.0
    )
    loss.backward()
    assert h.grad is not None
    value, gradient = TOLERANCES["value"].floor, TOLERANCES["16-bit gradient"].floor
    for name, got, want, bound in (
        ("ce", ce[rows], want_ce, value), ("kd", kd[rows], want_kd, 4 * value),
        ("dh", dh[rows], h.grad, gradient),
    ):  # fmt: skip
        for i, row in enumerate(rows.tolist()):
            error = relative_error(got[i], want[i])
            assert error <= bound, f"{name} of row {row}: {error:.2e}"


def test_a_block_of_logits_past_2_31_elements() -> None:
    from mllmkd_kernels.backends import triton

    _checked_rows(triton.distill_rows, MANY_ROWS)


def test_a_stream_past_2_31_logits_and_a_gradient_slice_past_2_31_elements() -> None:
    from mllmkd_kernels.backends import triton

    _checked_rows(triton.distill_stream, VOCAB)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["trained", "added in forward", "frozen"])
@pytest.mark.parametrize("workspace_mb", [None, 64.0])
def test_memory_is_what_the_plan_says(
    workspace_mb: float | None, head: str, algorithm: str
) -> None:
    n, d_s, d_t, train_head = 2048, 1024, 2048, head != "frozen"
    hs, ws = _normal(n, d_s).requires_grad_(), _normal(VOCAB, d_s).requires_grad_(train_head)
    ht, wt = _normal(n, d_t), _normal(VOCAB, d_t)
    labels, given = torch.arange(n, device="cuda"), {}
    if head == "added in forward":
        given = {"main_grad": torch.zeros_like(ws, dtype=torch.float32), "loss_gradient": 1.0}

    def step() -> int:
        hs.grad = ws.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mk.fused_linear_distill(
            hs, ws, ht, wt, labels, ce_weight=1 / n, kd_weight=1 / n, workspace_mb=workspace_mb,
            **given,
        ).loss.backward()  # fmt: skip
        gradients = sum(x.grad.nbytes for x in (hs, ws) if x.grad is not None)
        return torch.cuda.max_memory_allocated() - before - gradients

    step()  # libraries take their own workspaces once
    found = step()
    predicted = mk.explain(
        n, VOCAB, d_s, d_t, train_head=train_head, dtype=torch.bfloat16, device="cuda",
        workspace_mb=workspace_mb, main_grad="forward" if given else None,
    ).peak_bytes  # fmt: skip
    slack = 32 * 2**20  # partial sums, row terms, rounding of the allocator
    assert found <= 1.05 * predicted + slack, f"{found / 2**20:.0f} of {predicted / 2**20:.0f} MiB"
    assert found >= 0.5 * predicted - slack, f"{found / 2**20:.0f} of {predicted / 2**20:.0f} MiB"


# --- every run the same, and none waits -----------------------------------------------------------


def _distill() -> list[Tensor]:
    hs, ws = _normal(300, 128).requires_grad_(), _normal(5003, 128).requires_grad_()
    labels = torch.arange(300, device="cuda")
    out = mk.fused_linear_distill(
        hs, ws, _normal(300, 192), _normal(5003, 192), labels, ce_weight=1.0, divergence="jsd"
    )
    out.loss.backward()
    assert hs.grad is not None and ws.grad is not None
    return [out.loss.detach(), out.ce, out.kd, hs.grad, ws.grad]


def _relation(softcap: float | None = None) -> list[Tensor]:
    hs, ws = _normal(400, 128).requires_grad_(), _normal(5003, 128).requires_grad_()
    ends = torch.tensor([0, 131, 131, 400], dtype=torch.int32, device="cuda")
    heads = hs, ws, _normal(400, 192), _normal(5003, 192)
    loss = mk.fused_linear_relation(*heads, ends, student_softcap=softcap)
    loss.backward()
    assert hs.grad is not None and ws.grad is not None
    return [loss.detach(), hs.grad, ws.grad]


def _logprob() -> list[Tensor]:
    h, w = _normal(300, 128).requires_grad_(), _normal(5003, 128).requires_grad_()
    logp = mk.fused_linear_logprob(h, w, torch.arange(300, device="cuda"))
    logp.sum().backward()
    assert h.grad is not None and w.grad is not None
    return [logp.detach(), h.grad, w.grad]


CALLS = {
    "distill": _distill, "relation": _relation, "softcapped": lambda: _relation(30.0),
    "logprob": _logprob,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_twice(name: str, algorithm: str) -> None:
    first, second = CALLS[name](), CALLS[name]()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name: str, algorithm: str) -> None:
    """The mode makes PyTorch raise at any call that waits. Moving `ends` or making inputs would
    wait too, so they are made once before: everything inside is the package's.
    """
    CALLS[name]()  # compiles
    real, made = torch.tensor, {}
    torch.cuda.synchronize()
    ends = real([0, 131, 131, 400], dtype=torch.int32, device="cuda")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # PyTorch says so once
        patch.setattr(torch, "tensor", lambda *args, **kwargs: made.setdefault("ends", ends))
        try:
            torch.cuda.set_sync_debug_mode("error")
            CALLS[name]()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_forward_and_backward_are_captured_in_a_graph(algorithm: str) -> None:
    """A replay on other numbers gives what a call gives."""
    hs, ws = _normal(300, 128).requires_grad_(), _normal(5003, 128).requires_grad_()
    ht, wt, labels = _normal(300, 192), _normal(5003, 192), torch.arange(300, device="cuda")

    def step() -> list[Tensor]:
        hs.grad = ws.grad = None
        out = mk.fused_linear_distill(hs, ws, ht, wt, labels, ce_weight=1.0, divergence="jsd")
        out.loss.backward()
        assert hs.grad is not None and ws.grad is not None
        return [out.loss.detach(), hs.grad, ws.grad]

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    with torch.no_grad():
        hs.copy_(_normal(300, 128, seed=7))
    graph.replay()
    replayed = [x.clone() for x in held]
    for got, want in zip(replayed, step(), strict=True):
        assert torch.equal(got, want)
