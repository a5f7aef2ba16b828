"""How long does a step take? Forward and backward, methods interleaved in one process.

Rounds go A B C, A B C, …: a machine that slows down (heat, a neighbour) slows every method of that
round, and a ratio formed *within* a round does not see it. So ratios are medians of per-round
ratios, seconds are medians with minimum and maximum beside them. Gradients are dropped between
steps, outside the clock, as ``zero_grad(set_to_none=True)`` does.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.methods import EAGER, FLOOR
from benchmarks.problem import make
from benchmarks.session import Session, Verdict, said
from benchmarks.shapes import Case

#: Rounds end with so many times the seconds that the case was to take, and not before so many: a
#: prediction of milliseconds says nothing of the moment in which another process had the core.
SLACK, MOMENT = 2.0, 5.0

Step = Callable[[], object]
Seconds = Mapping[str, list[float]]  # of every round, by key


def measure(session: Session, case: Case) -> list[dict[str, Any]]:
    """One row per method. One that cannot be prepared or run at this size (memory, a kernel's
    limits) has no figures, and its row says so.
    """
    every = torch.get_num_threads()
    torch.set_num_threads(case.threads or every)
    try:
        return _measured(session, case)
    finally:
        torch.set_num_threads(every)


def _measured(session: Session, case: Case) -> list[dict[str, Any]]:
    methods = session.methods(case)
    verdicts = session.verdicts(methods, case)
    seconds: Seconds = {}
    if fit := [method for method in methods if verdicts[method.key].status == "ok"]:
        problem = make(case, device=session.suite.device)
        builds = {method.key: partial(method.build, problem) for method in fit}
        ends = time.monotonic() + max(MOMENT, SLACK * session.seconds)
        before = problem.forget_gradients
        seconds, failed = interleaved(session, case.title, builds, before, ends)
        verdicts |= {key: Verdict("failed", reason) for key, reason in failed.items()}
    rows = []
    for method in methods:
        row = method.row(case) | asdict(verdicts[method.key])
        if method.key in seconds:
            row |= figures(case, seconds[method.key], seconds)
        rows.append(row)
    return rows


def interleaved(
    session: Session,
    title: str,
    builds: Mapping[str, Callable[[], Step]],
    before: Callable[[], None],
    ends: float,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Round by round: seconds by key, and what those have said that could not be built or run.
    `before` is called before each step, outside the clock. One round there is, others begin only
    before `ends`.
    """
    steps: dict[str, Step] = {}
    seconds: dict[str, list[float]] = {key: [] for key in builds}
    failed: dict[str, str] = {}
    for turn in range(session.rounds + 1):
        if turn > 1 and time.monotonic() > ends:
            break
        for key in list(seconds):
            session.tell(f"{title}: {key}, round {turn} of {session.rounds}")
            before()
            try:
                if not turn:
                    steps[key] = builds[key]()
                if turn:
                    seconds[key].append(once(steps[key], session.suite.device))
                elif key not in session.cold:  # code is compiled, pages are mapped
                    steps[key]()
            except (Exception, SystemExit) as error:  # other people's code: whatever it raises
                failed[key] = said(error)
            if key in failed:  # nothing of it stays in the way of the next
                del seconds[key]
                steps.pop(key, None)
                before()
                gc.collect()
                torch.cuda.empty_cache()
    return seconds, failed


def once(step: Step, device: str) -> float:
    """Seconds of one step; on a GPU between two events, so that what Python does meanwhile is
    hidden where the device is busy, as in training.
    """
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def figures(case: Case, mine: list[float], everyone: Seconds) -> dict[str, Any]:
    """Seconds, their median, spread and ratios for one method, given everyone's of the same rounds.

    ``over_floor`` is time over the time of the matrix products alone, ``times_eager`` how many
    times faster than eager PyTorch; None where the other was not measured.
    """
    floor = everyone.get(FLOOR.key)
    return {
        **spread(mine, everyone),
        "over_floor": floor and median(m / f for m, f in zip(mine, floor, strict=True)),
        "gflops": case.floor_flops / median(mine) / 1e9,
    }


def spread(mine: list[float], everyone: Seconds) -> dict[str, Any]:
    """What figures of a loss and of a whole training step have in common."""
    eager = everyone.get(EAGER.key)
    return {
        "seconds": mine,
        "median_s": median(mine),
        "min_s": min(mine),
        "max_s": max(mine),
        "times_eager": eager and median(e / m for m, e in zip(mine, eager, strict=True)),
    }
