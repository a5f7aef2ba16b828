"""How long does a step take? Forward and backward, methods interleaved in one process.

Rounds go A B C, A B C, …: a machine that slows down (heat, a neighbour) slows every method of that
round, and a ratio formed *within* a round does not see it. So ratios are medians of per-round
ratios, seconds are medians with minimum and maximum beside them. Gradients are dropped between
steps, outside the clock, as ``zero_grad(set_to_none=True)`` does.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from benchmarks.methods import EAGER, FLOOR, Method, Run, select
from benchmarks.problem import Problem, make
from benchmarks.shapes import Case, Suite
from benchmarks.vetting import Verdict, Vetting, said


def steps(suite: Suite, only: tuple[str, ...], rounds: int) -> int:
    """How often `measure` will call `tick`."""
    return sum((rounds + 1) * len(_methods(suite, case, only)) for case in suite.speed)


def measure(
    suite: Suite,
    only: tuple[str, ...],
    rounds: int,
    vetting: Vetting,
    tick: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row per case and method; `tick` is called with a description at every step."""
    table: list[dict[str, Any]] = []
    for case in suite.speed:
        methods = _methods(suite, case, only)
        verdicts = dict(vetting.verdicts(methods, case))
        problem = make(case, device=suite.device)
        seconds = _seconds(problem, methods, verdicts, rounds, tick)
        del problem
        gc.collect()  # the inputs of one case leave before those of the next come
        table += [_row(case, method, verdicts[method.key], seconds) for method in methods]
    return table


def _methods(suite: Suite, case: Case, only: tuple[str, ...]) -> list[Method]:
    return select(case.loss, only, case in suite.every_backend, suite.device)


def _seconds(
    problem: Problem,
    methods: Sequence[Method],
    verdicts: dict[str, Verdict],
    rounds: int,
    tick: Callable[[str], None],
) -> dict[str, list[float]]:
    """key → seconds of every round, for the methods that may be measured. One that cannot be
    prepared or run at this size (memory, a kernel's limits) is dropped, and its verdict says so.
    """
    runs: dict[str, Run] = {}
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for method in methods:
            tick(f"{problem.case.title}: {method.label}")
            if verdicts[method.key].status != "ok":
                continue
            try:
                if not turn:
                    runs[method.key], seconds[method.key] = method.build(problem), []
                spent = _once(runs[method.key], problem)
            except (Exception, SystemExit) as error:  # other people's code: whatever it raises
                verdicts[method.key] = Verdict("failed", said(error))
                runs.pop(method.key, None)
                seconds.pop(method.key, None)
                _drop_memory(problem)
                continue
            if turn:  # the first round is warm-up: code is compiled, pages are mapped
                seconds[method.key].append(spent)
    return seconds


def _once(run: Run, problem: Problem) -> float:
    """Seconds of one step; on a GPU between two events, so that what Python does meanwhile is
    hidden where the device is busy, as in training.
    """
    problem.forget_gradients()
    if problem.hs.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _drop_memory(problem: Problem) -> None:
    """After a method has failed: nothing of it stays in the way of the next."""
    problem.forget_gradients()
    gc.collect()
    torch.cuda.empty_cache()


def _row(
    case: Case, method: Method, verdict: Verdict, seconds: Mapping[str, list[float]]
) -> dict[str, Any]:
    row = {
        "case": asdict(case),
        "method": method.key,
        "label": method.label,
        "version": method.version(),
        "status": verdict.status,
        "reason": verdict.reason,
        "errors": None if verdict.errors is None else asdict(verdict.errors),
    }
    if method.key in seconds:
        row |= figures(case, seconds[method.key], seconds)
    return row


def figures(case: Case, mine: list[float], everyone: Mapping[str, list[float]]) -> dict[str, Any]:
    """Median, spread and ratios of the seconds of one method, given everyone's of the same rounds.

    ``over_floor`` is time over the time of the matrix products alone, ``times_eager`` how many
    times faster than eager PyTorch; None where the other was not measured.
    """
    floor, eager = everyone.get(FLOOR.key), everyone.get(EAGER.key)
    return {
        "seconds": mine,
        "median_s": median(mine),
        "min_s": min(mine),
        "max_s": max(mine),
        "over_floor": floor and median(m / f for m, f in zip(mine, floor, strict=True)),
        "times_eager": eager and median(e / m for m, e in zip(mine, eager, strict=True)),
        "gflops": case.floor_flops / median(mine) / 1e9,
    }
