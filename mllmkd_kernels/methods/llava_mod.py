"""LLaVA-MoD (arXiv 2408.15881): a small mixture of experts mimics a large dense model.

    mimic         L = λ_r L_res + λ_c L_ce + λ_b L_bal
    preference    L = L_pref + λ_b L_bal

* L_res: KL(p_t ‖ p_s) on the answers
* L_ce: cross-entropy of the answers
* L_bal: Σ over mixtures of E Σ_e share_e mean_e, see `Balance`
* L_pref: ½ (1 − σ(β (r_c − K_r))) + ½ (1 − σ(β (K_c − r_r))), or DPO's −log σ(β (r_c − r_r)), of
  a chosen and a rejected answer, r = log p(answer) − log p_teacher(answer), see `Preference`

| stage | trains | data | objective |
|---|---|---|---|
| init | projector | captions | L_ce |
| d2d (dense to dense) | projector, LM | conversations | L_res |
| d2s (dense to sparse) | projector, experts, router | conversations | L_res + L_ce + 0.01 L_bal |
| preference | projector, experts, router | preferences | L_pref + 0.01 L_bal |

Before d2s the student becomes a mixture of experts (`upcycle`: every second layer, 4 experts, 2 of
them for a token). The paper gives d2d general captions and conversations and d2s tasks (VQA,
documents): two runs, where the data are to differ, the second from the model of the first. The last
stage has to be asked for: its data are pairs of answers, its student is a mixture from d2s.

Its released code differs, and so do options:

* L_res is soft cross-entropy, −Σ p_t log p_s: ``divergence="soft_cross_entropy"``. KL is that less
  the teacher's entropy, so the gradient is the same
* it distils what the head says *at* the answer tokens, unshifted: ``rows="response:unshifted"``; or
  at all tokens, ``rows="valid"``, where it counts padding too
* it adds L_bal twice: ``balance=0.02``; padding counts for it: ``padding=True``
* both vocabularies are cut to 151,936: ``vocab_size=151936``; by default to the smaller
* half the batch sizes, ``lr=1e-3`` in init, β₂ = 0.999
* in d2s also the feed-forward blocks of dense layers train, and an expert has a capacity: tokens
  beyond it are dropped, and the second expert is drawn with noise
* the paper speaks of DPO, its code has KTO's loss of pairs by default, with a gradient through K:
  ``detach_baseline=False``; and one pair in a micro-batch, so that K is the pair's own
* in preference it adds L_bal of the chosen answers to that of the rejected: about ``balance=0.02``
* its documents print d2d's settings for d2s (dense, L_res alone); its scripts have these
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from mllmkd_kernels.divergence import Divergence
from mllmkd_kernels.methods.stage import PROJECTOR, SPARSE, WHOLE, Stage
from mllmkd_kernels.methods.supervised import supervised
from mllmkd_kernels.objective import Objective, RowTerm
from mllmkd_kernels.terms import Balance, Preference
from mllmkd_kernels.upcycle import upcycle, upcycled_config


def mimic(
    response: float = 1.0,
    ce: float = 0.0,
    balance: float = 0.0,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    rows: Literal["response", "response:unshifted", "valid"] = "response",
    padding: bool = False,
    **settings: Any,
) -> Objective:
    """Mimic distillation: by default of d2d; d2s has ``ce=1.0, balance=0.01``.

    Args:
        response, ce, balance: weights of L_res, L_ce, L_bal; 0 leaves a term out.
        divergence, temperature: of L_res.
        rows: which rows L_res is over.
        padding: L_bal counts padding as tokens.
        **settings: see `Settings`.
    """
    return Objective(
        RowTerm("ce", ce, "response"),
        RowTerm("response_kl", response, rows, divergence, temperature),
        Balance("balance", balance, padding),
        **settings,
    )


def preference(
    kind: Literal["kto_pair", "sigmoid", "hinge", "ipo"] = "kto_pair",
    beta: float = 0.1,
    balance: float = 0.01,
    *,
    detach_baseline: bool = True,
    padding: bool = False,
    **settings: Any,
) -> Objective:
    """Preference distillation: batches are of pairs, the teacher is the reference.

    Args:
        kind, beta, detach_baseline: of L_pref; "sigmoid" is DPO.
        balance: weight of L_bal; 0 leaves it out, for a dense student.
        padding: L_bal counts padding as tokens.
        **settings: see `Settings`.
    """
    return Objective(
        Preference("preference", 1.0, kind, beta, detach_baseline),
        Balance("balance", balance, padding),
        **settings,
    )


#: Of the paper.
_TUNING = {"lr": 2e-5, "batch_size": 256, "beta2": 0.98}

STAGES = (
    Stage(
        "init", PROJECTOR, "captions", "chat", supervised,
        title="initialisation: projector, CE on captions",
        defaults={"lr": 1e-4, "batch_size": 512, "beta2": 0.98},
    ),
    Stage(
        "d2d", WHOLE, "conversations", "chat", mimic,
        title="dense to dense: projector and LM, KL", defaults=_TUNING,
    ),
    Stage(
        "d2s", SPARSE, "conversations", "chat", partial(mimic, ce=1.0, balance=0.01),
        student=upcycle, fits=upcycled_config,
        title="dense to sparse: projector, experts and router, KL, CE and balance",
        defaults=_TUNING,
    ),
    Stage(
        "preference", SPARSE, "preferences", "chat", preference,
        title="preference: projector, experts and router, pairs of answers and balance",
        defaults=_TUNING | {"lr": 2e-6}, usual=False,
    ),
)  # fmt: skip
