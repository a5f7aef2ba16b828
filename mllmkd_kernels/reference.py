"""What is each loss? The definitions, in plain PyTorch over whole logits, runnable in fp64.

Nothing here is fast and nothing is clever: every backend is tested against these functions, and the
C++ and Triton sources quote them. Autograd differentiates them as they stand.

Shapes, here and everywhere: N rows (tokens), V vocabulary, C rows of a chunk, D hidden size, P
visual rows of one image; ``_s`` student, ``_t`` teacher; the gradient of ``x`` is ``dx``.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mllmkd_kernels.divergence import Divergence


def logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (≥V, D)
    bias: Tensor | None = None,  # (≥V,)
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """z = h Wᵀ + b over the first `vocab_size` columns, soft-capped to c·tanh(z/c) where c is
    given: (N, V).
    """
    z = hidden @ weight[:vocab_size].mT
    if bias is not None:
        z = z + bias[:vocab_size]
    return softcap * torch.tanh(z / softcap) if softcap else z


def divergence_rows(a: Tensor, b: Tensor, divergence: str | Divergence = "forward_kl") -> Tensor:
    """D(softmax(b) teacher, softmax(a) student) of every row of a, b (N, V): (N,)."""
    divergence = Divergence.of(divergence)
    log_q, log_p, c = a.log_softmax(-1), b.log_softmax(-1), divergence.param
    p, q = log_p.exp(), log_q.exp()

    def kl(x: Tensor, log_x: Tensor, log_m: Tensor) -> Tensor:  # 0 · log(0/m) is 0
        return (x * torch.where(x > 0, log_x - log_m, 0)).sum(-1)

    def log_mixture(share_p: float) -> Tensor:  # not the log of a sum that may underflow to 0
        return torch.logaddexp(log_p + math.log(share_p), log_q + math.log(1 - share_p))

    match divergence.name:
        case "forward_kl":
            return kl(p, log_p, log_q)
        case "reverse_kl":
            return kl(q, log_q, log_p)
        case "jsd":
            return c * kl(p, log_p, log_mixture(c)) + (1 - c) * kl(q, log_q, log_mixture(c))
        case "skew_forward_kl":
            return kl(p, log_p, log_mixture(c))
        case "skew_reverse_kl":
            return kl(q, log_q, log_mixture(1 - c))
        case "total_variation":
            return 0.5 * (p - q).abs().sum(-1)
        case _:  # soft_cross_entropy
            return kl(p, torch.zeros_like(p), log_q)


def linear_distill(
    z_s: Tensor,  # (N, V) student logits
    z_t: Tensor | None,  # (N, V) teacher logits
    labels: Tensor | None = None,  # (N,)
    *,
    ce_weight: float | Tensor = 0.0,
    kd_weight: float | Tensor = 1.0,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """L = Σ_n ce_weight[n]·CE_n + kd_weight[n]·D_n; returns (L, CE (N,), D (N,)). CE takes no
    temperature.
    """
    ce = kd = z_s.new_zeros(z_s.shape[0])
    if labels is not None:
        ce = F.cross_entropy(z_s, labels, ignore_index=ignore_index, reduction="none")
    if z_t is not None:
        kd = divergence_rows(z_s / temperature, z_t / temperature, divergence)
    return (ce_weight * ce).sum() + (kd_weight * kd).sum(), ce, kd


def entropy(z: Tensor, temperature: float = 1.0) -> Tensor:
    """H = −Σ q log q with q = softmax(z/T), in nats, of every row of z (N, V): (N,)."""
    log_q = (z / temperature).log_softmax(-1)
    q = log_q.exp()
    return -(q * torch.where(q == 0, 0, log_q)).sum(-1)  # 0 · log 0 is 0


def agreement(z_s: Tensor, z_t: Tensor) -> Tensor:
    """1 where some token is the most likely of both models, else 0: (N,) for logits (N, V). Of
    tokens that tie for the maximum one in common is enough.
    """
    same = (z_s == z_s.amax(-1, keepdim=True)) & (z_t == z_t.amax(-1, keepdim=True))
    return same.any(-1).to(z_s.dtype)


def relation_cosine(y_s: Tensor, y_t: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over images of 1 − <R_s, R_t>/(‖R_s‖‖R_t‖), R = Y Yᵀ of an image's rows (raw,
    LLaVA-KD eq. 5).
    """
    ends = cu_seqlens.tolist()
    losses = []
    for start, end in pairwise(ends):
        r_s, r_t = (y[start:end] @ y[start:end].mT for y in (y_s, y_t))
        losses.append(1 - (r_s * r_t).sum() / (r_s.norm() * r_t.norm()))
    return torch.stack(losses).mean() if losses else (y_s * 0).sum()


