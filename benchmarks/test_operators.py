"""Has an operator become slower? One benchmark for each public operator, forward alone (as in
evaluation) and forward with backward, on shapes that take milliseconds.

    python -m pytest benchmarks --benchmark-only
    python -m pytest benchmarks --benchmark-only --benchmark-autosave           # keep this run
    python -m pytest benchmarks --benchmark-only --benchmark-compare            # with the last kept

Within a group backends stand side by side. Compare two commits on one quiet machine; no test
depends on seconds (`make test` does not collect this folder).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from benchmarks.methods import BY_KEY, distill, relation
from benchmarks.problem import Forward, Problem, make
from benchmarks.shapes import Case
from mllmkd_kernels import choose

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CASE = Case("operators", 64, 384, 256, 8192, 8192, images=2)
if ON_GPU:  # about the kernels rather than their launch
    CASE = Case("operators", 1024, 2048, 896, 65536, 65536, "bf16", images=2)
BACKENDS = [name for name in choose.BACKENDS if not BY_KEY[f"mk-{name}"].why_not(DEVICE)]


def logprob(p: Problem, backend: str) -> Forward:
    """Backward makes the logits again."""
    return lambda: mk.fused_linear_logprob(p.hs, p.ws, p.labels, backend=backend).sum()


def relation_cosine(p: Problem, backend: str) -> Forward:
    """Of the hidden states themselves."""
    return lambda: mk.relation_cosine(p.hs, p.teacher()[0], p.ends, backend=backend)


def head_gram(p: Problem, backend: str) -> Forward:
    """What a trained head costs the relation every step, whatever the backend."""
    return lambda: mk.head_gram(p.ws).sum()


def llava_kd_loss(p: Problem, backend: str) -> Forward:
    """All four terms: a sample's first half is its image, the last quarter its answer."""
    (ht, wt), images, length = p.teacher(), CASE.images, CASE.rows
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

    return forward


@pytest.fixture(scope="module")
def problem() -> Problem:
    """The same tensors for all."""
    return make(CASE, device=DEVICE.type)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "operator", [distill, logprob, relation_cosine, relation, head_gram, llava_kd_loss]
)
def test_operator(
    operator: Callable[[Problem, str], Forward], backend: str, backward: bool, problem: Problem,
    benchmark: Any,
) -> None:  # fmt: skip
    """Its time."""
    forward = operator(problem, backend)

    def run() -> None:
        problem.forget_gradients()
        with torch.set_grad_enabled(backward):
            value = forward()
        if backward:
            value.backward()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{operator.__name__}, forward{'+backward' * backward}"
    benchmark.pedantic(run, rounds=20 if ON_GPU else 7, warmup_rounds=2)
