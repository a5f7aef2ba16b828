"""Is the answer right? Loss and gradients in fp64, and how far a method is from them.

The truth is `mllmkd_kernels.reference` over whole logits in fp64, on the very inputs the method
gets (rounded to bf16 where they are bf16), differentiated by autograd. Logits are made a slice of
the vocabulary at a time, so that no head is ever held in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.methods import Method
from benchmarks.naive import preference
from benchmarks.problem import Problem
from benchmarks.shapes import PREFERENCES
from mllmkd_kernels import reference

#: A method is wrong, not merely coarse, beyond these relative errors. Far from convergence plain
#: fp32 stays at 1e-6 and bf16 logits at 5e-3; a wrong formula (a missing term, a missing mean, a
#: gradient of half its size) is at 1e-1. How coarse a method is, `accuracy` says.
WRONG_LOSS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
WRONG_GRADIENT = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-2}

_SLICE = 8192


@dataclass(frozen=True)
class Truth:
    """fp64 loss, dh (N, D_s) and, where the head is trained, dw (V_s, D_s)."""

    loss: Tensor
    dh: Tensor
    dw: Tensor | None


@dataclass(frozen=True)
class Errors:
    """Relative errors ‖Δ‖/‖truth‖; `dw` is None for a frozen head."""

    loss: float
    dh: float
    dw: float | None

    @property
    def gradient(self) -> float:
        """The worse of both gradients."""
        return max(self.dh, self.dw or 0.0)


def truth(problem: Problem) -> Truth:
    """The fp64 answer to `problem`. Holds N·V fp64 logits: for a few rows only."""
    case, vocab = problem.case, problem.case.vocab
    hs, ws = problem.hs.detach(), problem.ws.detach()
    z_s = _logits(hs, ws, vocab).requires_grad_(True)
    z_t = None if problem.ht is None else _logits(*problem.teacher(), vocab)
    if case.loss == "relation" and z_t is not None:
        loss = reference.relation_cosine(z_s, z_t, problem.ends)
    elif case.loss in PREFERENCES and z_t is not None:
        ours, theirs = (reference.linear_logprob(z, problem.labels) for z in (z_s, z_t))
        loss = preference(problem, problem.answers(ours - theirs))
    else:
        mean = 1 / case.rows
        loss, _, _ = reference.linear_distill(
            z_s, z_t, problem.labels, ce_weight=0.0 if case.loss == "kl" else mean, kd_weight=mean,
            divergence=case.divergence,
        )  # fmt: skip
    (dz,) = torch.autograd.grad(loss, z_s)
    slices = zip(dz.split(_SLICE, 1), ws[:vocab].split(_SLICE), strict=True)
    dh = torch.stack([columns @ part.double() for columns, part in slices]).sum(0)
    dw = None
    if case.train_head:
        dw = torch.zeros(ws.shape, dtype=torch.float64, device=ws.device)
        torch.mm(dz.mT, hs.double(), out=dw[:vocab])
    return Truth(loss.detach(), dh, dw)


def errors(method: Method, problem: Problem, expected: Truth) -> Errors:
    """One run of `method`, compared with the truth of the same problem.

    Raises:
        RuntimeError: the method left no gradient where one is wanted.
    """
    problem.forget_gradients()
    loss = method.build(problem)()
    dh, dw = problem.hs.grad, problem.dw
    if loss is None or dh is None or (dw is None) != (expected.dw is None):
        raise RuntimeError(f"{method.label}: a loss or a gradient is missing, or one too many")
    off = None if dw is None or expected.dw is None else relative(dw, expected.dw)
    return Errors(relative(loss, expected.loss), relative(dh, expected.dh), off)


def verdict(found: Errors, dtype: str) -> str:
    """ "" for a right answer, else what is wrong with it. A NaN is wrong."""
    if not found.loss <= WRONG_LOSS[dtype]:
        return f"loss off by {found.loss:.1e} of its value"
    if not found.gradient <= WRONG_GRADIENT[dtype]:
        return f"gradient off by {found.gradient:.1e} of its norm"
    return ""


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖/‖expected‖ in fp64; a piece at a time, a gradient of a head is large."""
    off = norm = torch.zeros((), dtype=torch.float64, device=expected.device)
    pieces = got.detach().reshape(-1).split(2**22), expected.reshape(-1).split(2**22)
    for x, y in zip(*pieces, strict=True):
        off, norm = off + (x.double() - y).square().sum(), norm + y.square().sum()
    return float((off / norm).sqrt())


def _logits(h: Tensor, w: Tensor, vocab: int) -> Tensor:
    """(N, V) in fp64, of h (N, D) and w (≥V, D)."""
    slices = w[:vocab].split(_SLICE)
    return torch.cat([reference.logits(h.double(), part.double()) for part in slices], dim=1)
