"""What does it cost that the student says q where the teacher says p?

Every divergence of this package is a sum over the vocabulary, ``D = Σ_k f(p_k, q_k)``, of the two
softmaxes ``p`` (teacher) and ``q`` (student). Its gradient with respect to the student's logits
``a`` is ``∂D/∂a = q ∘ (g − Σ_k q_k g_k)`` with ``g = ∂f/∂q``, so a divergence is one row of one
table: `f` and `g`. The C++ kernels carry the same rows under the same names.

How the terms are written decides whether the answer survives in fp32. With ``u = log q − log p``:

* ``f`` is given up to a multiple of ``q − p``, which sums to zero over the vocabulary. Chosen
  right, every term is second-order small where the models agree: forward KL is ``Σ p (expm1(u) −
  u)``, not ``Σ p log(p/q)``, whose terms of both signs cancel.
* ``g`` is given up to a constant, which ``g − Σ q g`` removes. Chosen to vanish at ``u = 0``, the
  difference is not one of two large numbers.
* Where ``|u|`` is large the plain form in p and q is used, because ``p · expm1(u)`` may overflow
  where ``q − p`` cannot.

All divergences are built from one function, the KL to a mixture: ``KL(p ‖ λp + (1−λ)q)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

#: name → (name of its parameter or None, default). The order is that of DESIGN's table.
PARAMETERS: dict[str, tuple[str | None, float]] = {
    "forward_kl": (None, 0.0),
    "reverse_kl": (None, 0.0),
    "jsd": ("beta", 0.5),
    "skew_forward_kl": ("lam", 0.1),
    "skew_reverse_kl": ("lam", 0.1),
    "total_variation": (None, 0.0),
    "soft_cross_entropy": (None, 0.0),
}

#: Divergences whose gradient is q − p: no mean over the whole row has to be known first.
ONE_SWEEP = frozenset({"forward_kl", "soft_cross_entropy"})


def sweeps(divergence: str | None, want_gradient: bool) -> int:
    """How often the logits are gone through where they do not stay at hand: log-sum-exps; values or
    gradient, if there is either; the gradient apart, where it needs a mean over the whole row.
    `divergence` None: no teacher.
    """
    teacher = divergence is not None
    apart = teacher and want_gradient and divergence not in ONE_SWEEP
    return 1 + (teacher or want_gradient) + apart


@dataclass(frozen=True)
class Divergence:
    """A divergence by name, with its parameter where it has one.

    ================== =========================================== ===================
    name               value                                       parameter, default
    ================== =========================================== ===================
    forward_kl         Σ p log(p/q)                                –
    reverse_kl         Σ q log(q/p)                                –
    jsd                β KL(p‖m) + (1−β) KL(q‖m), m = βp + (1−β)q  ``beta``, 0.5
    skew_forward_kl    KL(p ‖ λp + (1−λ)q)                         ``lam``, 0.1
    skew_reverse_kl    KL(q ‖ (1−λ)p + λq)                         ``lam``, 0.1
    total_variation    ½ Σ |p − q|                                 –
    soft_cross_entropy −Σ p log q (= forward KL + H(p))            –
    ================== =========================================== ===================

    Parameters lie in (0, 1).

    Conventions elsewhere, since they are easily taken the wrong way round (p teacher, q student):

    * ``beta`` is the teacher's share of the mixture ``m``. TRL and GKD (arXiv 2306.13649, eq. 1)
      use the same value with the same meaning inside (0, 1), and define β = 0 as forward KL and β =
      1 as reverse KL; Liger likewise. Here the end points are divergences of their own: a JSD with
      β = 0 would be identically zero.
    * ``lam`` is the share of the *first* argument in the mixture. DistiLLM (arXiv 2402.03898)
      writes the skew KL with the same α: ``skew_forward_kl`` is its SKL, ``skew_reverse_kl`` its
      SRKL, and 0.1 is its default.
    * No T² is applied for a temperature. For Hinton's scaling multiply ``kd_weight`` by T².

    Raises:
        ValueError: unknown name, a parameter the divergence does not have, or one outside (0, 1).
    """

    name: str = "forward_kl"
    beta: float | None = None
    lam: float | None = None

    def __post_init__(self) -> None:
        if self.name not in PARAMETERS:
            raise ValueError(
                f"divergence: got {self.name!r}, expected one of {', '.join(PARAMETERS)}"
            )
        mine, _ = PARAMETERS[self.name]
        for key in ("beta", "lam"):
            value = getattr(self, key)
            if value is None:
                continue
            if key != mine:
                raise ValueError(
                    f"divergence: {self.name!r} has no parameter {key!r} (got {key}={value})"
                )
            number: Any = value if isinstance(value, Real | torch.SymFloat) else math.nan
            if not 0.0 < number < 1.0:
                raise ValueError(
                    f"divergence: {key} of {self.name!r} must lie in (0, 1), got {value}"
                )

    @property
    def param(self) -> float:
        """The parameter's value, 0.0 for a divergence without one."""
        key, default = PARAMETERS[self.name]
        value = None if key is None else getattr(self, key)
        return default if value is None else float(value)

    @classmethod
    def with_param(cls, name: str, param: float) -> Divergence:
        """The one whose `name` and `param` these are."""
        key, _ = PARAMETERS[name]
        return cls(name, **({} if key is None else {key: param}))

    @classmethod
    def of(cls, divergence: str | Divergence) -> Divergence:
        """Accept a name or a `Divergence`."""
        if isinstance(divergence, Divergence):
            return divergence
        if not isinstance(divergence, str):
            raise TypeError(
                f"divergence: expected a name or a Divergence, got {type(divergence).__name__}"
            )
        return cls(divergence)


