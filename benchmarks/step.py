"""How much faster, and how much smaller, is a whole training step?

One optimiser step of LLaVA-KD's distilled stages with models of a real class (`vlm`): the frozen
teacher and the student forward, losses, backward, AdamW, the student's layers checkpointed as the
published scripts have it. Only the losses differ: plain PyTorch on whole logits, as a trainer
writes them (`naive`), or `mk.LlavaKDLoss`. Both are first compared on one sample: loss and
gradients of every trained parameter. Tokens are those of the sequence, visual rows included; the
peak is beyond weights and optimiser state, so gradients count, measured as in `memory`; the largest
batch within a budget for that peak is one that was run, not an extrapolation.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import mllmkd_kernels as mk
from benchmarks import methods, truth
from benchmarks.memory import apart, peak_rise
from benchmarks.methods import EAGER
from benchmarks.naive import WholeLogitsLoss
from benchmarks.session import Session
from benchmarks.shapes import StepCase
from benchmarks.speed import interleaved, spread

Rows = list[dict[str, Any]]

NEEDED = ("transformers", "safetensors")

#: Both compute the same, so a larger relative difference of the loss or of the gradients of all
#: trained parameters means that they do not. In bf16 the rounding of the logits' gradient passes
#: through every layer; a missing term or factor is a matter of 0.3 or more.
AGREE = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 1e-1)}

#: At most so many measurements for a largest batch beyond the first two.
TRIES = 10


def measure(session: Session, case: StepCase) -> Rows:
    """One row per method: plain PyTorch and what is chosen for the device."""
    device = session.suite.device
    both = (EAGER, methods.ours_by_default(device))
    only = session.only or [method.key for method in both]
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    status = {"status": "missing" if lacking else "ok"}
    status["reason"] = f"needs {', '.join(lacking)}" if lacking else ""
    rows = [method.row(case) | status for method in both if method.key in only]
    if _fit(rows):
        ends = time.monotonic() + session.seconds
        _time(session, case, rows)
        for n, row in enumerate(fit := _fit(rows)):
            left = (ends - time.monotonic()) / (len(fit) - n)
            session.tell(f"{case.title}: largest batch, {row['label']}")
            _forget_models()
            row |= apart(device, _peaks, case, row["method"], device, left)
        _forget_models()
    return rows


def _fit(rows: Rows) -> Rows:
    return [row for row in rows if row["status"] == "ok"]


def _training(case: StepCase, key: str, device: str) -> Any:
    """The case's training with the losses of a method."""
    from benchmarks.vlm import Training  # needs transformers

    loss = WholeLogitsLoss() if key == EAGER.key else mk.LlavaKDLoss(backend=key[3:])
    return Training(case, loss, device)


def _forget_models() -> None:
    from benchmarks.vlm import pair  # needs transformers

    pair.cache_clear()
    gc.collect()


def _time(session: Session, case: StepCase, rows: Rows) -> None:
    """Whether all agree, seconds of every round, tokens a second and ratios, into `rows`; in half
    of the time.
    """
    device, ends = session.suite.device, time.monotonic() + session.seconds / 2
    trainings = {row["method"]: _training(case, row["method"], device) for row in rows}
    _compare(case, rows, trainings)
    one = next(iter(trainings.values()))  # all train the same parameters
    inputs = one.batch(case.batch)
    keys = [row["method"] for row in _fit(rows)]
    steps = {key: partial(partial, trainings[key].step, inputs) for key in keys}
    seconds, failed = interleaved(session, case.title, steps, one.forget, ends)
    for row in _fit(rows):
        if row["method"] in failed:
            row |= {"status": "failed", "reason": failed[row["method"]]}
        else:
            row |= spread(seconds[row["method"]], seconds)
            row["tokens_per_s"] = case.batch * case.tokens / row["median_s"]


def _compare(case: StepCase, rows: Rows, trainings: dict[str, Any]) -> None:
    """The differences of each method's loss and gradients from the first's, into `rows`."""
    first: tuple[torch.Tensor, torch.Tensor] | None = None
    for row in rows:
        training = trainings[row["method"]]
        loss = training.gradients(training.batch(1))
        gradient = torch.cat([p.grad.flatten() for p in training.trained])
        training.forget()
        first = first or (loss, gradient)
        off = [truth.relative(*pair) for pair in zip((loss, gradient), first, strict=True)]
        row |= {"loss": float(loss), "loss_off": off[0], "gradient_off": off[1]}
        if not all(o <= most for o, most in zip(off, AGREE[case.models.dtype], strict=True)):
            reason = f"loss {off[0]:.1e} and gradient {off[1]:.1e} off plain PyTorch's"
            row |= {"status": "wrong", "reason": reason}


def _peaks(case: StepCase, key: str, device: str, seconds: float) -> dict[str, Any]:
    """Peaks by batch and the largest batch within the budget that was found in so many seconds.

    In a child blocks of a MiB or more are made to go back to the system when they are freed, and so
    is the workspace that our C++ kernels keep from call to call: one process can measure batch
    after batch, and nothing that a step needs is there before it.
    """
    if device == "cpu":
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)  # M_MMAP_THRESHOLD of malloc.h
    training = _training(case, key, device)
    training.step(training.batch(1))  # optimiser state, Gram matrices of frozen heads, thread pools

    def peak(samples: int) -> float:
        training.forget()  # what a step that ran out of memory left
        mk.release_workspace()
        gc.collect()
        torch.cuda.empty_cache()
        try:
            return peak_rise(partial(training.step, training.batch(samples)), device)
        except torch.OutOfMemoryError:
            return math.inf

    first = (1, case.batch) if case.batch > 1 else (1, 2)
    ends = time.monotonic() + seconds
    batch, peaks = largest(peak, case.budget_mib * 2**20, first, lambda: time.monotonic() < ends)
    measured = {n: int(found) for n, found in peaks.items() if found < math.inf}
    extra, pairs = measured.get(case.batch), [[n, measured[n]] for n in sorted(measured)]
    return {"extra_bytes": extra, "peaks": pairs, "largest_batch": batch}


def largest(
    peak: Callable[[int], float],
    budget: float,
    first: tuple[int, int],
    more_time: Callable[[], bool] = lambda: True,
) -> tuple[int, dict[int, float]]:
    """The largest batch whose measured `peak` is within `budget`, and every peak measured: of both
    batches of `first`, then between the largest that fits and the smallest that does not, where a
    line through two peaks proposes, until these are neighbours or within a twentieth, or `TRIES`
    are used up.
    """
    peaks = {batch: peak(batch) for batch in first}
    for _ in range(TRIES):
        fits = max((n for n, found in peaks.items() if found <= budget), default=0)
        beyond = min((n for n, found in peaks.items() if found > budget), default=math.inf)
        if fits + max(1, fits // 20) >= beyond or not more_time():
            break
        guess, known = math.inf, sorted(n for n, found in peaks.items() if found < math.inf)[-2:]
        if len(known) == 2 and (rise := peaks[known[1]] - peaks[known[0]]) > 0:
            guess = known[1] + (budget - peaks[known[1]]) * (known[1] - known[0]) / rise
        if guess >= beyond:  # also where that ran out of memory, to which no line leads
            guess = (fits + beyond) / 2
        # at most 8 times the last that fits: a line may be flat by chance
        n = int(max(fits + 1, min(guess, beyond - 1, 8 * max(fits, 1))))
        peaks[n] = peak(n)
    return max((n for n, found in peaks.items() if found <= budget), default=0), peaks
