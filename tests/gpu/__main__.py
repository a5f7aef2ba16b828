"""Everything that needs a GPU, in one command and under ten minutes: ``make gpu``.

    python3 -m tests.gpu                          all stages
    python3 -m tests.gpu --stages headline,tests  some of them
    python3 -m tests.gpu --quick                  the same, shorter: does it work at all
    python3 -m tests.gpu --rehearse               the same on a machine without a GPU, tiny shapes

Uses the Python that runs it and what is installed there: no virtual environment, no network.
Stages, each a process of its own with a time limit after which it is stopped and counts as failed;
none falls with another, and the first two run side by side:

    build      compile the extension in place; where that fails the CUDA kernel is left out
    compile    the kernels of the headline shapes, on all processors, into build/triton-cache
    headline   the targets: trained, frozen, JSD and relation at real shapes, time, memory, ladder,
               of both backends, and of either with a `main_grad`
    tests      every test of the Triton and CUDA kernels, on the GPU
    large      real vocabularies, blocks past 2^31 elements, memory, determinism, host waits
    sanitizer  every kernel on small shapes under compute-sanitizer
    bench      other shapes, against the floor and PyTorch

Figures go to benchmarks/results/<gpu>-<date>*.json, case by case as they are measured, and what
stages print to runs/gpu/<stage>.log. A summary comes last. Where $OUT names a folder, records and
summary are copied there while stages run, and everything in one archive: whoever stops this command
at any moment has what there was ten seconds before. In a rehearsal the sanitizer's program runs
alone: there is nothing that checks a processor in its stead.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs" / "benchmarks"
LOGS = ROOT / "runs" / "gpu"

#: Methods that are timed: those that the targets are about, and the algorithm for the least memory,
#: of which the plan only assumes how fast it is. `torch.compile` alone would take all
#: of the time; ``python -m benchmarks all`` has everything.
METHODS = (
    "floor,torch-eager,mk-triton,mk-cuda,mk-auto-64mb,"
    "mk-triton-600mb-main-grad,mk-cuda-600mb-main-grad"
)
REHEARSED = "floor,mk-eager,mk-eager-600mb-main-grad"

#: Seconds between two copies of what there is.
OFTEN = 10.0


@dataclass(frozen=True)
class Stage:
    """A command with a time limit.

    Attributes:
        name: for ``--stages``.
        seconds: the limit.
        command: what to run; empty where it cannot run here.
        note: why it cannot, or what is different.
        needed: whether a failure makes the whole fail.
        beside: whether it runs beside the one before.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    note: str = ""
    needed: bool = True
    beside: bool = False


@dataclass(frozen=True)
class Result:
    """How a stage ended: "passed", "failed", "stopped" (its time was over) or "skipped"."""

    stage: Stage
    outcome: str
    seconds: float


