"""May row passes run beside products? Whatever two streams do first, as far as their events leave
it open, the numbers are those of one stream.

A stream here is a queue: products, row passes and folds of the driver enter it with the events that
they wait for, and nothing runs before the lanes are joined. Then steps are taken from the queues in
every kind of order in which a GPU may take them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import mllmkd_kernels as mk
from mllmkd_kernels import plan
from mllmkd_kernels.backends import products
from mllmkd_kernels.backends.calls import Options
from mllmkd_kernels.backends.triton import chunk, lanes
from mllmkd_kernels.heads import HeadInputs
from mllmkd_kernels.sweep import RowTerm
from tests.problems import Problem, asked, problem, run

Order = Callable[[list["Queue"]], "Queue"]


@dataclass
class Queue:
    """A stream whose work waits."""

    lane: int
    steps: list[Callable[[], bool]] = field(default_factory=list)

    def record_event(self) -> list[bool]:
        reached: list[bool] = []
        self.steps.append(lambda: reached.append(True) or True)
        return reached

    def wait_event(self, reached: list[bool]) -> None:
        self.steps.append(lambda: bool(reached))

    def wait_stream(self, other: Any) -> None:
        pass  # of the caller's stream, which has done its work

    def advance(self) -> bool:
        """Take a step, if it can be taken."""
        if not self.steps or not self.steps[0]():
            return False
        self.steps.pop(0)
        return True


@dataclass
class Gpu:
    """Two queues and the order in which steps are taken from them."""

    order: str
    queues: list[Queue] = field(default_factory=lambda: [Queue(0), Queue(1)])
    now: Queue | None = None
    running: bool = False
    taken: list[int] = field(default_factory=list)  # lane of every launch, as they ran

    def wait_stream(self, other: Any) -> None:
        """The caller joins: all that was launched runs."""
        self.running = True
        while any(queue.steps for queue in self.queues):
            first, second = sorted(self.queues, key=self._rank)
            assert first.advance() or second.advance(), "the streams wait for each other"

    def _rank(self, queue: Queue) -> float:
        ranks = {"products first": queue.lane, "rows first": 1 - queue.lane}
        return ranks.get(self.order, random.random())

    @contextmanager
    def stream(self, queue: Queue) -> Iterator[None]:
        self.now = queue
        yield
        self.now = None

    def later(self, f: Callable[..., None]) -> Callable[..., None]:
        """f, launched: it runs when its queue comes to it."""

        def launch(*args: Any, **kwargs: Any) -> None:
            if self.running:  # a part of a launch
                return f(*args, **kwargs)
            queue = self.now
            assert queue is not None, f"{f} outside of both lanes"

            def step() -> bool:
                f(*args, **kwargs)
                self.taken.append(queue.lane)
                return True

            queue.steps.append(step)

        return launch


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Products, row passes and folds wait in the lanes' queues."""
    random.seed(0)
    gpu = Gpu(request.param)
    monkeypatch.setattr(lanes, "streams", lambda *_: tuple(gpu.queues))
    monkeypatch.setattr(lanes, "on_streams", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
    return gpu


def losses(z_s: Tensor, z_t: Tensor | None, *rest: Any, seen: Any, standardize: bool) -> None:
    """A row pass that reads both blocks and writes dz and its rows' terms, with what matters here:
    every number tells from which rows it came.
    """
    ce, kd, dz = rest[5], rest[6], rest[-1]
    assert z_t is not None
    ce.copy_(z_s.sum(1))
    kd.copy_(z_t.sum(1))
    if dz is not None:
        dz.copy_(z_s - z_t)


def outcome(
    beside: int,
    dtype: torch.dtype,
    gradient: bool,
    p: Problem,
    row_pass: Callable[..., None],
    fold: int = 6,
) -> list[Tensor]:
    """Of chunks of 3 rows."""
    p = p.to(dtype)
    options = Options(p.vocab, 3, gradient, gradient, False, None, False, fold, beside)
    return [*chunk._distill(row_pass, *asked(p, mk.Divergence()), options)]


ORDERS = ("products first", "rows first", "any", "any again")


@pytest.mark.parametrize("gradient", [True, False], ids=["trained", "evaluated"])
@pytest.mark.parametrize("fold", [6, 3], ids=["two chunks folded", "one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gpu", ORDERS, indirect=True)
def test_no_block_is_read_before_it_is_written_nor_overwritten_before_it_is_read(
    gpu: Gpu, dtype: torch.dtype, fold: int, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem("aligned")
    want = outcome(0, dtype, gradient, p, losses, fold)
    random.seed(len(gpu.order))
    with monkeypatch.context() as patch:
        patch.setattr(products, "product", gpu.later(products.product))
        patch.setattr(products.Gradients, "add", gpu.later(products.Gradients.add))
        got = outcome(24, dtype, gradient, p, gpu.later(losses), fold)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert {0, 1} == set(gpu.taken)


def test_a_gradient_in_the_place_of_the_logits_is_the_same() -> None:
    """In bf16, where one chunk is folded at a time and its row pass reads before it writes."""
    inside = []

    def watched(z_s: Tensor, *rest: Any, **options: Any) -> None:
        inside.append(rest[-1].data_ptr() == z_s.data_ptr())
        losses(z_s, *rest, **options)

    p = problem("aligned")
    apart, within = (outcome(0, torch.bfloat16, True, p, watched, fold) for fold in (6, 3))
    assert inside == sorted(inside) and {*inside} == {False, True}
    torch.testing.assert_close(within[3], apart[3])
    torch.testing.assert_close(within[4], apart[4], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_numbers_are_those_of_one_stream(dtype: torch.dtype, device: torch.device) -> None:
    p = problem("ragged").on(device)
    rows = {name: getattr(p, name)[:7] for name in ("hs", "ht", "labels")}  # 3 chunks, 2 folds
    heads = {name: getattr(p, name)[:50].contiguous() for name in ("ws", "wt")}
    p = replace(p, **rows | heads | {"labels": rows["labels"] % 50}, ce_weight=None, kd_weight=None)
    one, two = (outcome(beside, dtype, True, p, chunk.row_losses) for beside in (0, 24))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_it_is_asked_for_by_a_call_and_by_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="overlap: expected backend 'triton' or 'cuda', got"):
        run(problem("ragged"), "eager", overlap=True)
    planned = []

    def plan_of(*args: Any, overlap: bool, **options: Any) -> plan.Plan:
        planned.append(overlap)
        return original(*args, overlap=False, **options)

    original = plan.distill_plan
    monkeypatch.setattr(plan, "distill_plan", plan_of)
    head = HeadInputs(torch.randn(1, 4, 8), torch.randn(9, 8))
    labels = torch.ones(1, 4, dtype=torch.int64)
    for overlap in (False, True):
        objective = mk.Objective(RowTerm("ce", 1.0, "response"), overlap=overlap)
        objective(head, None, {"labels": labels})
    assert planned == [False, True]
