"""How far from the truth, as the student converges? The ε-ladder.

With the teacher equal to the student plus noise ε the gradient is a small difference of two
softmaxes, and an error of fixed size in the logits grows like 1/ε relative to it. The contract:
relative gradient error ≤ 0.3% for bf16 inputs whatever ε (gradients returned in bf16 included), and
≤ 3e-6/ε for fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks import truth
from benchmarks.methods import FLOOR, Method, select
from benchmarks.problem import Problem, make_near
from benchmarks.shapes import Suite


def contract(dtype: str, epsilon: float) -> float:
    """The largest relative gradient error that is kept to."""
    return 3e-6 / epsilon if dtype == "fp32" else 3e-3


def steps(suite: Suite, only: tuple[str, ...]) -> int:
    """How often `measure` will call `tick`."""
    return sum(len(ladder.epsilons) * len(_methods(suite, only)) for ladder in suite.accuracy)


def measure(
    suite: Suite, only: tuple[str, ...], tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row per dtype, ε and method; `tick` is called with a description at every step."""
    rows = []
    for ladder in suite.accuracy:
        for epsilon in ladder.epsilons:
            problem = make_near(ladder.case, epsilon, device=suite.device)
            expected = truth.truth(problem)
            for method in _methods(suite, only):
                tick(f"{ladder.case.title}, ε {epsilon}: {method.label}")
                rows.append(
                    {
                        "case": asdict(ladder.case),
                        "epsilon": epsilon,
                        "contract": contract(ladder.case.dtype, epsilon),
                        "method": method.key,
                        "label": method.label,
                        "version": method.version(),
                    }
                    | _errors(method, problem, expected)
                )
    return rows


def _methods(suite: Suite, only: tuple[str, ...]) -> list[Method]:
    everything = select("kl", only, device=suite.device)
    return [method for method in everything if method.key != FLOOR.key]


def _errors(method: Method, problem: Problem, expected: truth.Truth) -> dict[str, Any]:
    """Errors of the loss and of both gradients; here a large one is the finding, not a fault."""
    reason = method.why_not(problem.hs.device)
    if reason:
        return {"status": "missing", "reason": reason}
    try:
        found = truth.errors(method, problem, expected)
    except Exception as error:  # other people's code: whatever it raises becomes a row
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {"status": "ok", "reason": "", "gradient": found.gradient, **asdict(found)}
