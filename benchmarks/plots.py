"""What does it look like? Three figures from a record: time over the floor, memory against N, and
the accuracy ladder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from benchmarks.methods import FLOOR, METHODS
from benchmarks.shapes import DTYPES, Case

#: One colour and marker a method, in every figure; colours that colour-blind readers tell apart.
_PALETTE = (
    "#7f7f7f",
    "#d55e00",
    "#0072b2",
    "#56b4e9",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#000000",
    "#8c510a",
    "#5e3c99",
    "#b2abd2",
)
COLOURS = {method.key: _PALETTE[i % len(_PALETTE)] for i, method in enumerate(METHODS)}
MARKERS = {method.key: "osD^vP*<>hX"[i % 11] for i, method in enumerate(METHODS)}


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write the figures that the record has data for into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
        "time_over_floor": time_over_floor,
        "memory_against_rows": memory_against_rows,
        "accuracy_ladder": accuracy_ladder,
    }
    paths = []
    for name, drawing in drawings.items():
        figure = drawing(record)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150, bbox_inches="tight")
            plt.close(figure)
            paths.append(path)
    return paths


def time_over_floor(record: dict[str, Any]) -> Figure | None:
    """Bars: time of every method over the matrix products alone, case by case."""
    rows = [r for r in record.get("speed", []) if r.get("over_floor") and r["method"] != FLOOR.key]
    if not rows:
        return None
    cases = list(dict.fromkeys(Case(**row["case"]) for row in rows))
    methods = list(dict.fromkeys((row["method"], row["label"]) for row in rows))
    height = 1.4 + 0.22 * len(rows) + 0.2 * len(cases)
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    thickness = 0.8 / len(methods)
    for n, (key, label) in enumerate(methods):
        mine = {Case(**row["case"]): row["over_floor"] for row in rows if row["method"] == key}
        places = [i + n * thickness for i, case in enumerate(cases) if case in mine]
        values = [mine[case] for case in cases if case in mine]
        bars = axes.barh(places, values, thickness * 0.9, color=COLOURS[key], label=label)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    middle = 0.4 - thickness / 2
    axes.set_yticks([i + middle for i in range(len(cases))], [_label(c) for c in cases], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time / time of the matrix products alone (dashed: 1)")
    axes.set_title("One step's loss, forward and backward", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    _plain(axes)
    return figure


def memory_against_rows(record: dict[str, Any]) -> Figure | None:
    """Lines: extra memory against N for the case that was swept, predictions dotted."""
    rows = [r for r in record.get("memory", []) if r.get("extra_bytes") is not None]
    swept = _most_swept(rows)
    if not swept:
        return None
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for key, label in dict.fromkeys((row["method"], row["label"]) for row in swept):
        mine = sorted((r for r in swept if r["method"] == key), key=lambda r: r["case"]["rows"])
        n = [row["case"]["rows"] for row in mine]
        axes.plot(n, [row["extra_bytes"] / 2**20 for row in mine], color=COLOURS[key],
                  marker=MARKERS[key], label=label)  # fmt: skip
        if all(row["predicted_bytes"] is not None for row in mine):
            axes.plot(n, [row["predicted_bytes"] / 2**20 for row in mine], ":", color=COLOURS[key])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ticks = sorted({row["case"]["rows"] for row in swept})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rows N")
    axes.set_ylabel("MiB beyond inputs and gradients")
    case = Case(**swept[0]["case"])
    axes.set_title(f"Peak memory, {case.dtype}, V {case.vocab:,} (dotted: explain())", fontsize=10)
    axes.legend(fontsize=8)
    _plain(axes)
    return figure


def accuracy_ladder(record: dict[str, Any]) -> Figure | None:
    """Lines, log-log: relative gradient error against ε, one panel a dtype, the contract dashed."""
    rows = [row for row in record.get("accuracy", []) if "gradient" in row]
    dtypes = [d for d in DTYPES if any(row["case"]["dtype"] == d for row in rows)]
    if not dtypes:
        return None
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(5.2 * len(dtypes), 4.4), squeeze=False, layout="constrained"
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        here = [row for row in rows if row["case"]["dtype"] == dtype]
        for key, label in dict.fromkeys((row["method"], row["label"]) for row in here):
            mine = [row for row in here if row["method"] == key]
            axes.loglog([r["epsilon"] for r in mine], [r["gradient"] for r in mine], 
                        color=COLOURS[key], marker=MARKERS[key], label=label)  # fmt: skip
        limits = sorted({(row["epsilon"], row["contract"]) for row in here})
        axes.loglog(*zip(*limits, strict=True), "k--", linewidth=1, label="contract")
        axes.invert_xaxis()
        axes.set_xticks([e for e, _ in limits], [f"{e:g}" for e, _ in limits])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{dtype} inputs", fontsize=10)
        axes.set_xlabel("ε: teacher = student + ε·noise (towards convergence →)")
        axes.set_ylabel("relative error of the gradient")
        _plain(axes)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=8)  # fmt: skip
    return figure


def _most_swept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the case that differs only in N most often; empty without a sweep."""
    groups: dict[Case, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(Case(**{**row["case"], "rows": 0}), []).append(row)
    sweeps = [g for g in groups.values() if len({row["case"]["rows"] for row in g}) > 1]
    return max(sweeps, key=lambda g: len({row["case"]["rows"] for row in g}), default=[])


def _label(case: Case) -> str:
    head = "trained" if case.train_head else "frozen"
    return f"{case.loss} {case.dtype}, head {head}\n{case.pair}, N {case.rows:,}"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, which="major", alpha=0.25)
