"""Do the public functions reach Triton's kernels, with either algorithm, and come out right?

Kernels have tests of their own beside this file; here the way goes through plan, operator and
autograd. Without a GPU the interpreter runs them, so problems are small and combinations few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

import mllmkd_kernels as mk
from mllmkd_kernels import ops, plan, reference
from tests.problems import PROBLEMS, Problem, check_result, problem, run
from tests.tolerances import check

ALGORITHMS = ("chunk", "stream")


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each algorithm in turn, whatever the plan would take."""
    forced = functools.partial(plan.distill_plan, algorithm=request.param)
    monkeypatch.setattr(plan, "distill_plan", forced)
    return request.param


def check_all(p: Problem, divergence: str) -> None:
    """Loss, terms and gradients against the definition in fp64."""
    check_result(run(p, "triton", divergence), p, divergence, p.hs.dtype)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem(name: str, algorithm: str, device: torch.device) -> None:
    check_all(problem(name).on(device), "forward_kl")


def test_operands_of_different_dtypes(algorithm: str, device: torch.device) -> None:
    p = problem("aligned").on(device)
    mixed = Problem(p.hs.bfloat16(), p.ws, p.ht.half(), p.wt.bfloat16(), p.labels)
    check_all(mixed, "forward_kl")


@pytest.mark.usefixtures("device")
def test_a_small_budget_streams() -> None:
    """By the model: at 64 MiB a chunk of 55 rows would read the heads 149 times."""
    big = plan.Shapes(8192, 151_936, 1024, 2560, True, True, torch.bfloat16)
    cuda = torch.device("cuda")
    assert plan.distill_plan(big, cuda, "triton").algorithm == "chunk"
    small = plan.distill_plan(big, cuda, "triton", workspace_mb=64.0)
    copy = 8192 * 1024 * 2  # of the hidden states, for dW
    assert small.algorithm == "stream" and small.workspace_bytes <= 64 * 2**20 + copy


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("d_t", [0, 2560])
@pytest.mark.parametrize("wants", [(False, False), (True, False), (True, True)])
def test_the_plan_counts_what_the_kernels_do(
    wants: tuple[bool, bool], d_t: int, divergence: str
) -> None:
    from mllmkd_kernels.backends.triton import rows, sweeps

    n, v, d_s = 512, 151_936, 1024
    s = plan.Shapes(n, v, d_s, d_t, *wants, torch.bfloat16, divergence=divergence)
    device, table = torch.device("cuda"), divergence if d_t else None
    stream = plan.distill_plan(s, device, "triton", algorithm="stream")
    assert stream.flops == sweeps.flops(n, v, d_s, d_t, table, *wants)
    moved = rows.bytes_moved(n, v, d_t > 0, divergence, 2 if any(wants) else 0)
    blocks = 1 + (d_t > 0)
    assert moved == n * v * (4 * blocks * s.sweeps + 2 * any(wants))


def test_log_probabilities(device: torch.device) -> None:
    p = problem("ragged").on(device)
    hs, ws = p.hs.clone().requires_grad_(), p.ws.clone().requires_grad_()
    labels = torch.randint(0, 307, (13,), device=device)
    mk.fused_linear_logprob(hs, ws, labels, backend="triton").sum().backward()
    exact_h, exact_w = (x.detach().double().requires_grad_() for x in (hs, ws))
    z = reference.logits(exact_h, exact_w, None, None, 307)
    z.log_softmax(-1).gather(1, labels[:, None]).sum().backward()
    for got, want in ((hs, exact_h), (ws, exact_w)):
        assert got.grad is not None and want.grad is not None
        check(got.grad, want.grad, "gradient")


def _arguments(p: Problem) -> tuple:
    even = p.hs.new_full((p.hs.shape[0],), 0.1)
    heads = p.hs.clone().requires_grad_(), p.ws.clone().requires_grad_(), None, p.ht, p.wt, None
    options = "jsd", 0.5, 1.0, 0.0, 0.0, p.vocab, -100, True, True, False, "triton", 0.0
    return (*heads, p.labels, even, even, *options)


def test_opcheck(device: torch.device) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(
        ops.linear_distill, _arguments(problem("one_row").on(device)), test_utils=checks
    )


def test_compile_of_a_caller(device: torch.device) -> None:
    p = problem("one_row").on(device)

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return mk.fused_linear_distill(h, w, p.ht, p.wt, p.labels, backend="triton").loss

    compiled: Callable = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p.hs, p.ws), loss(p.hs, p.ws))


def test_fp64_is_refused_by_name(device: torch.device) -> None:
    p = problem("one_row").to(torch.float64).on(device)
    with pytest.raises(ValueError, match="backend: 'triton' has no fp64; 'eager' computes fp64"):
        run(p, "triton")


@pytest.mark.usefixtures("device")
def test_without_gpu_and_interpreter_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton' was asked for, but the tensors are on cpu"):
        mk.explain(8, 8, 8, backend="triton")
    with pytest.raises(ValueError, match="'cuda' was asked for, but the tensors are on cpu"):
        mk.explain(8, 8, 8, backend="cuda")
