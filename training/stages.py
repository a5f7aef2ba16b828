"""What trains, on which data, with which loss terms, in each stage? One table.

| stage | who | trains | data | loss |
|---|---|---|---|---|
| `pt`  | teacher (or plain baseline) | projector | captions | CE |
| `dpt` | student | projector | captions | CE + α·response + β·visual + γ·relation |
| `sft` | both | projector, LM | conversations | CE; no teacher |
| `dft` | student | projector, LM | conversations | CE + α·response + β·visual + γ·relation |

LLaVA-KD (arXiv 2410.16236), section 3; weights 1, 1, 0.5 by default. The vision tower is frozen
always. With `trains` the projector only, the LM and its head are frozen, so that the losses form no
`dW`. A stage of one's own is one row.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlavaForConditionalGeneration

import mllmkd_kernels as mk
from training.config import LossConfig
from training.data.template import TemplateName

PROJECTOR = "model.multi_modal_projector."
LANGUAGE = ("model.language_model.", "lm_head.")
DISTILLED = ("ce", "response", "visual", "relation")


@dataclass(frozen=True)
class Stage:
    """One row of the table above; `trains` holds parameter-name prefixes."""

    name: str
    title: str
    data: str  # the field of DataConfig
    template: TemplateName
    trains: tuple[str, ...]
    terms: tuple[str, ...]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return self.terms != ("ce",)


_ALL = (PROJECTOR, *LANGUAGE)
STAGES = {
    "pt": Stage("pt", "pre-training", "captions", "pretrain", (PROJECTOR,), ("ce",)),
    "dpt": Stage("dpt", "distilled pre-training", "captions", "pretrain", (PROJECTOR,), DISTILLED),
    "sft": Stage("sft", "supervised fine-tuning", "conversations", "chat", _ALL, ("ce",)),
    "dft": Stage("dft", "distilled fine-tuning", "conversations", "chat", _ALL, DISTILLED),
}


def freeze(model: LlavaForConditionalGeneration, stage: Stage) -> list[str]:
    """Let exactly the stage's parameters require gradients; return their names."""
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(stage.trains))
        if parameter.requires_grad:
            trainable.append(name)
    for prefix in stage.trains:
        tied_head = prefix == "lm_head." and model.config.tie_word_embeddings
        if not tied_head and not any(name.startswith(prefix) for name in trainable):
            raise ValueError(f"stage {stage.name}: the model has no parameter named {prefix}*")
    return trainable


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
        backend=weights.backend,
    )
