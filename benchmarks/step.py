"""How much faster, and how much smaller, is a whole training step?

One optimiser step of LLaVA-KD's distilled stages with models of a real class (`vlm`): the shared
tower, the frozen teacher and the student forward, losses, backward, AdamW. Only the losses differ:
plain PyTorch on whole logits, as a trainer writes them (`naive`), or `mk.LlavaKDLoss`. The
student's layers are checkpointed, as the published scripts have it.

* **Same loss.** Before anything is timed, loss and gradients of every trained parameter are
  compared on one sample with the same weights.
* **Tokens a second** at one batch: rounds interleaved, ratios formed within a round, as in `speed`.
  Tokens are those of the sequence, visual rows included.
* **Peak** beyond weights and optimiser state, so gradients count, as in `memory`: on a CPU the
  kernel's high-water mark of a child process of its own, on a GPU the allocator's.
* **Largest batch** within a stated budget for that peak: measured at one sample and at the timed
  batch; the line through the two latest measurements proposes the next batch to measure, until one
  fits and one larger (beyond 20, by a twentieth) does not, or is not expected to by the line. On a
  GPU a step that runs out of memory does not fit. So the answer is a batch that was run, not an
  extrapolation.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from benchmarks import methods, truth
from benchmarks.child import in_child
from benchmarks.memory import peak_rise
from benchmarks.methods import EAGER, Method
from benchmarks.shapes import StepCase, Suite
from mllmkd_kernels.backends import cpu

#: Both compute the same, so a larger relative difference of the loss or of the gradients of all
#: trained parameters means that they do not. In bf16 the rounding of the logits' gradient passes
#: through every layer; a missing term or factor is a matter of 0.3 or more.
AGREE = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 1e-1)}

#: At most so many measurements for a largest batch beyond the first two.
TRIES = 10

_M_MMAP_THRESHOLD = -3  # malloc.h


def steps(suite: Suite, only: tuple[str, ...], rounds: int) -> int:
    """How often `measure` will call `tick`."""
    return sum((rounds + 2) * len(_methods(suite, only)) for _ in suite.step)


def measure(
    suite: Suite, only: tuple[str, ...], rounds: int, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row per case and method; `tick` is called with a description at every step."""
    table: list[dict[str, Any]] = []
    for case in suite.step:
        rows = [
            {"case": asdict(case), "method": method.key, "label": method.label,
             "version": method.version(), **_usable()}
            for method in _methods(suite, only)
        ]  # fmt: skip
        if rows and rows[0]["status"] == "ok":
            _time(case, rows, suite.device, rounds, tick)
            _weigh(case, rows, suite.device, tick)
        table += rows
    return table


def _methods(suite: Suite, only: tuple[str, ...]) -> list[Method]:
    both = (EAGER, methods.ours_by_default(suite.device))
    return [method for method in both if not only or method.key in only]


def _usable() -> dict[str, str]:
    lacking = [name for name in ("transformers", "safetensors") if not _found(name)]
    if lacking:
        return {"status": "missing", "reason": f"needs {', '.join(lacking)}"}
    return {"status": "ok", "reason": ""}


def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _training(case: StepCase, key: str, device: str) -> Any:
    """The case's training with the losses of a method."""
    import mllmkd_kernels as mk
    from benchmarks.naive import WholeLogitsLoss
    from benchmarks.vlm import Training

    loss = WholeLogitsLoss() if key == EAGER.key else mk.LlavaKDLoss(backend=key[3:])
    return Training(case, loss, device)


# --- time ----------------------------------------------------------------------------------------


def _time(
    case: StepCase,
    rows: list[dict[str, Any]],
    device: str,
    rounds: int,
    tick: Callable[[str], None],
) -> None:
    """Whether all agree, seconds of every round, tokens a second and ratios, into `rows`."""
    trainings = {row["method"]: _training(case, row["method"], device) for row in rows}
    _compare(case, rows, trainings)
    inputs = next(iter(trainings.values())).batch(case.batch)
    for turn in range(rounds + 1):
        for row in rows:
            tick(f"{case.title}: {row['label']}")
            if row["status"] != "ok":
                continue
            try:
                spent = _once(lambda key=row["method"]: trainings[key].step(inputs), device)
            except torch.OutOfMemoryError as error:
                row |= {"status": "failed", "reason": f"out of memory: {error}".splitlines()[0]}
                trainings[row["method"]].forget()
                continue
            if turn:  # the first round is warm-up
                row.setdefault("seconds", []).append(spent)
    eager = next((r.get("seconds") for r in rows if r["method"] == EAGER.key), None)
    for row in rows:
        if row["status"] == "ok":
            row |= figures(case, row["seconds"], eager)


def figures(case: StepCase, mine: list[float], eager: list[float] | None) -> dict[str, Any]:
    """Median, spread, tokens a second, and how many times faster than plain PyTorch."""
    whole = eager is not None and len(eager) == len(mine)
    return {
        "median_s": median(mine),
        "min_s": min(mine),
        "max_s": max(mine),
        "tokens_per_s": case.batch * case.tokens / median(mine),
        "times_eager": median(e / m for m, e in zip(mine, eager or (), strict=True))
        if whole
        else None,
    }


