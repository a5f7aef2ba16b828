"""Which launch parameters are best on this GPU? ``python -m mllmkd_kernels.tune`` finds out, once.

Each kernel is run with a short list of candidates on the shapes of a distillation step. A candidate
counts only if it compiles and gives the same result as the built-in parameters; candidates are
timed in turn, round after round, so that a GPU that slows down slows them all, and the median
decides. The winners are written to the user's table (see `backends.triton.tables`), from which
every later run takes them. The built-in parameters stay unless another candidate is 2% faster.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mllmkd_kernels.backends.calls import Head, Options, Targets
from mllmkd_kernels.divergence import Divergence

#: A candidate must be faster by this factor, or the built-in parameters stay.
MARGIN = 1.02

#: Largest relative difference to the built-in parameters' result: other tiles sum in another order.
TOLERANCE = 1e-3

Launch = dict[str, int]
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Sizes:
    """Shapes that kernels are timed on; `images` of `image_rows` rows for the relation."""

    rows: int = 4096
    vocab: int = 151936
    d_s: int = 1024
    d_t: int = 2560
    image_rows: int = 729
    images: int = 8
    chunk: int = 512


@dataclass(frozen=True)
class Job:
    """One kernel for one class of operands.

    Attributes:
        kernel, kind: as in `tables`.
        dtype: of the operands.
        prepare: makes the inputs on a device and returns ``run(launch) -> result``, which leaves
            its inputs as they were.
        candidates: parameters to try, beside the built-in ones.
    """

    kernel: str
    kind: str
    dtype: torch.dtype
    prepare: Callable[[Sizes, torch.device], Callable[[Launch], Tensor]]
    candidates: tuple[Launch, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a job: seconds of the built-in parameters and of the best candidate, and why
    each of the others did not count.
    """

    job: Job
    before: Launch
    best: Launch
    seconds_before: float
    seconds_best: float
    refused: tuple[str, ...]


def search(
    job: Job,
    sizes: Sizes,
    device: torch.device,
    timer: Timer,
    rounds: int,
    tick: Callable[[str], None] = lambda what: None,
) -> Outcome:
    """Time the candidates of a job against the built-in parameters."""
    from mllmkd_kernels.backends.triton import tables

    run = job.prepare(sizes, device)
    before = tables.built_in(job.kernel, device, job.dtype, tma=job.kind == "half")
    expected = run(before)
    fit, refused = [before], []
    for launch in job.candidates:
        tick(f"{job.kernel} {_words(launch)}")
        why = "" if launch == before else _objection(run, launch, expected)
        if why:
            refused.append(f"{_words(launch)}: {why}")
        elif launch != before:
            fit.append(launch)
    seconds: list[list[float]] = [[] for _ in fit]
    for _ in range(rounds):
        for launch, times in zip(fit, seconds, strict=True):
            times.append(timer(lambda launch=launch: run(launch)))
    medians = [median(times) for times in seconds]
    best = min(range(len(fit)), key=medians.__getitem__)
    if medians[best] * MARGIN > medians[0]:
        best = 0
    return Outcome(job, before, fit[best], medians[0], medians[best], tuple(refused))


def _objection(run: Callable[[Launch], Tensor], launch: Launch, expected: Tensor) -> str:
    """Why a candidate does not count; empty if it does."""
    try:
        found = run(launch)
        off = (found.double() - expected.double()).norm() / expected.double().norm()
    except Exception as error:  # compilers and drivers raise what they like
        return (str(error).strip().splitlines() or [type(error).__name__])[-1][:160]
    return "" if float(off) <= TOLERANCE else f"its result is off by {float(off):.1e}"


