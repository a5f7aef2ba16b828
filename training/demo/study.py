"""What matters when a small model learns from a large one? One student, trained in many ways.

Every row (`training.demo.rows`) is a run of the trainer itself: the same student, weights at the
start, labels, optimiser and number of steps, one stage unless the method has more. What a row comes
after (half the steps of D2D, a finished student, a teacher in between) counts among its steps and
seconds. The table has mean and spread over seeds beside steps, seconds, speed and memory; what it
says in words follows from the numbers by one rule: a difference counts if it is larger than the
spread (`training.demo.results`). To lay the tables of two data sets side by side, differences are
also told as shares of the gap that there is to close, from SFT to the teacher.

Settings are to be compared on `held_out: dev` (questions about training images that students do not
see), never on what the published table is made of.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from training.bar import Bar
from training.demo import pictures, results
from training.demo.config import StudyConfig
from training.demo.folder import write_folder
from training.demo.recipes import entries, trained
from training.demo.recomposed import recomposed
from training.demo.report import TEACHER
from training.demo.results import Difference, Lines, Rows, Run, ahead, difference
from training.demo.rows import RECOMPOSED, ROWS, SFT, Row
from training.demo.run import prepared
from training.demo.tell import part
from training.lock import held
from training.settings import ConfigError, build, to_dict


def study(config: StudyConfig) -> None:
    """Train every row that is not there yet, and write `out/study`."""
    known = {row.name: row for row in ROWS if row.data in ("", config.data)}
    if unknown := [name for name in config.rows if name not in known]:
        raise ConfigError(f"rows: got {unknown}, expected some of {', '.join(known)}")
    rows = [row for name, row in known.items() if not config.rows or name in config.rows]
    with held(config.folder, "out"):
        start = time.perf_counter()
        runs = [prepared(config)]
        if any(RECOMPOSED in row.shown for row in rows):
            asked = entries(config.split("student_questions"))
            write_folder(config.recomposed.parent, recomposed(config, asked))
        if config.jobs > 1:
            train_side_by_side(config, rows)
        for row in rows:
            for seed in range(config.seeds):
                with part(f"{row.name}, seed {seed}"):
                    runs.append(Run(row.name, seed, trained(config, row, seed)))
        report(config, runs, time.perf_counter() - start)


def train_side_by_side(config: StudyConfig, rows: Sequence[Row]) -> None:
    """Train the rows in `config.jobs` processes; rows after the same one share a process, which
    trains that one once. What they print goes to `out/study/PROCESS.log`.
    """
    chains: dict[str, list[str]] = {}
    for row in rows:
        chains.setdefault((row.after or row).name, []).append(row.name)
    logs = config.folder / "study"
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("*.log"):
        old.unlink()
    with ProcessPoolExecutor(
        config.jobs, multiprocessing.get_context("spawn"), _worker, (str(logs),)
    ) as pool:
        work = [
            pool.submit(_chain, to_dict(config), chain, seed)
            for chain in sorted(chains.values(), key=len, reverse=True)
            for seed in range(config.seeds)
        ]
        try:
            with Bar("study", len(rows) * config.seeds, "students") as bar:
                for done in as_completed(work):
                    bar.advance(done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _worker(logs: str) -> None:
    """Before a process trains: where it prints."""
    log = (Path(logs) / f"{os.getpid()}.log").open("w", encoding="utf-8", buffering=1)
    sys.stdout = sys.stderr = log


def _chain(values: dict[str, Any], names: Sequence[str], seed: int) -> int:
    """Train rows one after another; returns how many."""
    config = build(StudyConfig, values)
    torch.set_num_threads(config.threads or 1)
    for name in names:
        print(f"{name}, seed {seed}")
        trained(config, next(row for row in ROWS if row.name == name), seed)
    return len(names)


def report(config: StudyConfig, runs: Sequence[Run], seconds: float) -> None:
    """Write `out/study`: table.json, table.csv, accuracy.png, report.md; print the table."""
    folder = config.folder / "study"
    folder.mkdir(parents=True, exist_ok=True)
    results.write_rows(runs, folder)
    rows = results.by_name(runs)
    found = {name: results.accuracies(seeds) for name, seeds in rows.items()}
    pictures.accuracies(found, folder / "accuracy.png")
    facts = [*results.where_and_how(), f"{seconds:.0f} s in the call that wrote this"]
    text = [f"# Study: {config.data}", *findings(rows), results.markdown(results.table(rows))]
    text += ["![accuracy](accuracy.png)", results.listed(facts)]
    (folder / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    console = Console()
    console.print(results.terminal_table(results.table(rows, ("questions", "steps", "seconds"))))
    told = [*findings(rows)[:1], f"all figures: {folder / 'report.md'}"]
    console.print("\n".join(told), highlight=False, markup=False, soft_wrap=True)


def findings(rows: Rows) -> list[str]:
    """What differs from its control by more than the spread, and a table of all differences."""
    found = {
        row: difference(rows, row.name, row.control)
        for row in ROWS
        if row.name in rows and row.control in rows
    }
    if not found:
        return []
    paragraphs = [results.listed(list(_words(found))), results.markdown(_lines(rows, found))]
    if gap := _gap(rows):
        paragraphs.append(
            f"The gap is what the teacher is ahead of {SFT.name}: {100 * gap:.1f} points."
        )
    return paragraphs


def _words(found: dict[Row, Difference]) -> Iterator[str]:
    """Which rows are above, below and within the spread of the one that they are compared with."""
    if any(one.spread is None for one in found.values()):
        yield "A row of one seed has no spread to compare a difference with: SEEDS=3 measures it."
        return
    for side, sign in (("above", 1), ("below", -1)):
        told = [
            f"{row.name} ({100 * one.margin:+.1f} on {row.control})"
            for row, one in found.items()
            if one.counts and sign * one.margin > 0
        ]
        yield f"More than the spread {side} its control: {'; '.join(told) or 'none'}."
    within = [row.name for row, one in found.items() if not one.counts]
    yield f"Within the spread of its control: {'; '.join(within) or 'none'}."


def _lines(rows: Rows, found: dict[Row, Difference]) -> Lines:
    """A line a difference, in the order of the rows whatever the data."""
    gap = _gap(rows)
    lines = [["row", "control", "points", "spread", "beyond it", "seeds ahead", "of the gap"]]
    for row, (margin, spread, won) in found.items():
        beyond = "–" if not found[row].counts else "above" if margin > 0 else "below"
        known = "–" if spread is None else f"{100 * spread:.1f}"
        share = f"{margin / gap:+.0%}" if gap else "–"
        seeds = f"{won} of {len(rows[row.name])}"
        points = f"{100 * margin:+.1f}"
        lines.append([row.name, row.control, points, known, beyond, seeds, share])
    return lines


def _gap(rows: Rows) -> float:
    """What the teacher is ahead of SFT; 0 where that is nothing, or not known."""
    known = TEACHER in rows and SFT.name in rows
    return max(0.0, ahead(rows, TEACHER, SFT.name)) if known else 0.0
