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

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from benchmarks.problem import Problem, make
from benchmarks.shapes import Case
from mllmkd_kernels import choose

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
#: Large enough on a GPU to be about the kernels rather than their launch.
CASE = (
    Case("operators", 2048, 2048, 896, 65536, 65536, "bf16")
    if ON_GPU
    else Case("operators", 128, 384, 256, 8192, 8192)
)
IMAGES = 2


def _usable(backend: str) -> bool:
    try:
        choose.choose_backend(backend, DEVICE)
    except (RuntimeError, ValueError):
        return False
    return True


BACKENDS = [backend for backend in choose.BACKENDS if _usable(backend)]
Forward = Callable[[], Tensor]


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


def _ends() -> Tensor:
    return torch.arange(IMAGES + 1, dtype=torch.int32, device=DEVICE) * (CASE.rows // IMAGES)


def test_fused_linear_distill(time: Any, problem: Problem, backend: str) -> None:
    """CE and forward KL of all rows, the head trained."""
    mean, p = 1 / CASE.rows, problem
    time(
        lambda: (
            mk.fused_linear_distill(
                p.hs, p.ws, p.ht, p.wt, p.labels, ce_weight=mean, kd_weight=mean, backend=backend
            ).loss
        )
    )


def test_fused_linear_logprob(time: Any, problem: Problem, backend: str) -> None:
    """Backward makes the logits again."""
    p = problem
    time(lambda: mk.fused_linear_logprob(p.hs, p.ws, p.labels, backend=backend).sum())


def test_relation_cosine(time: Any, problem: Problem, backend: str) -> None:
    """Of the hidden states themselves."""
    ends, (ht, _) = _ends(), problem.teacher()
    time(lambda: mk.relation_cosine(problem.hs, ht, ends, backend=backend))


def test_fused_linear_relation(time: Any, problem: Problem, backend: str) -> None:
    """The head trained: its Gram is made every time, the teacher's once."""
    p, ends, (ht, wt) = problem, _ends(), problem.teacher()
    gram = mk.head_gram(wt)
    time(
        lambda: mk.fused_linear_relation(
            p.hs, p.ws, ht, wt, ends, teacher_gram=gram, backend=backend
        )
    )


def test_head_gram(time: Any, problem: Problem) -> None:
    """What a trained head costs the relation every step."""
    time(lambda: mk.head_gram(problem.ws).sum())


def test_llava_kd_loss(time: Any, problem: Problem, backend: str) -> None:
    """All four terms: a sample's first half is its image, the last quarter its answer."""
    p, (ht, wt) = problem, problem.teacher()
    shape, length = (IMAGES, CASE.rows // IMAGES), CASE.rows // IMAGES
    labels = p.labels.view(shape).clone()
    labels[:, : 3 * length // 4] = -100
    mask = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    mask[:, : length // 2] = True
    teacher = mk.HeadInputs(ht.view(*shape, -1), wt)
    loss = mk.LlavaKDLoss(backend=backend)
    counts = mk.RowCounts(IMAGES * length // 4, IMAGES * length // 2, IMAGES)
    time(
        lambda: loss(
            mk.HeadInputs(p.hs.view(*shape, -1), p.ws), teacher, labels, mask,
            num_items_in_batch=counts, image_lens=[length // 2] * IMAGES,
        ).loss
    )  # fmt: skip
