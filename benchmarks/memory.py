"""How much memory does a step need beyond its inputs and gradients? Measured by the kernel.

Each figure comes from a fresh child process, because a used heap hides what an allocation costs,
forked from a server that has imported everything and done nothing: importing PyTorch anew would be
half of a run, and no thread pool exists yet. A child warms up on a tiny problem (thread pools and
vendor libraries allocate once, whatever the size), returns free memory to the system, and runs one
forward and backward. Then

    extra = VmHWM after − VmRSS before − bytes of the gradients that the step returns.

The kernel keeps that high-water mark at every page fault, so nothing is sampled and no peak is
missed. Linux only; elsewhere a row says so. On a GPU the allocator keeps one, without a child.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import mllmkd_kernels as mk
from benchmarks.methods import BY_KEY, COMPILED, EAGER, FLOOR, ROWWISE, Method
from benchmarks.problem import make
from benchmarks.session import Session, said
from benchmarks.shapes import DTYPES, Case

Figures = dict[str, Any]


def measure(session: Session, case: Case) -> list[Figures]:
    """One row per method."""
    device = session.suite.device
    # The floor computes no loss: its memory means nothing.
    methods = [method for method in session.methods(case) if method.key != FLOOR.key]
    verdicts = session.verdicts(methods, case)
    rows = []
    for method in methods:
        session.tell(f"{case.title}: {method.label}")
        verdict = verdicts[method.key]
        row = method.row(case) | {
            "status": verdict.status, "reason": verdict.reason,
            "predicted_bytes": predicted(method, case, device),
        }  # fmt: skip
        found = apart(device, _extra, method.key, case, device) if verdict.status == "ok" else {}
        rows.append(row | found)
    return rows


def predicted(method: Method, case: Case, device: str = "cpu") -> int | None:
    """What `mllmkd_kernels.explain` says of our methods; None for what it does not plan."""
    unfit = case.loss not in ROWWISE or method.why_not(torch.device(device))
    if method.plan is None or unfit:
        return None
    return mk.explain(
        case.rows, case.vocab, case.d_s, 0 if case.loss == "ce" else case.d_t,
        train_head=case.train_head, dtype=DTYPES[case.dtype], divergence=case.divergence,
        device=device, **method.plan,
    ).peak_bytes  # fmt: skip


def _extra(key: str, case: Case, device: str) -> Figures:
    """Bytes that one step needs beyond inputs, gradients and what a trainer has once per run."""
    method = BY_KEY[key]
    small = replace(case, rows=min(case.rows, 16), vocab_s=512, vocab_t=512)
    # Libraries take their workspaces once; what is compiled runs when it is built.
    (EAGER if method is COMPILED else method).build(make(small, device=device))()
    problem = make(case, device=device)
    rise = peak_rise(method.build(problem), device)
    gradients = [t.grad for t in (problem.hs, problem.ws) if t.grad is not None]
    return {"extra_bytes": rise - sum(gradient.nbytes for gradient in gradients)}


def peak_rise(run: Callable[[], object], device: str = "cpu") -> int:
    """How far the memory in use, of this process or of a GPU, rises above its present level."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # free heap would absorb allocations unseen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"memory: /proc/self/status has no {field}")


def apart(device: str, function: Callable[..., Figures], *arguments: Any) -> Figures:
    """What `function` returns, a status and a reason where it raised: in a fresh process, or on a
    GPU, whose allocator knows what was there before, in this one.
    """
    if device == "cuda":
        found = _attempt(torch.get_num_threads(), function, *arguments)
        gc.collect()
        torch.cuda.empty_cache()
        return found
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        try:
            return pool.submit(_attempt, torch.get_num_threads(), function, *arguments).result()
        except BrokenProcessPool:
            return {"status": "failed", "reason": "the child process was killed: out of memory?"}


def _attempt(threads: int, function: Callable[..., Figures], *arguments: Any) -> Figures:
    torch.set_num_threads(threads)
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:  # other people's code: whatever it raises is a row
        return {"status": "failed", "reason": said(error)}


@lru_cache(maxsize=1)
def _context() -> Any:
    context: Any = multiprocessing.get_context("forkserver")
    # An import that fails is none: `vlm` needs transformers.
    context.set_forkserver_preload(["benchmarks.memory", "benchmarks.step", "benchmarks.vlm"])
    return context
