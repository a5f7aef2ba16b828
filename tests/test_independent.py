"""Do the public functions agree with formulas written out by hand, number by number?

Nothing of the package but its public names is used for the expectations: plain Python floats, one
loop a sum sign, from DESIGN's table and the papers (LLaVA-KD arXiv 2410.16236 eq. 1–6, GKD
2306.13649 eq. 1, DistiLLM 2402.03898 eq. 5). Sizes are a handful because every entry is visited.
"""

from __future__ import annotations

from math import exp, log, sqrt, tanh

import numpy as np
import pytest
import torch

import mllmkd_kernels as mk
from mllmkd_kernels import reference
from tests.problems import DIVERGENCES
from tests.tolerances import check

N, V_S, V_T, D_S, D_T, V = 5, 11, 13, 3, 4, 11
BETA, LAM = 0.3, 0.2
Matrix = list[list[float]]


def numbers(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * scale)


HS, WS, BS = numbers(N, D_S, seed=1), numbers(V_S, D_S, seed=2), numbers(V_S, seed=3)
HT, WT, BT = numbers(N, D_T, seed=4), numbers(V_T, D_T, seed=5), numbers(V_T, seed=6)
LABELS = [4, -100, 0, 10, 7]
CE_WEIGHT, KD_WEIGHT = [0.5, 3.0, 0.0, 1.0, 0.25], [1.0, 0.0, 2.0, 0.5, 0.75]
TEMPERATURE, CAP_S, CAP_T = 1.7, 2.5, 3.5


def logit(hidden, weight, bias, cap: float | None, n: int, k: int) -> float:
    z = sum(float(hidden[n, d]) * float(weight[k, d]) for d in range(hidden.shape[1]))
    z += float(bias[k]) if bias is not None else 0.0
    return cap * tanh(z / cap) if cap else z


def softmax(z: list[float]) -> list[float]:
    total = sum(exp(x) for x in z)
    return [exp(x) / total for x in z]


def by_hand(name: str, p: list[float], q: list[float]) -> float:
    """D(p, q) as the papers write it, p the teacher."""
    total = 0.0
    for pk, qk in zip(p, q, strict=True):
        if name == "forward_kl":
            total += pk * log(pk / qk)
        elif name == "reverse_kl":
            total += qk * log(qk / pk)
        elif name == "jsd":
            m = BETA * pk + (1 - BETA) * qk
            total += BETA * pk * log(pk / m) + (1 - BETA) * qk * log(qk / m)
        elif name == "skew_forward_kl":
            total += pk * log(pk / (LAM * pk + (1 - LAM) * qk))
        elif name == "skew_reverse_kl":
            total += qk * log(qk / ((1 - LAM) * pk + LAM * qk))
        elif name == "total_variation":
            total += 0.5 * abs(pk - qk)
        else:
            assert name == "soft_cross_entropy"
            total += -pk * log(qk)
    return total


def slope_by_hand(name: str, p: list[float], q: list[float]) -> list[float]:
    """∂D/∂a = q ∘ (g − Σ q g) with the g = ∂f/∂q of DESIGN's table."""
    g = []
    for pk, qk in zip(p, q, strict=True):
        if name in ("forward_kl", "soft_cross_entropy"):
            g.append(-pk / qk)
        elif name == "reverse_kl":
            g.append(log(qk / pk) + 1)
        elif name == "jsd":
            g.append((1 - BETA) * log(qk / (BETA * pk + (1 - BETA) * qk)))
        elif name == "skew_forward_kl":
            g.append(-(1 - LAM) * pk / (LAM * pk + (1 - LAM) * qk))
        elif name == "skew_reverse_kl":
            m = (1 - LAM) * pk + LAM * qk
            g.append(log(qk / m) + 1 - LAM * qk / m)
        else:
            g.append(0.5 if qk > pk else -0.5)
    mean = sum(qk * gk for qk, gk in zip(q, g, strict=True))
    return [qk * (gk - mean) for qk, gk in zip(q, g, strict=True)]


