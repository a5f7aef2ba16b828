"""What did the demo find? A table, a verdict that follows from it, and where they were measured.

The folder `out/report` holds report.md (all of it, pictures included), table.json and table.csv
(one row a run, not averaged), and the pictures of `training.demo.pictures`. The verdict is a rule,
not a judgement: distillation is said to help only if, over the seeds, the distilled students' mean
accuracy on held-out questions exceeds the SFT students' by more than the spread, which is the
larger of the two sample standard deviations. One seed has no spread, and says so.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.machine import facts
from mllmkd_kernels.llava_kd import TERMS
from training import settings
from training.demo import pictures
from training.demo.folder import LlavaFolder
from training.demo.recipes import DemoConfig
from training.demo.trained import Run
from training.evaluation.held_out import CAPTION

TEACHER, EQUAL_STEPS, EQUAL_TIME, DISTILLED = (
    "teacher",
    "SFT, equal steps",
    "SFT, equal time",
    "distilled",
)
COMPARED = (TEACHER, EQUAL_STEPS, EQUAL_TIME, DISTILLED)


@dataclass(frozen=True)
class Report:
    """The finished report."""

    folder: Path
    rows: dict[str, list[dict[str, float]]]  # by model name, one entry a seed
    verdict: str


def write_report(config: DemoConfig, runs: list[Run], data: LlavaFolder, seconds: float) -> Report:
    """Write `out/report` and print the table and the verdict."""
    folder = config.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        rows.setdefault(run.name, []).append(run.row())
    verdict = judge(rows)
    first = [run for run in runs if run.seed == 0]
    pictures.loss_curves(first, folder / "loss.png")
    pictures.stage_accuracy(runs, folder / "stages.png")
    shown = [run for run in first if run.name in (TEACHER, EQUAL_STEPS, DISTILLED)]
    pictures.answer_grid(shown, data, folder / "answers.png")
    _write_rows(runs, folder)
    text = _markdown(config, rows, verdict, data, seconds)
    (folder / "report.md").write_text(text, encoding="utf-8")
    console = Console()
    console.print(_terminal_table({name: rows[name] for name in COMPARED}))
    others = {name: seeds for name, seeds in rows.items() if name not in COMPARED}
    if others:
        console.print(_terminal_table({DISTILLED: rows[DISTILLED], **others}))
    console.print(verdict, highlight=False, soft_wrap=True)
    end = f"whole demo: {seconds:.0f} s; report: {folder / 'report.md'}"
    console.print(end, highlight=False, soft_wrap=True)
    return Report(folder, rows, verdict)


def judge(rows: dict[str, list[dict[str, float]]]) -> str:
    """The verdict, by the rule in the module's docstring."""
    ours = [row["questions"] for row in rows[DISTILLED]]
    parts = []
    for name in (EQUAL_STEPS, EQUAL_TIME):
        theirs = [row["questions"] for row in rows[name]]
        margin = statistics.mean(ours) - statistics.mean(theirs)
        text = f"distilled minus {name}: {100 * margin:+.1f} points"
        if len(ours) < 2:
            parts.append(f"{text} (one seed, so no spread: SEEDS=3 measures it)")
            continue
        spread = max(statistics.stdev(ours), statistics.stdev(theirs))
        won = sum(a > b for a, b in zip(ours, theirs, strict=True))
        holds = "more" if margin > spread else "NOT more"
        parts.append(
            f"{text} in the mean of {len(ours)} seeds, {holds} than the spread "
            f"({100 * spread:.1f}); ahead in {won} of {len(ours)}"
        )
    return ". ".join(parts) + "."


def machine() -> dict[str, str]:
    """Where the figures were measured."""
    here = facts()
    return {
        "processor": f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads used",
        "memory": f"{here['memory_gib']:.0f} GiB",
        "versions": f"mllmkd_kernels {here['mllmkd_kernels']}, torch {here['torch']}, "
        f"transformers {transformers.__version__}, Python {here['python']}",
        "commit": here["commit"] or "not a git checkout",
    }


def table(rows: dict[str, list[dict[str, float]]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: one line a model, mean ± sample standard deviation where there are
    seeds."""
    columns = list(next(iter(rows.values()))[0])
    header = ["model", *(_TITLES.get(column, column) for column in columns)]
    lines = []
    for name, seeds in rows.items():
        lines.append([name, *(_cell(column, [row[column] for row in seeds]) for column in columns)])
    return header, lines


_TITLES = {
    "questions": "questions (all but captions)",
    "ce": "CE",
    "response_kl": "KL response",
    "visual_kl": "KL visual",
    "tokens_per_second": "tokens/s",
    "peak_gib": "peak GiB",
}
_FORMATS: dict[str, Callable[[float], str]] = {
    "steps": lambda x: f"{x:.0f}",
    "seconds": lambda x: f"{x:.0f}",
    "tokens_per_second": lambda x: f"{x:.0f}",
    "peak_gib": lambda x: f"{x:.2f}",
}


def _cell(column: str, values: list[float]) -> str:
    show = _FORMATS.get(column, lambda x: f"{x:.3f}")
    if column in TERMS and not any(values):
        return "–"  # not a term of this model's last stage
    mean = show(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {show(statistics.stdev(values))}"


def _terminal_table(rows: dict[str, list[dict[str, float]]]) -> Table:
    """The table on its side: models are few, figures many, terminals narrow."""
    header, lines = table(rows)
    shown = Table(title="held-out exact match, perplexity, final loss terms, cost")
    for name in ("", *(line[0] for line in lines)):
        shown.add_column(name, justify="right" if name else "left")
    for i, title in enumerate(header[1:], 1):
        shown.add_row(title, *(line[i] for line in lines))
    return shown


def _write_rows(runs: list[Run], folder: Path) -> None:
    records: list[dict[str, Any]] = [{"model": r.name, "seed": r.seed, **r.row()} for r in runs]
    (folder / "table.json").write_text(
        json.dumps({"machine": machine(), "runs": records}, indent=1)
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    (folder / "table.csv").write_text(text.getvalue())


def _markdown(
    config: DemoConfig,
    rows: dict[str, list[dict[str, float]]],
    verdict: str,
    data: LlavaFolder,
    seconds: float,
) -> str:
    header, lines = table(rows)
    # on its side, like the terminal's: models are columns
    sides = list(zip(header, *lines, strict=True))
    grid = [sides[0], ("---",) * len(sides[0]), *sides[1:]]
    tower = json.loads((config.folder / "tower" / "tower.json").read_text())
    entries = data.settings()["entries"]
    facts = "\n".join(f"- {name}: {value}" for name, value in machine().items())
    changed = "\n".join(f"- {line}" for line in settings.differences(DemoConfig(), config))
    return f"""# Demo report

**{verdict}**

{chr(10).join("| " + " | ".join(row) + " |" for row in grid)}

Exact match on {entries["test"]} held-out questions ("{CAPTION}" counts only if every word is
right); perplexity of their answers; loss terms unweighted, mean over the last logged steps of the
last stage; tokens/s of the last stage. Students learned from {entries["student_train"]} questions
(their captions are among those), the teacher from {entries["train"]}. **The vision tower that all
models share was trained with the labels of all training images** (accuracy of its probe
{tower["accuracy"]:.3f}, {tower["seconds"]:.0f} s): the limited data limit what the students'
projectors and language models see, not what the tower has seen. Language models start from random
weights.

![loss curves](loss.png)

![accuracy after each stage](stages.png)

![held-out images and answers](answers.png)

## Where and how

{facts}
- whole demo: {seconds:.0f} s in the call that wrote this report

Changed from the defaults:

{changed or "- nothing"}
"""
