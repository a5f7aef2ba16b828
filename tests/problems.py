"""Which inputs? One factory of named problems, and what each of them must come out as.

Every problem is a student and a teacher head with their rows, small and of one purpose. `expected`
gives the truth from `mllmkd_kernels.reference` in fp64 on the very same numbers, `naive` what plain
PyTorch makes of them in fp32, `run` what the package makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import reference
from mllmkd_kernels.backends.calls import Head, Targets, dtype_of
from tests.tolerances import check

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "soft_cross_entropy",
)
BACKENDS = ("eager", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Result(NamedTuple):
    loss: Tensor
    ce: Tensor
    kd: Tensor
    dh: Tensor
    dw: Tensor
    db: Tensor | None


@dataclass(frozen=True)
class Problem:
    """Tensors of `fused_linear_distill` and its options; leaves are made anew by every `run`."""

    hs: Tensor  # (N, D_s)
    ws: Tensor  # (V_s, D_s)
    ht: Tensor  # (N, D_t)
    wt: Tensor  # (V_t, D_t)
    labels: Tensor  # (N,)
    bs: Tensor | None = None  # (V_s,)
    bt: Tensor | None = None  # (V_t,)
    ce_weight: Tensor | None = None  # (N,); None: 1/N each
    kd_weight: Tensor | None = None  # (N,)
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem with heads and hidden states of another dtype."""
        names = ("hs", "ws", "ht", "wt", "bs", "bt")
        values = {n: getattr(self, n) for n in names}
        return replace(self, **{n: t if t is None else t.to(dtype) for n, t in values.items()})

    def on(self, device: torch.device | str) -> Problem:
        """The same problem with its tensors on `device`."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def vocab(self) -> int:
        return self.options.get("vocab_size") or min(self.ws.shape[0], self.wt.shape[0])

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weights of the two terms of every row."""
        rows = self.hs.shape[0]
        even = self.hs.new_full((rows,), 1.0 / max(rows, 1), dtype=torch.float64)
        return (
            even if self.ce_weight is None else self.ce_weight,
            even if self.kd_weight is None else self.kd_weight,
        )


def asked(
    p: Problem, divergence: mk.Divergence, teacher: bool = True, labelled: bool = True
) -> tuple[Head, Head | None, Targets]:
    """What a backend's function is asked for a problem."""
    student = Head(p.hs, p.ws, p.bs, p.options.get("student_softcap") or 0.0)
    other = Head(p.ht, p.wt, p.bt, p.options.get("teacher_softcap") or 0.0)
    ce, kd = (w.to(dtype_of(student, other)) for w in p.weights())
    targets = Targets(
        p.labels if labelled else None, ce if labelled else None, kd if teacher else None,
        divergence, p.options.get("temperature", 1.0),
        standardize=p.options.get("standardize", False),
    )  # fmt: skip
    return student, other if teacher else None, targets


def run(p: Problem, backend: str, divergence: Any = "forward_kl", **overrides: Any) -> Result:
    """Loss, terms and gradients by the package, forward and backward."""
    hs, ws = p.hs.clone().requires_grad_(), p.ws.clone().requires_grad_()
    bs = None if p.bs is None else p.bs.clone().requires_grad_()
    ce_weight, kd_weight = p.weights()
    options = {
        "ce_weight": ce_weight, "kd_weight": kd_weight, "divergence": divergence,
        "student_bias": bs,
        "teacher_bias": p.bt, "backend": backend, **p.options, **overrides,
    }  # fmt: skip
    out = mk.fused_linear_distill(hs, ws, p.ht, p.wt, p.labels, **options)
    out.loss.backward()
    assert hs.grad is not None and ws.grad is not None
    return Result(
        out.loss.detach(), out.ce, out.kd, hs.grad, ws.grad, None if bs is None else bs.grad
    )


