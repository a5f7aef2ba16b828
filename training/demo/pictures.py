"""The demo's pictures: loss curves, accuracy after each stage, held-out images with the models'
answers."""

from __future__ import annotations

import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot as plt

from mllmkd_kernels.llava_kd import TERMS
from training.data.records import Sample
from training.data.sources import LlavaSource
from training.demo.trained import Run
from training.generate import Asked, Writer, load

GRID = 12  # held-out questions shown
LONGEST = 16  # tokens of an answer
LABELS = {
    "ce": "CE",
    "response_kl": "KL response",
    "visual_kl": "KL visual",
    "relation": "relation",
}


def loss_curves(runs: list[Run], path: Path) -> None:
    """Cross-entropy of every run, and the four terms of those that have a teacher."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for run in runs:
        steps, curve = _joined(run)
        axes[0].plot(steps, [entry.get("ce", math.nan) for entry in curve], label=run.name)
        if not any("response_kl" in entry for entry in curve):
            continue
        for term in TERMS if run.name == "distilled" else ():
            values = [entry.get(term, math.nan) for entry in curve]
            axes[1].plot(steps, values, label=LABELS[term])
        at = 0
        for stage in run.stages if run.name == "distilled" else ():
            axes[1].axvline(at, color="grey", linewidth=0.6)
            axes[1].text(at, axes[1].get_ylim()[0], f" {stage.name}", va="bottom", color="grey")
            at += int(stage.summary["steps"])
    for axis, title in zip(
        axes, ("cross-entropy in training", "terms of the distilled student"), strict=True
    ):
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    _save(figure, path)


def stage_accuracy(runs: list[Run], path: Path) -> None:
    """Held-out accuracy on the questions after each stage, mean over seeds with their range."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for stage in run.stages:
            if stage.scores is not None:
                label = f"{run.name}\n{stage.name.upper()}"
                found.setdefault(label, []).append(stage.scores.questions)
    figure, axis = plt.subplots(figsize=(max(6.0, 1.1 * len(found)), 4.2), layout="constrained")
    means = [statistics.mean(values) for values in found.values()]
    low = [mean - min(values) for mean, values in zip(means, found.values(), strict=True)]
    high = [max(values) - mean for mean, values in zip(means, found.values(), strict=True)]
    bars = axis.bar(list(found), means, yerr=[low, high], capsize=4, color="#5b8db8")
    axis.bar_label(bars, [f"{mean:.3f}" for mean in means], padding=3, fontsize=8)
    axis.set(ylim=(0, 1), ylabel="exact match, questions", title="held-out accuracy by stage")
    axis.tick_params(axis="x", labelsize=7)
    _save(figure, path)


def accuracies(rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Held-out accuracy of each row of a study: its seeds, and their mean with its deviation."""
    figure, axis = plt.subplots(figsize=(9, 1 + 0.32 * len(rows)), layout="constrained")
    for place, (name, seeds) in enumerate(rows.items()):
        values = [row["questions"] for row in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axis.plot(values, [place] * len(values), "o", color="#5b8db8", alpha=0.5, markersize=4)
        axis.errorbar(statistics.mean(values), place, xerr=spread, fmt="|k", capsize=3, label=name)
    axis.set(xlabel="exact match, questions", title="held-out accuracy: seeds, mean ± deviation")
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def answer_grid(runs: list[Run], source: LlavaSource, path: Path) -> None:
    """Images, a question about each alone, the true answer and what each model writes, green if
    right."""
    held_out = [
        one
        for one in source.samples()
        if isinstance(one, Sample) and len(one.asked().images) == len(one.images) == 1
    ]
    chosen = held_out[:: max(1, len(held_out) // GRID)][:GRID]
    asked = [Asked(one.asked(), partial(source.images, one.asked())) for one in chosen]
    writers = [Writer(*load(str(run.stages[-1].model)), LONGEST) for run in runs]
    answers = [[answer.text for answer in writer.write(asked)] for writer in writers]
    figure, axes = plt.subplots(3, GRID // 3, figsize=(15, 11), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for at, (axis, sample) in enumerate(zip(axes.flat, chosen, strict=False)):
        axis.imshow(source.images(sample)[0])
        question, truth = sample.turns[0]
        axis.set_title(question.replace("<image>", "").strip(), fontsize=9)
        lines = [("truth", truth, "black")]
        for run, given in zip(runs, answers, strict=True):
            lines.append((run.name, given[at], "green" if given[at] == truth else "firebrick"))
        for row, (name, text, colour) in enumerate(lines):
            place = {"transform": axis.transAxes, "va": "top", "fontsize": 8}
            axis.text(0, -0.03 - 0.09 * row, f"{name}: {text}", color=colour, **place)
    _save(figure, path)


def _joined(run: Run) -> tuple[list[float], list[dict[str, float]]]:
    """The curves of a run's stages one after another, with steps counted through."""
    steps: list[float] = []
    curve: list[dict[str, float]] = []
    before = 0.0
    for stage in run.stages:
        steps += [before + entry["step"] for entry in stage.history]
        curve += stage.history
        before += stage.summary["steps"]
    return steps, curve


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
