"""What did the demo find? A table, a verdict that follows from it, and where they were measured.

The folder `out/report` holds report.md (all of it, pictures included), table.json and table.csv
(one row a run, not averaged), and the pictures of `training.demo.pictures`. The verdict is a rule,
not a judgement: distillation is said to help only if, over the seeds, the distilled students' mean
accuracy on held-out questions exceeds the SFT students' by more than the spread, which is the
larger of the two sample standard deviations. One seed has no spread, and says so. The gap is what
the teacher is ahead of the SFT students.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.machine import facts
from mllmkd_kernels.llava_kd import TERMS
from training import settings
from training.data.sources import LlavaSource
from training.demo import pictures
from training.demo.early import Early
from training.demo.folder import LlavaFolder
from training.demo.recipes import DemoConfig
from training.demo.trained import Run
from training.evaluation.held_out import CAPTION

TEACHER, EQUAL_STEPS, EQUAL_TIME, DISTILLED, UNLABELLED = (
    "teacher",
    "SFT, equal steps",
    "SFT, equal time",
    "distilled",
    "distilled, no label",
)


@dataclass(frozen=True)
class Report:
    """The finished report."""

    folder: Path
    rows: dict[str, list[dict[str, float]]]  # by model name, one entry a seed
    verdict: str


def write_report(
    config: DemoConfig,
    runs: list[Run],
    early: Sequence[Early],
    data: LlavaFolder,
    seconds: float,
) -> Report:
    """Write `out/report` and print the table and the verdict."""
    folder = config.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    rows = by_name(runs)
    verdict = judge(rows)
    stopped = early_stopped(config, rows, early, data.settings()["entries"]["dev"])
    first = [run for run in runs if run.seed == 0]
    pictures.loss_curves(first, folder / "loss.png")
    pictures.stage_accuracy(runs, folder / "stages.png")
    shown = [run for run in first if run.name != EQUAL_TIME]
    held_out = LlavaSource(config.split("test"), config.images)
    pictures.answer_grid(shown, held_out, folder / "answers.png")
    write_rows(runs, folder)
    text = _markdown(config, rows, verdict, stopped, data, seconds)
    (folder / "report.md").write_text(text, encoding="utf-8")
    console = Console()
    console.print(terminal_table(*on_its_side(*table(rows))))
    console.print(f"{verdict}\n{stopped}", highlight=False, soft_wrap=True)
    end = f"whole demo: {seconds:.0f} s; report: {folder / 'report.md'}"
    console.print(end, highlight=False, soft_wrap=True)
    return Report(folder, rows, verdict)


def judge(rows: dict[str, list[dict[str, float]]]) -> str:
    """The verdict, by the rule in the module's docstring."""
    return " ".join(
        _margin(rows, ours, theirs)
        for ours in (DISTILLED, UNLABELLED)
        for theirs in (EQUAL_STEPS, EQUAL_TIME)
    )


def _margin(rows: dict[str, list[dict[str, float]]], name: str, other: str) -> str:
    """How far a distilled student is ahead of an SFT student, and what of the gap that is."""
    ours, theirs, best = (accuracies(rows[n]) for n in (name, other, TEACHER))
    margin, spread = difference(ours, theirs)
    text = f"{name} minus {other}: {100 * margin:+.1f} points"
    if (gap := statistics.mean(best) - statistics.mean(theirs)) > 0:
        text += f", {margin / gap:.0%} of the gap"
    if spread is None:
        return f"{text} (one seed, so no spread: SEEDS=3 measures it)."
    won = sum(a > b for a, b in zip(ours, theirs, strict=True))
    holds = "more" if margin > spread else "NOT more"
    return (
        f"{text} in the mean of {len(ours)} seeds, {holds} than the spread ({100 * spread:.1f}); "
        f"ahead in {won} of {len(ours)}."
    )


def early_stopped(
    config: DemoConfig,
    rows: dict[str, list[dict[str, float]]],
    early: Sequence[Early],
    questions: int,
) -> str:
    """What early stopping would have made of the SFT students of equal time."""
    steps = ", ".join(str(one.step) for one in early)
    found = _cell("early", [{"early": one.questions} for one in early])
    last = _cell("last", [{"last": value} for value in accuracies(rows[EQUAL_TIME])])
    return (
        f"Early stopping, by {questions} questions about images that students do not see, asked "
        f"every {config.save_steps} steps, would have ended {EQUAL_TIME} at step {steps}: {found} "
        f"on the held-out questions, {last} at its last step."
    )


def by_name(runs: Sequence[Run]) -> dict[str, list[dict[str, float]]]:
    """The rows of runs by the name of the model, one entry a seed."""
    rows: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        rows.setdefault(run.name, []).append(run.row())
    return rows


