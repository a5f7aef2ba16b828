"""Which kernel has grown? Instructions of every kernel in every call, as they were accepted.

``instructions.json`` holds, for the compilers that made it, a line for each kernel and call with a
number for each target: the sum over the configurations that the call compiles. More than `MOST` of
that is a fault until somebody accepts it (``python -m tests.gpu.offline --accept``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tests.gpu.resources import Row

FILE = Path(__file__).with_name("instructions.json")
MOST = 1.05

#: "kernel: call" → target → instructions.
Counts = dict[str, dict[str, int]]


def counted(rows: Iterable[Row]) -> Counts:
    """Instructions by kernel, call and target."""
    found: Counts = {}
    for row in rows:
        line = found.setdefault(f"{row.kernel}: {row.call}", {})
        line[row.target] = line.get(row.target, 0) + row.instructions
    return found


def grown(rows: list[Row], path: Path = FILE) -> list[str]:
    """A line for each kernel that has more than `MOST` of the instructions accepted; another
    compiler's are not compared.
    """
    accepted = read(path)
    faults = []
    for compiler, before in accepted.items():
        for name, line in counted(row for row in rows if row.compiler == compiler).items():
            for target, now in line.items():
                then = before.get(name, {}).get(target)
                if then is not None and now > MOST * then:
                    change = f"{now} instructions, {then} accepted (+{now / then - 1:.0%})"
                    faults.append(f"{name}, {target}, {compiler}: {change}")
    return faults


def accept(rows: list[Row], compilers: Iterable[str], path: Path = FILE) -> None:
    """Write what `compilers` have made into the file, which keeps what they have not made now and
    forgets other versions of them.
    """
    tools = {compiler.split()[0]: compiler for compiler in compilers}
    kept = {c: counts for c, counts in read(path).items() if tools.get(c.split()[0], c) == c}
    for compiler in tools.values():
        before = kept.setdefault(compiler, {})
        for name, line in counted(row for row in rows if row.compiler == compiler).items():
            before[name] = before.get(name, {}) | line
    path.write_text(_text(kept), encoding="utf-8")


def read(path: Path = FILE) -> dict[str, Counts]:
    """Compiler → counts; nothing where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _text(accepted: dict[str, Counts]) -> str:
    """JSON with a line for each kernel and call, so that a change is one line of a diff."""
    parts = []
    for compiler, counts in accepted.items():
        lines = (f" {json.dumps(name)}: {json.dumps(counts[name])}" for name in sorted(counts))
        parts.append(f"{json.dumps(compiler)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{" + ",\n".join(parts) + "}\n"
