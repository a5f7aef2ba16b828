"""GKD, on-policy distillation (arXiv 2306.13649): a student learns where it goes itself.

    L = (1 − λ) E_(x,y)∼data D(p_t ‖ p_s)(y|x) + λ E_x∼data E_y∼p_s(·|x) D(p_t ‖ p_s)(y|x)  + w L_ce

    D(p ‖ q) = JSD_β = β KL(p ‖ m) + (1 − β) KL(q ‖ m),  m = β p + (1 − β) q      λ = β = 0.5, w = 0

* with probability λ the student p_s writes a micro-batch's answers y itself, sampled at a
  temperature, and learns what the teacher would have said at each of its tokens; no gradient goes
  through the sampling (eq. 3, algorithm 1)
* D (eq. 1) is a mean over the answer tokens of a step, of whoever wrote them. β → 0 is the forward
  KL, β → 1 the reverse KL: `divergence: forward_kl` or `reverse_kl`
* L_ce: cross-entropy of the answers that were given; own answers are never its target

| stage | who | trains | data | view | objective |
|---|---|---|---|---|---|
| pt  | both | projector | captions | | L_ce |
| sft | both | projector, LM | conversations | | L_ce |
| gkd | student | projector, LM | conversations | λ | D |

The student has to be able to answer before its answers are of use: hence sft. λ = 0 is supervised
distillation, λ = 1 purely on-policy. TRL's trainer has the same λ, β and mean; it draws λ on each
rank alone, and samples at 0.9 and to 128 tokens.
"""

from __future__ import annotations

from typing import Any

from mllmkd_kernels.divergence import Divergence
from mllmkd_kernels.methods.stage import PROJECTOR, WHOLE, Stage
from mllmkd_kernels.methods.supervised import PRETRAINING, TUNING, supervised
from mllmkd_kernels.objective import Objective, RowTerm
from mllmkd_kernels.own_answers import on_policy


def objective(
    response: float = 1.0,
    ce: float = 0.0,
    *,
    divergence: str | Divergence = "jsd",
    temperature: float = 1.0,
    **settings: Any,
) -> Objective:
    """D and L_ce, under their weights.

    Args:
        response, ce: weights of D and of L_ce.
        divergence, temperature: of D.
        **settings: see `Settings`.
    """
    return Objective(
        RowTerm("ce", ce, "response", over="response:given"),
        RowTerm("response", response, "response", divergence, temperature),
        **settings,
    )


STAGES = (
    Stage(
        "pt", PROJECTOR, "captions", "pretrain", supervised,
        title="pre-training: projector, CE on captions", defaults=PRETRAINING,
    ),
    Stage(
        "sft", WHOLE, "conversations", "chat", supervised,
        title="supervised fine-tuning: projector and LM, CE", defaults=TUNING,
    ),
    Stage(
        "gkd", WHOLE, "conversations", "chat", objective, view=on_policy,
        title="on-policy distillation: projector and LM, JSD on own and given answers",
        defaults=TUNING,
    ),
)  # fmt: skip
