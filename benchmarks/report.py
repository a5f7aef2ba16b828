"""What does one read afterwards? The terminal's tables, and a page with the figures in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from benchmarks import plots
from benchmarks.record import cut
from benchmarks.tables import markdown, tables


def show(record: dict[str, Any], console: Console) -> None:
    """Print every table and every promise."""
    for table in tables(record):
        drawn = RichTable(
            title=escape(table.title), caption=escape(table.note), title_justify="left"
        )
        for n, column in enumerate(table.columns):
            drawn.add_column(escape(column), justify="right" if n else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*map(escape, row))
        console.print(drawn)
    console.print(f"\n[bold]Promises[/bold], for {escape(record['judged'])}")
    marks = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: "[dim]  – [/dim]"}
    for mark, text in _promises(record, marks):
        console.print(f"  {mark}  {escape(text)}", highlight=False)


def write(record: dict[str, Any], folder: Path) -> Path:
    """Write ``report.md`` and its figures into `folder`; returns the page's path."""
    parts = ["# Benchmark report", machine_line(record), f"Promises, for {record['judged']}:"]
    promises = _promises(record, {True: "pass", False: "**fail**", None: "–"})
    parts.append("\n".join(f"- {mark}: {text}" for mark, text in promises))
    parts += [f"![{text}]({name})" for name, text in plots.draw(record, folder).items()]
    for table in tables(record):
        parts += [f"## {table.title}", table.note, markdown(table)]
    page = folder / "report.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


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
        text += " For want of time {} cases are smaller and {} of fewer rounds.".format(*lost)
    return text


def _promises(record: dict[str, Any], marks: dict[bool | None, str]) -> list[tuple[str, str]]:
    """Whether each holds, and what was found."""
    return [(marks[t["holds"]], f"{t['promise']}: {t['found']}") for t in record["targets"]]
