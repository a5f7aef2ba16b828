"""Has an operator become slower? One benchmark for each public operator, forward alone (as in
evaluation) and forward with backward, on shapes that take milliseconds.

    python -m pytest benchmarks --benchmark-only
    python -m pytest benchmarks --benchmark-only --benchmark-autosave           # keep this run
    python -m pytest benchmarks --benchmark-only --benchmark-compare            # with the last kept
    python -m pytest benchmarks --benchmark-only -k "distill and backward"

Groups are operators; within one, backends stand side by side. Compare two commits on one quiet
machine: seconds of another machine, or of a busy one, say nothing, so no test depends on them
(`make test` does not collect this folder; what may not change is counted in
tests/test_guards.py). For whole problems, peers and memory there is ``python -m benchmarks``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from benchmarks.methods import BY_KEY
from benchmarks.problem import Forward, Problem, make
from benchmarks.shapes import Case
from mllmkd_kernels import choose

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CASE = Case("operators", 64, 384, 256, 8192, 8192, images=2)
if ON_GPU:  # about the kernels rather than their launch
    CASE = Case("operators", 1024, 2048, 896, 65536, 65536, "bf16", images=2)
BACKENDS = [name for name in choose.BACKENDS if not BY_KEY[f"mk-{name}"].why_not(DEVICE)]


@pytest.fixture(scope="module")
def problem() -> Problem:
    """The same tensors for all."""
    return make(CASE, device=DEVICE.type)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can serve the device."""
    return request.param


@pytest.fixture(params=["forward", "forward+backward"])
def time(request: pytest.FixtureRequest, benchmark: Any, problem: Problem) -> Any:
    """Times a function that returns a scalar, alone or with its backward."""
    backward = request.param != "forward"

    def timed(forward: Forward) -> None:
        def run() -> None:
            problem.forget_gradients()
            with torch.set_grad_enabled(backward):
                value = forward()
            if backward:
                value.backward()
            if ON_GPU:
                torch.cuda.synchronize()

        operator = request.node.originalname.removeprefix("test_")
        benchmark.group = f"{operator}, {request.param}"
        benchmark.pedantic(run, rounds=20 if ON_GPU else 7, warmup_rounds=2)

    return timed


def test_fused_linear_distill(time: Any, problem: Problem, backend: str) -> None:
    """CE and forward KL of all rows, the head trained."""
    p, mean = problem, 1 / CASE.all_rows
    call = partial(mk.fused_linear_distill, ce_weight=mean, kd_weight=mean, backend=backend)
    time(lambda: call(p.hs, p.ws, p.ht, p.wt, p.labels).loss)


def test_fused_linear_logprob(time: Any, problem: Problem, backend: str) -> None:
    """Backward makes the logits again."""
    p = problem
    time(lambda: mk.fused_linear_logprob(p.hs, p.ws, p.labels, backend=backend).sum())


def test_relation_cosine(time: Any, problem: Problem, backend: str) -> None:
    """Of the hidden states themselves."""
    inputs = problem.hs, problem.teacher()[0], problem.ends
    time(lambda: mk.relation_cosine(*inputs, backend=backend))


def test_fused_linear_relation(time: Any, problem: Problem, backend: str) -> None:
    """The head trained: its Gram is made every time, the teacher's once."""
    inputs = problem.hs, problem.ws, *problem.teacher(), problem.ends
    gram = mk.head_gram(problem.teacher()[1])
    time(lambda: mk.fused_linear_relation(*inputs, teacher_gram=gram, backend=backend))


def test_head_gram(time: Any, problem: Problem) -> None:
    """What a trained head costs the relation every step."""
    time(lambda: mk.head_gram(problem.ws).sum())


def test_llava_kd_loss(time: Any, problem: Problem, backend: str) -> None:
    """All four terms: a sample's first half is its image, the last quarter its answer."""
    p, (ht, wt), images, length = problem, problem.teacher(), CASE.images, CASE.rows
    labels = p.labels.view(images, length).clone()
    labels[:, : 3 * length // 4] = -100
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, : length // 2] = True
    teacher = mk.HeadInputs(ht.view(images, length, -1), wt)
    loss = mk.LlavaKDLoss(backend=backend)
    how: dict[str, Any] = {
        "num_items_in_batch": mk.RowCounts(images * length // 4, images * length // 2, images),
        "image_lens": [length // 2] * images,
    }

    def forward() -> Tensor:
        student = mk.HeadInputs(p.hs.view(images, length, -1), p.ws)
        return loss(student, teacher, labels, mask, **how).loss

    time(forward)