def accuracies(seeds: Sequence[dict[str, float]]) -> list[float]:
    """On the questions, of each seed."""
    return [row["questions"] for row in seeds]


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Of two means, and the spread that it is to exceed: the larger of the two sample standard
    deviations, None where a seed stands alone."""
    margin = statistics.mean(ours) - statistics.mean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return margin, None
    return margin, max(statistics.stdev(ours), statistics.stdev(theirs))


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
    columns = [c for c in next(iter(rows.values()))[0] if c not in ("low", "high")]
    header = ["model", *(_TITLES.get(column, column) for column in columns)]
    return header, [[name, *(_cell(c, seeds) for c in columns)] for name, seeds in rows.items()]


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


def _cell(column: str, seeds: list[dict[str, float]]) -> str:
    values = [row[column] for row in seeds]
    show = _FORMATS.get(column, lambda x: f"{x:.3f}")
    if column in TERMS and not any(values):
        return "–"  # not a term of this model's last stage
    mean = show(statistics.mean(values))
    if len(values) > 1:
        return f"{mean} ± {show(statistics.stdev(values))}"
    if column == "questions":
        return f"{mean} ({show(seeds[0]['low'])} to {show(seeds[0]['high'])})"
    return mean


def on_its_side(header: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table whose models are columns, for few models and narrow pages."""
    first, *others = zip(header, *lines, strict=True)
    return list(first), [list(line) for line in others]


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *lines))


def terminal_table(header: list[str], lines: list[list[str]]) -> Table:
    """A table for the terminal."""
    shown = Table(title="held-out exact match, perplexity, final loss terms, cost")
    for i, title in enumerate(header):
        shown.add_column(title, justify="right" if i else "left")
    for line in lines:
        shown.add_row(*line)
    return shown


def write_rows(runs: Sequence[Run], folder: Path) -> None:
    """Write table.json and table.csv, a row a run."""
    records: list[dict[str, Any]] = [{"model": r.name, "seed": r.seed, **r.row()} for r in runs]
    (folder / "table.json").write_text(
        json.dumps({"machine": machine(), "runs": records}, indent=1)
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    (folder / "table.csv").write_text(text.getvalue())


_SEEN = """\
The vision tower that all models share was trained with the labels of all training images
  (accuracy of its probe {accuracy:.3f}), the students' among them. And the teacher saw the true
  answers about them, so what it says of the students' images is closer to the truth than it would
  be of images that nobody labelled. The held-out images are new to all."""
_TEMPLATES = "Questions are templates, so that more of them can be had for nothing."
_PARTS = """ Whoever knows that the four
  photographs of a scene are separate things can cut up and recompose the students' own labelled
  scenes and train on those, without a teacher (a row of `make study`)."""
_OWN = """\
The vision tower that all models share and the teacher learned from train.json (accuracy of the
  tower's probe {accuracy:.3f}). Of the students' images that are in it they saw the true answers,
  so what the teacher says of these is closer to the truth than of images that nobody labelled."""
_RANDOM = """\
Language models start from random weights: with a pre-trained one, less is left to be learned from
  so few labels."""
#: What the comparison does not show, by the data; of a folder of one's own, by None.
_LIMITS = {
    "scenes": (_SEEN, _TEMPLATES + _PARTS, _RANDOM),
    "easy-vqa": (_SEEN, _TEMPLATES, _RANDOM),
    None: (_OWN, _RANDOM),
}


def _markdown(
    config: DemoConfig,
    rows: dict[str, list[dict[str, float]]],
    verdict: str,
    stopped: str,
    data: LlavaFolder,
    seconds: float,
) -> str:
    tower = json.loads((config.folder / "tower" / "tower.json").read_text())
    entries = data.settings()["entries"]
    whole = (
        f' ("{CAPTION}" counts only if every word is right)' if CAPTION in rows[TEACHER][0] else ""
    )
    spread = "mean ± standard deviation of the seeds" if config.seeds > 1 else "95% interval"
    among = " (their captions are among those)" if "student_pretrain" in entries else ""
    facts = "\n".join(f"- {name}: {value}" for name, value in machine().items())
    limits = _LIMITS.get(config.data, _LIMITS[None])
    said = "\n".join(f"- {line.format(accuracy=tower['accuracy'])}" for line in limits)
    here = settings.changed(config, out=DemoConfig().out)
    changed = "\n".join(f"- {line}" for line in settings.differences(DemoConfig(), here))
    return f"""# Demo report

**{verdict}**

{markdown(*on_its_side(*table(rows)))}

{stopped}

Exact match on {entries[config.held_out]} held-out questions{whole}, {spread} where
there is one; perplexity of their answers; loss terms unweighted, mean over the last logged steps of
the last stage; tokens/s of the last stage. The teacher learned from {entries["train"]} questions;
students from {entries["student_train"]} of them{among}, the distilled one
also from the teacher's answers to {entries["student_questions"]} more about the same images, "no
label" from those answers alone. SFT students have weight decay {config.weight_decay:g}, label
smoothing {config.smoothing:g} and dropout {config.dropout:g}.

What the comparison does not show:

{said}

![loss curves](loss.png)

![accuracy after each stage](stages.png)

![held-out images and answers](answers.png)

## Where and how

{facts}
- whole demo: {seconds:.0f} s in the call that wrote this report

Changed from the defaults:

{changed or "- nothing"}
"""