def stages(quick: bool, rehearse: bool = False) -> list[Stage]:
    """All of them, in order, for this machine."""
    python, pytest = sys.executable, _pytest()
    kernels = sorted(map(_short, (ROOT / "tests").glob("test_triton_*.py")))
    kernels += [f"tests/test_{name}.py" for name in ("row_kernels", "cuda_rows")]
    some = ("-k", "forward_kl or jsd or aligned or relation") if quick else ()
    nvcc, sanitizer = shutil.which("nvcc"), shutil.which("compute-sanitizer")
    build = (python, "setup.py", "--quiet", "build_ext", "--inplace")
    ahead = (python, "-m", "tests.gpu.offline", "--only-installed", "--here", "--minutes", "1")
    checked = (
        sanitizer or "", "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "5",
        "--report-api-errors", "no", python, "-m", "tests.gpu.small",
    )  # fmt: skip
    missing = "" if sanitizer else "compute-sanitizer is not on PATH"
    built = "" if nvcc else "no nvcc: without CUDA kernels"
    device = ("--device", "cpu" if rehearse else "cuda")
    out = ("--out", str(RUNS if quick or rehearse else RESULTS))
    bench = (python, "-m", "benchmarks", "all", *device, *out)
    bench = (*bench, "--only", REHEARSED if rehearse else METHODS)
    suites = ("tiny", "tiny") if rehearse else ("headline", "quick" if quick else "gpu")
    minutes = ("60", "60") if rehearse else ("1.1", "1.7")
    if rehearse:  # the same programs: one kernel, a few tests, small tensors
        build, built = (), "not in a rehearsal"
        checked = (python, "-m", "tests.gpu.small", "cpu")
        missing = "the program alone: no sanitizer watches a processor"
        ahead = (*ahead[:3], "--only-installed", "--arch", "90", "--kernel", "without teacher")
        some = ("-k", "equal_models")
    found = [
        Stage("build", 100, build, built, needed=False),
        Stage("compile", 85, ahead, needed=False, beside=True),
        Stage("headline", 80, (*bench, "--minutes", minutes[0], "--suite", suites[0])),
        Stage("tests", 110, (*pytest, *_parallel(12), *some, *kernels)),
        Stage(
            "large", 80,
            (*pytest, *_parallel(4), *(("-k", "not 2_31") if quick else ()), "tests/gpu"),
        ),
        Stage(
            "sanitizer", 55, checked if checked[0] else (), missing, needed=bool(checked[0])
        ),
        Stage("bench", 115, (*bench, "--minutes", minutes[1], "--suite", suites[1])),
    ]  # fmt: skip
    if rehearse:  # a processor, however busy, and an interpreter: nothing is bound by time
        found = [replace(stage, seconds=3600) for stage in found]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the stages, print a summary last; 0 if all passed, 1 if not, 2 for no GPU."""
    args = parser().parse_args(argv)
    everything = stages(args.quick, args.rehearse)
    known = [stage.name for stage in everything]
    unknown = [name for name in args.stages if name not in known]
    if unknown:
        print(f"stages: got {', '.join(unknown)}, expected some of {', '.join(known)}")
        return 2
    chosen = [s for s in everything if s.name in (args.stages or known)]
    if args.dry_run:
        for stage in chosen:
            print(f"{stage.name:10} {stage.seconds:4} s  {' '.join(stage.command) or stage.note}")
        return 0
    import torch

    if not torch.cuda.is_available() and not args.rehearse:
        print("gpu: PyTorch sees no GPU here; `make gpu-offline` is what can be checked without")
        return 2
    where = "a rehearsal on CPU" if args.rehearse else torch.cuda.get_device_name()
    where = f"{where}, torch {torch.__version__}, {sys.executable}"
    print(where)
    begin, text, results = time.time(), where, []
    run = functools.partial(_run, rehearse=args.rehearse)
    for group in groups(chosen):  # handed out meanwhile: whatever comes next cannot take it away
        with ThreadPoolExecutor(len(group)) as pool:
            running = [pool.submit(perform, stage, run) for stage in group]
            while wait(running, OFTEN).not_done:
                _hand_out(begin)
        results += [stage.result() for stage in running]
        text = where + summary(results, _records(begin))
        LOGS.mkdir(parents=True, exist_ok=True)
        (LOGS / "summary.txt").write_text(text + "\n", encoding="utf-8")
        _hand_out(begin)
    print(text)
    return int(any(r.stage.needed and r.outcome in ("failed", "stopped") for r in results))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python3 -m tests.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    top.add_argument(
        "--stages", default=[], metavar="NAME,...", help="only these",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
    )  # fmt: skip
    top.add_argument("--quick", action="store_true", help="fewer tests, small benchmark shapes")
    top.add_argument("--dry-run", action="store_true", help="only print what would be run")
    top.add_argument(
        "--rehearse", action="store_true", help="every stage on CPU, kernels in the interpreter"
    )
    return top


def groups(stages: Sequence[Stage]) -> Iterator[list[Stage]]:
    """Those that run side by side, together."""
    together: list[Stage] = []
    for stage in stages:
        if together and not stage.beside:
            yield together
            together = []
        together.append(stage)
    yield together


def perform(stage: Stage, run: Callable[[Stage], int | None]) -> Result:
    """Run one stage; `run` gives its exit status, None where its time was over."""
    print(f"\n=== {stage.name} (at most {stage.seconds} s) {stage.note}", flush=True)
    if not stage.command:
        return Result(stage, "skipped", 0.0)
    start = time.monotonic()
    status = run(stage)
    outcome = {0: "passed", None: "stopped"}.get(status, "failed")
    seconds = time.monotonic() - start
    print(f"=== {stage.name}: {outcome} after {seconds:.0f} s", flush=True)
    return Result(stage, outcome, seconds)


def summary(results: list[Result], records: Sequence[Mapping[str, Any]] = ()) -> str:
    """What a person reads: a line a stage, the targets of every record, what failed last."""
    lines = ["", "summary"]
    for r in results:
        note = r.stage.note or ("" if r.stage.needed else "may fail")
        lines.append(f"  {r.stage.name:10} {r.outcome:8} {r.seconds:5.0f} s  {note}".rstrip())
    marks = {True: "pass", False: "FAIL", None: " -  "}
    for record in records:
        state = "" if record.get("complete") else ", unfinished"
        lines.append(f"targets, suite {record['suite']}{state}")
        lines += [
            f"  {marks[target['holds']]}  {target['promise']}: {target['found']}"
            for target in record["targets"]
        ]
    for r in results:
        if r.outcome in ("failed", "stopped") and (log := _log(r.stage)).exists():
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            lines += [f"{r.stage.name} ended with", *(f"  | {line[:150]}" for line in last)]
    return "\n".join(lines)


def _records(since: float) -> list[Mapping[str, Any]]:
    """What the benchmarks have written so far, the oldest first."""
    found = [path for path, _ in _written(since) if path.suffix == ".json"]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    return [record for record in records if "targets" in record]


def _written(since: float) -> list[tuple[Path, float]]:
    """Files of results and logs that are newer, with their times, the oldest first."""
    found = [
        (path, path.stat().st_mtime)
        for folder in (RESULTS, RUNS, LOGS)
        for path in (folder.rglob("*") if folder.exists() else ())
        if path.is_file()
    ]
    return sorted((x for x in found if x[1] >= since), key=lambda x: x[1])


def _log(stage: Stage) -> Path:
    return LOGS / f"{stage.name}.log"


def _run(stage: Stage, rehearse: bool = False) -> int | None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton-cache")  # all stages share it
    if rehearse:
        environment["TRITON_INTERPRET"] = "1"
    if stage.name == "sanitizer":  # every tensor an allocation of its own, so that its end is seen
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    LOGS.mkdir(parents=True, exist_ok=True)
    with _log(stage).open("wb") as log:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        echo = threading.Thread(target=_echo, args=(process, log), daemon=True)
        echo.start()
        status = _ended(process, stage.seconds)
        echo.join(5 if status is None else 60)  # children may outlive what was stopped
    return status


def _echo(process: subprocess.Popen[bytes], log: BinaryIO) -> None:
    """What it prints, on the terminal and in its log."""
    assert process.stdout is not None
    with process.stdout as output:
        while chunk := os.read(output.fileno(), 65536):
            log.write(chunk)
            log.flush()
            print(chunk.decode(errors="replace"), end="", flush=True)


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit status; None where its time was over and it was stopped."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        for how in (signal.SIGINT, signal.SIGKILL):  # a report is written when interrupted
            os.killpg(process.pid, how)
            try:
                process.wait(10)
                break
            except subprocess.TimeoutExpired:
                continue
        return None


def _hand_out(since: float) -> None:
    """Into $OUT, where there is such a folder: records and summary, and all that was written in
    one archive. Few files, because what carries them on may take few.
    """
    out = os.environ.get("OUT")
    if not out or not Path(out).is_dir():
        return
    part = Path(out, "gpu.tar.gz.part")
    with suppress(OSError):  # a file that changes while it is read: it is there the next time
        with tarfile.open(part, "w:gz") as archive:
            for path, _ in _written(since):
                archive.add(path, Path(*path.parts[-2:]))
                if path.suffix == ".json" or path.name == "summary.txt":
                    shutil.copy(path, Path(out, path.name))
        part.replace(Path(out, "gpu.tar.gz"))


def _pytest() -> tuple[str, ...]:
    """pytest on the GPU's tests too, telling each failure at once. Neither the plugins that a
    machine happens to have nor what its versions of other libraries warn of is judged.
    """
    return (
        sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider",
        "-p", "tests.gpu.early", "-W", "default", "--maxfail=25", "--tb=short",
    )  # fmt: skip


def _parallel(most: int) -> tuple[str, ...]:
    """Most of the time of small tests is compiling: several at once, where pytest can."""
    if importlib.util.find_spec("xdist") is None:
        return ()
    return ("-p", "xdist", "-n", str(max(2, min(most, (os.cpu_count() or 2) - 2))))


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
