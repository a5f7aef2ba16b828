"""LLaVA-KD (arXiv 2410.16236): three stages, four terms.

    L = L_reg + α L_res + β L_vis + γ L_rel         α = β = 1, γ = 0.5

* L_reg (eq. 1): cross-entropy of the answers
* L_res (eq. 2): KL(p_t ‖ p_s) on response rows, those whose *next* token is of an answer
* L_vis (eq. 3): the same on the image positions themselves, not shifted
* L_rel (eq. 4-5): 1 − cos(R_s, R_t) of each image, R = Z Zᵀ of its raw visual logits

| stage | who | trains | data | objective |
|---|---|---|---|---|
| pt  | teacher (or plain baseline) | projector | captions | L_reg |
| dpt | student | projector | captions | all four |
| sft | both | projector, LM | conversations | L_reg |
| dft | student | projector, LM | conversations | all four |

All four are means over tokens or images, where the paper has sums; its released code takes γ = 1,
one cosine a batch (`joint`), and all patches of SigLIP but the first (``feature_strategy: default``
of the model).
"""

from __future__ import annotations

from typing import Any

from mllmkd_kernels.divergence import Divergence
from mllmkd_kernels.methods.stage import PROJECTOR, WHOLE, Stage
from mllmkd_kernels.methods.supervised import PRETRAINING, TUNING, supervised
from mllmkd_kernels.objective import Objective, RowTerm
from mllmkd_kernels.terms.relation import Relation


def objective(
    ce: float = 1.0,
    response: float = 1.0,
    visual: float = 1.0,
    relation: float = 0.5,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    shift: bool = True,
    joint: bool = False,
    **settings: Any,
) -> Objective:
    """The four terms, under their weights; a weight of 0 leaves a term out.

    Args:
        ce, response, visual, relation: weights of L_reg, L_res, L_vis, L_rel.
        divergence, temperature: of L_res and L_vis.
        shift: False distils the unshifted answer positions, as the released code of LLaVA-MoD and
            LLAVADI does against its papers; divided by the number of shifted ones all the same.
        joint: see `Relation`.
        **settings: see `Settings`.
    """
    answers = "response" if shift else "response:unshifted"
    return Objective(
        RowTerm("ce", ce, "response"),
        RowTerm("response_kl", response, answers, divergence, temperature, over="response"),
        RowTerm("visual_kl", visual, "visual", divergence, temperature),
        Relation("relation", relation, joint),
        **settings,
    )


STAGES = (
    Stage(
        "pt", PROJECTOR, "captions", "pretrain", supervised,
        title="pre-training: projector, CE on captions", defaults=PRETRAINING, usual=False,
    ),
    Stage(
        "dpt", PROJECTOR, "captions", "pretrain", objective,
        title="distilled pre-training: projector, four terms on captions", defaults=PRETRAINING,
    ),
    Stage(
        "sft", WHOLE, "conversations", "chat", supervised,
        title="supervised fine-tuning: projector and LM, CE", defaults=TUNING,
    ),
    Stage(
        "dft", WHOLE, "conversations", "chat", objective,
        title="distilled fine-tuning: projector and LM, four terms", defaults=TUNING,
    ),
)  # fmt: skip
