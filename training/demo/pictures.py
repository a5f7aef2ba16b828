"""The demo's pictures: loss curves, accuracy after each stage, held-out images with the models'
answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot as plt

from mllmkd_kernels.llava_kd import TERMS
from training.data.sample import IMAGE_MARK, Sample
from training.data.sources import LlavaSource
from training.demo.results import TITLES, Run
from training.generate import Asked, Writer, load

GRID = 12  # held-out questions shown
TOKENS, LONGEST = 16, 60  # of an answer; characters of a line


def loss_curves(runs: Sequence[Run], distilled: Run, path: Path) -> None:
    """Cross-entropy of every run, and the four terms of the distilled one."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for run in runs:
        left.plot(*_curve(run, "ce"), label=run.name)
    for term in TERMS:
        right.plot(*_curve(distilled, term), label=TITLES.get(term, term))
    at = 0.0
    for stage in distilled.stages:
        right.axvline(at, color="grey", linewidth=0.6)
        beside = {"transform": right.get_xaxis_transform(), "rotation": 90, "fontsize": 7}
        right.text(at, 0.02, f" {stage.name}", color="grey", **beside)
        at += stage.summary["steps"]
    titles = {left: "cross-entropy in training", right: "terms of the distilled student"}
    for axis, title in titles.items():
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    _save(figure, path)


def _curve(run: Run, term: str) -> tuple[list[float], list[float]]:
    """Steps, counted through its stages, and a term of a run; nan where that is no term."""
    steps: list[float] = []
    values: list[float] = []
    before = 0.0
    for stage in run.stages:
        steps += [before + entry["step"] for entry in stage.history]
        values += [entry.get(term, math.nan) for entry in stage.history]
        before += stage.summary["steps"]
    return steps, values


def stage_accuracy(runs: Sequence[Run], path: Path) -> None:
    """Held-out accuracy after each stage of each model."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for stage in run.stages:
            if stage.scores is not None:
                name = f"{run.name}: {stage.name.upper()}"
                found.setdefault(name, []).append(stage.scores.questions)
    accuracies(found, path)


def accuracies(found: Mapping[str, Sequence[float]], path: Path) -> None:
    """Held-out accuracies by name: the seeds, and their mean with its deviation."""
    figure, axis = plt.subplots(figsize=(9, 1 + 0.32 * len(found)), layout="constrained")
    for place, values in enumerate(found.values()):
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axis.plot(values, [place] * len(values), "o", color="#5b8db8", alpha=0.5, markersize=4)
        axis.errorbar(statistics.mean(values), place, xerr=spread, fmt="|k", capsize=3)
    axis.set(xlabel="exact match, questions", title="held-out accuracy: seeds, mean ± deviation")
    axis.set_yticks(range(len(found)), list(found), fontsize=8)
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
    writers = [Writer(*load(str(run.stages[-1].model)), TOKENS) for run in runs]
    answers = [[answer.text for answer in writer.write(asked)] for writer in writers]
    figure, axes = plt.subplots(3, GRID // 3, figsize=(15, 11), layout="constrained")
    for axis in axes.flat[len(chosen) :]:
        axis.axis("off")
    for at, (axis, sample) in enumerate(zip(axes.flat, chosen, strict=False)):
        axis.imshow(source.images(sample)[0])
        question, truth = sample.turns[0]
        axis.set(xticks=[], yticks=[])
        axis.set_title(shorten(question.replace(IMAGE_MARK, ""), LONGEST), fontsize=9)
        lines = [("truth", truth, "black")]
        for run, given in zip(runs, answers, strict=True):
            lines.append((run.name, given[at], "green" if given[at] == truth else "firebrick"))
        for row, (name, text, colour) in enumerate(lines):
            place = {"transform": axis.transAxes, "va": "top", "fontsize": 8}
            line = shorten(f"{name}: {text}", LONGEST)
            axis.text(0, -0.03 - 0.09 * row, line, color=colour, **place)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