def expected(p: Problem, divergence: Any = "forward_kl", dtype: Any = torch.float64) -> Result:
    """The same by the definitions, whole logits and autograd."""
    exact = p.to(dtype)
    hs, ws = exact.hs.clone().requires_grad_(), exact.ws.clone().requires_grad_()
    bs = None if exact.bs is None else exact.bs.clone().requires_grad_()
    options = dict(p.options)
    v, temperature = p.vocab, options.get("temperature", 1.0)
    z_s = reference.logits(hs, ws, bs, options.get("student_softcap"), v)
    z_t = reference.logits(exact.ht, exact.wt, exact.bt, options.get("teacher_softcap"), v)
    ce_weight, kd_weight = (w.to(dtype) for w in p.weights())
    hard, ce, _ = reference.linear_distill(
        z_s, None, p.labels, ce_weight=ce_weight, ignore_index=options.get("ignore_index", -100)
    )
    if options.get("standardize"):
        z_s, z_t = reference.standardize(z_s), reference.standardize(z_t)
    soft, _, kd = reference.linear_distill(
        z_s, z_t, kd_weight=kd_weight, divergence=divergence, temperature=temperature
    )
    loss = hard + soft
    loss.backward()
    assert hs.grad is not None and ws.grad is not None
    terms = loss.detach(), ce.detach(), kd.detach()
    return Result(*terms, hs.grad, ws.grad, None if bs is None else bs.grad)


def naive(p: Problem, divergence: Any = "forward_kl") -> Result:
    """Plain PyTorch in fp32 on the inputs as they are: the yardstick of a fair error."""
    return expected(p, divergence, torch.float32)


def check_result(got: Result, p: Problem, divergence: str, dtype: torch.dtype) -> None:
    """Every field of a result against fp64, in units of what plain fp32 achieves."""
    want, plain = expected(p, divergence), naive(p, divergence)
    head = p.ws.double().norm() * sum(w.double().abs().max() for w in p.weights() if w.numel())
    # Below 1e-9 nats of a KL, whose terms are second-order small, and for |p − q|, which is not.
    values = {"cancels": 1.0 if divergence == "total_variation" else 1e-3, "what": divergence}
    fp64 = dtype == torch.float64
    for name in ("loss", "ce", "kd"):
        row = "fp64" if fp64 else "value"
        check(getattr(got, name), getattr(want, name), row, getattr(plain, name), **values)
    for name in ("dh", "dw", "db"):
        gradient, like = getattr(got, name), getattr(want, name)
        if like is None:
            continue
        row = "fp64" if fp64 else "gradient" if dtype == torch.float32 else "16-bit gradient"
        cancels = float(head) / p.ws.shape[1] ** 0.5 if p.hs.numel() else 0.0
        check(
            gradient, like, row, getattr(plain, name), cancels=cancels, what=f"{divergence} {name}"
        )


# --- the named problems --------------------------------------------------------------------------