def table(name: str) -> mk.Divergence:
    if name == "jsd":
        return mk.Divergence(name, beta=BETA)
    return mk.Divergence(name, lam=LAM) if name.startswith("skew") else mk.Divergence(name)


def distill_by_hand(name: str, temperature: float, capped: bool):
    """Loss, terms and all three gradients of the whole problem."""
    cap_s, cap_t = (CAP_S, CAP_T) if capped else (None, None)
    loss, ce, kd = 0.0, [0.0] * N, [0.0] * N
    dh, dw, db = np.zeros((N, D_S)), np.zeros((V_S, D_S)), np.zeros(V_S)
    for n in range(N):
        z_s = [logit(HS, WS, BS, cap_s, n, k) for k in range(V)]
        z_t = [logit(HT, WT, BT, cap_t, n, k) for k in range(V)]
        q = softmax([z / temperature for z in z_s])
        p = softmax([z / temperature for z in z_t])
        kd[n] = by_hand(name, p, q)
        dz = [KD_WEIGHT[n] * s / temperature for s in slope_by_hand(name, p, q)]
        if LABELS[n] != -100:
            plain = softmax(z_s)
            ce[n] = -log(plain[LABELS[n]])
            for k in range(V):
                dz[k] += CE_WEIGHT[n] * (plain[k] - (k == LABELS[n]))
        loss += CE_WEIGHT[n] * ce[n] + KD_WEIGHT[n] * kd[n]
        for k in range(V):
            dy = dz[k] * (1 - (z_s[k] / CAP_S) ** 2 if capped else 1.0)
            db[k] += dy
            for d in range(D_S):
                dh[n, d] += dy * float(WS[k, d])
                dw[k, d] += dy * float(HS[n, d])
    return [torch.as_tensor(x, dtype=torch.float64) for x in (loss, ce, kd, dh, dw, db)]


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_distill(name: str, temperature: float, capped: bool, backend: str) -> None:
    want = distill_by_hand(name, temperature, capped)
    for dtype, value, gradient in (
        (torch.float64, "fp64", "fp64"), (torch.float32, "value", "gradient"),
    ):  # fmt: skip
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (HS, WS, BS)]
        out = mk.fused_linear_distill(
            leaves[0], leaves[1], HT.to(dtype), WT.to(dtype), torch.tensor(LABELS),
            ce_weight=torch.tensor(CE_WEIGHT), kd_weight=torch.tensor(KD_WEIGHT),
            divergence=table(name), temperature=temperature, student_bias=leaves[2],
            teacher_bias=BT.to(dtype), student_softcap=CAP_S if capped else None,
            teacher_softcap=CAP_T if capped else None, backend=backend,
        )  # fmt: skip
        out.loss.backward()
        for got, like, what in zip((out.loss, out.ce, out.kd), want[:3], "LCD", strict=True):
            check(got.detach(), like, value, what=what)
        for leaf, like, what in zip(leaves, want[3:], ("dh", "dw", "db"), strict=True):
            assert leaf.grad is not None
            check(leaf.grad, like, gradient, what=what)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_reference_distill(name: str) -> None:
    """The definitions that every other test trusts."""
    z_s = reference.logits(HS, WS, BS, CAP_S, V)
    z_t = reference.logits(HT, WT, BT, CAP_T, V)
    got = reference.linear_distill(
        z_s, z_t, torch.tensor(LABELS), ce_weight=torch.tensor(CE_WEIGHT),
        kd_weight=torch.tensor(KD_WEIGHT), divergence=table(name), temperature=TEMPERATURE,
    )  # fmt: skip
    want = distill_by_hand(name, TEMPERATURE, True)[:3]
    for x, like in zip(got, want, strict=True):
        check(x, like, "fp64")


