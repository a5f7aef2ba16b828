"""Everything that needs a GPU, in one command and under ten minutes: ``make gpu``.

    python3 -m tests.gpu                          all stages
    python3 -m tests.gpu --stages tests,bench     some of them
    python3 -m tests.gpu --quick                  the same, shorter: does it work at all

Uses the Python that runs it and what is installed there: no virtual environment, no network.
Stages, each with a time limit after which it is stopped and counts as failed:

    build      compile the extension in place; where that fails the CUDA kernel is left out
    tests      every test of the Triton and CUDA kernels, on the GPU
    large      real vocabularies, blocks past 2^31 elements, memory, determinism, host waits
    sanitizer  every kernel on small shapes under compute-sanitizer
    bench      time, memory and accuracy against the floor and the peers that can be imported

Figures go to benchmarks/results/<gpu>-<date>.json, and to the folder $OUT where that is set.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs" / "benchmarks"


@dataclass(frozen=True)
class Stage:
    """A command with a time limit.

    Attributes:
        name: for ``--stages``.
        seconds: the limit.
        command: what to run; empty where it cannot run here.
        note: why it cannot, or what is different.
        needed: whether a failure makes the whole fail.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    note: str = ""
    needed: bool = True


@dataclass(frozen=True)
class Result:
    """How a stage ended: "passed", "failed", "stopped" (its time was over) or "skipped"."""

    stage: Stage
    outcome: str
    seconds: float


def stages(quick: bool) -> list[Stage]:
    """All of them, in order, for this machine."""
    python, pytest = sys.executable, _pytest()
    kernels = sorted(map(_short, (ROOT / "tests").glob("test_triton_*.py")))
    kernels += [_short(f) for f in [ROOT / "tests" / "test_cuda_rows.py"] if f.exists()]
    some = ("-k", "forward_kl or jsd or aligned or relation") if quick else ()
    nvcc, sanitizer = shutil.which("nvcc"), shutil.which("compute-sanitizer")
    build = (python, "setup.py", "--quiet", "build_ext", "--inplace")
    checked = (
        sanitizer or "", "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "5",
        python, "-m", "tests.gpu.small",
    )  # fmt: skip
    suite = ("--suite", "quick") if quick else ("--suite", "gpu")
    bench = (python, "-m", "benchmarks", "all", "--device", "cuda", *suite)
    out = ("--out", str(RUNS if quick else RESULTS))
    return [
        Stage("build", 120, build, "" if nvcc else "no nvcc: without CUDA kernels", needed=False),
        Stage("tests", 150, (*pytest, *_parallel(), *some, *kernels)),
        Stage("large", 90, (*pytest, *(("-k", "not 2_31") if quick else ()), "tests/gpu")),
        Stage(
            "sanitizer", 50, checked if sanitizer else (),
            "" if sanitizer else "compute-sanitizer is not on PATH", needed=bool(sanitizer),
        ),
        Stage("bench", 60 if quick else 170, (*bench, *out)),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the stages, print a summary last; 0 if all passed, 1 if not, 2 for no GPU."""
    args = parser().parse_args(argv)
    everything = stages(args.quick)
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

    if not torch.cuda.is_available():
        print("gpu: PyTorch sees no GPU here; `make gpu-offline` is what can be checked without")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {sys.executable}")
    begin = time.time()
    results = [perform(stage, _run) for stage in chosen]
    _hand_out(begin)
    print(summary(results))
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
    return top


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


def summary(results: list[Result]) -> str:
    """A line a stage."""
    lines = ["", "summary"]
    for r in results:
        note = r.stage.note or ("" if r.stage.needed else "may fail")
        lines.append(f"  {r.stage.name:10} {r.outcome:8} {r.seconds:5.0f} s  {note}".rstrip())
    return "\n".join(lines)


def _run(stage: Stage) -> int | None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if stage.name == "sanitizer":  # every tensor an allocation of its own, so that its end is seen
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    process = subprocess.Popen(stage.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(stage.seconds)
    except subprocess.TimeoutExpired:
        for how in (
            signal.SIGINT,
            signal.SIGKILL,
        ):  # both commands write what they have when interrupted
            os.killpg(process.pid, how)
            try:
                process.wait(30)
                break
            except subprocess.TimeoutExpired:
                continue
        return None


def _hand_out(since: float) -> None:
    """Copy what the benchmark wrote to $OUT, flat, where there is such a folder."""
    out = os.environ.get("OUT")
    if not out or not Path(out).is_dir():
        return
    for folder in (RESULTS, RUNS):
        for path in folder.rglob("*") if folder.exists() else ():
            if path.is_file() and path.stat().st_mtime >= since:
                shutil.copy(path, Path(out) / path.name)


def _pytest() -> tuple[str, ...]:
    """pytest on the GPU's tests too, telling each failure at once."""
    return (
        sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider",
        "-p", "tests.gpu.early", "--maxfail=25", "--tb=short",
    )  # fmt: skip


def _parallel() -> tuple[str, ...]:
    """Most of the time of small tests is compiling: several at once, where pytest can."""
    workers = min(12, (os.cpu_count() or 2) - 2)
    if workers < 2 or importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(workers))


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
