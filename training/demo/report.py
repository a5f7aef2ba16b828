"""What did the demo find? A table, a verdict that follows from it, and where they were measured.

The folder `out/report` holds report.md (all of it, pictures included), table.json and table.csv
(one row a run, not averaged), and the pictures of `training.demo.pictures`. The verdict is a rule,
not a judgement: distillation is said to help only if, over the seeds, the distilled students' mean
accuracy on held-out questions exceeds the SFT students' by more than the spread
(`training.demo.results`). The gap is what the teacher is ahead of the SFT students.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from training import settings
from training.data.sources import LlavaSource
from training.demo import pictures, results
from training.demo.config import MADE, DemoConfig
from training.demo.early import Early
from training.demo.recipes import entries
from training.demo.results import Rows, Run, accuracies, ahead, difference, mean
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
    rows: Rows
    verdict: str


def write_report(
    config: DemoConfig, runs: list[Run], early: Sequence[Early], seconds: float
) -> Report:
    """Write `out/report` and print the table and the verdict."""
    folder = config.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    first = [run for run in runs if run.seed == 0]
    distilled = next(run for run in first if run.name == DISTILLED)
    pictures.loss_curves(first, distilled, folder / "loss.png")
    pictures.stage_accuracy(runs, folder / "stages.png")
    shown = [run for run in first if run.name != EQUAL_TIME]
    held_out = LlavaSource(config.split("test"), config.images)
    pictures.answer_grid(shown, held_out, folder / "answers.png")
    results.write_rows(runs, folder)
    rows = results.by_name(runs)
    verdict, stopped = judge(rows), early_stopped(config, rows, early)
    lines = results.on_its_side(results.table(rows))
    facts = [
        *results.where_and_how(),
        f"whole demo: {seconds:.0f} s in the call that wrote this report",
    ]
    here = settings.changed(config, out=DemoConfig().out)
    text = _MARKDOWN.format(
        verdict=verdict,
        table=results.markdown(lines),
        stopped=stopped,
        explained=explained(config, rows),
        limits=limits(config),
        facts=results.listed(facts),
        changed=results.listed(settings.differences(DemoConfig(), here) or ["nothing"]),
    )
    (folder / "report.md").write_text(text, encoding="utf-8")
    console = Console()
    console.print(results.terminal_table(lines))
    end = f"whole demo: {seconds:.0f} s; report: {folder / 'report.md'}"
    console.print(f"{verdict}\n{stopped}\n{end}", highlight=False, soft_wrap=True)
    return Report(folder, rows, verdict)


def judge(rows: Rows) -> str:
    """The verdict, by the rule in the module's docstring."""
    return " ".join(
        _margin(rows, ours, theirs)
        for ours in (DISTILLED, UNLABELLED)
        for theirs in (EQUAL_STEPS, EQUAL_TIME)
    )


def _margin(rows: Rows, name: str, other: str) -> str:
    """How far a distilled student is ahead of an SFT student, and what of the gap that is."""
    margin, spread, won = difference(rows, name, other)
    text = f"{name} minus {other}: {100 * margin:+.1f} points"
    if (gap := ahead(rows, TEACHER, other)) > 0:
        text += f", {margin / gap:.0%} of the gap"
    if spread is None:
        return f"{text} (one seed, so no spread: SEEDS=3 measures it)."
    seeds, holds = len(rows[name]), "more" if margin > spread else "NOT more"
    return (
        f"{text} in the mean of {seeds} seeds, {holds} than the spread ({100 * spread:.1f}); "
        f"ahead in {won} of {seeds}."
    )


def early_stopped(config: DemoConfig, rows: Rows, early: Sequence[Early]) -> str:
    """What early stopping would have made of the SFT students of equal time."""
    steps = ", ".join(str(one.step) for one in early)
    return (
        f"Early stopping, by {entries(config.split('dev'))} questions about images that students "
        f"do not see, asked every {config.save_steps} steps, would have ended {EQUAL_TIME} at step "
        f"{steps}: {mean([one.questions for one in early])} on the held-out questions, "
        f"{mean(accuracies(rows[EQUAL_TIME]))} at its last step."
    )


def explained(config: DemoConfig, rows: Rows) -> str:
    """What the table's figures are, and what each model learned from."""
    captions = CAPTION in rows[TEACHER][0]
    whole = f' ("{CAPTION}" counts only if every word is right)' if captions else ""
    spread = "mean ± standard deviation of the seeds" if config.seeds > 1 else "95% interval"
    of = " of them" if config.data in MADE else ""  # a folder may have a file of their own
    among = config.split("student_pretrain").is_file()
    counts = {
        name: entries(config.split(name))
        for name in (config.held_out, "train", "student_train", "student_questions")
    }
    return f"""\
Exact match on {counts[config.held_out]} held-out questions{whole}, {spread} where
there is one; perplexity of their answers; loss terms unweighted, mean over the last logged steps of
the last stage; tokens/s of the last stage. The teacher learned from {counts["train"]} questions;
students from {counts["student_train"]}{of}\
{" (their captions are among those)" if among else ""}, the distilled one
also from the teacher's answers to {counts["student_questions"]} more about the same images, "no
label" from those answers alone. SFT students have weight decay {config.weight_decay:g}, label
smoothing {config.smoothing:g} and dropout {config.dropout:g}."""


def limits(config: DemoConfig) -> str:
    """What the comparison does not show, by the data."""
    tower = json.loads((config.folder / "tower" / "tower.json").read_text())
    lines = {"scenes": (_SEEN, _TEMPLATES + _PARTS), "easy-vqa": (_SEEN, _TEMPLATES)}
    told = (*lines.get(config.data, (_OWN,)), _RANDOM)
    held_out = _HELD_OUT[config.held_out]
    return results.listed([line.format(**tower, held_out=held_out) for line in told])


_SEEN = """\
The vision tower that all models share was trained with the labels of all training images
  (accuracy of its probe {accuracy:.3f}), the students' among them. And the teacher saw the true
  answers about them, so what it says of the students' images is closer to the truth than it would
  be of images that nobody labelled.{held_out}"""
_HELD_OUT = {
    "test": " The held-out images are new to all.",
    "dev": " So they did of what is held out here: training questions that no student sees.",
}
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
_MARKDOWN = """\
# Demo report

**{verdict}**

{table}

{stopped}

{explained}

What the comparison does not show:

{limits}

![loss curves](loss.png)

![accuracy after each stage](stages.png)

![held-out images and answers](answers.png)

## Where and how

{facts}

Changed from the defaults:

{changed}
"""
