"""Which kernels does one Triton compile? A process of its own, because a process has one Triton.

Reads a job a line, ``{"call": …, "target": …}``, and answers each with a line: the rows of the
table, or the error. Standard output belongs to the answers; what libraries print goes to standard
error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from typing import Any

#: Constants that say nothing in a table, because every call has the same.
_SILENT = ("GROUP",)


def main() -> None:
    """Answer jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Triton 3.9 warns once that a default will change in 3.10.
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    from tests.gpu import calls, pretended

    by_name = {call.name: call for call in calls.every()}
    for line in sys.stdin:
        job = json.loads(line)
        rows: list[dict[str, Any]] = []
        try:
            call = by_name[job["call"]]
            with pretended.gpu(job["target"], _Table(call, job["target"], rows)):
                call.run()
            answer: dict[str, Any] = {"rows": rows}
        except Exception as error:  # a kernel that does not compile is a finding, not the end
            answer = {"error": _reason(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _reason(error: BaseException) -> str:
    """The innermost cause: Triton's errors say line by line who called, and last what is wrong."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    lines = str(error).strip().splitlines() or [repr(error)]
    return f"{type(error).__name__}: " + " | ".join(line.strip() for line in lines[-4:])


class _Table:
    """Turns each kernel that a call compiles into a row, once."""

    def __init__(self, call: Any, target: str, rows: list[dict[str, Any]]) -> None:
        self.call, self.target, self.rows = call, target, rows
        self.seen: set[str] = set()

    def __call__(self, compiled: Any, constants: dict[str, Any]) -> None:
        import triton

        from tests.gpu import resources

        if compiled.hash in self.seen:
            return
        self.seen.add(compiled.hash)
        kernel = compiled.src.fn.__name__
        row = resources.Row(
            kernel=kernel, call=self.call.name, config=_config(compiled, constants),
            compiler=f"triton {triton.__version__}", needs=self.call.needs.get(kernel, ()),
            target=self.target, **resources.of_triton(compiled),
        )  # fmt: skip
        self.rows.append(dataclasses.asdict(row))


def _config(compiled: Any, constants: dict[str, Any]) -> str:
    """Operand types and constants, one word each."""
    types = dict.fromkeys(
        t.split("[")[0].lstrip("*").replace("tensordesc<", "tma ")
        for t in compiled.src.signature.values()
        if isinstance(t, str) and t.startswith(("*", "tensordesc"))
    )
    told = {k: v for k, v in constants.items() if v not in (None, False) and k not in _SILENT}
    words = [*types, *(k if v is True else f"{k}={v}" for k, v in told.items())]
    return " ".join([*words, f"warps={compiled.metadata.num_warps}"])


if __name__ == "__main__":
    main()
