"""What does one read afterwards? A page: on the terminal, and in a file with figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks import plots
from benchmarks.record import cut
from benchmarks.tables import markdown, tables


def show(record: dict[str, Any], console: Console) -> None:
    """Print every table, and last, where it is seen, every promise."""
    console.print(Markdown("\n\n".join([*_tables(record), *_promises(record)])))


def write(record: dict[str, Any], folder: Path) -> Path:
    """Write ``report.md`` and its figures into `folder`; returns the page's path."""
    figures = [f"![{text}]({name})" for name, text in plots.draw(record, folder).items()]
    parts = ["# Benchmark report", machine_line(record), *_promises(record), *figures]
    page = folder / "report.md"
    page.write_text("\n\n".join([*parts, *_tables(record)]) + "\n", encoding="utf-8")
    return page


def _tables(record: dict[str, Any]) -> Iterator[str]:
    for table in tables(record):
        yield from (f"## {table.title}", table.note, markdown(table))


def _promises(record: dict[str, Any]) -> tuple[str, str]:
    """Whether each holds, and what was found."""
    marks = {True: "pass", False: "**fail**", None: "–"}
    lines = [f"- {marks[t['holds']]}: {t['promise']}: {t['found']}" for t in record["targets"]]
    return f"Promises, for {record['judged']}:", "\n".join(lines)


def machine_line(record: dict[str, Any]) -> str:
    """Machine, versions and commit in a sentence, and whether something was left out."""
    m = record["machine"]
    missing = [name for name, version in m["peers"].items() if version is None]
    peers = [f"{name} {version}" for name, version in m["peers"].items() if version]
    gpu = "{gpu} ({gpu_memory_gib} GiB), CUDA {cuda}, Triton {triton}; " if "gpu" in m else ""
    text = gpu + (
        "{cpu}, {cores} cores ({vector_units}), {memory_gib} GiB, {threads} threads, {system}; "
        "Python {python}, torch {torch}, mllmkd_kernels {mllmkd_kernels} at {commit}"
    )
    text = text.format(**m | {"commit": m["commit"] or "no commit"})
    if peers:
        text += f"; {', '.join(peers)}"
    if missing:
        text += f"; not installed: {', '.join(missing)}"
    text = f"{text}. Measured {record['date'][:10]}, {record['rounds']} rounds."
    if any(lost := cut(record)):
        text += (
            f" For want of time {lost[0]} cases are smaller, N and V halved in turn, and {lost[1]} "
            "of fewer rounds."
        )
    return text
