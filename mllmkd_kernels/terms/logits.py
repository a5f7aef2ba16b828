"""How far are the student's logits from the teacher's in squares? (LLAVADI's logit MSE)

L = mean over rows of mean_k (z_s − z_t)²
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mllmkd_kernels.kept_gram import KeptGram
from mllmkd_kernels.logits import fused_linear_logit_mse
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.relation import head_gram
from mllmkd_kernels.view import View


@dataclass(frozen=True)
class LogitMse:
    """See above; through Gram matrices, the teacher's kept from step to step.

    Attributes:
        name, weight: as of every `Term`.
        over: name of the row set.
    """

    name: str
    weight: float
    over: str = "response"
    kept: KeptGram = field(default_factory=lambda: KeptGram("teacher"), repr=False, compare=False)

    @property
    def needs(self) -> Needs:
        """The teacher's rows."""
        return Needs(rows=frozenset({self.over}))

    def __call__(self, view: View) -> Tensor:
        """This micro-batch's share of the mean.

        Raises:
            ValueError: a soft-capped head, whose logits are no product.
        """
        s, t = view.student, view.teacher
        assert t is not None
        for who, head in (("student", s), ("teacher", t)):
            if head.softcap is not None:
                raise ValueError(f"{who}.softcap: got {head.softcap}, expected None: {self.name}")

        def gram(weight: Tensor, bias: Tensor | None) -> Tensor:
            return head_gram(weight, bias, vocab_size=view.vocab, dtype=torch.float64)

        hidden_s, hidden_t = view.hidden(self.over)
        loss, _ = fused_linear_logit_mse(
            hidden_s, s.weight, hidden_t, t.weight, student_bias=s.bias, teacher_bias=t.bias,
            vocab_size=view.vocab, teacher_gram=self.kept.of(t.weight, t.bias, view.vocab, gram),
        )  # fmt: skip
        return loss / view.count(self.over)
