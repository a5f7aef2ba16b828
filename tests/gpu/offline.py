"""Would the GPU kernels run well, as far as a machine without a GPU can say?

Compiles every Triton kernel in every kind of call for sm_80, sm_90 and sm_100, with the installed
Triton and with the oldest one that is supported, and the CUDA sources with nvcc where it is there.
Prints registers, stack, shared memory, spills and the matrix instruction of each, and fails where
a kernel spills on sm_90 or sm_100, asks for more shared memory than there is, or does without
wgmma or TMA on sm_90 where it must have them.

    python -m tests.gpu.offline                   everything (what `make gpu-offline` does)
    python -m tests.gpu.offline --arch 90 --kernel "stream jsd"
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.gpu import nvcc
from tests.gpu.resources import SHARED_LIMIT, Row

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"

#: The oldest Triton that is supported, kept apart from the installed one.
OLDEST = "3.6.0"


@dataclass
class Findings:
    """Rows of the table, and what could not be made into one."""

    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def faults(self) -> list[str]:
        """Everything that makes the check fail, a line each."""
        bad = [
            f"{row.kernel} in {row.call!r}, sm_{row.arch}, {row.compiler}: {', '.join(faults)}"
            for row in self.rows
            if (faults := row.faults())
        ]
        return [*bad, *self.errors]


@dataclass(frozen=True)
class Job:
    """A call to be compiled for an architecture by one version of Triton ("" is the installed)."""

    call: str
    arch: int
    triton: str


def main(argv: list[str] | None = None) -> int:
    """Compile, print, judge: 0 if every row passes, 1 if one does not, 2 for bad arguments."""
    args = parser().parse_args(argv)
    console = Console()
    from tests.gpu import calls

    try:
        wanted = calls.selected(calls.every(), args.kernel)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    names = [call.name for call in wanted if call.quick or not args.quick]
    found = Findings()
    versions = [""] if args.only_installed else _versions(found, console)
    jobs = [Job(name, arch, v) for v in versions for arch in args.arch for name in names]
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("starting", total=len(jobs))

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=what)

        compile_all(jobs, args.processes, found, tick)
        if not args.kernel and not args.quick:
            progress.update(task, description="nvcc")
            rows, notes, errors = nvcc.compile_all(BUILD / "nvcc")
            found.rows += rows
            found.notes += notes
            found.errors += errors
    return _report(found, console)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m tests.gpu.offline", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    top.add_argument(
        "--arch", type=_architectures, default=tuple(SHARED_LIMIT), metavar="90,...",
        help="only these architectures, of 80, 90, 100",
    )  # fmt: skip
    top.add_argument("--kernel", default="", metavar="TEXT", help="only calls whose name has TEXT")
    top.add_argument("--quick", action="store_true", help="a call or two of every kernel")
    top.add_argument(
        "--only-installed", action="store_true", help=f"leave out Triton {OLDEST}"
    )  # fmt: skip
    top.add_argument("--processes", type=int, default=2, metavar="N", help="at once; default 2")
    return top


def compile_all(
    jobs: list[Job], processes: int, found: Findings, tick: Callable[[str], None]
) -> None:
    """Run the jobs in up to `processes` workers, each with one Triton, and collect their rows."""
    waiting = {
        version: queue.SimpleQueue() for version in dict.fromkeys(job.triton for job in jobs)
    }
    for job in jobs:
        waiting[job.triton].put(job)
    lock = threading.Lock()

    def work(version: str) -> None:
        with _worker(version) as worker:
            for job in _drain(waiting[version]):
                answer = _ask(worker, job)
                with lock:
                    tick(f"sm_{job.arch} {job.call}")
                    found.rows += [Row(**row) for row in answer.get("rows", [])]
                    if "error" in answer:
                        where = f"{job.call!r}, sm_{job.arch}, Triton {version or 'installed'}"
                        found.errors.append(f"{where}: {answer['error']}")

    versions = list(waiting)
    share = max(1, processes // max(1, len(versions)))
    threads = [threading.Thread(target=work, args=(v,)) for v in versions for _ in range(share)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


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
        print(json.dumps({"call": job.call, "arch": job.arch}), file=worker.stdin, flush=True)
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    return json.loads(line) if line else {"error": "the compiling process ended: see above"}


def _drain(jobs: queue.SimpleQueue) -> Iterator[Job]:
    while True:
        try:
            yield jobs.get_nowait()
        except queue.Empty:
            return


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


def _report(found: Findings, console: Console) -> int:
    """The table, the notes and the verdict."""
    table = Table(title="GPU kernels, compiled", title_justify="left")
    heads = ("kernel", "call", "configuration", "arch", "compiler", "registers", "stack", "shared")
    for column in (*heads, "spills", "matrix", "TMA"):
        right = column in ("arch", "registers", "stack", "shared", "spills")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    unique = {(r.kernel, r.config, r.arch, r.compiler): r for r in reversed(found.rows)}
    for r in sorted(unique.values(), key=lambda r: (r.kernel, r.call, r.arch, r.compiler)):
        numbers = map(str, (r.registers, r.stack, r.shared, r.spills))
        words = (r.kernel, r.call, r.config, f"sm_{r.arch}", r.compiler)
        cells = map(escape, (*words, *numbers, r.matrix, "yes" if r.tma else "-"))
        table.add_row(*cells, style="red" if r.faults() else None)
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


def _architectures(text: str) -> tuple[int, ...]:
    known = {str(arch) for arch in SHARED_LIMIT}
    asked = text.replace("sm_", "").split(",")
    if not set(asked) <= known:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {', '.join(known)}")
    return tuple(int(arch) for arch in asked)


if __name__ == "__main__":
    sys.exit(main())
