"""What trains, on which data, with which loss terms, in each stage? One table.

| stage | who | trains | data | loss |
|---|---|---|---|---|
| `pt`  | teacher (or plain baseline) | projector | captions | CE |
| `dpt` | student | projector | captions | CE + α·response + β·visual + γ·relation |
| `sft` | both | projector, LM | conversations | CE; no teacher |
| `dft` | student | projector, LM | conversations | CE + α·response + β·visual + γ·relation |

LLaVA-KD (arXiv 2410.16236), section 3; weights 1, 1, 0.5 by default. The vision tower is frozen
always. With `trains` the projector only, the LM and its head are frozen, so that the losses form no
`dW`. Which parameters these are in a given class, `training.anatomy` says. A stage of one's own is
one row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

import mllmkd_kernels as mk
from training.anatomy import Role, anatomy
from training.config import LossConfig
from training.data.item import IGNORE
from training.data.template import TemplateName

DISTILLED = ("ce", "response", "visual", "relation")


@dataclass(frozen=True)
class Stage:
    """One row of the table above; `trains` holds roles of parameters."""

    name: str
    title: str
    data: str  # the field of DataConfig
    template: TemplateName
    trains: tuple[Role, ...]
    terms: tuple[str, ...]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return self.terms != ("ce",)


_PROJECTOR: tuple[Role, ...] = ("projector",)
_ALL: tuple[Role, ...] = ("projector", "language")
STAGES = {
    "pt": Stage("pt", "pre-training", "captions", "pretrain", _PROJECTOR, ("ce",)),
    "dpt": Stage("dpt", "distilled pre-training", "captions", "pretrain", _PROJECTOR, DISTILLED),
    "sft": Stage("sft", "supervised fine-tuning", "conversations", "chat", _ALL, ("ce",)),
    "dft": Stage("dft", "distilled fine-tuning", "conversations", "chat", _ALL, DISTILLED),
}


def freeze(model: nn.Module, stage: Stage) -> list[str]:
    """Let exactly the stage's parameters require gradients; return their names."""
    trained = anatomy(model).parameters(*stage.trains)
    model.requires_grad_(False)
    for name in trained:
        model.get_parameter(name).requires_grad_(True)
    return trained


def loss_of(stage: Stage, weights: LossConfig) -> mk.LlavaKDLoss:
    """The stage's loss: the configured weight for its own terms, 0 for those it does not have."""

    def weight(term: str) -> float:
        return getattr(weights, term) if term in stage.terms else 0.0

    return mk.LlavaKDLoss(
        ce=weight("ce"),
        response=weight("response"),
        visual=weight("visual"),
        relation=weight("relation"),
        temperature=weights.temperature,
        divergence=weights.divergence,
        ignore_index=IGNORE,
        diagnostics=True,  # for the log, out of what the loss computes anyway
        backend=weights.backend,
    )