class Pair:
    """What the terms of every divergence are made of: the normalised log-probabilities of teacher
    and student, (N, V) or some columns of it, and what follows from both, each made when it is
    first asked for. A row that holds a NaN is NaN throughout.
    """

    def __init__(self, log_p: Tensor, log_q: Tensor) -> None:
        self.log_p, self.log_q = log_p, log_q

    @cached_property
    def p(self) -> Tensor:
        """The teacher's probabilities."""
        return self.log_p.exp()

    @cached_property
    def q(self) -> Tensor:
        """The student's."""
        return self.log_q.exp()

    @cached_property
    def _larger(self) -> Tensor:
        """max(p, q)."""
        return torch.maximum(self.log_p, self.log_q).exp_()

    @cached_property
    def log_ratio(self) -> Tensor:
        """u = log q − log p, 0 where both models mask the token."""
        u = (self.log_q - self.log_p).nan_to_num_(0.0, torch.inf, -torch.inf)
        return u.add_(0 * self._larger.sum(-1, keepdim=True))  # a NaN row's NaN again

    @cached_property
    def difference(self) -> Tensor:
        """q − p as ± max(p, q) · (1 − exp(−|u|)), which loses nothing where the two are close."""
        u = self.log_ratio
        return u.abs().neg_().expm1_().mul_(self._larger).copysign_(u)


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p · x with 0 · ±inf = 0: a token the model gives no mass (a masked logit) contributes
    nothing.
    """
    most = torch.finfo(p.dtype).max
    bound = (p * most).mul_(most).mul_(most)  # 0 where p is, else infinite, however small p
    return x.clamp(-bound, bound).mul_(p)


def _either(inside: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """`near` where `inside` is 1, `far` where it is 0; finite where they are not taken. On a CPU
    ``torch.where`` is not vectorised: it takes as long as four exponentials.
    """
    return torch.addcmul(far * (1 - inside), near, inside)


def _log_mix(u: Tensor, w: float) -> Tensor:
    """log((1 − w) + w eᵘ), exact near u = 0 and without overflow for large u."""
    if w == 1.0:
        return u
    positive = u.sign().clamp_(min=0)
    share = positive.mul_(1 - 2 * w).add_(w)  # of the smaller exponential: 1 − w or w
    return u.clamp(min=0) + torch.expm1(-u.abs()).mul_(share).log1p_()


def _second_order(u: Tensor, w: float) -> Tensor:
    """φ(u) = x − log1p(x) with x = w · expm1(u): the non-negative, second-order small value of
    one token, |u| ≤ 1.
    """
    if w == 1.0:  # expm1(u) − u by its series: as exact as the dtype at u = 1
        last = 19 if u.dtype == torch.float64 else 11
        return u * u * _polynomial(u, [1 / math.factorial(n) for n in range(2, last + 1)])
    x = w * torch.expm1(u)
    if u.dtype == torch.float64:
        return x - torch.log1p(x)
    series = x * x * _polynomial(x, (1 / 2, -1 / 3, 1 / 4, -1 / 5, 1 / 6, -1 / 7, 1 / 8))
    return _either(x.abs().lt_(0.1), series, x - torch.log1p(x))


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value.mul_(x).add_(c)
    return value


def _kl_to_mixture(p: Tensor, difference: Tensor, u: Tensor, lam: float) -> Tensor:
    """Terms of KL(p ‖ λp + (1−λ)q), with (1−λ)(q − p) added to each; u = log q − log p."""
    w = 1.0 - lam
    near = _second_order(u.clamp(-1, 1), w).mul_(p)
    far = (w * difference).sub_(_times(p, _log_mix(u, w)))
    return _either(u.abs().lt_(1), near, far)


def values(divergence: Divergence, pair: Pair) -> Tensor:
    """Row values D, (N,) in the dtype of the pair."""
    u, lam, log_q = pair.log_ratio, divergence.param, pair.log_q
    match divergence.name:
        case "forward_kl" | "skew_forward_kl":
            terms = _kl_to_mixture(pair.p, pair.difference, u, lam)
        case "reverse_kl" | "skew_reverse_kl":
            terms = _kl_to_mixture(pair.q, -pair.difference, -u, lam)
        case "jsd":
            terms = lam * _kl_to_mixture(pair.p, pair.difference, u, lam)
            terms += (1 - lam) * _kl_to_mixture(pair.q, -pair.difference, -u, 1 - lam)
        case "total_variation":
            terms = 0.5 * pair.difference.abs()
        case _:  # soft_cross_entropy
            terms = -_times(pair.p, log_q)
    return terms.sum(-1)


def entropies(log_p: Tensor) -> Tensor:
    """−Σ p log p of every row of normalised log-probabilities (N, V): (N,)."""
    return -_times(log_p.exp(), log_p).sum(-1)


def gradients(divergence: Divergence, pair: Pair) -> Tensor:
    """∂D/∂a (N, V) for the student's log-probabilities log_softmax(a). Not to be written to: it may
    be a tensor of the pair.
    """
    if divergence.name in ONE_SWEEP:
        return pair.difference
    slope = slopes(divergence, pair)
    return from_slopes(pair.q, slope, slope_sums(pair.q, slope))


def slopes(divergence: Divergence, pair: Pair) -> Tensor:
    """g = ∂f/∂q up to a constant, (N, V), of a divergence that is not in `ONE_SWEEP`."""
    u, lam = pair.log_ratio, divergence.param
    w = 1.0 - lam
    match divergence.name:
        case "reverse_kl":
            slope = u
        case "jsd":
            slope = -w * _log_mix(-u, lam)
        case "skew_forward_kl":
            slope = -w * torch.expm1(-_log_mix(u, w))
        case "skew_reverse_kl":
            mix = _log_mix(-u, w)
            slope = -mix - lam * torch.expm1(-mix)
        case _:  # total_variation
            most = torch.finfo(u.dtype).max
            slope = (u * most).clamp_(-0.5, 0.5)  # sign(NaN) would be 0
    return slope


def slope_sums(q: Tensor, slope: Tensor) -> Tensor:
    """Σ_k q_k g_k of every row, (N,); sums over slices of the vocabulary add up to it."""
    return _times(q, slope).sum(-1)


def from_slopes(q: Tensor, slope: Tensor, sums: Tensor) -> Tensor:
    """∂D/∂a = q ∘ (g − Σ_k q_k g_k), given the sums (N,) over the whole vocabulary."""
    return _times(q, slope - sums[:, None])
