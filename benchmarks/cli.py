"""What can be asked? Measure, print, write JSON and a report, keep the README honest."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import accuracy, memory, methods, readme, record, report, speed, step, targets
from benchmarks.shapes import SUITES, Suite
from benchmarks.vetting import Vetting

ROOT = Path(__file__).parent.parent

DESCRIPTION = """\
Measures the losses of mllmkd_kernels against plain PyTorch, the matrix products alone and other
projects where they are installed, and whole training steps with either. Every method's loss and
gradients are compared with fp64 before it is measured. Prints tables and which promises hold,
writes JSON and a report page with plots."""

EPILOG = """\
examples:
  python -m benchmarks all                 everything: minutes on two cores (what `make bench` does)
  python -m benchmarks speed --quick       does it run here, under a minute
  python -m benchmarks speed --only floor,torch-eager,mk-cpu --rounds 9
  python -m benchmarks all --device cuda   a GPU's shapes, where there is one (the default there)
  python -m benchmarks readme              put the newest full run into README.md
  pip install -e '.[peers]'                adds other projects to the comparison

methods: """ + ", ".join(method.key for method in methods.METHODS)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("speed", "time of forward and backward, interleaved, over floor and against eager"),
        ("memory", "peak memory beyond inputs and gradients, each in a fresh process"),
        ("accuracy", "loss and gradient error as the student converges"),
        ("step", "whole training steps: tokens a second, peak memory, largest batch"),
        ("all", "speed, memory, accuracy and step"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        _measuring_options(command)
    text = "rewrite the generated block of README.md from the newest full run"
    command = commands.add_parser("readme", help=text, description=text)
    command.add_argument("--json", type=Path, help="the record to use instead of the newest")
    command.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    command.add_argument("--check", action="store_true", help="only say whether it is current")
    return top


def _measuring_options(command: argparse.ArgumentParser) -> None:
    """What all commands that measure have in common."""
    suites = "; ".join(f"{suite.name}: {suite.note}" for suite in SUITES.values())
    command.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu"
    )
    command.add_argument(
        "--suite", choices=tuple(SUITES), help=f"default: that of the device; {suites}"
    )
    command.add_argument(
        "--quick", action="store_const", const="quick", dest="suite", help="same as --suite quick"
    )
    command.add_argument(
        "--only", type=_keys, default=(), metavar="METHOD,...", help="measure only these methods"
    )
    command.add_argument(
        "--rounds", type=_positive, metavar="N", help="rounds after warm-up; the suite has its own"
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder of the JSON and the report; by itself a full run of suite cpu or gpu, made in "
        "the checkout, goes to benchmarks/results, any other to ./runs/benchmarks",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success. A promise that does not hold is printed, not an error."""
    args = parser().parse_args(argv)
    console = Console()
    try:
        if args.command == "readme":
            return _readme(args, console)
        return _measure(args, console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2


def _measure(args: argparse.Namespace, console: Console) -> int:
    suite = _suite(args.suite, args.device)
    parts = record.SECTIONS if args.command == "all" else (args.command,)
    rounds = args.rounds or suite.rounds
    methods.select(
        "ce+kl", args.only, device=suite.device
    )  # an unknown key is an error before anything is measured
    run = record.new(suite, rounds, args.only)
    console.print(report.machine_line(run), highlight=False, markup=False)
    if run["machine"]["load_at_start"] > 0.5 * run["machine"]["cores"]:
        console.print(
            f"The machine is busy (load {run['machine']['load_at_start']}): ratios, taken within a "
            "round, survive that better than seconds do.",
            style="yellow",
        )
    run |= _sections(parts, suite, args.only, rounds, console)
    judged = methods.ours_by_default(suite.device)
    run["judged_method"], run["judged"] = judged.key, judged.label
    run["targets"] = targets.judge(run, judged.key)
    report.show(run, console)
    path = record.save(run, args.out or _folder(run))
    page = report.write(run, path.with_suffix(""))
    console.print(f"\nwritten: {_short(path)}\n         {_short(page)}", highlight=False)
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


def _sections(
    parts: tuple[str, ...], suite: Suite, only: tuple[str, ...], rounds: int, console: Console
) -> dict[str, Any]:
    """The figures of every part, under one progress bar."""
    steps = {
        "speed": speed.steps(suite, only, rounds),
        "memory": memory.steps(suite, only),
        "accuracy": accuracy.steps(suite, only),
        "step": step.steps(suite, only, rounds),
    }
    vetting = Vetting(suite.device)
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=sum(steps[part] for part in parts))

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=what)

        measure: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "speed": lambda: speed.measure(suite, only, rounds, vetting, tick),
            "memory": lambda: memory.measure(suite, only, vetting, tick),
            "accuracy": lambda: accuracy.measure(suite, only, tick),
            "step": lambda: step.measure(suite, only, rounds, tick),
        }
        found: dict[str, Any] = {}
        try:
            for part in (part for part in measure if part in parts):
                found[part] = measure[part]()
        except KeyboardInterrupt:  # Ctrl-C, or a time limit: whole sections are worth keeping
            console.print(f"interrupted; measured: {', '.join(found) or 'nothing'}", style="yellow")
            if not found:
                raise
    return found


def _readme(args: argparse.Namespace, console: Console) -> int:
    path = args.json or record.newest(record.RESULTS)
    if path is None:
        raise ValueError(
            "readme: no full run in benchmarks/results yet; python -m benchmarks all makes one"
        )
    text = args.readme.read_text(encoding="utf-8")
    fresh = readme.rewritten(text, readme.block(path.resolve(), ROOT))
    if args.check:
        state = "current" if fresh == text else "stale: run python -m benchmarks readme"
        console.print(f"{args.readme.name} is {state}", highlight=False)
        return int(fresh != text)
    args.readme.write_text(fresh, encoding="utf-8")
    console.print(f"{args.readme.name} rewritten from {path.name}", highlight=False)
    return 0


def _keys(text: str) -> tuple[str, ...]:
    return tuple(key.strip() for key in text.split(",") if key.strip())


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _short(path: Path) -> str:
    return os.path.relpath(path)
