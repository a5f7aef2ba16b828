"""And what does it cost in truth? A step on random tensors of given shapes, timed and weighed."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mllmkd_kernels.distill import fused_linear_distill

if TYPE_CHECKING:  # plan asks for this module, not the other way round
    from mllmkd_kernels.plan import Plan, Shapes

STEPS = 5


def measured(s: Shapes, device: torch.device, plan: Plan, workspace_mb: float | None) -> str:
    """Median seconds of a step and of the matrix products alone, interleaved; on CUDA the peak
    memory beyond inputs and returned gradients.

    Raises:
        RuntimeError: `device` is not on this machine.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("measure: there is no CUDA device on this machine")
    hs, ht = _normal(s.rows, s.d_s, s, device), _normal(s.rows, s.d_t, s, device)
    ws, wt = _normal(s.vocab, s.d_s, s, device), _normal(s.vocab, s.d_t, s, device)
    hs.requires_grad_(s.want_dh)
    ws.requires_grad_(s.want_dw)
    labels = torch.zeros(s.rows, dtype=torch.int64, device=device)
    even = 1 / max(s.rows, 1)

    def step() -> None:
        hs.grad = ws.grad = None
        loss = fused_linear_distill(
            hs, ws, ht if s.d_t else None, wt if s.d_t else None, labels, ce_weight=even,
            kd_weight=even, divergence=s.divergence, backend=plan.backend,
            workspace_mb=workspace_mb,
        ).loss  # fmt: skip
        if loss.requires_grad:
            loss.backward()

    dz = _normal(s.rows, s.vocab, s, device)

    @torch.no_grad()
    def products() -> None:
        torch.mm(hs, ws.mT)
        if s.d_t:
            torch.mm(ht, wt.mT)
        if s.want_dh:
            torch.mm(dz, ws)
        if s.want_dw:
            torch.mm(dz.mT, hs)

    extra = _extra_bytes(step, [hs, ws], device)
    seconds: dict[str, list[float]] = {"step": [], "products": []}
    for _ in range(STEPS):
        seconds["step"].append(_seconds(step, device))
        seconds["products"].append(_seconds(products, device))
    mine, floor = median(seconds["step"]), median(seconds["products"])
    memory = "" if extra is None else f", {extra / 2**20:.0f} MiB beyond inputs and gradients"
    return (
        f"{mine * 1e3:.2f} ms, products alone {floor * 1e3:.2f} ms "
        f"({mine / max(floor, 1e-9):.2f}x){memory}"
    )


def _normal(rows: int, columns: int, s: Shapes, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, dtype=s.dtype, device=device).mul_(max(columns, 1) ** -0.25)


def _extra_bytes(
    step: Callable[[], None], leaves: list[Tensor], device: torch.device
) -> int | None:
    """Peak of one step beyond what was there before and the gradients it leaves; None on CPU."""
    if device.type != "cuda":
        step()  # the first call reads files and allocates once
        return None
    step()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    kept = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return torch.cuda.max_memory_allocated(device) - before - kept


def _seconds(f: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
