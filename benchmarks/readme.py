"""Where do the README's figures come from? From the newest record, between two markers.

``python -m benchmarks readme`` rewrites the block. So no figure in the README is typed by hand, and
a test notices one that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.methods import EAGER, FLOOR
from benchmarks.plots import FIGURES
from benchmarks.record import load, published
from benchmarks.report import machine_line
from benchmarks.shapes import PREFERENCES, PROMISED, Case, headline, step_case
from benchmarks.tables import (
    STEP,
    Body,
    Row,
    Table,
    absent,
    ladder,
    lines,
    markdown,
    mebibytes,
    seconds,
    times,
)

#: Errors are compared as multiples of PyTorch's; rounding alone makes them differ by less.
NOISE = 1.25

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def block(path: Path, root: Path) -> str:
    """What stands between the markers for the record at `path`; links are relative to `root`."""
    record = load(path)
    case = headline("bf16")
    parts = [
        f"CE + forward KL of {case.rows:,} tokens, V {case.vocab:,}, Ds {case.d_s}, Dt "
        f"{case.d_t:,}; forward and backward, student head trained. Memory is what a step needs "
        f"beyond inputs and gradients.{_smaller(record)}",
        markdown(_headline_table(record)),
        *_below_the_floor(record),
        "The teacher is the student plus noise ε; relative error of the gradient, bf16 inputs:",
        markdown(_ladder_table(record)),
    ]
    if others := absent(_headline_rows(record) + _ladder_rows(record)):
        parts.append(f"Not in these tables: {others}.")
    if relation := "\n".join(_relation_lines(record)):
        parts.append(relation)
    if (preferences := _preference_table(record)).rows:
        parts += [_PREFERENCES, markdown(preferences)]
    if record.get("step"):
        parts += [_step_note(record["step"]), markdown(_step_table(record["step"]))]
    if lost := list(_losses(record)):
        parts.append("Where the package loses to plain PyTorch:\n\n" + "\n".join(lost))
    name = _link(path, root)
    drawn = "time_against_size", "memory_against_size", "accuracy_ladder"
    for figure in drawn:
        if (path.with_suffix("") / f"{figure}.png").exists():
            parts.append(f"![{FIGURES[figure][1].rstrip('.')}]({name}/{figure}.png)")
    parts.append(f"{machine_line(record)} [Everything that was measured]({name}/report.md).")
    parts += _elsewhere(path, root)
    return "\n\n".join(parts)


def rewritten(text: str, new_block: str) -> str:
    """`text` with the block replaced.

    Raises:
        ValueError: a marker is missing, repeated, or the two are the wrong way round.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"readme: expected one {BEGIN} and one {END} after it")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new_block}\n{END}{rest.split(END)[1]}"


def _headline_table(record: dict[str, Any]) -> Table:
    body: Body = []
    for label in dict.fromkeys(r["label"] for r in _headline_rows(record) if r["status"] == "ok"):
        cells: list[str] = []
        for dtype in PROMISED:
            fast, small = (
                next((r for r in _headline_rows(record, dtype, of) if r["label"] == label), {})
                for of in ("speed", "memory")
            )
            if fast.get("status", "ok") != "ok":
                cells += [fast["status"], "", "", ""]
                continue
            cells += [
                seconds(fast["median_s"]) if "median_s" in fast else "–",
                times(fast.get("over_floor")),
                times(fast.get("times_eager")),
                mebibytes(small.get("extra_bytes")),
            ]
        body.append((label, *cells))
    heads = ("time", "over floor", "faster", "memory")
    return _table((f"{dtype} {head}" for dtype in PROMISED for head in heads), body)


def _headline_rows(record: dict[str, Any], dtype: str = "", section: str = "speed") -> list[Row]:
    """Of one dtype or of all, whatever there was time for of them."""
    asked = [headline(dtype) for dtype in ([dtype] if dtype else PROMISED)]
    return [r for r in record[section] if any(Case(**r["case"]).made_of(case) for case in asked)]


def _smaller(record: dict[str, Any]) -> str:
    """What there was no time for."""
    cases = dict.fromkeys(Case(**row["case"]) for row in _headline_rows(record))
    halved = [f"{case.dtype} is of {case.size}" for case in cases if case.halvings]
    text = " There was no time here for all of it: {}, for every method alike."
    return text.format(" and ".join(halved)) if halved else ""


def _below_the_floor(record: dict[str, Any]) -> Iterator[str]:
    """What a time below the floor means, where there is one."""
    below = []
    for dtype in PROMISED:
        rows = {row["label"]: row for row in _headline_rows(record, dtype)}
        ours, floor = rows.get(record["judged"], {}), rows.get(FLOOR.label)
        if floor and (ours.get("over_floor") or 1) < 1:
            speeds = f"{ours['gflops']:.3g} GFLOP/s against {floor['gflops']:.3g}"
            below.append(f"in {dtype} {speeds}, hence {times(ours['over_floor'])}")
    if below:
        yield (
            "The floor is the time of PyTorch's own products (`torch.mm`, called once each), not a "
            "bound. Ours are faster on this processor, so that a whole step, loss and all, runs "
            f"faster than those products alone: {'; '.join(below)}."
        )