def _random(
    n: int, v_s: int, v_t: int, d_s: int, d_t: int, scale: float = 2.0, seed: int = 0
) -> Problem:
    """Logits of standard deviation `scale`; every seventh row without a label."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    vocab = min(v_s, v_t)
    labels = torch.randint(0, vocab, (n,), generator=g)
    labels[3::7] = -100
    return Problem(
        hs=normal(n, d_s), ws=normal(v_s, d_s) * scale / d_s**0.5,
        ht=normal(n, d_t), wt=normal(v_t, d_t) * scale / d_t**0.5, labels=labels,
    )  # fmt: skip


def near_converged(
    eps: float, n: int = 24, v: int = 1024, d: int = 48, seed: int = 0, two_sided: bool = False
) -> Problem:
    """Teacher logits = student logits + ε·noise, exactly so in 16 bits too: the noise has hidden
    features of its own. 24 rows and 1,024 tokens keep a rung below 10 ms; the error is relative.

    `two_sided` noise is ±1: no token has p = q to within rounding, where the slope of |p − q| has
    no right answer in any finite precision.
    """
    p = _random(n, v, v, d, d, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    if two_sided:
        noise = [torch.randint(0, 2, (m, 1), generator=g) * 2.0 - 1 for m in (n, v)]
    else:
        noise = [torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) / d**0.5]
    ht = torch.cat((p.hs, eps * noise[0]), 1)
    return replace(p, ht=ht, wt=torch.cat((p.ws, noise[1]), 1), ce_weight=torch.zeros(n))


def _aligned() -> Problem:
    # Multiples of every vector width and tile: no remainder loop runs.
    return _random(32, 512, 512, 64, 128)


def _ragged() -> Problem:
    # Primes: every remainder loop runs; all options at once, the teacher's head the larger.
    p = _random(13, 307, 331, 11, 19)
    g = torch.Generator().manual_seed(9)
    options = {"temperature": 2.0, "student_softcap": 5.0, "teacher_softcap": 4.0}
    return replace(
        p, bs=torch.randn(307, generator=g), bt=torch.randn(331, generator=g),
        ce_weight=torch.rand(13, generator=g), kd_weight=torch.rand(13, generator=g),
        options=options,
    )  # fmt: skip


def _peaked() -> Problem:
    # Logits of ±60: one token holds all the mass, and the models disagree about which.
    return _random(9, 257, 257, 16, 24, scale=20.0)


def _masked() -> Problem:
    # The teacher forbids every third token: p = 0 exactly where q > 0.
    p = _random(9, 200, 200, 16, 24)
    bt = torch.zeros(200)
    bt[::3] = -torch.inf
    return replace(p, bt=bt)


def _one_row() -> Problem:
    return _random(1, 97, 97, 8, 8)


def _empty() -> Problem:
    return _random(0, 97, 97, 8, 8)


def _constant() -> Problem:
    # Every logit equal: both models uniform, D = 0, CE = log V.
    p = _random(5, 128, 128, 8, 8)
    return replace(p, ws=p.ws[:1].expand(128, 8).clone(), wt=p.wt[:1].expand(128, 8).clone())


def _huge() -> Problem:
    # Logits of 1e4: any exp without its maximum subtracted overflows, all but one underflow.
    return _random(6, 130, 130, 8, 8, scale=1e4)


def _one_hot_teacher() -> Problem:
    # The teacher is certain, p is 1 and exact zeros; the student is not.
    p = _random(7, 128, 128, 16, 16)
    return replace(p, wt=p.wt * 5e3)


def _zero_weight_rows() -> Problem:
    p = _random(8, 150, 150, 16, 24)
    weight = torch.ones(8) / 8
    weight[2] = weight[5] = 0
    return replace(p, ce_weight=weight, kd_weight=weight)


def _larger_student() -> Problem:
    return _random(10, 211, 190, 16, 24)


def _larger_teacher() -> Problem:
    return _random(10, 190, 211, 16, 24)


def _small_vocab_size() -> Problem:
    # A vocabulary below both heads, as padded heads have.
    return replace(_random(10, 190, 211, 16, 24), options={"vocab_size": 180})


def _identical() -> Problem:
    p = _random(12, 300, 300, 32, 32)
    return replace(p, ht=p.hs.clone(), wt=p.ws.clone(), ce_weight=torch.zeros(12))


def _one_token() -> Problem:
    # V = 1: both models are certain, every term is 0.
    return _random(4, 1, 1, 8, 8)


PROBLEMS = {
    "aligned": _aligned,
    "ragged": _ragged,
    "peaked": _peaked,
    "near_converged": lambda: near_converged(0.01),
    "masked": _masked,
    "one_row": _one_row,
    "empty": _empty,
    "constant": _constant,
    "huge": _huge,
    "one_hot_teacher": _one_hot_teacher,
    "identical": _identical,
    "zero_weight_rows": _zero_weight_rows,
    "larger_student": _larger_student,
    "larger_teacher": _larger_teacher,
    "small_vocab_size": _small_vocab_size,
    "one_token": _one_token,
}


def problem(name: str, dtype: torch.dtype = torch.float32) -> Problem:
    """A problem by name, its heads and hidden states in `dtype`."""
    return PROBLEMS[name]().to(dtype)
