"""How far are the student's logits from the teacher's in squares? (LLAVADI's logit MSE)

L = mean over rows of mean_k (z_s − z_t)²
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mllmkd_kernels.logits import fused_linear_logit_mse
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.view import View


@dataclass(frozen=True)
class LogitMse:
    """See above.

    Attributes:
        name, weight: as of every `Term`.
        over: name of the row set.
    """

    name: str
    weight: float
    over: str = "response"

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

        hidden_s, hidden_t = view.hidden(self.over)
        loss, _ = fused_linear_logit_mse(
            hidden_s, s.weight, hidden_t, t.weight, student_bias=s.bias, teacher_bias=t.bias,
            vocab_size=view.vocab, workspace_mb=view.settings.workspace_mb,
        )  # fmt: skip
        return loss / view.count(self.over)
