"""Which tensors? The inputs of a case, the same for every method.

Hidden states are standard normal and heads scaled so that logits have a standard deviation of 2.5:
peaked distributions, as those of language models are. Uniform random inputs, the habit of published
benchmarks, make a softmax that is nearly flat and flatter every method's accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shapes import DTYPES, Case

LOGIT_STD = 2.5
BETA = 0.1  # of preference losses

Forward = Callable[[], Tensor]  # the loss of a problem
Run = Callable[[], Tensor | None]  # and its backward: gradients are left; the floor has no loss


@dataclass
class Problem:
    """Inputs of a case; heads and hidden states are leaves, gradients land in their ``.grad``, or
    that of the head in what a method has made `main_grad`.
    """

    case: Case
    hs: Tensor  # (N, D_s), requires grad
    ws: Tensor  # (V_s, D_s), requires grad where the case trains the head
    ht: Tensor | None  # (N, D_t); None for "ce"
    wt: Tensor | None  # (V_t, D_t)
    labels: Tensor  # (N,) int64
    main_grad: Tensor | None = None  # (V_s, D_s) fp32

    def __post_init__(self) -> None:
        self.hs.requires_grad_(True)
        self.ws.requires_grad_(self.case.train_head)

    @property
    def ends(self) -> Tensor:
        """(images + 1,) int32: where the rows of every image begin, and the last end."""
        images = torch.arange(self.case.images + 1, dtype=torch.int32, device=self.hs.device)
        return images * self.case.rows

    def teacher(self) -> tuple[Tensor, Tensor]:
        """(ht, wt), for a loss that has a teacher."""
        if self.ht is None or self.wt is None:
            raise ValueError(f"problem: loss {self.case.loss!r} has no teacher")
        return self.ht, self.wt

    def answers(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of (N,) log-probabilities over the chosen answers and over the rejected: (B,)."""
        chosen, rejected = logp.view(-1, self.case.rows).sum(1).chunk(2)
        return chosen, rejected

    @property
    def dw(self) -> Tensor | None:
        """The head's gradient, None where there is none."""
        return self.ws.grad if self.main_grad is None else self.main_grad

    def forget_gradients(self) -> None:
        """As ``zero_grad(set_to_none=True)`` between steps; who owns an accumulator zeroes it."""
        self.hs.grad = self.ws.grad = None
        if self.main_grad is not None:
            self.main_grad.zero_()
            self.main_grad = None


def with_backward(forward: Forward) -> Run:
    """What a trainer does with a loss; returns it detached."""

    def run() -> Tensor:
        loss = forward()
        loss.backward()
        return loss.detach()

    return run


def make(case: Case, device: str = "cpu") -> Problem:
    """The tensors of `case`: teacher and student independent, far from convergence."""
    rng = torch.Generator(device).manual_seed(0)
    dtype, rows = DTYPES[case.dtype], case.all_rows
    hs, ws = _hidden(rows, case.d_s, dtype, rng), _head(case.vocab_s, case.d_s, dtype, rng)
    ht = wt = None
    if case.loss != "ce":
        ht, wt = _hidden(rows, case.d_t, dtype, rng), _head(case.vocab_t, case.d_t, dtype, rng)
    labels = torch.randint(case.vocab, (rows,), generator=rng, device=device)
    return Problem(case, hs, ws, ht, wt, labels)


def make_near(case: Case, epsilon: float, device: str = "cpu") -> Problem:
    """A rung of the ladder: both models share a head, ``h_t = h_s + ε·noise``."""
    rng = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.dtype]
    h, noise = (_hidden(case.rows, case.d_s, torch.float32, rng) for _ in range(2))
    ws = _head(case.vocab_s, case.d_s, dtype, rng)
    ht = (h + epsilon * noise).to(dtype)
    labels = torch.randint(case.vocab, (case.rows,), generator=rng, device=device)
    return Problem(case, h.to(dtype), ws, ht, ws.detach(), labels)


def _hidden(rows: int, d: int, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    return torch.randn(rows, d, generator=rng, device=rng.device).to(dtype)


def _head(vocab: int, d: int, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Drawn a slice at a time, so that building a bf16 head never holds an fp32 one."""
    w = torch.empty(vocab, d, dtype=dtype, device=rng.device)
    for part in w.split(8192):
        values = torch.randn(part.shape, generator=rng, device=rng.device)
        part.copy_(values.mul_(LOGIT_STD / d**0.5))
    return w
