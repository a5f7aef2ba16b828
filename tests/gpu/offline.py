"""Would the GPU kernels run well, as far as a machine without a GPU can say?

Compiles every Triton kernel in every kind of call with the installed Triton for sm_80, sm_90,
sm_100, sm_120, gfx942 and gfx950, for the first three with the oldest one that is supported too,
and the CUDA sources with nvcc where it is there. Prints instructions, registers, stack, shared
memory, spills and the matrix instruction of each, writes the same to build/gpu-offline.csv, and
fails where a kernel spills, asks for more shared memory than there is, does without wgmma or TMA on
sm_90 where it must have them, or has more instructions than were accepted.

    python -m tests.gpu.offline                   everything (what `make gpu-offline` does)
    python -m tests.gpu.offline --arch 90,gfx942 --kernel "stream jsd"
    python -m tests.gpu.offline --accept          the numbers of instructions are right as they are
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.gpu import baseline, nvcc
from tests.gpu.resources import SHARED_LIMIT, Row

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"

#: The oldest Triton that is supported, kept apart from the installed one, and what it is asked for.
OLDEST = "3.6.0"
OLDEST_TARGETS = ("sm_80", "sm_90", "sm_100")


@dataclass
class Findings:
    """Rows of the table, and what could not be made into one."""

    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def faults(self) -> list[str]:
        """Everything that makes the check fail, a line each."""
        bad = [
            f"{row.kernel} in {row.call!r}, {row.target}, {row.compiler}: {', '.join(faults)}"
            for row in self.rows
            if (faults := row.faults())
        ]
        return [*bad, *baseline.grown(self.rows), *self.errors]


@dataclass(frozen=True)
class Job:
    """A call to be compiled for a target by one version of Triton ("" is the installed)."""

    call: str
    target: str
    triton: str


def main(argv: list[str] | None = None) -> int:
    """Compile, print, judge: 0 if every row passes, 1 if one does not, 2 for bad arguments."""
    args, begin = parser().parse_args(argv), time.monotonic()
    console = Console()
    from tests.gpu import calls

    try:
        wanted = calls.selected(calls.every(), args.kernel)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    names = [call.name for call in wanted if call.quick or not args.quick]
    if args.here:
        args.arch = (_here(),)
    found = Findings()
    versions = [""] if args.only_installed else _versions(found, console)
    jobs = [
        Job(name, target, version)
        for version in versions
        for target in args.arch
        for name in names
        if not version or target in OLDEST_TARGETS
    ]
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("starting", total=len(jobs))

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=what)

        compile_all(jobs, args.processes, found, tick, begin + 60 * args.minutes)
        if not args.kernel and not args.quick and not args.here:
            progress.update(task, description="nvcc")
            rows, notes, errors = nvcc.compile_all(BUILD / "nvcc")
            found.rows += rows
            found.notes += notes
            found.errors += errors
    if args.accept:
        compilers = dict.fromkeys(row.compiler for row in found.rows)
        baseline.accept(found.rows, [c for c in compilers if not c.endswith(OLDEST)])
    status = _report(found, console)
    console.print(f"{time.monotonic() - begin:.0f} s", highlight=False)
    return status


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m tests.gpu.offline", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    top.add_argument(
        "--arch", type=_targets, default=tuple(SHARED_LIMIT), metavar="90,...",
        help="only these targets, of 80, 90, 100, 120, gfx942, gfx950",
    )  # fmt: skip
    top.add_argument("--kernel", default="", metavar="TEXT", help="only calls whose name has TEXT")
    top.add_argument("--quick", action="store_true", help="a call or two of every kernel")
    top.add_argument(
        "--only-installed", action="store_true", help=f"leave out Triton {OLDEST}"
    )  # fmt: skip
    top.add_argument("--here", action="store_true", help="for the GPU of this machine")
    top.add_argument(
        "--processes", type=int, default=os.cpu_count() or 2, metavar="N",
        help="at once; default: as many as there are processors",
    )  # fmt: skip
    top.add_argument(
        "--minutes", type=float, default=30, metavar="N", help="what is left then is a fault; 30"
    )
    top.add_argument(
        "--accept", action="store_true", help=f"write instructions to {baseline.FILE.name}"
    )
    return top


def compile_all(
    jobs: list[Job],
    processes: int,
    found: Findings,
    tick: Callable[[str], None],
    end: float = float("inf"),  # of `time.monotonic`
) -> None:
    """Run the jobs in up to `processes` workers, each with one Triton at a time, and collect their
    rows.
    """
    waiting, lock = deque(jobs), threading.Lock()

    def work(last: bool) -> None:
        worker, version = None, ""
        while True:
            with lock:  # from both ends, so that each meets the other's Triton as late as can be
                if not waiting or time.monotonic() > end:
                    break
                job = waiting.pop() if last else waiting.popleft()
            if worker is None or job.triton != version:
                _dismiss(worker)
                worker, version = _worker(job.triton), job.triton
            answer = _ask(worker, job)
            with lock:
                tick(f"{job.target} {job.call}")
                found.rows += [Row(**row) for row in answer.get("rows", [])]
                if "error" in answer:
                    found.errors.append(f"{_words(job)}: {answer['error']}")
        _dismiss(worker)

    threads = [threading.Thread(target=work, args=(i % 2 == 1,)) for i in range(max(1, processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.errors += [f"{_words(job)}: not compiled, the time was over" for job in waiting]


def _words(job: Job) -> str:
    return f"{job.call!r}, {job.target}, Triton {job.triton or 'installed'}"


def _dismiss(worker: subprocess.Popen[str] | None) -> None:
    if worker is not None:
        worker.communicate()


def _worker(version: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(_place(version))] if version else []
    environment |= {
        "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
        "TRITON_CACHE_DIR": str(BUILD / "triton-cache"),  # what did not change is not made again
        "MLLMKD_TABLES": "",  # the built-in tables are judged, not a user's
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.worker"], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def _ask(worker: subprocess.Popen[str], job: Job) -> dict:
    assert worker.stdin is not None and worker.stdout is not None
    try:
        print(json.dumps({"call": job.call, "target": job.target}), file=worker.stdin, flush=True)
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    return json.loads(line) if line else {"error": "the compiling process ended: see above"}


def _versions(found: Findings, console: Console) -> list[str]:
    """The installed Triton and the oldest supported one, which is fetched once."""
    if metadata.version("triton") == OLDEST:
        return [""]
    place = _place(OLDEST)
    if not (place / "triton" / "__init__.py").exists():
        console.print(f"fetching Triton {OLDEST} into {place.relative_to(ROOT)} (once)")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        command = [*pip, "--no-input", "--no-deps", "--target", str(place), f"triton=={OLDEST}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            found.errors.append(
                f"Triton {OLDEST} cannot be fetched ({reason}); --only-installed does without"
            )
            return [""]
    return ["", OLDEST]


def _place(version: str) -> Path:
    return BUILD / f"triton-{version}"


#: Columns of the report: fields of a `Row`.
COLUMNS = ("kernel", "call", "config", "target", "compiler", "instructions", "registers", "stack",
           "shared", "spills", "matrix", "tma")  # fmt: skip


def _report(found: Findings, console: Console) -> int:
    """The table, on the screen and in a file, the notes and the verdict."""
    table = Table(title="GPU kernels, compiled", title_justify="left")
    for column in COLUMNS:
        right = Row.__annotations__[column] == "int"
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    unique = {(r.kernel, r.config, r.target, r.compiler): r for r in reversed(found.rows)}
    ordered = sorted(unique.values(), key=lambda r: (r.kernel, r.call, r.target, r.compiler))
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "gpu-offline.csv").open("w", newline="", encoding="utf-8") as file:
        report = csv.writer(file)
        report.writerow(COLUMNS)
        for r in ordered:
            values = dataclasses.asdict(r) | {"tma": "yes" if r.tma else "-"}
            cells = [str(values[column]) for column in COLUMNS]
            report.writerow(cells)
            table.add_row(*map(escape, cells), style="red" if r.faults() else None)
    if console.width < 160:  # a pipe or a narrow window: rows that wrap are of no use
        console = Console(width=220)
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    faults = found.faults()
    console.print(f"{len(unique)} configurations, {len(faults)} faults", highlight=False)
    for fault in faults:
        console.print(f"FAIL {fault}", style="red", markup=False, highlight=False)
    return int(bool(faults))


def _here() -> str:
    """The target of the GPU that is here."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _targets(text: str) -> tuple[str, ...]:
    asked = tuple(f"sm_{word}" if word.isdigit() else word for word in text.split(","))
    if not set(asked) <= set(SHARED_LIMIT):
        expected = ", ".join(SHARED_LIMIT)
        raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {expected}")
    return asked


if __name__ == "__main__":
    sys.exit(main())