def cuda_timer(run: Callable[[], object]) -> float:
    """Seconds of one run, between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


# --- what is tuned --------------------------------------------------------------------------------


def jobs(quick: bool = False) -> list[Job]:
    """Every kernel of the tables for each class of operands; `quick` tries half the candidates."""
    half, single = torch.bfloat16, torch.float32
    found = [Job("rows", "single", single, _rows, tuple(_row_candidates()))]
    asked: dict[str, dict[str, Any]] = {
        "statistics": {"teacher": False}, "values": {},
        "gradient": {"divergence": "forward_kl", "gradient": True},
    }  # fmt: skip
    for name, options in asked.items():
        for kind, dtype in (("half", half), ("single", single)):
            candidates = tuple(_matrix_candidates(kind))
            prepare = functools.partial(_distill, name, "stream", dtype, **options)
            found.append(Job(name, kind, dtype, prepare, candidates))
    for name in ("relation_stats", "relation_grad"):
        candidates = tuple(_relation_candidates(name == "relation_grad"))
        prepare = functools.partial(_relation, name)
        found.append(Job(name, "single", single, prepare, candidates))
    if quick:
        found = [Job(j.kernel, j.kind, j.dtype, j.prepare, j.candidates[::2]) for j in found]
    return found


def _row_candidates() -> Iterator[Launch]:
    for block, warps in ((2048, 4), (4096, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16)):
        yield {"BLOCK": block, "num_warps": warps, "num_stages": 1}


def _matrix_candidates(kind: str) -> Iterator[Launch]:
    tiles = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 8, 3), (64, 128, 64, 8, 3)]
    tiles += [(128, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4)]
    if kind == "single":
        tiles = [(64, 64, 32, 8, 2), (64, 64, 32, 4, 2), (64, 32, 32, 4, 2), (32, 64, 32, 4, 2),
                 (32, 32, 32, 4, 3), (64, 64, 16, 8, 3)]  # fmt: skip
    names = ("BLOCK_N", "BLOCK_V", "BLOCK_D", "num_warps", "num_stages")
    for tile in tiles:
        yield dict(zip(names, tile, strict=True))


def _relation_candidates(grad: bool) -> Iterator[Launch]:
    tiles = ((64, 32, 4, 4, 3), (64, 32, 4, 8, 3), (32, 32, 4, 4, 3), (64, 16, 4, 8, 3),
             (32, 32, 8, 4, 3), (64, 32, 8, 4, 3), (32, 64, 4, 4, 2))  # fmt: skip
    names = ("block", "block_k", "splits", "num_warps", "num_stages")
    for tile in tiles:
        yield dict(zip(names, tile, strict=True)) | ({"block_d": 64} if grad else {})


# --- their inputs ---------------------------------------------------------------------------------


def _normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator(device).manual_seed(len(shape))
    return (
        torch.randn(shape, generator=rng, dtype=torch.float32, device=device)
        .mul_(shape[-1] ** -0.25)
        .to(dtype)
    )


def _labels(s: Sizes, device: torch.device) -> Tensor:
    return torch.arange(s.rows, dtype=torch.int64, device=device) * 7 % s.vocab


def _distill(
    kernel: str, algorithm: str, dtype: torch.dtype, s: Sizes, device: torch.device,
    divergence: str = "jsd", teacher: bool = True, gradient: bool = False,
) -> Callable[[Launch], Tensor]:  # fmt: skip
    """A call of the backend in which `kernel` takes most of the time."""
    from mllmkd_kernels.backends import triton
    from mllmkd_kernels.backends.triton import tables

    hs, ws = (_normal(device, n, s.d_s, dtype=dtype) for n in (s.rows, s.vocab))
    ht, wt = (_normal(device, n, s.d_t, dtype=dtype) for n in (s.rows, s.vocab))
    weight = torch.full((s.rows,), 1 / s.rows, dtype=torch.float32, device=device)
    stream = algorithm == "stream"
    function = triton.distill_stream if stream else triton.distill_rows
    table = Divergence(divergence)
    targets = Targets(_labels(s, device), weight, weight if teacher else None, table)
    options = Options(s.vocab, 8192 if stream else s.chunk, want_dh=gradient)

    def run(launch: Launch) -> Tensor:
        with tables.overridden(kernel, launch):
            _, ce, kd, dh, *_ = function(
                Head(hs, ws), Head(ht, wt) if teacher else None, targets, options
            )
        return torch.cat([ce, kd, dh.flatten()])

    return run


def _rows(s: Sizes, device: torch.device) -> Callable[[Launch], Tensor]:
    small = replace(s, d_s=min(s.d_s, 64), d_t=min(s.d_t, 64))  # so that the products cost little
    return _distill("rows", "chunk", torch.bfloat16, small, device, "forward_kl", gradient=True)


def _relation(kernel: str, s: Sizes, device: torch.device) -> Callable[[Launch], Tensor]:
    from mllmkd_kernels.backends import triton

    n = s.image_rows * s.images
    hs, ht = _normal(device, n, s.d_s), _normal(device, n, s.d_t)
    ends = torch.arange(s.images + 1, dtype=torch.int32, device=device) * s.image_rows
    coef = torch.ones(s.images, 2, dtype=torch.float64, device=device)

    def run(launch: Launch) -> Tensor:
        if kernel == "relation_stats":
            return triton.relation_stats(hs, hs, ht, ht, ends, launch=launch)
        return triton.relation_grad(hs, hs, ht, ht, ends, coef, launch=launch)

    return run


# --- the command ----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = sorted({job.kernel for job in jobs()})
    top = argparse.ArgumentParser(
        prog="python -m mllmkd_kernels.tune",
        description="Times launch parameters of the Triton kernels on this GPU and writes the best "
        "ones to a table that later runs read. Takes a few minutes, once per GPU.",
    )
    top.add_argument("--kernel", choices=names, action="append", help="only this one; repeatable")
    top.add_argument("--quick", action="store_true", help="half the candidates, fewer rounds")
    top.add_argument(
        "--out", type=Path, metavar="FILE",
        help="default: what MLLMKD_TABLES names, else ~/.cache/mllmkd_kernels/tables.json",
    )  # fmt: skip
    return top


def main(argv: list[str] | None = None) -> int:
    """Tune, print before and after, write the table; 2 where there is no GPU or no place for it."""
    args = parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: PyTorch sees no GPU on this machine; nothing can be timed", file=sys.stderr)
        return 2
    from mllmkd_kernels.backends.triton import tables

    path = args.out or tables.path_of_user_table()
    if path is None:
        print("tune: MLLMKD_TABLES is empty, so --out must say where to write", file=sys.stderr)
        return 2
    wanted = [job for job in jobs(args.quick) if not args.kernel or job.kernel in args.kernel]
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    print(f"{name}: {len(wanted)} kernels")
    outcomes = tune(wanted, Sizes(), device, cuda_timer, rounds=5 if args.quick else 15)
    tables.write(path, name, as_table(outcomes))
    for outcome in outcomes:
        print(describe(outcome))
    print(f"written: {path}")
    return 0


def tune(
    wanted: list[Job], sizes: Sizes, device: torch.device, timer: Timer, rounds: int
) -> list[Outcome]:
    """`search` for every job, under a progress bar."""
    from tqdm import tqdm  # comes with transformers

    outcomes = []
    with tqdm(total=sum(len(job.candidates) for job in wanted), unit="candidate") as bar:

        def tick(what: str) -> None:
            bar.set_description(what)
            bar.update()

        for job in wanted:
            outcomes.append(search(job, sizes, device, timer, rounds, tick))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return outcomes


def as_table(outcomes: list[Outcome]) -> dict[str, dict[str, Launch]]:
    """The winners, as `tables.write` takes them."""
    table: dict[str, dict[str, Launch]] = {}
    for outcome in outcomes:
        table.setdefault(outcome.job.kernel, {})[outcome.job.kind] = outcome.best
    return table


def describe(outcome: Outcome) -> str:
    """A line: before, after, and how many candidates did not count."""
    job, before, best = outcome.job, outcome.seconds_before * 1e3, outcome.seconds_best * 1e3
    change = "kept" if outcome.best == outcome.before else f"now {_words(outcome.best)}"
    refused = f"; {len(outcome.refused)} did not count" if outcome.refused else ""
    return f"{job.kernel:15} {job.kind:7} {before:9.3f} ms -> {best:9.3f} ms  {change}{refused}"


def _words(launch: Launch) -> str:
    return " ".join(f"{name}={value}" for name, value in launch.items())


if __name__ == "__main__":
    sys.exit(main())
