"""What will a call cost, why, and what does it cost in truth? The plan for given shapes; and a step
on random tensors of these shapes, timed and weighed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from mllmkd_kernels import checks, hardware
from mllmkd_kernels.distill import fused_linear_distill
from mllmkd_kernels.divergence import Divergence
from mllmkd_kernels.plan import Plan, Shapes, distill_plan

STEPS = 5


def explain(
    rows: int,
    vocab: int,
    d_s: int,
    d_t: int = 0,
    *,
    train_hidden: bool = True,
    train_head: bool = True,
    dtype: torch.dtype = torch.float32,
    divergence: str | Divergence = "forward_kl",
    device: torch.device | str = "cpu",
    backend: str = "auto",
    workspace_mb: float | None = None,
    gpu: str | None = None,
    measure: bool = False,
    overlap: bool = False,
    main_grad: str | None = None,
) -> Plan:
    """The plan of `fused_linear_distill` for these shapes; ``print(explain(...))`` says why.

    Args:
        rows, vocab, d_s, d_t: N, V and the hidden sizes of student and teacher (0: no teacher).
        train_hidden, train_head: whether the student's hidden states and head require gradients.
        dtype: of the head weights and hidden states.
        divergence: a name or a `Divergence`; its parameter changes no cost.
        device, backend, workspace_mb, overlap: as the call will have them. ``device="cuda"`` may be
            asked about on a machine without a GPU: the prediction is then made for `gpu`.
        gpu: "a100", "h100", "h200" or "b200"; default the GPU of `device`, else "h100".
        main_grad: "backward" for a call with one, "forward" for one with a `loss_gradient` as well.
        measure: run the call on random tensors of these shapes on `device` and put what was
            measured beside what was predicted.

    Raises:
        TypeError, ValueError, RuntimeError: sizes that are no positive integers; another dtype or
            divergence; a backend that is unknown or cannot serve the device; an unknown GPU.
    """
    for name, value, least in (
        ("rows", rows, 0),
        ("vocab", vocab, 1),
        ("d_s", d_s, 1),
        ("d_t", d_t, 0),
    ):
        if checks.integer(name, value) < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if dtype not in checks.FLOATS:
        raise ValueError(f"dtype: got {dtype}, expected one of {checks.FLOATS}")
    device, divergence = torch.device(device), Divergence.of(divergence).name
    if main_grad not in (None, "backward", "forward") or (main_grad and not train_head):
        raise ValueError(
            "main_grad: expected None, or 'backward' or 'forward' for a trained head, "
            f"got {main_grad!r}"
        )
    shapes = Shapes(
        rows, vocab, d_s, d_t, train_hidden, train_head, dtype, divergence=divergence,
        main_grad=main_grad,
    )  # fmt: skip
    plan = distill_plan(
        shapes, device, backend, workspace_mb, gpu=None if gpu is None else hardware.named(gpu),
        overlap=overlap,
    )  # fmt: skip
    if measure:
        plan = replace(plan, measured=measured(shapes, device, plan, workspace_mb))
    return plan


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
    acc = torch.promote_types(s.dtype, torch.float32)
    main_grad = torch.zeros_like(ws, dtype=acc, requires_grad=False) if s.main_grad else None
    known = 1.0 if s.main_grad == "forward" else None

    def step() -> None:
        hs.grad = ws.grad = None
        loss = fused_linear_distill(
            hs, ws, ht if s.d_t else None, wt if s.d_t else None, labels, ce_weight=even,
            kd_weight=even, divergence=s.divergence, backend=plan.backend,
            workspace_mb=workspace_mb, overlap=plan.beside > 0, main_grad=main_grad,
            loss_gradient=known,
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
