"""How much memory does a step need beyond its inputs and gradients? Measured by the kernel.

Each figure comes from a fresh child process, because a used heap hides what an allocation costs.
The child builds the inputs, warms up on a tiny problem (thread pools and vendor libraries allocate
once, whatever the size), returns free memory to the system, resets the kernel's high-water mark of
resident memory and runs one forward and backward. Then

    extra = VmHWM after − VmRSS before − bytes of the gradients that the step returns,

the peak over what every method must hold at the end. The kernel keeps the high-water mark
(``VmHWM``, reset through ``/proc/self/clear_refs``) at every page fault, so nothing is sampled and
no peak is missed. Linux only; elsewhere a row says so.

On a GPU the allocator keeps its own high-water mark, so no child is needed:

    extra = max_memory_allocated − memory_allocated before − bytes of the gradients.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import mllmkd_kernels as mk
from benchmarks.child import in_child
from benchmarks.methods import FLOOR, METHODS, Method, select
from benchmarks.problem import make
from benchmarks.shapes import DTYPES, Case, Suite
from benchmarks.vetting import Vetting


def steps(suite: Suite, only: tuple[str, ...]) -> int:
    """How often `measure` will call `tick`."""
    return sum(len(_methods(suite, case, only)) for case in suite.memory)


def measure(
    suite: Suite, only: tuple[str, ...], vetting: Vetting, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row per case and method; `tick` is called with a description at every step."""
    rows = []
    for case in suite.memory:
        methods = _methods(suite, case, only)
        verdicts = vetting.verdicts(methods, case)
        gc.collect()
        weigh = _on_gpu if suite.device == "cuda" else _on_cpu
        for method in methods:
            tick(f"{case.title}: {method.label}")
            verdict = verdicts[method.key]
            row = {
                "case": asdict(case), "method": method.key, "label": method.label,
                "version": method.version(), "status": verdict.status, "reason": verdict.reason,
                "predicted_bytes": predicted(method, case, suite.device),
            }  # fmt: skip
            rows.append(row | (weigh(method, case) if verdict.status == "ok" else {}))
    return rows


def predicted(method: Method, case: Case, device: str = "cpu") -> int | None:
    """What `mllmkd_kernels.explain` says of our methods; None for what it does not plan."""
    unfit = not method.key.startswith("mk-") or method.why_not(torch.device(device))
    if unfit or case.loss == "relation":
        return None
    backend, _, budget = method.key[3:].partition("-")
    return mk.explain(
        case.rows, case.vocab, case.d_s, 0 if case.loss == "ce" else case.d_t,
        train_head=case.train_head, dtype=DTYPES[case.dtype], device=device, backend=backend,
        workspace_mb=float(budget.removesuffix("mb")) if budget else None,
    ).peak_bytes  # fmt: skip


def _methods(suite: Suite, case: Case, only: tuple[str, ...]) -> list[Method]:
    """The floor computes no loss: its memory means nothing."""
    return [
        method
        for method in select(case.loss, only, case in suite.every_backend, suite.device)
        if method.key != FLOOR.key
    ]


def _on_gpu(method: Method, case: Case) -> dict[str, Any]:
    """``extra_bytes``, or a status and reason where the step failed."""
    try:
        method.build(make(_small(case), device="cuda"))()  # libraries take their workspaces once
        problem = make(case, device="cuda")
        run = method.build(problem)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        rise = torch.cuda.max_memory_allocated() - before
        gradients = [t.grad for t in (problem.hs, problem.ws) if t.grad is not None]
        return {"extra_bytes": rise - sum(gradient.nbytes for gradient in gradients)}
    except Exception as error:  # other people's code: whatever it raises becomes a row
        line = str(error).splitlines()[0] if str(error) else ""
        return {"status": "failed", "reason": f"{type(error).__name__}: {line}"}
    finally:
        problem = run = None
        gc.collect()
        torch.cuda.empty_cache()


def _on_cpu(method: Method, case: Case) -> dict[str, Any]:
    return in_child(_child, method.key, case, torch.get_num_threads())


def _child(key: str, case: Case, threads: int) -> dict[str, Any]:
    """Runs in the child: bytes that one step needs beyond inputs and gradients."""
    torch.set_num_threads(threads)
    method = next(method for method in METHODS if method.key == key)
    warm_up = make(_small(case))
    method.build(warm_up)()
    del warm_up
    problem = make(case)
    run = method.build(problem)
    rise = peak_rise(run)
    gradients = [t.grad for t in (problem.hs, problem.ws) if t.grad is not None]
    return {"extra_bytes": rise - sum(gradient.nbytes for gradient in gradients)}


def peak_rise(run: Callable[[], object]) -> int:
    """How far the resident memory of this process rises above its present level during `run`."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # free heap would absorb allocations unseen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _small(case: Case) -> Case:
    """Few rows and tokens, the same kind of work."""
    return replace(case, rows=min(case.rows, 16), vocab_s=512, vocab_t=512)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"memory: /proc/self/status has no {field}")
