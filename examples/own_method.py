"""A method of one's own: `python -m examples.own_method run --config run.yaml`.

The student is to be as sure of each right token as its teacher, besides to agree with it:

    L = L_ce + α JSD(p_t, p_s) + β KL(p_s ‖ p_t; T = 2) + γ (log p_s(y) − log p_t(y))²

means over answer tokens y; the KL is over image positions. No logits are made for any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import mllmkd_kernels as mk
import training
from mllmkd_kernels.methods import Stage


@dataclass(frozen=True)
class Sureness:
    """How far the two models' log-probabilities of the right tokens are apart, squared."""

    weight: float
    name, over = "sureness", "response"
    needs = mk.Needs(rows=frozenset({"response"}))  # of the teacher

    def __call__(self, view: mk.View) -> Tensor:
        """This micro-batch's share of the mean over the answer tokens of the step."""
        assert view.teacher is not None  # it is needed
        tokens, heads = view.rows(self.over).labels, (view.student, view.teacher)
        ours, theirs = (
            mk.fused_linear_logprob(
                hidden, head.weight, tokens, bias=head.bias, softcap=head.softcap,
                vocab_size=view.vocab, backend=view.settings.backend,
            )
            for hidden, head in zip(view.hidden(self.over), heads, strict=True)
        )  # fmt: skip
        return (ours - theirs).square().sum() / view.count(self.over)


def loss(
    ce: float = 1.0, answers: float = 1.0, images: float = 0.1, sure: float = 0.1, **settings: Any
) -> mk.Objective:
    """The four terms.

    Args:
        ce, answers, images, sure: weights of cross-entropy, of α, β and γ; 0 leaves a term out.
        **settings: how they are computed.
    """
    return mk.Objective(
        mk.RowTerm("ce", ce, "response"),
        mk.RowTerm("answers", answers, "response", mk.Divergence("jsd", beta=0.5)),
        mk.RowTerm("images", images, "visual", "reverse_kl", temperature=2.0),
        Sureness(sure),
        **settings,
    )


STAGES = (
    Stage("align", ("projector",), "captions", "pretrain", loss, defaults={"lr": 1e-3}),
    Stage("tune", ("projector", "language"), "conversations", "chat", loss),
)

if __name__ == "__main__":
    training.main(STAGES)
