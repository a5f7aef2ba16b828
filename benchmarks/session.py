"""What has every section at hand? The suite, its methods, and which of them may be measured.

A figure for a wrong answer is worse than none, so every method first computes a few rows of the
same problem and is compared with fp64. One that cannot run, fails or is wrong becomes a row that
says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from benchmarks import truth
from benchmarks.methods import FLOOR, Method, select
from benchmarks.problem import Problem, make
from benchmarks.shapes import Case
from benchmarks.suites import Suite

#: Rows that are checked: enough for a relation matrix, few enough for fp64 logits.
CHECK_ROWS = 32


@dataclass(frozen=True)
class Verdict:
    """Whether a method is measured on a case.

    Attributes:
        status: "ok", "missing" (cannot run here), "failed" (raised) or "wrong".
        reason: why not, "" where ok.
        errors: against fp64; None where nothing was computed.
    """

    status: str
    reason: str = ""
    errors: truth.Errors | None = None


def few(case: Case) -> Case:
    """As many rows of it as are checked, at least one of each image or answer."""
    return replace(case, rows=min(max(1, CHECK_ROWS // case.images), case.rows))


@dataclass
class Session:
    """One run of the benchmarks.

    Attributes:
        suite: what is measured, and where.
        only: keys of the methods that were asked for; none: all that are made for the device.
        rounds: after one of warm-up.
        cold: keys of methods that are not warmed up, because a step takes long enough.
        seconds: that a case is to take.
        tell: called with what is measured now.
    """

    suite: Suite
    only: tuple[str, ...] = ()
    rounds: int = 5
    cold: Collection[str] = ()
    seconds: float = math.inf
    tell: Callable[[str], None] = lambda what: None
    _verdicts: dict[tuple[str, Case], Verdict] = field(default_factory=dict)

    def methods(self, case: Case, every_backend: bool = False) -> list[Method]:
        """Those that a case is measured with."""
        every = every_backend or any(case.made_of(asked) for asked in self.suite.every_backend)
        return select(case, self.only, every, self.suite.device)

    def verdicts(self, methods: Sequence[Method], case: Case) -> dict[str, Verdict]:
        """key → verdict for this shape and dtype, whatever its rows and threads: a sweep over N
        asks the same question of the same heads again, and gets the answer that it has.
        """
        kind = replace(case, rows=0, threads=0)
        if ask := [method for method in methods if (method.key, kind) not in self._verdicts]:
            problem = make(few(case), device=self.suite.device)
            expected = truth.truth(problem)
            for method in ask:
                self._verdicts[method.key, kind] = vet(method, problem, expected)
        return {method.key: self._verdicts[method.key, kind] for method in methods}


def vet(method: Method, problem: Problem, expected: truth.Truth) -> Verdict:
    """The verdict on one run."""
    if reason := method.why_not(problem.hs.device):
        return Verdict("missing", reason)
    if method.key == FLOOR.key:
        return Verdict("ok")  # matrix products without a loss: there is nothing to be right about
    try:
        found = truth.errors(method, problem, expected)
    except (Exception, SystemExit) as error:  # other people's code: whatever it raises is a row
        return Verdict("failed", said(error))
    finally:
        problem.forget_gradients()  # what a method left when it failed is not the next one's
    wrong = truth.verdict(found, problem.case.dtype)
    return Verdict("wrong" if wrong else "ok", wrong, found)


def said(error: BaseException) -> str:
    """Type and first line of what was raised; the rest of it, a compiler's say, names folders."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
