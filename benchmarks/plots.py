"""What does it look like? Figures from a record: time and memory against N and V, time against
threads; and the accuracy ladder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from benchmarks.methods import METHODS
from benchmarks.shapes import DTYPES, Case

#: One colour and marker a method, in every figure; the first colours are those that colour-blind
#: readers tell apart, and a marker comes back with another colour only.
_PALETTE = (
    "#7f7f7f", "#d55e00", "#8c510a", "#56b4e9", "#0072b2", "#cc79a7", "#e69f00", "#009e73",
    "#000000", "#5e3c99", "#b2abd2", "#66a61e", "#a6761d", "#e7298a", "#1b9e77", "#7570b3",
    "#e6ab02", "#b15928", "#fb9a99", "#33a02c", "#6a3d9a", "#1f78b4", "#ff7f00", "#a6cee3",
    "#b2df8a",
)  # fmt: skip
_MARKS = "osD^vP*<>hXpd"
STYLES = {
    method.key: {"color": _PALETTE[i % len(_PALETTE)], "marker": _MARKS[i % len(_MARKS)]}
    for i, method in enumerate(METHODS)
}
#: What is swept in a panel: the property of a case, and the fields it depends on.
AXES = {
    "rows N": ("all_rows", {"rows": 0}),
    "vocabulary V": ("vocab", {"vocab_s": 0, "vocab_t": 0}),
    "threads": ("threads", {"threads": 0}),
}


def time_against_size(record: dict[str, Any]) -> Figure | None:
    """Lines, log-log: time of a step against N, against V and against threads."""
    rows = [
        row | {"figure": row["median_s"] * 1e3, "case": _with_threads(row["case"], record)}
        for row in record.get("speed", [])
        if "median_s" in row
    ]
    return _against_size(rows, "Time", "ms, forward and backward")


def _with_threads(case: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """How many "all" are."""
    return case | {"threads": case.get("threads") or record["machine"]["threads"]}


def memory_against_size(record: dict[str, Any]) -> Figure | None:
    """Lines, log-log: extra memory against N and against V, predictions dotted."""
    rows = [
        row | {"figure": row["extra_bytes"] / 2**20}
        for row in record.get("memory", [])
        if row.get("extra_bytes") is not None
    ]
    return _against_size(rows, "Peak memory", "MiB beyond inputs and gradients")


def _against_size(rows: list[dict[str, Any]], what: str, unit: str) -> Figure | None:
    """A panel for each of `AXES` that is swept, of the rows' "figure"."""
    sweeps = [(axis, swept) for axis in AXES if (swept := _most_swept(rows, axis))]
    if not sweeps:
        return None
    figure, panels = _panels(len(sweeps), 5.4)
    for axes, (axis, swept) in zip(panels, sweeps, strict=True):
        case = Case(**swept[0]["case"])
        sizes = {"rows N": f"N {case.all_rows:,}", "vocabulary V": f"V {case.vocab:,}"}
        fixed = ", ".join(size for of, size in sizes.items() if of != axis)
        dotted = " (dotted: explain())" if _size_panel(axes, axis, swept) else ""
        _finish(axes, f"{what}, {case.dtype}, {fixed}{dotted}", axis, unit)
    _legend(figure, panels)
    return figure


def _size_panel(axes: Axes, axis: str, swept: list[dict[str, Any]]) -> bool:
    """A line a method; whether some have a prediction."""
    size, dotted = partial(_size, axis=axis), False
    for style, mine in _by_method(swept):
        mine = sorted(mine, key=size)
        sizes = [size(row) for row in mine]
        axes.plot(sizes, [row["figure"] for row in mine], **style)
        if all(row.get("predicted_bytes") is not None for row in mine):
            predicted = [row["predicted_bytes"] / 2**20 for row in mine]
            axes.plot(sizes, predicted, ":", color=style["color"])
            dotted = True
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _ticks(axes, sorted({size(row) for row in swept}), ",")
    return dotted


def accuracy_ladder(record: dict[str, Any]) -> Figure | None:
    """Lines, log-log: relative gradient error against ε, one panel a dtype, the contract dashed."""
    rows = [row for row in record.get("accuracy", []) if "gradient" in row]
    dtypes = [d for d in DTYPES if any(row["case"]["dtype"] == d for row in rows)]
    if not dtypes:
        return None
    figure, panels = _panels(len(dtypes), 5.2)
    for axes, dtype in zip(panels, dtypes, strict=True):
        here = [row for row in rows if row["case"]["dtype"] == dtype]
        for style, mine in _by_method(here):
            axes.loglog([r["epsilon"] for r in mine], [r["gradient"] for r in mine], **style)
        limits = sorted({(row["epsilon"], row["contract"]) for row in here})
        axes.loglog(*zip(*limits, strict=True), "k--", linewidth=1, label="contract")
        axes.invert_xaxis()
        _ticks(axes, [e for e, _ in limits])
        noise = "ε: teacher = student + ε·noise (towards convergence →)"
        _finish(axes, f"{dtype} inputs", noise, "relative error of the gradient")
    _legend(figure, panels)
    return figure


def _size(row: dict[str, Any], axis: str) -> int:
    """What a case has of that which is swept."""
    return getattr(Case(**row["case"]), AXES[axis][0])


def _most_swept(rows: list[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """The rows of the case that differs only in `axis` most often, of the largest such case where
    several do; empty without a sweep.
    """
    groups: dict[Case, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(Case(**(row["case"] | AXES[axis][1])), []).append(row)
    sizes = [({_size(row, axis) for row in group}, group) for group in groups.values()]
    found, rows = max(sizes, key=lambda s: (len(s[0]), max(s[0])), default=(set(), []))
    return rows if len(found) > 1 else []


def _by_method(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """How each method is drawn, and its rows."""
    for key, label in dict.fromkeys((row["method"], row["label"]) for row in rows):
        yield STYLES[key] | {"label": label}, [row for row in rows if row["method"] == key]


def _panels(count: int, width: float) -> tuple[Figure, Sequence[Axes]]:
    """Side by side."""
    size = (width * count, 4.4)
    figure, panels = plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained")
    return figure, panels[0]


def _ticks(axes: Axes, places: Sequence[float], form: str = "g") -> None:
    """Of a logarithmic axis: at what was measured, and nowhere else."""
    axes.set_xticks(places, [f"{place:{form}}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One for all panels, each label once, below them."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True)) | found
    where = "outside lower center"
    figure.legend(list(found.values()), list(found), loc=where, ncols=3, fontsize=8)


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, which="major", alpha=0.25)


#: Name of a file, what draws it, and what it shows.
FIGURES: dict[str, tuple[Callable[[dict[str, Any]], Figure | None], str]] = {
    "time_against_size": (
        time_against_size,
        "Time of a step against rows, vocabulary and threads.",
    ),
    "memory_against_size": (
        memory_against_size,
        "Peak memory beyond inputs and gradients, against rows and vocabulary.",
    ),
    "accuracy_ladder": (accuracy_ladder, "Relative gradient error as the student converges."),
}


def draw(record: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write the figures that the record has data for into `folder`; file name → caption."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for name, (drawing, caption) in FIGURES.items():
        if figure := drawing(record):
            figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
            plt.close(figure)
            captions[f"{name}.png"] = caption
    return captions
