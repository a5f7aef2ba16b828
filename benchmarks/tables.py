"""How does a person read the figures? Tables as rows of text, for the terminal and for Markdown.

One function a section turns a record into `Table`s; how a table is drawn is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from benchmarks.shapes import Case, step_case


@dataclass(frozen=True)
class Table:
    """Title, one line of explanation, column heads and rows of text."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


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


def _by_case(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for _, group in groupby(rows, key=lambda row: row["case"]):
        yield list(group)


def _speed(rows: list[dict[str, Any]]) -> Table:
    case = Case(**rows[0]["case"])
    body = []
    for row in rows:
        if row["status"] != "ok":
            body.append((row["label"], _trouble(row), *[""] * 6))
            continue
        errors = row["errors"]
        worst = "–" if errors is None else f"{max(errors['dh'], errors['dw'] or 0):.1e}"
        body.append(
            (
                row["label"],
                seconds(row["median_s"]),
                f"{seconds(row['min_s'])} – {seconds(row['max_s'])}",
                times(row["over_floor"]),
                times(row["times_eager"]),
                f"{row['gflops']:,.0f}",
                f"{case.input_bytes / row['median_s'] / 1e9:.2f}",
                worst,
            )
        )
    return Table(
        case.title,
        f"{case.floor_flops / 1e9:,.0f} GFLOP at least through the logits, "
        f"{mebibytes(case.input_bytes)} of inputs, {mebibytes(case.gradient_bytes)} of gradients. "
        f"Medians of {_rounds(rows)} interleaved rounds.",
        ("method", "time", "min – max", "over floor", "faster than PyTorch", "GFLOP/s",
         "inputs GB/s", "gradient error"),
        body,
    )  # fmt: skip


def _memory(rows: list[dict[str, Any]]) -> Table:
    body: list[tuple[str, ...]] = []
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


def _accuracy(rows: list[dict[str, Any]]) -> Table:
    """Methods down, ε across: relative error of the gradient, and of the value in brackets."""
    epsilons = sorted({row["epsilon"] for row in rows}, reverse=True)
    contract = {row["epsilon"]: row["contract"] for row in rows}
    body = [("contract", *(f"{contract[e]:.1e}" for e in epsilons))]
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = {row["epsilon"]: row for row in rows if row["label"] == label}
        body.append((label, *(_rung(mine.get(e)) for e in epsilons)))
    case = Case(**rows[0]["case"])
    return Table(
        f"Gradient error near convergence, {case.dtype}",
        "Teacher = student + ε·noise, forward KL; relative to fp64 on the same inputs; "
        "error of the loss in brackets.",
        ("method", *(f"ε = {e:g}" for e in epsilons)),
        body,
    )


def _step(rows: list[dict[str, Any]]) -> Table:
    case = step_case(rows[0]["case"])
    body = []
    for row in rows:
        if row["status"] != "ok":
            body.append((row["label"], _trouble(row), *[""] * 5))
            continue
        body.append(
            (
                row["label"],
                seconds(row["median_s"]),
                f"{seconds(row['min_s'])} – {seconds(row['max_s'])}",
                f"{row['tokens_per_s']:,.0f}",
                times(row["times_eager"]),
                mebibytes(row["extra_bytes"]),
                f"{row['largest_batch']:,}",
            )
        )
    models = case.models
    off = {
        field: max(row.get(field, 0.0) for row in rows) for field in ("loss_off", "gradient_off")
    }
    return Table(
        case.title,
        f"Teacher ({models.teacher.layers} layers of {models.teacher.hidden:,}) and student "
        f"({models.student.layers} of {models.student.hidden:,}) forward, losses, backward, AdamW; "
        f"batch of {case.batch}, medians of {_rounds(rows)} interleaved rounds. Peak beyond "
        f"weights and optimiser state; the largest batch that was run with a peak within "
        f"{case.budget_mib:,} MiB. Losses agree to {off['loss_off']:.0e}, gradients to "
        f"{off['gradient_off']:.0e}.",
        ("losses", "time", "min – max", "tokens/s", "faster", "peak", "largest batch"),
        body,
    )  # fmt: skip


def _rung(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["status"] != "ok":
        return row["status"]
    return f"{row['gradient']:.1e} ({row['loss']:.0e})"


def _rounds(rows: list[dict[str, Any]]) -> int:
    return max((len(row["seconds"]) for row in rows if "seconds" in row), default=0)


def _trouble(row: dict[str, Any]) -> str:
    """One cell: a table's bars and line breaks are not for other people's error messages."""
    reason = " ".join(row["reason"].split()).replace("|", "/")
    return f"{row['status']}: {reason[:120]}"
