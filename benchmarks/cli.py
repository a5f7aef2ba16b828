"""What can be asked? Measure, print, write JSON and a report, keep the README honest."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import (
    accuracy,
    memory,
    methods,
    pilot,
    readme,
    record,
    report,
    speed,
    step,
    targets,
)
from benchmarks.session import Session
from benchmarks.suites import SUITES, Suite

ROOT = Path(__file__).parent.parent

#: What measures a section, case by case, and what it says of itself.
SECTIONS: dict[str, tuple[Any, str]] = {
    "speed": (speed, "time of forward and backward, interleaved, over floor and against eager"),
    "memory": (memory, "peak memory beyond inputs and gradients, each in a fresh process"),
    "accuracy": (accuracy, "loss and gradient error as the student converges"),
    "step": (step, "whole training steps: tokens a second, peak memory, largest batch"),
}

DESCRIPTION = """\
Measures the losses of mllmkd_kernels against plain PyTorch, the matrix products alone and other
projects where they are installed (pip install --no-build-isolation -e '.[peers]'), and whole
training steps. Every method's loss and gradients are compared with fp64 before it is measured.
Prints tables and which promises hold, writes JSON and a report page with plots."""

EPILOG = """\
examples:
  python -m benchmarks all                    everything, as `make bench` does
  python -m benchmarks speed --suite quick    does it run here, under a minute
  python -m benchmarks speed --only floor,torch-eager,mk-cpu --rounds 9

methods: """ + ", ".join(method.key for method in methods.METHODS)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    texts = {name: text for name, (_, text) in SECTIONS.items()}
    for name, text in (texts | {"all": "speed, memory, accuracy and step"}).items():
        _measuring_options(commands.add_parser(name, help=text, description=text))
    text = "rewrite the generated block of README.md from the newest full run"
    commands.add_parser("readme", help=text, description=text)
    return top


def _measuring_options(command: argparse.ArgumentParser) -> None:
    """What all commands that measure have in common."""
    suites = "; ".join(f"{suite.name}: {suite.note}" for suite in SUITES.values())
    add = command.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    add("--suite", choices=tuple(SUITES), help=f"default: that of the device; {suites}")
    add("--only", type=_keys, default=(), metavar="METHOD,...", help="measure only these methods")
    add("--rounds", type=_positive, metavar="N", help="rounds after warm-up; the suite has its own")
    minutes = "for everything; what does not fit is made smaller, and said (%(default)g)"
    add("--minutes", type=float, default=record.MINUTES, metavar="M", help=minutes)
    add(
        "--out", type=Path, metavar="DIR",
        help="folder of the JSON and the report; by itself a full run of suite cpu or gpu, made in "
        "the checkout, goes to benchmarks/results, any other to ./runs/benchmarks",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success. A promise that does not hold is printed, not an error."""
    args = parser().parse_args(argv)
    console = Console()
    try:
        return _readme(console) if args.command == "readme" else _measure(args, console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2


def _measure(args: argparse.Namespace, console: Console) -> int:
    suite = _suite(args.suite, args.device)
    session = Session(suite, args.only, args.rounds or suite.rounds)
    methods.select(suite.speed[0], args.only)  # an unknown key is an error before any measurement
    run = record.new(session)
    console.print(report.machine_line(run), highlight=False, markup=False)
    if (load := run["machine"]["load_at_start"]) > 0.5 * run["machine"]["cores"]:
        busy = f"The machine is busy (load {load}): ratios, taken within a round, survive that "
        console.print(busy + "better than seconds do.", style="yellow")
    parts = SECTIONS if args.command == "all" else (args.command,)
    judged = methods.ours_by_default(suite.device)
    run |= {"judged_method": judged.key, "judged": judged.label, "targets": []}
    run["minutes"] = args.minutes
    kept = args.out or Path("runs", "benchmarks")
    for done in _measured(run, parts, session, args.minutes, console):
        run |= {"complete": done, "targets": targets.judge(run, judged.key)}
        unfinished = record.save(run | {"complete": False}, kept)  # whoever stops it loses one case
    report.show(run, console)
    path = record.save(run, args.out or _folder(run))
    if run["complete"]:
        unfinished.unlink()
    page = report.write(run, path.with_suffix(""))
    written = "\n         ".join(map(os.path.relpath, (path, page)))
    console.print(f"\nwritten: {written}", highlight=False)
    return 0


def _suite(name: str | None, device: str | None) -> Suite:
    """The suite by name, for the device.

    Raises:
        ValueError: a GPU is asked for where there is none.
    """
    gpu = torch.cuda.is_available()
    device = device or ("cuda" if gpu else "cpu")
    if device == "cuda" and not gpu:
        raise ValueError("device: cuda was asked for, and PyTorch sees no GPU")
    return replace(SUITES[name or {"cuda": "gpu", "cpu": "cpu"}[device]], device=device)


def _folder(run: dict[str, Any]) -> Path:
    """Where a run belongs: in the current folder; among the published ones, which are in the
    checkout, only where that is the current folder and the run may be published.
    """
    published = Path().samefile(ROOT) and record.publishable(run)
    return record.RESULTS if published else Path("runs", "benchmarks")


def _measured(
    run: dict[str, Any], parts: Iterable[str], session: Session, minutes: float, console: Console
) -> Iterator[bool]:
    """Puts the figures of every part into `run`, under one progress bar: a step of it is a case.
    After each, whether that was all.
    """
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    cases = session.suite.sections(parts)
    run |= {part: [] for part in parts}
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=len(cases))
        session.tell = lambda what: progress.update(task, description=what)
        try:
            ahead = pilot.Pilot(session, minutes)
            ahead.start(cases)
            for case, having in cases.items():
                chosen = ahead.choose(case)
                session.rounds, session.cold = chosen.rounds, chosen.cold
                session.seconds = chosen.seconds
                for part in having:
                    run[part] += SECTIONS[part][0].measure(session, chosen.case)
                    gc.collect()  # the inputs of one leave before those of the next come
                progress.advance(task)
                yield False
        except KeyboardInterrupt:  # Ctrl-C, or a time limit
            measured = ", ".join(part for part in parts if run[part])
            console.print(f"interrupted; measured: {measured or 'nothing'}", style="yellow")
            if not measured:
                raise
            return
    yield True


def _readme(console: Console) -> int:
    published = record.published(record.RESULTS)
    if not published:
        raise ValueError("readme: no full run yet in benchmarks/results: python -m benchmarks all")
    path, page = published[-1][1], ROOT / "README.md"
    fresh = readme.rewritten(page.read_text(encoding="utf-8"), readme.block(path, ROOT))
    page.write_text(fresh, encoding="utf-8")
    console.print(f"{page.name} rewritten from {path.name}", highlight=False)
    return 0


def _keys(text: str) -> tuple[str, ...]:
    return tuple(key.strip() for key in text.split(",") if key.strip())


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)
