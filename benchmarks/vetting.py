"""May this method be measured? It can run here, and its loss and gradients are right.

A figure for a wrong answer is worse than none, so every method first computes a few rows of the
same problem and is compared with fp64. One that cannot run, fails or is wrong becomes a row that
says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks import truth
from benchmarks.methods import FLOOR, Method
from benchmarks.problem import Problem, make
from benchmarks.shapes import Case

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


class Vetting:
    """Verdicts, remembered: a sweep over N asks the same question of the same heads again."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._verdicts: dict[tuple[str, Case], Verdict] = {}

    def verdicts(self, methods: Sequence[Method], case: Case) -> dict[str, Verdict]:
        """key → verdict for this shape and dtype, whatever its rows."""
        kind = replace(case, rows=0)
        ask = [method for method in methods if (method.key, kind) not in self._verdicts]
        if ask:
            few = make(replace(case, rows=min(CHECK_ROWS, case.rows)), device=self._device)
            expected = truth.truth(few)
            for method in ask:
                self._verdicts[method.key, kind] = _verdict(method, few, expected)
        return {method.key: self._verdicts[method.key, kind] for method in methods}


def _verdict(method: Method, problem: Problem, expected: truth.Truth) -> Verdict:
    reason = method.why_not(problem.hs.device)
    if reason:
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
