"""What matters when a small model learns from a large one? One student, trained in many ways.

Every row is a run of the trainer itself: the same student, weights at the start, labels, optimiser
and number of steps, one stage unless the method has more. Rows differ from their control in one
thing, but where the method wants it otherwise: D2S trains projector, experts and router alone, and
pairs are learned at a lower rate. What a row comes after (half the steps of D2D, a finished
student, a teacher in between) counts among its steps and seconds. The table has mean and spread
over seeds beside steps, seconds, speed and memory;
what it says in words follows from the numbers by one rule: a difference counts if it is larger than
the spread, the larger of the two sample standard deviations.

Settings are to be compared on `held_out: dev` (questions about training images that students do not
see), never on what the published table is made of.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from rich.console import Console

from mllmkd_kernels.methods import Stage
from mllmkd_kernels.methods.llava_mod import preference
from mllmkd_kernels.methods.stage import WHOLE
from training.bar import Bar
from training.config import Config
from training.demo import pictures
from training.demo.recipes import (
    ANSWERED,
    LABELLED,
    RECOMPOSED,
    DemoConfig,
    StudyConfig,
    demo_distilled,
    demo_sft,
    entries,
    optimised,
    student,
)
from training.demo.recomposed import write_recomposed
from training.demo.report import (
    accuracies,
    by_name,
    difference,
    machine,
    markdown,
    table,
    terminal_table,
    write_rows,
)
from training.demo.run import answers_of, part, prepared, say
from training.demo.trained import Run
from training.journal import write_whole
from training.lock import held
from training.loop import StageResult, run
from training.settings import ConfigError, build, to_dict

BOTH = (LABELLED, ANSWERED)


class Row(NamedTuple):
    """One way to train the student, and the row that it is compared with.

    `make` is told the model of the row that this one comes `after`, whose steps and seconds count.
    A row of some `data` alone is left out of others.
    """

    name: str
    control: str
    make: Callable[[DemoConfig, int, Path | None], Config]
    after: Row | None = None
    data: str = ""


def one_stage(
    name: str,
    control: str,
    shown: Sequence[str] = BOTH,
    *,
    method: str | tuple[Stage, ...] = "llava-kd",
    stage: str = "dft",
    after: Row | None = None,
    ladder: bool = False,
    share: float = 1.0,
    rate: float = 1.0,
    settings: Mapping[str, Any] = MappingProxyType({}),
    sizes: Mapping[str, int] = MappingProxyType({}),
    **loss: Any,
) -> Row:
    """A row of one stage, whose loss has these settings, and the stage those.

    Args:
        name, control, shown, method, stage: of the row.
        after: the row whose model this student starts as.
        ladder: that model is its teacher instead.
        share, rate: of the other students' steps and learning rate.
        settings: of the stage.
        sizes: of the student.
        **loss: of the stage.
    """

    def make(demo: DemoConfig, seed: int, before: Path | None) -> Config:
        values = optimised(demo, round(share * demo.student_steps)) | {"loss": loss, **settings}
        values["lr"] *= rate
        started = {} if before is None or ladder else {"path": str(before)}
        pairs = None
        if stage == PAIRS and before is not None:
            pairs = write_pairs(demo, before, demo.folder / f"seed{seed}" / "pairs")
        return student(
            demo, slug(name), seed, {stage: values}, shown, method=method, pairs=pairs,
            teacher=before if ladder else demo.teacher, **sizes, **started,
        )  # fmt: skip

    return Row(name, control, make, after)


def write_pairs(demo: DemoConfig, model: Path, out: Path) -> Path:
    """Pairs to learn a preference from, in `out`: the teacher's answers, and those of `model` where
    they differ. Who does not end an answer is to learn that too.
    """
    own = {
        entry["id"]: entry["conversations"][-1]["value"]
        for entry in answers_of(demo, model, out, keep_cut=True)
    }
    pairs = [
        {**entry, "rejected": own[entry["id"]]}
        for entry in json.loads(demo.answered.read_text(encoding="utf-8"))
        if own.get(entry["id"]) not in (None, entry["conversations"][-1]["value"])
    ]
    write_whole(out / "pairs.json", json.dumps(pairs))
    return out / "pairs.json"


def _plain(demo: DemoConfig, seed: int, _: Path | None) -> Config:
    stages = {"sft": optimised(demo, demo.student_steps)}
    return student(demo, "plain", seed, stages, [LABELLED])


def _recomposed(demo: DemoConfig, seed: int, _: Path | None) -> Config:
    return demo_sft(demo, seed, demo.student_steps, "recomposed", (LABELLED, RECOMPOSED))


def _given(own: float) -> dict[str, Any]:
    """Settings of a stage where the student writes this share of the answers."""
    return {"view": {"probability": own, "max_new_tokens": 16}}


SFT, BASE = "SFT, regularised", "answered: CE + KL + visual + relation"
HALF, QUARTER, PAIRS = 0.5, 0.25, "preference"
_KL: dict[str, Any] = {"visual": 0.0, "relation": 0.0}
_ADI: dict[str, Any] = {"method": "llavadi", "stage": "kd"}
_D2D: dict[str, Any] = {"method": "llava-mod", "stage": "d2d", "share": HALF}
_D2S: dict[str, Any] = _D2D | {"stage": "d2s"}
#: With the experts that a token goes to, 143,000 parameters of the sparse LM are active; the dense
#: one has 107,000 and, 80 wide, 159,000.
_WIDE = {"hidden": 80}
_GKD: dict[str, Any] = {"method": "on-policy", "stage": "gkd", "share": HALF}
#: LLaVA-MoD's loss of pairs for a dense student, whose projector and LM train. The pairs are of
#: questions that the student got wrong, and learned alone they unlearn the others: on the
#: development split (scenes, one seed) .88 of the questions at rates of .003 and .01 (KTO; .88 at
#: .01 by DPO too), .74 and .60 at .03 and .1. This is the largest that does no harm.
_PAIRS: dict[str, Any] = {
    "method": (Stage(PAIRS, WHOLE, "preferences", "chat", preference),),
    "stage": PAIRS,
    "balance": 0.0,
    "share": QUARTER,
    "rate": 0.01,
}
_D2D_HALF = one_stage("answered: D2D, half the steps", "", **_D2D)
_WIDE_HALF = one_stage("answered: D2D, half the steps, 80 wide", "", sizes=_WIDE, **_D2D)
_FOUR = one_stage(BASE, "answered: CE + KL + visual")
_MIDDLE = one_stage(
    "answered: CE + KL, 128 wide, 3 layers", "answered: CE + KL",
    sizes={"hidden": 128, "layers": 3}, **_KL,
)  # fmt: skip
ROWS = (
    Row(SFT, "", lambda demo, seed, _: demo_sft(demo, seed, demo.student_steps, "sft")),
    Row("SFT, as the others", SFT, _plain),
    one_stage("CE + KL", SFT, [LABELLED], **_KL),
    one_stage("CE + KL + visual", "CE + KL", [LABELLED], relation=0.0),
    one_stage("CE + KL + visual + relation", "CE + KL + visual", [LABELLED]),
    one_stage("KL", "CE + KL", [LABELLED], ce=0.0, **_KL),
    one_stage("answered: CE", SFT, response=0.0, **_KL),
    one_stage("answered: CE + KL", "CE + KL", **_KL),
    one_stage("answered: CE + KL + visual", "answered: CE + KL", relation=0.0),
    _FOUR,
    Row("answered: DPT, SFT, DFT", BASE, lambda demo, seed, _: demo_distilled(demo, seed)),
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
    one_stage(
        "answered: D2D, JSD", "answered: JSD", after=_D2D_HALF, settings=_given(0.0), **_GKD
    ),
    one_stage(
        "answered: D2D, GKD with half own answers", "answered: D2D, JSD", after=_D2D_HALF,
        settings=_given(0.5), **_GKD,
    ),
    one_stage("answered: D2D, CE + KL", "answered: CE + KL", after=_D2D_HALF, ce=1.0, **_D2D),
    one_stage(
        "answered: D2D, D2S", "answered: D2D, CE + KL", after=_D2D_HALF,
        settings={"student": {"experts": 4, "top_k": 2, "every": 2}}, **_D2S,
    ),
    one_stage(
        "answered: D2D, CE + KL, 80 wide", "answered: D2D, D2S", after=_WIDE_HALF, sizes=_WIDE,
        ce=1.0, **_D2D,
    ),
    one_stage(f"{BASE}, 25% more", BASE, after=_FOUR, share=QUARTER, rate=0.1),
    one_stage(
        f"{BASE}, 25% KTO pairs", f"{BASE}, 25% more", (), after=_FOUR, **_PAIRS
    ),
    one_stage(
        f"{BASE}, 25% DPO", f"{BASE}, 25% more", (), after=_FOUR, kind="sigmoid", **_PAIRS
    ),
    _MIDDLE,
    one_stage(
        "answered: CE + KL of the student 128 wide", "answered: CE + KL", after=_MIDDLE,
        ladder=True, **_KL,
    ),
    Row("SFT, photographs recomposed", SFT, _recomposed, data="scenes"),
)  # fmt: skip


def study(config: StudyConfig) -> None:
    """Train every row that is not there yet, and write `out/study`."""
    known = {row.name: row for row in ROWS if row.data in ("", config.data)}
    if unknown := [name for name in config.rows if name not in known]:
        raise ConfigError(f"rows: got {unknown}, expected some of {', '.join(known)}")
    rows = [row for name, row in known.items() if not config.rows or name in config.rows]
    with held(config.folder, "out"):
        start = time.perf_counter()
        data, _ = prepared(config)
        if any(row.make is _recomposed for row in rows):
            asked = entries(data.json("student_questions"))
            write_recomposed(data, config.recomposed.parent, asked)
        if config.jobs > 1:
            train_side_by_side(config, rows)
        runs = []
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
        chains.setdefault(row.name if row.after is None else row.after.name, []).append(row.name)
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


def trained(demo: DemoConfig, row: Row, seed: int) -> list[StageResult]:
    """The stages of a row, made or reused, after those of the row that it comes after."""
    before = [] if row.after is None else trained(demo, row.after, seed)
    made = row.make(demo, seed, before[-1].model if before else None)
    return before + run(made, say)


def report(config: StudyConfig, runs: Sequence[Run], seconds: float) -> None:
    """Write `out/study`: table.json, table.csv, accuracy.png, report.md; print the table."""
    folder = config.folder / "study"
    folder.mkdir(parents=True, exist_ok=True)
    rows = by_name(runs)
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
        ours, theirs = accuracies(rows[row.name]), accuracies(rows[row.control])
        margin, spread = difference(ours, theirs)
        line = f"{row.name}: {100 * margin:+.1f} points on {row.control}"
        if spread is not None:
            larger = "more" if abs(margin) > spread else "not more"
            line += f", {larger} than the spread ({100 * spread:.1f})"
        found.append(line)
    return found


def slug(name: str) -> str:
    """A folder's name for a row's."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