def _elsewhere(path: Path, root: Path) -> Iterator[str]:
    """The newest record of every other machine beside it, in a sentence."""

    def machine(record: dict[str, Any]) -> str:
        return "{cpu}, {cores} cores ({vector_units})".format(**record["machine"])

    newest = {machine(record): (record, other) for record, other in published(path.parent)}
    newest.pop(machine(load(path)), None)
    for name, (record, other) in newest.items():
        ours = [r for r in _headline_rows(record) if r["method"] == record["judged_method"]]
        faster = " and ".join(
            f"{row['case']['dtype']} {times(row.get('times_eager'))} ({Case(**row['case']).size})"
            for row in ours
        )
        yield (
            f"On {name}, {record['date'][:10]}, faster than PyTorch: {faster}; "
            f"[everything]({_link(other, root)}/report.md)."
        )


def _link(path: Path, root: Path) -> str:
    """The folder of a record, from the root."""
    return path.with_suffix("").relative_to(root).as_posix()


def _losses(record: dict[str, Any]) -> Iterator[str]:
    """Where plain PyTorch is faster, smaller or more exact than a method of ours."""
    figures = ("speed", "median_s", seconds), ("memory", "extra_bytes", mebibytes)
    for section, key, form in figures:
        rows = _by_case_and_label(record[section])
        for (case, label), row in rows.items():
            ours, theirs = (r.get(key) for r in (row, rows.get((case, EAGER.label), {})))
            if row["method"].startswith("mk-") and ours and theirs and ours > theirs:
                yield f"- {section}, {label}, {case.title}: {form(ours)} against {form(theirs)}."
    eager = {
        (row["case"]["dtype"], row["epsilon"]): row.get("gradient")
        for row in record["accuracy"]
        if row["method"] == EAGER.key
    }
    worst: dict[tuple[str, str], float] = {}
    for row in record["accuracy"]:
        dtype, theirs = row["case"]["dtype"], eager.get((row["case"]["dtype"], row["epsilon"]))
        if row["method"].startswith("mk-") and theirs and "gradient" in row:
            key = row["label"], dtype
            worst[key] = max(worst.get(key, 0.0), row["gradient"] / theirs)
    for (label, dtype), ratio in worst.items():
        if ratio >= NOISE:
            yield f"- accuracy, {label}, {dtype} near convergence: up to {ratio:.1f}x the error."


def _by_case_and_label(rows: list[Row]) -> dict[tuple[Case, str], Row]:
    return {(Case(**row["case"]), row["label"]): row for row in rows}


def _ladder_table(record: dict[str, Any]) -> Table:
    return _table(*ladder(_ladder_rows(record), lambda row: f"{row['gradient']:.2%}"))


def _ladder_rows(record: dict[str, Any]) -> list[Row]:
    return [row for row in record["accuracy"] if row["case"]["dtype"] == "bf16"]


def _step_note(rows: list[Row]) -> str:
    case = step_case(rows[0]["case"])
    m = case.models
    return (
        f"A whole training step, teacher and student forward to AdamW: {m.name}, "
        f"{m.teacher.layers} layers of {m.teacher.hidden:,} → {m.student.layers} of "
        f"{m.student.hidden:,}, V {m.vocab:,}, {m.dtype}, {case.batch} samples with {m.image_rows} "
        "visual rows each. Memory is beyond weights and optimiser state; the largest batch is the "
        f"largest that keeps it within {case.budget_mib:,} MiB."
    )


def _step_table(rows: list[Row]) -> Table:
    named = [r | {"label": f"{r['case']['stage'].upper()}, {r['label']}"} for r in rows]
    return _table(("memory" if head == "peak" else head for head in STEP), lines(named, STEP))


def _table(heads: Iterable[str], rows: Body) -> Table:
    return Table("", "", ("", *heads), rows)


_PREFERENCES = """\
Preference losses of pairs of answers with the teacher as reference, forward and backward; error of
the loss, and of the gradient:"""


def _preference_table(record: dict[str, Any]) -> Table:
    memory, body = _by_case_and_label(record["memory"]), []
    for (case, label), row in _by_case_and_label(record["speed"]).items():
        if case.loss not in PREFERENCES or not row.get("errors") or "median_s" not in row:
            continue
        errors, found = row["errors"], memory.get((case, label), {})
        body.append((
            f"{case.loss.upper()}, {case.dtype}, {case.size}: {label}", seconds(row["median_s"]),
            times(row["over_floor"]), times(row["times_eager"]),
            mebibytes(found.get("extra_bytes")), f"{errors['loss']:.0e}",
            f"{max(errors['dh'], errors['dw'] or 0):.0e}",
        ))  # fmt: skip
    return _table(("time", "over floor", "faster", "memory", "loss", "gradient"), body)


def _relation_lines(record: dict[str, Any]) -> Iterator[str]:
    """Our default backend against whole logits, a sentence a case."""
    memory = _by_case_and_label(record["memory"])
    for (case, label), row in _by_case_and_label(record["speed"]).items():
        if case.loss != "relation" or label != record["judged"] or row["status"] != "ok":
            continue
        head = "trained" if case.train_head else "frozen"
        images = "one image" if case.images == 1 else f"each of {case.images} images"
        ours, eager = (memory.get((case, of), {}).get("extra_bytes") for of in (label, EAGER.label))
        extra = f", {mebibytes(ours)} extra instead of {mebibytes(eager)}"
        yield (
            f"- Relation loss of {case.rows} rows of {images}, V {case.vocab:,}, {case.dtype}, "
            f"head {head}: {times(row['times_eager'])} faster than through the logits"
            f"{'' if None in (ours, eager) else extra}."
        )
