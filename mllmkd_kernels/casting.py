"""How do arguments enter an operator? Cast as autocast would, and asked what they want."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast as ``F.linear`` would under autocast, and nothing outside it."""
    device = next((t.device.type for t in tensors if t is not None), "cpu")
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def heads(
    student: tuple[Tensor | None, ...], teacher: tuple[Tensor | None, ...]
) -> tuple[Any, ...]:
    """All of both, cast; the teacher's detached."""
    frozen = (None if t is None else t.detach() for t in teacher)
    return *autocast(*student), *autocast(*frozen)


def wants(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which tensors get a gradient: a frozen one, or any under ``torch.no_grad``, costs nothing."""
    return tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors)
