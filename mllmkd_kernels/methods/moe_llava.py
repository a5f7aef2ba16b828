"""MoE-LLaVA (arXiv 2401.15947): a dense LLaVA becomes a mixture of experts; no teacher.

    L = L_ce + λ_b L_bal        λ_b = 0.01

* L_ce: cross-entropy of the answers
* L_bal: Σ over mixtures of E Σ_e share_e mean_e, see `Balance`

| stage | trains | data | objective |
|---|---|---|---|
| pt  | projector | captions | L_ce |
| sft | projector, LM | conversations | L_ce |
| moe | projector, experts, router | conversations | L_ce + 0.01 L_bal |

Before the third stage every second layer becomes a mixture of 4 experts, of which a token goes to 2
(`upcycle`). From a dense checkpoint of one's own: ``model.path`` and ``stages=[moe]``.

In the released code an expert has a capacity and tokens beyond it are dropped, padding counts for
L_bal (``padding=True``), and of the dense layers the feed-forward blocks train too.
"""

from __future__ import annotations

from typing import Any

from mllmkd_kernels.methods.llava_mod import mimic
from mllmkd_kernels.methods.stage import PROJECTOR, SPARSE, WHOLE, Stage
from mllmkd_kernels.methods.supervised import PRETRAINING, TUNING, supervised
from mllmkd_kernels.objective import Objective
from mllmkd_kernels.upcycle import upcycle, upcycled_config


def objective(
    ce: float = 1.0, balance: float = 0.01, *, padding: bool = False, **settings: Any
) -> Objective:
    """Both terms, under their weights; a weight of 0 leaves a term out.

    Args:
        ce, balance: weights of L_ce and L_bal.
        padding: L_bal counts padding as tokens.
        **settings: see `Settings`.
    """
    return mimic(0.0, ce, balance, padding=padding, **settings)


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
        "moe", SPARSE, "conversations", "chat", objective, student=upcycle, fits=upcycled_config,
        title="mixture: projector, experts and router, CE and balance", defaults=TUNING,
    ),
)  # fmt: skip
