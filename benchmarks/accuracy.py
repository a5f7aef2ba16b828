"""How far from the truth, as the student converges? The ε-ladder.

With the teacher equal to the student plus noise ε the gradient is a small difference of two
softmaxes, and an error of fixed size in the logits grows like 1/ε relative to it. The contract:
relative gradient error ≤ 0.3% for bf16 inputs whatever ε (gradients returned in bf16 included), and
≤ 3e-6/ε for fp32. A large error is the finding here, not a fault.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks import truth
from benchmarks.methods import FLOOR
from benchmarks.problem import make_near
from benchmarks.session import Session, vet
from benchmarks.shapes import Ladder


def contract(dtype: str, epsilon: float) -> float:
    """The largest relative gradient error that is kept to."""
    return 3e-6 / epsilon if dtype == "fp32" else 3e-3


def measure(session: Session, ladder: Ladder) -> list[dict[str, Any]]:
    """One row per ε and method."""
    case, rows = ladder.case, []
    methods = [method for method in session.methods(case, True) if method.key != FLOOR.key]
    for epsilon in ladder.epsilons:
        problem = make_near(case, epsilon, device=session.suite.device)
        expected = truth.truth(problem)
        for method in methods:
            session.tell(f"{case.title}, ε {epsilon}: {method.label}")
            row = method.row(case) | {"epsilon": epsilon, "contract": contract(case.dtype, epsilon)}
            verdict = vet(method, problem, expected)
            row |= {"status": verdict.status, "reason": verdict.reason}
            if found := verdict.errors:
                row |= {"status": "ok", "reason": "", "gradient": found.gradient, **asdict(found)}
            rows.append(row)
    return rows
