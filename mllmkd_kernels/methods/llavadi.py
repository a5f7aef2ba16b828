"""LLAVADI (arXiv 2407.19409): what of a multimodal teacher is worth distilling?

    L = L_ce + λ_r L_res + λ_f L_feat + λ_a L_aff + λ_m L_mse       λ_r = λ_f = 1, λ_a = λ_m = 0

* L_ce: cross-entropy of the answers
* L_res: KL(p_t ‖ p_s) on the answers; as options the reverse KL, the JSD, z-scored logits
* L_feat: mean_d (f(h_s) − h_t)² of last hidden states, f a trained perceptron; or 1 − cos
* L_aff: mean of (cos_s(i, j) − cos_t(i, j))² over image tokens i and answer tokens j
* L_mse: mean_k (z_s − z_t)² of the logits

| stage | who | trains | data | objective |
|---|---|---|---|---|
| pt  | both | projector | captions | L_ce |
| sft | teacher (or plain baseline) | projector, LM | conversations | L_ce |
| kd  | student | projector, LM | conversations | all |

The paper finds L_res with L_feat the best of these. Its released code differs, and so do options:

* it distils what the head says *at* the answer tokens, unshifted: ``rows="response:unshifted"``;
  its last command distils all tokens, image and prompt too, with z-scores: ``rows="valid",
  standardize=True``, whose σ is of V − 1: ``temperature=(V / (V - 1)) ** 0.5`` is its
* its affinity is one mean over all cells of a batch: ``joint=True``; a variant compares the images
  with the answers of all samples: ``affinity_kind="contrastive"``
* early versions weigh by 5 (``response=5, features=5``)
* on-policy, the student writes half of the answers itself (`own_answers`), which L_ce leaves out:
  ``view: {probability: 0.5}`` of the stage kd
* its means are over samples of means over rows, ours over the rows of a step: equal for one sample
"""

from __future__ import annotations

from typing import Any, Literal

from mllmkd_kernels.divergence import Divergence
from mllmkd_kernels.drawn import BatchView
from mllmkd_kernels.methods.stage import PROJECTOR, WHOLE, Stage
from mllmkd_kernels.methods.supervised import PRETRAINING, TUNING, supervised
from mllmkd_kernels.objective import Objective, RowTerm
from mllmkd_kernels.own_answers import on_policy
from mllmkd_kernels.terms import Affinity, Features, LogitMse


def objective(
    ce: float = 1.0,
    response: float = 1.0,
    features: float = 1.0,
    affinity: float = 0.0,
    logit_mse: float = 0.0,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    standardize: bool = False,
    rows: Literal["response", "response:unshifted", "valid"] = "response",
    feature_loss: Literal["mse", "cosine"] = "mse",
    joint: bool = False,
    affinity_kind: Literal["squared", "contrastive"] = "squared",
    **settings: Any,
) -> Objective:
    """The five terms, under their weights; a weight of 0 leaves a term out.

    Args:
        ce, response, features, affinity, logit_mse: weights of L_ce, L_res, L_feat, L_aff, L_mse.
        divergence, temperature: of L_res.
        standardize: L_res compares z-scored logits.
        rows: which rows L_res, L_feat and L_mse are over; L_aff takes its answers unshifted where
            this is, else shifted.
        feature_loss: of L_feat.
        joint, affinity_kind: see `Affinity`.
        **settings: see `Settings`.
    """
    answers = "response" if rows == "valid" else rows
    return Objective(
        RowTerm("ce", ce, "response", over="response:given"),
        RowTerm("response_kl", response, rows, divergence, temperature, standardize=standardize),
        Features("features", features, rows, feature_loss),
        Affinity("affinity", affinity, answers, joint, kind=affinity_kind),
        LogitMse("logit_mse", logit_mse, rows),
        **settings,
    )


def own_answers(
    probability: float = 0.0, max_new_tokens: int = 64, temperature: float = 1.0
) -> BatchView | None:
    """The view of kd: none, unless the student is to write answers itself.

    Args:
        probability, max_new_tokens, temperature: see `mllmkd_kernels.on_policy`.
    """
    view = on_policy(probability, max_new_tokens, temperature)
    return view if probability else None


STAGES = (
    Stage(
        "pt", PROJECTOR, "captions", "pretrain", supervised,
        title="pre-training: projector, CE on captions", defaults=PRETRAINING,
    ),
    Stage(
        "sft", WHOLE, "conversations", "chat", supervised,
        title="supervised fine-tuning: projector and LM, CE", defaults=TUNING, usual=False,
    ),
    Stage(
        "kd", WHOLE, "conversations", "chat", objective, view=own_answers,
        title="distillation: projector and LM, logits and features", defaults=TUNING,
    ),
)  # fmt: skip
