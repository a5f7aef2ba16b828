"""What does a trainer write without this package? The losses over whole logits.

Heads run over *every* row, the result is widened by ``.float()``, autograd does the rest. For a
training step that is the published code of LLaVA-KD in the paper's form (one cosine an image,
relation weight 0.5), written anew, with rows picked by masks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mllmkd_kernels as mk
from benchmarks.problem import BETA, Problem
from benchmarks.shapes import PREFERENCES
from mllmkd_kernels import reference


def loss_of(problem: Problem) -> Tensor:
    """The loss of a case."""
    case, labels = problem.case, problem.labels
    if case.loss in PREFERENCES:
        return preference(problem, log_ratios(problem))
    z_s = _logits(problem.hs, problem.ws, case.vocab)
    if case.loss == "ce":
        return F.cross_entropy(z_s, labels)
    with torch.no_grad():
        z_t = _logits(*problem.teacher(), case.vocab)
    if case.loss == "relation":
        return _relation(z_s, z_t, [case.rows] * case.images)
    divergence = _kl(z_s, z_t) if case.divergence == "forward_kl" else _jsd(z_s, z_t)
    return divergence if case.loss == "kl" else F.cross_entropy(z_s, labels) + divergence


def log_ratios(problem: Problem) -> tuple[Tensor, Tensor]:
    """Of chosen and rejected answers, to the teacher: (B,) each."""
    vocab, labels = problem.case.vocab, problem.labels
    with torch.no_grad():
        theirs = reference.linear_logprob(_logits(*problem.teacher(), vocab), labels)
    ours = reference.linear_logprob(_logits(problem.hs, problem.ws, vocab), labels)
    return problem.answers(ours - theirs)


def preference(problem: Problem, ratios: tuple[Tensor, Tensor]) -> Tensor:
    """Of such log-ratios."""
    return reference.preference(*ratios, PREFERENCES[problem.case.loss], BETA)


class WholeLogitsLoss(mk.LlavaKDLoss):
    """`mk.LlavaKDLoss` with forward KL, through logits of shape (B, T, V). It takes the other's
    place, so that a step with it differs in nothing but the losses.
    """

    def forward(
        self,
        student: mk.HeadInputs,
        teacher: mk.HeadInputs | None,
        labels: Tensor,  # (B, T)
        image_mask: Tensor | None = None,  # (B, T) bool
        *,
        image_lens: Any = None,
        **_: Any,
    ) -> mk.LlavaKDOutput:
        """The loss of one batch whose samples have an image each."""
        assert teacher is not None and image_mask is not None
        z_s = _logits(student.hidden, student.weight)
        with torch.no_grad():
            z_t = _logits(teacher.hidden, teacher.weight)
        following = labels[:, 1:]
        answered = following != self.ignore_index
        ce = F.cross_entropy(z_s[:, :-1].flatten(0, 1), following.flatten())
        response = _kl(z_s[:, :-1][answered], z_t[:, :-1][answered])
        v_s, v_t = z_s[image_mask], z_t[image_mask]
        terms = (ce, response, _kl(v_s, v_t), _relation(v_s, v_t, image_lens.tolist()))
        weights = (self.ce, self.response, self.visual, self.relation)
        loss = torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).sum()
        return mk.LlavaKDOutput(loss, *(term.detach() for term in terms))


def _logits(h: Tensor, w: Tensor, vocab: int | None = None) -> Tensor:
    """In the model's dtype, then widened."""
    return F.linear(h, w)[..., :vocab].float()


def _kl(z_s: Tensor, z_t: Tensor) -> Tensor:
    return F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="batchmean")


def _jsd(z_s: Tensor, z_t: Tensor) -> Tensor:
    log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    halves = [F.kl_div(log_m, x, reduction="batchmean", log_target=True) for x in (log_p, log_q)]
    return (halves[0] + halves[1]) / 2


def _relation(z_s: Tensor, z_t: Tensor, rows: list[int]) -> Tensor:
    """Image by image: 1 − cos of the two relation matrices, averaged."""
    losses = []
    for s, t in zip(z_s.split(rows), z_t.split(rows), strict=True):
        r_s, r_t = s @ s.mT, t @ t.mT
        losses.append(1 - F.cosine_similarity(r_s.flatten(), r_t.flatten(), dim=0))
    return torch.stack(losses).mean()
