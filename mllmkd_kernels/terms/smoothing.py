"""How sure may the student be? Label smoothing, as a term of its own (arXiv 1512.00567, section 7).

    L = mean over rows of KL(u ‖ p_s),   u = 1/V

(1 − ε) CE + ε L has the gradient of cross-entropy with labels smoothed by ε; in value it lacks the
constant ε log V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mllmkd_kernels.heads import take_rows
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.view import View


@dataclass(frozen=True)
class Smoothing:
    """See above. u is what a teacher says whose head is zero, so it is one sweep of the head.

    Attributes:
        name, weight: as of every `Term`.
        over: name of the row set.
    """

    name: str
    weight: float
    over: str = "response"

    @property
    def needs(self) -> Needs:
        """Nothing of a teacher."""
        return Needs()

    def __call__(self, view: View) -> Tensor:
        """This micro-batch's share of the mean."""
        s, settings, chosen = view.student, view.settings, view.rows(self.over)
        hidden = take_rows(s.hidden, chosen.student)
        out = settings.functions.distill(
            hidden, s.weight, hidden.new_zeros(len(hidden), 1), s.weight.new_zeros(view.vocab, 1),
            torch.full_like(chosen.labels, settings.ignore_index),
            ce_weight=0.0, kd_weight=1.0, ignore_index=settings.ignore_index,
            student_bias=s.bias, student_softcap=s.softcap, vocab_size=view.vocab,
            backend=settings.backend, workspace_mb=settings.workspace_mb,
        )  # fmt: skip
        return out.loss / view.count(self.over)