@pytest.mark.parametrize("name", DIVERGENCES)
def test_slopes_by_hand_are_the_derivative_of_the_values_by_hand(name: str) -> None:
    """The expectations check each other, by central differences: error h² · f''' ≈ 1e-10."""
    a = [0.3, -1.0, 0.7, 0.1]
    p = softmax([1.0, 0.2, -0.5, 0.0])
    slopes, h = slope_by_hand(name, p, softmax(a)), 1e-5
    for k, slope in enumerate(slopes):
        up, down = ([x + s * h * (i == k) for i, x in enumerate(a)] for s in (1, -1))
        numeric = (by_hand(name, p, softmax(up)) - by_hand(name, p, softmax(down))) / (2 * h)
        assert abs(numeric - slope) < 1e-8


def matrix(y: Matrix) -> Matrix:
    rows = range(len(y))
    return [[sum(a * b for a, b in zip(y[i], y[j], strict=True)) for j in rows] for i in rows]


def relation_by_hand(y_s: Matrix, y_t: Matrix, images: list[tuple[int, int]]) -> float:
    """Mean over images of 1 − cos(R_s, R_t), R of raw logits."""
    total = 0.0
    for start, end in images:
        r_s, r_t = matrix(y_s[start:end]), matrix(y_t[start:end])
        st = ss = tt = 0.0
        for row_s, row_t in zip(r_s, r_t, strict=True):
            for x, y in zip(row_s, row_t, strict=True):
                st, ss, tt = st + x * y, ss + x * x, tt + y * y
        total += 1 - st / (sqrt(ss) * sqrt(tt))
    return total / len(images)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("capped", [False, True], ids=["plain", "softcap"])
def test_relation_of_logits(capped: bool, with_bias: bool, backend: str) -> None:
    bias_s, bias_t = (BS, BT) if with_bias else (None, None)
    cap_s, cap_t = (CAP_S, CAP_T) if capped else (None, None)
    y_s = [[logit(HS, WS, bias_s, cap_s, n, k) for k in range(V)] for n in range(N)]
    y_t = [[logit(HT, WT, bias_t, cap_t, n, k) for k in range(V)] for n in range(N)]
    want = torch.tensor(relation_by_hand(y_s, y_t, [(0, 2), (2, 5)]), dtype=torch.float64)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    got = mk.fused_linear_relation(
        HS, WS, HT, WT, cu, student_bias=bias_s, teacher_bias=bias_t,
        student_softcap=cap_s, teacher_softcap=cap_t, backend=backend,
    )  # fmt: skip
    check(got, want, "fp64")
    y_s, y_t = torch.tensor(y_s).double(), torch.tensor(y_t).double()
    check(reference.relation_cosine(y_s, y_t, cu), want, "relation")


def test_relation_of_features(backend: str) -> None:
    want = relation_by_hand(HS.tolist(), HT.tolist(), [(0, 5)])
    got = mk.relation_cosine(HS, HT, backend=backend)
    check(got, torch.tensor(want, dtype=torch.float64), "fp64")


def test_head_gram() -> None:
    w = torch.cat((WS, BS[:, None]), 1)
    want = [
        [sum(float(w[k, i] * w[k, j]) for k in range(9)) for j in range(D_S + 1)]
        for i in range(D_S + 1)
    ]
    got = mk.head_gram(WS, BS, vocab_size=9)
    check(got, torch.tensor(want, dtype=torch.float64), "fp64")


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_log_probabilities(temperature: float, backend: str) -> None:
    want = [
        0.0
        if label == -100
        else log(softmax([logit(HS, WS, BS, CAP_S, n, k) / temperature for k in range(V)])[label])
        for n, label in enumerate(LABELS)
    ]
    got = mk.fused_linear_logprob(
        HS, WS, torch.tensor(LABELS), temperature=temperature, bias=BS, softcap=CAP_S,
        backend=backend,
    )  # fmt: skip
    z = reference.logits(HS, WS, BS, CAP_S, V)
    for x in (got, reference.linear_logprob(z, torch.tensor(LABELS), temperature)):
        check(x, torch.tensor(want, dtype=torch.float64), "fp64")
