"""Random cases for the C++ kernels, and the oracle they are held against.

The oracle is written from the table of divergences alone: fp64, whole logits, autograd. It shares
no code with `reference.py` or the eager backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mllmkd_kernels import Divergence
from mllmkd_kernels.backends import cpu, eager
from mllmkd_kernels.backends.calls import Head, Options, Targets

DIVERGENCES = {
    "forward_kl": 0.0,
    "reverse_kl": 0.0,
    "jsd": 0.3,
    "skew_forward_kl": 0.1,
    "skew_reverse_kl": 0.1,
    "total_variation": 0.0,
    "soft_cross_entropy": 0.0,
}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Relative error of a whole tensor: fp64 rounding; fp32 logits; one rounding of dz and one of dW to
#: 16 bits, which average out over hundreds of rows (DESIGN 6 grants 0.3%).
BOUND = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}


@dataclass
class Case:
    """What `distill_rows` is asked; shapes as in `calls`."""

    hs: Tensor
    ws: Tensor
    ht: Tensor | None
    wt: Tensor | None
    labels: Tensor | None
    ce_weight: Tensor | None
    kd_weight: Tensor | None
    bs: Tensor | None = None
    bt: Tensor | None = None
    temperature: float = 1.0
    cap_s: float = 0.0
    cap_t: float = 0.0
    vocab: int = 0
    chunk: int = 1 << 20

    def run(
        self,
        divergence: str,
        want: tuple[bool, bool, bool] = (True, True, True),
        factored: bool = False,
    ) -> tuple[Tensor, ...]:
        """With `factored` dw is formed afterwards, of dz, and rounded."""
        teacher = None
        if self.ht is not None and self.wt is not None:
            teacher = Head(self.ht, self.wt, self.bt, self.cap_t)
        table = Divergence.with_param(divergence, DIVERGENCES[divergence])
        targets = Targets(self.labels, self.ce_weight, self.kd_weight, table, self.temperature)
        loss, ce, kd, dh, dw, db = cpu.distill_rows(
            Head(self.hs, self.ws, self.bs, self.cap_s), teacher, targets,
            Options(self.vocab, self.chunk, *want, factored=factored),
        )  # fmt: skip
        if factored:
            h, one, (rows, _) = eager.alive(self.hs, targets), torch.ones_like(loss), self.ws.shape
            dw = cpu.head_gradient(dw, h, one, rows, self.vocab, self.ws.dtype)
        return loss, ce, kd, dh, dw, db


def make(
    n: int = 70,
    v: int = 501,
    d_s: int = 70,
    d_t: int = 33,
    dtype: torch.dtype = torch.float32,
    **options,
) -> Case:
    """A random case: a third of the labels ignored, some rows without one weight or the other,
    vocabularies with padding.
    """
    generator = torch.Generator().manual_seed(n + v)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.6).to(dtype)

    real = torch.float64 if dtype == torch.float64 else torch.float32
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[::3] = -100
    ce, kd = torch.rand(2, n, generator=generator).to(real)
    ce[1::7], kd[2::7] = 0, 0
    return Case(
        normal(n, d_s),
        normal(v + 9, d_s),
        normal(n, d_t),
        normal(v + 4, d_t),
        labels,
        ce,
        kd,
        vocab=v,
        **options,
    )


def logits(h: Tensor, w: Tensor, b: Tensor | None, cap: float, vocab: int) -> Tensor:
    z = h.double() @ w.double().T[:, :vocab]
    z = z if b is None else z + b.double()[:vocab]
    return cap * torch.tanh(z / cap) if cap else z


def divergence_of(name: str, log_p: Tensor, log_q: Tensor, c: float) -> Tensor:
    """Rows of the table of DESIGN section 2, as they stand there."""
    p, q = log_p.exp(), log_q.exp()

    def kl(x: Tensor, log_x: Tensor, log_y: Tensor) -> Tensor:
        terms = x * (log_x - log_y)
        return torch.where(x == 0, torch.zeros_like(terms), terms).sum(1)

    def mix(share_p: float) -> Tensor:
        return torch.logaddexp(log_p + math.log(share_p), log_q + math.log(1 - share_p))

    return {
        "forward_kl": lambda: kl(p, log_p, log_q),
        "reverse_kl": lambda: kl(q, log_q, log_p),
        "jsd": lambda: c * kl(p, log_p, mix(c)) + (1 - c) * kl(q, log_q, mix(c)),
        "skew_forward_kl": lambda: kl(p, log_p, mix(c)),
        "skew_reverse_kl": lambda: kl(q, log_q, mix(1 - c)),
        "total_variation": lambda: (p - q).abs().sum(1) / 2,
        "soft_cross_entropy": lambda: -(p * log_q).sum(1),
    }[name]()


def oracle(case: Case, divergence: str) -> tuple[Tensor, ...]:
    """(loss, ce, kd, dh, dw, db) in fp64 by autograd."""
    h, w = (x.double().requires_grad_() for x in (case.hs, case.ws))
    b = None if case.bs is None else case.bs.double().requires_grad_()
    z = logits(h, w, b, case.cap_s, case.vocab)
    n = h.shape[0]
    ce = kd = torch.zeros(n, dtype=torch.float64)
    if case.labels is not None:
        valid = case.labels != -100
        picked = z.log_softmax(1).gather(
            1, case.labels.where(valid, torch.zeros_like(case.labels))[:, None]
        )
        ce = -picked[:, 0] * valid
    if case.ht is not None:
        assert case.wt is not None
        z_t = logits(case.ht, case.wt, case.bt, case.cap_t, case.vocab)
        t = case.temperature
        kd = divergence_of(
            divergence, (z_t / t).log_softmax(1), (z / t).log_softmax(1), DIVERGENCES[divergence]
        )
    loss = torch.zeros((), dtype=torch.float64)
    for weight, value in ((case.ce_weight, ce), (case.kd_weight, kd)):
        if weight is not None:
            loss = loss + (weight.double() * value)[weight != 0].sum()
    leaves = [h, w] if b is None else [h, w, b]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    db = grads[2] if b is not None else (torch.zeros(w.shape[0], dtype=torch.float64))
    return loss.detach(), ce.detach(), kd.detach(), grads[0], grads[1], db


def error(got: Tensor, want: Tensor) -> float:
    scale = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (scale or 1.0)


def compare(case: Case, divergence: str, bound: float) -> None:
    names = ("loss", "ce", "kd", "dh", "dw", "db")
    fields = names if case.bs is not None else names[:-1]
    truth = oracle(case, divergence)
    for factored in (False, True):
        found = case.run(divergence, factored=factored)
        for name, got, want in zip(fields, found, truth, strict=False):
            limit = bound if name in ("dh", "dw") else min(bound, 2e-5)
            off = error(got, want)
            assert off <= limit, f"{name}, factored {factored}: {off:.2e} > {limit:.0e}"
        assert not found[4][case.vocab :].any()
