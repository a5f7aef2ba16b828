"""How does a person read the figures? Tables as rows of text, for the terminal and for Markdown.

One function a section turns a record into `Table`s; how a table is drawn is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from benchmarks.shapes import Case, step_case

Row = dict[str, Any]
#: Heads of columns, and what a row has there.
Columns = Mapping[str, Callable[[Row], str]]
Body = list[tuple[str, ...]]


@dataclass(frozen=True)
class Table:
    """Title, one line of explanation, column heads and rows of text."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: Body


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """Every table that the record has figures for."""
    for rows in _by_case(record.get("speed", [])):
        yield _speed(rows)
    if record.get("memory"):
        yield _memory(record["memory"])
    for rows in _by_case(record.get("accuracy", [])):
        yield _accuracy(rows)
    for rows in _by_case(record.get("step", [])):
        yield _step(rows)


def markdown(table: Table) -> str:
    """The table as GitHub Markdown, without its title."""
    lines = [table.columns, ("---", *("---:" for _ in table.columns[1:])), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def lines(rows: Iterable[Row], columns: Columns) -> Body:
    """Label and cells of every row; one without figures says why in the first cell."""
    body = []
    for row in rows:
        if row["status"] == "ok":
            cells = [cell(row) for cell in columns.values()]
        else:
            cells = [_trouble(row), *[""] * (len(columns) - 1)]
        body.append((row["label"], *cells))
    return body


def absent(rows: Iterable[Row]) -> str:
    """Who has no figure at all among the rows and why, reason by reason; "" if all have one."""
    rows = list(rows)
    figured = {row["label"] for row in rows if row["status"] == "ok"}
    why: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["label"] not in figured:
            why.setdefault(_trouble(row), {})[row["label"]] = None
    return "; ".join(f"{', '.join(labels)} ({reason})" for reason, labels in why.items())


def ladder(rows: list[Row], cell: Callable[[Row], str]) -> tuple[tuple[str, ...], Body]:
    """Column heads and lines of errors: methods down, ε across and falling. Without methods that
    have none.
    """
    epsilons = sorted({row["epsilon"] for row in rows}, reverse=True)
    body = []
    for label in dict.fromkeys(row["label"] for row in rows if row["status"] == "ok"):
        mine = {row["epsilon"]: row for row in rows if row["label"] == label}
        rungs = (mine.get(epsilon, {"status": "–"}) for epsilon in epsilons)
        cells = (cell(rung) if rung["status"] == "ok" else rung["status"] for rung in rungs)
        body.append((label, *cells))
    return tuple(f"ε = {e:g}" for e in epsilons), body


def seconds(value: float) -> str:
    """About three digits, in ms below a second."""
    if value >= 0.9995:
        return f"{value:.2f} s"
    return f"{value * 1e3:.0f} ms" if value >= 0.1 else f"{value * 1e3:.3g} ms"


def mebibytes(value: float | None) -> str:
    """MiB, "–" for None."""
    return "–" if value is None else f"{value / 2**20:,.0f} MiB"


def times(value: float | None) -> str:
    """A ratio, "–" for None."""
    return "–" if value is None else f"{value:.2f}x"


_TIME: Columns = {
    "time": lambda row: seconds(row["median_s"]),
    "min – max": lambda row: f"{seconds(row['min_s'])} – {seconds(row['max_s'])}",
}
#: Of a whole training step, beyond its time.
STEP: Columns = {
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "faster": lambda row: times(row["times_eager"]),
    "peak": lambda row: mebibytes(row["extra_bytes"]),
    "largest batch": lambda row: f"{row['largest_batch']:,}",
}


def _by_case(rows: list[Row]) -> Iterator[list[Row]]:
    for _, group in groupby(rows, key=lambda row: row["case"]):
        yield list(group)


def _speed(rows: list[Row]) -> Table:
    case = Case(**rows[0]["case"])

    def worst(row: Row) -> str:
        errors = row["errors"]
        gradient = errors and f"{max(errors['dh'], errors['dw'] or 0):.1e} ({errors['loss']:.0e})"
        return gradient or "–"

    columns: Columns = {
        **_TIME,
        "over floor": lambda row: times(row["over_floor"]),
        "faster than PyTorch": lambda row: times(row["times_eager"]),
        "GFLOP/s": lambda row: f"{row['gflops']:,.0f}",
        "gradient (loss) error": worst,
    }
    return Table(
        case.title,
        f"{case.floor_flops / 1e9:,.0f} GFLOP at least through the logits. "
        f"Medians of {_rounds(rows)}.",
        ("method", *columns),
        lines(rows, columns),
    )


def _memory(rows: list[Row]) -> Table:
    body: Body = []
    for group in _by_case(rows):
        title = Case(**group[0]["case"]).title
        for row in group:
            found = mebibytes(row["extra_bytes"]) if row["status"] == "ok" else _trouble(row)
            body.append((title, row["label"], found, mebibytes(row["predicted_bytes"])))
            title = ""  # named once
    return Table(
        "Peak memory beyond inputs and gradients",
        "The kernel's high-water mark of a fresh process; predicted by explain().",
        ("case", "method", "extra", "predicted"),
        body,
    )


def _accuracy(rows: list[Row]) -> Table:
    """Relative error of the gradient, and of the value in brackets."""
    heads, body = ladder(rows, lambda row: f"{row['gradient']:.1e} ({row['loss']:.0e})")
    contract = sorted({(row["epsilon"], row["contract"]) for row in rows}, reverse=True)
    others = absent(rows)
    return Table(
        f"Gradient error near convergence, {rows[0]['case']['dtype']}",
        "Teacher = student + ε·noise, forward KL; relative to fp64 on the same inputs; "
        f"error of the loss in brackets.{others and f' Not in the table: {others}.'}",
        ("method", *heads),
        [("contract", *(f"{limit:.1e}" for _, limit in contract)), *body],
    )


def _step(rows: list[Row]) -> Table:
    case = step_case(rows[0]["case"])
    teacher, student = case.models.teacher, case.models.student
    off = [max(row.get(key, 0.0) for row in rows) for key in ("loss_off", "gradient_off")]
    columns = {**_TIME, **STEP}
    return Table(
        case.title,
        f"Teacher ({teacher.layers} layers of {teacher.hidden:,}) and student "
        f"({student.layers} of {student.hidden:,}) forward, losses, backward, AdamW; "
        f"batch of {case.batch}, medians of {_rounds(rows)}. Peak beyond "
        f"weights and optimiser state; the largest batch that was run with a peak within "
        f"{case.budget_mib:,} MiB. Losses agree to {off[0]:.0e}, gradients to {off[1]:.0e}.",
        ("losses", *columns),
        lines(rows, columns),
    )


def _rounds(rows: list[Row]) -> str:
    return f"{max((len(row.get('seconds', ())) for row in rows), default=0)} interleaved rounds"


def _trouble(row: Row) -> str:
    """One cell: a table's bars and line breaks are not for other people's error messages."""
    reason = " ".join(row["reason"].split()).replace("|", "/")
    return f"{row['status']}: {reason[:120]}"