def _compare(case: StepCase, rows: list[dict[str, Any]], trainings: dict[str, Any]) -> None:
    """The differences of each method's loss and gradients from the first's, into `rows`."""
    first: tuple[torch.Tensor, torch.Tensor] | None = None
    for row in rows:
        training = trainings[row["method"]]
        loss = training.gradients(training.batch(1))
        gradient = torch.cat([p.grad.flatten() for p in training.trained])
        training.forget()
        if first is None:
            first = loss, gradient
        off = [truth.relative(*pair) for pair in zip((loss, gradient), first, strict=True)]
        row |= {"loss": float(loss), "loss_off": off[0], "gradient_off": off[1]}
        if not all(o <= most for o, most in zip(off, AGREE[case.models.dtype], strict=True)):
            row |= {
                "status": "wrong",
                "reason": f"loss {off[0]:.1e} and gradient {off[1]:.1e} off plain PyTorch's",
            }


def _once(step: Callable[[], object], device: str) -> float:
    """Seconds of one step, until the device has done it."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# --- memory --------------------------------------------------------------------------------------


def _weigh(
    case: StepCase, rows: list[dict[str, Any]], device: str, tick: Callable[[str], None]
) -> None:
    """Peaks by batch and the largest batch within the budget, into `rows`."""
    for row in rows:
        tick(f"{case.title}: largest batch, {row['label']}")
        if row["status"] != "ok":
            continue
        if device == "cuda":
            found = _peaks_on_gpu(case, row["method"])
        else:
            _forget_models()  # the child has its own
            found = in_child(_child, case, row["method"], torch.get_num_threads())
        row |= found
    if device == "cuda":
        _forget_models()


def _forget_models() -> None:
    from benchmarks.vlm import pair

    pair.cache_clear()
    gc.collect()


def largest(
    peak: Callable[[int], float], budget: float, first: tuple[int, int]
) -> tuple[int, dict[int, float]]:
    """The largest batch whose measured `peak` is within `budget`, and every peak measured.

    The two batches of `first` are measured, then what the line through the two latest proposes,
    between the largest that fits and the smallest that does not, until these are neighbours (or
    within a twentieth) or the line expects them to be; or `TRIES` is used up, then it is the
    largest that was seen to fit.
    """
    peaks: dict[int, float] = {}
    for batch in first:
        peaks[batch] = peak(batch)
    a, b = first
    for turn in range(TRIES):
        fits = max((n for n, found in peaks.items() if found <= budget), default=0)
        beyond = min((n for n, found in peaks.items() if found > budget), default=math.inf)
        more = fits + max(1, fits // 20)
        if more >= beyond:
            break
        slope = (peaks[b] - peaks[a]) / (b - a)
        guess = math.inf
        if 0 < slope < math.inf:
            guess = b + (budget - peaks[b]) / slope
            if turn and peaks[b] <= budget and b == fits and guess < more:
                break
        if beyond < math.inf and peaks[int(beyond)] == math.inf:  # no line leads to that
            guess = min(guess, (fits + beyond) / 2)
        # at most 8 times the last that fits: a line may be flat by chance
        n = int(max(fits + 1, min(guess, beyond - 1, 8 * max(fits, 1))))
        peaks[n] = peak(n)
        a, b = (b, n) if peaks[n] < math.inf else (a, b)
    return max((n for n, found in peaks.items() if found <= budget), default=0), peaks


def _found_peaks(case: StepCase, peak: Callable[[int], float]) -> dict[str, Any]:
    first = (1, case.batch) if case.batch > 1 else (1, 2)
    batch, peaks = largest(peak, case.budget_mib * 2**20, first)
    measured = {n: found for n, found in peaks.items() if found < math.inf}
    return {
        "extra_bytes": measured.get(case.batch),
        "peaks": [[n, int(measured[n])] for n in sorted(measured)],
        "largest_batch": batch,
    }


def _peaks_on_gpu(case: StepCase, key: str) -> dict[str, Any]:
    training = _training(case, key, "cuda")
    training.step(training.batch(1))  # optimiser state, Gram matrices of frozen heads, libraries

    def peak(samples: int) -> float:
        training.forget()  # what a step that ran out of memory left
        gc.collect()
        torch.cuda.empty_cache()
        try:
            inputs = training.batch(samples)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            training.step(inputs)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        except torch.OutOfMemoryError:
            return math.inf

    return _found_peaks(case, peak)


def _child(case: StepCase, key: str, threads: int) -> dict[str, Any]:
    """Runs in the child. Blocks of a MiB or more are made to go back to the system when they are
    freed, and so is the workspace that our C++ kernels keep from call to call: one process can
    measure batch after batch, and nothing that a step needs is there before it.
    """
    torch.set_num_threads(threads)
    ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 2**20)
    training = _training(case, key, "cpu")
    training.step(training.batch(1))  # optimiser state, Gram matrices of frozen heads, thread pools

    def peak(samples: int) -> float:
        inputs = training.batch(samples)
        cpu.release_workspace()
        return peak_rise(lambda: training.step(inputs))

    return _found_peaks(case, peak)
