"""What does one read afterwards? A page: on the terminal, and in a file with figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks import plots
from benchmarks.record import cut
from benchmarks.tables import markdown, tables


def show(record: dict[str, Any], console: Console) -> None:
    """Print the page on a terminal."""
    console.print(Markdown(_page(record, {})))


def write(record: dict[str, Any], folder: Path) -> Path:
    """Write ``report.md`` and its figures into `folder`; returns the page's path."""
    page = folder / "report.md"
    page.write_text(_page(record, plots.draw(record, folder)), encoding="utf-8")
    return page


def _page(record: dict[str, Any], figures: dict[str, str]) -> str:
    """Machine, promises, figures (file name → caption) and every table."""
    marks = {True: "pass", False: "**fail**", None: "–"}
    promises = [f"- {marks[t['holds']]}: {t['promise']}: {t['found']}" for t in record["targets"]]
    parts = ["# Benchmark report", machine_line(record), f"Promises, for {record['judged']}:"]
    parts += ["\n".join(promises), *(f"![{text}]({name})" for name, text in figures.items())]
    for table in tables(record):
        parts += [f"## {table.title}", table.note, markdown(table)]
    return "\n\n".join(parts) + "\n"


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
