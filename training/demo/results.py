"""What did each model reach, what did it cost, and is a difference larger than the spread?

The spread is the larger of two models' sample standard deviations over seeds; a model of one seed
has none.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import transformers
from rich.table import Table

from benchmarks.machine import facts
from mllmkd_kernels.llava_kd import TERMS
from training.evaluation.held_out import Scores
from training.loop import StageResult

#: By model, one entry a seed.
Rows = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Run:
    """One trained model: which, from which seed, and its stages."""

    name: str
    seed: int
    stages: list[StageResult]

    @property
    def scores(self) -> Scores:
        """Held-out scores after the last stage."""
        scores = self.stages[-1].scores
        assert scores is not None, "every run of the demo has held-out data"
        return scores

    def total(self, name: str) -> float:
        """Steps or seconds of all its stages."""
        return sum(stage.summary[name] for stage in self.stages)

    def row(self) -> dict[str, float]:
        """The run's numbers, in the order of the table's columns."""
        last = self.stages[-1]
        row = {"questions": self.scores.questions}
        row["low"], row["high"] = self.scores.interval()
        row |= self.scores.kinds
        row["perplexity"] = self.scores.perplexity
        row |= {term: last.history[-1].get(term, 0.0) for term in TERMS}
        row |= {name: self.total(name) for name in ("steps", "seconds")}
        row["tokens_per_second"] = last.summary["tokens_per_second"]
        row["peak_gib"] = max(stage.summary["peak_gib"] for stage in self.stages)
        return row


def by_name(runs: Sequence[Run]) -> Rows:
    """The rows of runs by the name of the model."""
    rows: Rows = {}
    for run in runs:
        rows.setdefault(run.name, []).append(run.row())
    return rows


def accuracies(seeds: Sequence[dict[str, float]]) -> list[float]:
    """On the questions, of each seed."""
    return [row["questions"] for row in seeds]


def ahead(rows: Rows, name: str, other: str) -> float:
    """How much more of the questions a model gets right in the mean."""
    ours, theirs = accuracies(rows[name]), accuracies(rows[other])
    return statistics.mean(ours) - statistics.mean(theirs)


class Difference(NamedTuple):
    """Between two models on the questions.

    Attributes:
        margin: how far the first is ahead in the mean.
        spread: what that is to exceed; None where a seed stands alone.
        won: seeds in which it is ahead.
    """

    margin: float
    spread: float | None
    won: int

    @property
    def counts(self) -> bool:
        """Whether the models differ by more than the spread."""
        return self.spread is not None and abs(self.margin) > self.spread


def difference(rows: Rows, name: str, other: str) -> Difference:
    """Between `name` and `other`, whose seeds are the same."""
    ours, theirs = accuracies(rows[name]), accuracies(rows[other])
    alone = len(ours) < 2
    spread = None if alone else max(statistics.stdev(ours), statistics.stdev(theirs))
    won = sum(a > b for a, b in zip(ours, theirs, strict=True))
    return Difference(ahead(rows, name, other), spread, won)


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


def write_rows(runs: Sequence[Run], folder: Path) -> None:
    """Write table.json and table.csv, a row a run."""
    records = [{"model": run.name, "seed": run.seed, **run.row()} for run in runs]
    text = json.dumps({"machine": machine(), "runs": records}, indent=1)
    (folder / "table.json").write_text(text)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


# --- as tables of text: lines of cells, the first line is the header ------------------------------

Lines = list[list[str]]
TITLES = {
    "questions": "questions (all but captions)",
    "ce": "CE",
    "response_kl": "KL response",
    "visual_kl": "KL visual",
    "tokens_per_second": "tokens/s",
    "peak_gib": "peak GiB",
}
DIGITS = {"steps": 0, "seconds": 0, "tokens_per_second": 0, "peak_gib": 2}


def table(rows: Rows, columns: Sequence[str] = ()) -> Lines:
    """One line a model; empty `columns` are all."""
    columns = columns or [c for c in next(iter(rows.values()))[0] if c not in ("low", "high")]
    header = ["model", *(TITLES.get(column, column) for column in columns)]
    return [header, *([name, *(_cell(c, seeds) for c in columns)] for name, seeds in rows.items())]


def _cell(column: str, seeds: Sequence[dict[str, float]]) -> str:
    values = [row[column] for row in seeds]
    if column in TERMS and not any(values):
        return "–"  # not a term of this model's last stage
    text = mean(values, DIGITS.get(column, 3))
    if column == "questions" and len(seeds) == 1:
        text += f" ({seeds[0]['low']:.3f} to {seeds[0]['high']:.3f})"
    return text


def mean(values: Sequence[float], digits: int = 3) -> str:
    """Of the seeds, with ± their sample standard deviation where there are several."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def on_its_side(lines: Lines) -> Lines:
    """A table whose models are columns, for few models and narrow pages."""
    return [list(line) for line in zip(*lines, strict=True)]


def markdown(lines: Lines) -> str:
    """A table in Markdown."""
    rows = (lines[0], ["---"] * len(lines[0]), *lines[1:])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def terminal_table(lines: Lines) -> Table:
    """A table for the terminal."""
    shown = Table(title="held-out exact match, perplexity, final loss terms, cost")
    for i, title in enumerate(lines[0]):
        shown.add_column(title, justify="right" if i else "left")
    for line in lines[1:]:
        shown.add_row(*line)
    return shown


def listed(items: Sequence[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {item}" for item in items)


def where_and_how() -> list[str]:
    """Lines that name the machine."""
    return [f"{name}: {value}" for name, value in machine().items()]