def linear_logprob(
    z: Tensor, labels: Tensor, temperature: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """log softmax(z/T)[label] of every row, 0 where the label is `ignore_index`: (N,)."""
    return -F.cross_entropy(z / temperature, labels, ignore_index=ignore_index, reduction="none")


def standardize(z: Tensor, eps: float = 1e-7) -> Tensor:
    """(z − μ)/(σ + eps) of every row of z (N, V), σ its population standard deviation (LLAVADI's
    `norm_logits`, whose σ has V − 1): (N, V).
    """
    return (z - z.mean(-1, keepdim=True)) / (logit_std(z)[:, None] + eps)


def logit_std(z: Tensor) -> Tensor:
    """Population standard deviation of every row of z (N, V): (N,)."""
    return (z - z.mean(-1, keepdim=True)).square().mean(-1).sqrt()


def linear_logit_mse(
    z_s: Tensor, z_t: Tensor, row_weight: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """L = Σ_n row_weight[n] · mean_k (z_s − z_t)²; returns (L, the means (N,))."""
    rows = (z_s - z_t).square().mean(-1)
    return (row_weight * rows).sum(), rows


def affinity(
    student: Tensor,  # (N, D_s)
    teacher: Tensor,  # (N, D_t)
    visual: Tensor,  # (P,)
    response: Tensor,  # (M,)
    cu_visual: Tensor,  # (samples + 1,)
    cu_response: Tensor,  # (samples + 1,)
    joint: bool = False,
) -> Tensor:
    """Squared differences of the cosines of visual and response rows of a sample: the mean over
    samples of their means over cells, or the mean over all cells.
    """
    splits = zip(pairwise(cu_visual.tolist()), pairwise(cu_response.tolist()), strict=True)
    gaps = []
    for (v0, v1), (r0, r1) in splits:
        cosines = [
            F.normalize(x[visual[v0:v1]], dim=-1) @ F.normalize(x[response[r0:r1]], dim=-1).mT
            for x in (student, teacher)
        ]
        gaps.append((cosines[0] - cosines[1]).square().flatten())
    if joint:
        cells = torch.cat(gaps)
        return cells.sum() / max(len(cells), 1)
    return torch.stack([gap.sum() / max(len(gap), 1) for gap in gaps]).mean()


def contrast(
    student: Tensor,  # (N, D_s)
    teacher: Tensor,  # (N, D_t)
    visual: Tensor,  # (P,)
    response: Tensor,  # (M,)
    cu_visual: Tensor,  # (samples + 1,)
    cu_response: Tensor,  # (samples + 1,)
) -> Tensor:
    """Cross-entropies of the cosines of visual rows of one and response rows of another sample, in
    both directions and over the number of answers; the mean over all pairs of samples.
    """
    units = [F.normalize(x, dim=-1) for x in (student, teacher)]
    images, answers = (list(pairwise(cu.tolist())) for cu in (cu_visual, cu_response))
    total = student.new_zeros(())
    for a, b in images:
        for c, d in answers:
            if a < b and c < d:
                ours, theirs = (u[visual[a:b]] @ u[response[c:d]].mT for u in units)
                both = F.cross_entropy(ours, theirs) + F.cross_entropy(ours.mT, theirs.mT)
                total = total + both / 2 / (d - c)
    return total / max(len(images), 1) ** 2


def preference(
    r_c: Tensor, r_r: Tensor, kind: str, beta: float, detach_baseline: bool = True
) -> Tensor:
    """Mean over pairs, of log-ratios to the reference of chosen and rejected answers (B,)."""
    margin = r_c - r_r
    match kind:
        case "sigmoid":
            return -torch.log(torch.sigmoid(beta * margin)).mean()
        case "hinge":
            return torch.clamp(1 - beta * margin, min=0).mean()
        case "ipo":
            return ((margin - 1 / (2 * beta)) ** 2).mean()
        case _:  # kto_pair
            k_c, k_r = r_c.mean().clamp(min=0), r_r.mean().clamp(min=0)
            if detach_baseline:
                k_c, k_r = k_c.detach(), k_r.detach()
            ours, theirs = torch.sigmoid(beta * (r_c - k_r)), torch.sigmoid(beta * (k_c - r_r))
            return 0.5 * (1 - ours).mean() + 0.5 * (1 - theirs).mean()


def balance(router_logits: list[Tensor]) -> Tensor:
    """Σ over layers of E · Σ_e share_e · mean_e, of (tokens, E) each."""
    total = router_logits[0].new_zeros(())
    for z in router_logits:
        share = torch.stack([(z.argmax(-1) == e).to(z.dtype).mean() for e in range(z.shape[1])])
        total = total + z.shape[1] * (share * z.softmax(-1).mean(0)).sum()
    return total
