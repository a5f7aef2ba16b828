"""What matters when a small model learns from a large one? One student, trained in many ways.

Every row is a run of the trainer itself: the same student, weights at the start, labels, optimiser
and number of steps, one stage unless the method has more. Rows differ from their control in one
thing. The table has mean and spread over seeds beside steps, seconds, speed and memory; what it
says in words follows from the numbers by one rule: a difference counts if it is larger than the
spread, the larger of the two sample standard deviations.

Settings are to be compared on `held_out: dev` (questions about training images that students do not
see), never on what the published table is made of.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from training.config import Config
from training.demo import pictures
from training.demo.recipes import (
    ANSWERED,
    LABELLED,
    DemoConfig,
    StudyConfig,
    demo_distilled,
    demo_sft,
    optimised,
    student,
)
from training.demo.report import machine, markdown, table, terminal_table, write_rows
from training.demo.run import part, prepared, say
from training.demo.trained import Run
from training.lock import held
from training.loop import run
from training.settings import ConfigError

BOTH = (LABELLED, ANSWERED)


class Row(NamedTuple):
    """One way to train the student, and the row that it is compared with."""

    name: str
    control: str
    make: Callable[[DemoConfig, int], Config]


def one_stage(
    name: str,
    control: str,
    shown: Sequence[str] = BOTH,
    *,
    method: str = "llava-kd",
    stage: str = "dft",
    **loss: Any,
) -> Row:
    """A row of one stage, whose loss has these settings."""

    def make(demo: DemoConfig, seed: int) -> Config:
        values = optimised(demo, demo.student_steps) | {"loss": loss}
        return student(demo, slug(name), seed, {stage: values}, shown, method=method)

    return Row(name, control, make)


def _sft(demo: DemoConfig, seed: int) -> Config:
    return demo_sft(demo, seed, demo.student_steps, "sft")


def _plain(demo: DemoConfig, seed: int) -> Config:
    stages = {"sft": optimised(demo, demo.student_steps)}
    return student(demo, "plain", seed, stages, [LABELLED], teacher=False)


SFT, BASE = "SFT, regularised", "answered: CE + KL + visual + relation"
_KL = {"visual": 0.0, "relation": 0.0}
_ADI: dict[str, Any] = {"method": "llavadi", "stage": "kd"}
ROWS = (
    Row(SFT, "", _sft),
    Row("SFT, as the others", SFT, _plain),
    one_stage("CE + KL", SFT, [LABELLED], **_KL),
    one_stage("CE + KL + visual", "CE + KL", [LABELLED], relation=0.0),
    one_stage("CE + KL + visual + relation", "CE + KL + visual", [LABELLED]),
    one_stage("KL", "CE + KL", [LABELLED], ce=0.0, **_KL),
    one_stage("answered: CE", SFT, response=0.0, **_KL),
    one_stage("answered: CE + KL", "CE + KL", **_KL),
    one_stage("answered: CE + KL + visual", "answered: CE + KL", relation=0.0),
    one_stage(BASE, "answered: CE + KL + visual"),
    Row("answered: DPT, SFT, DFT", BASE, demo_distilled),
    one_stage("answered: KL + visual + relation", BASE, ce=0.0),
    one_stage("no label", BASE, [ANSWERED]),
    one_stage("answered: reverse KL", "answered: CE + KL", divergence="reverse_kl", **_KL),
    one_stage("answered: JSD", "answered: CE + KL", divergence="jsd", **_KL),
    one_stage("answered: T = 2", "answered: CE + KL", temperature=2.0, **_KL),
    one_stage(
        "answered: z-scored KL", "answered: CE + KL", features=0.0, standardize=True, **_ADI
    ),
    one_stage("answered: CE + KL + features", "answered: CE + KL", **_ADI),
    one_stage(
        "answered: CE + KL + affinity", "answered: CE + KL", features=0.0, affinity=1.0, **_ADI
    ),
    one_stage(
        "answered: CE + logit MSE", "answered: CE + KL", features=0.0, response=0.0, logit_mse=1.0,
        **_ADI,
    ),
)  # fmt: skip


def study(config: StudyConfig) -> None:
    """Train every row that is not there yet, and write `out/study`."""
    known = [row.name for row in ROWS]
    if unknown := [name for name in config.rows if name not in known]:
        raise ConfigError(f"rows: got {unknown}, expected some of {', '.join(known)}")
    with held(config.folder, "out"):
        start = time.perf_counter()
        prepared(config)
        runs = []
        for row in ROWS:
            for seed in range(config.seeds) if not config.rows or row.name in config.rows else ():
                with part(f"{row.name}, seed {seed}"):
                    runs.append(Run(row.name, seed, run(row.make(config, seed), say)))
        report(config, runs, time.perf_counter() - start)


def report(config: StudyConfig, runs: Sequence[Run], seconds: float) -> None:
    """Write `out/study`: table.json, table.csv, accuracy.png, report.md; print the table."""
    folder = config.folder / "study"
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, float]]] = {}
    for one in runs:
        rows.setdefault(one.name, []).append(one.row())
    write_rows(runs, folder)
    pictures.accuracies(rows, folder / "accuracy.png")
    said = "\n".join(f"- {line}" for line in findings(rows))
    facts = "\n".join(f"- {name}: {value}" for name, value in machine().items())
    (folder / "report.md").write_text(
        f"# Study: {config.data}\n\n{markdown(*table(rows))}\n\n{said}\n\n"
        f"![accuracy](accuracy.png)\n\n{facts}\n- {seconds:.0f} s in the call that wrote this\n",
        encoding="utf-8",
    )
    console = Console()
    console.print(terminal_table(*table(rows)))
    console.print(said, highlight=False, soft_wrap=True)


def findings(rows: dict[str, list[dict[str, float]]]) -> list[str]:
    """A line for each row whose control is there."""
    found = []
    for row in ROWS:
        if row.name not in rows or row.control not in rows:
            continue
        ours, theirs = ([r["questions"] for r in rows[name]] for name in (row.name, row.control))
        margin = statistics.mean(ours) - statistics.mean(theirs)
        line = f"{row.name}: {100 * margin:+.1f} points on {row.control}"
        if min(len(ours), len(theirs)) > 1:
            spread = max(statistics.stdev(ours), statistics.stdev(theirs))
            larger = "more" if abs(margin) > spread else "not more"
            line += f", {larger} than the spread ({100 * spread:.1f})"
        found.append(line)
    return found


def slug(name: str) -> str:
    """A folder's name for a row's."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
