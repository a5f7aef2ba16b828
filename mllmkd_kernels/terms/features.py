"""Do the student's last hidden states carry what the teacher's do? Asked through a trained map.
(LLAVADI's feature distillation)

    L = mean over rows of  mean_d (f(h_s) − h_t)²   or   1 − cos(f(h_s), h_t)

f is a two-layer perceptron D_s → D_t → D_t with GELU, which is trained with the student and then
thrown away.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllmkd_kernels.backends.products import accumulation_dtype
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.view import View

KINDS = ("mse", "cosine")


class Features(nn.Module):
    """See above. Without `sizes` its parameters are made when an objective is built for two models
    (`Objective.build`, which `DistillMixin` calls), or at the latest by its first call; an
    optimiser has to be made after that.

    Args:
        name, weight: as of every `Term`.
        rows: name of the row set.
        kind: "mse" or "cosine".
        sizes: D_s and D_t.

    Raises:
        ValueError: no such kind.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        rows: str = "response",
        kind: str = "mse",
        sizes: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
        self.name, self.weight, self.over, self.kind = name, weight, rows, kind
        self.needs = Needs(rows=frozenset({rows}))
        self.map = nn.Sequential()
        if sizes is not None:
            self.build(*sizes)

    def build(self, student: int, teacher: int, device: Any = "cpu") -> None:
        """Make the parameters for hidden sizes D_s and D_t, fp32; those that are there stay.

        Raises:
            ValueError: they are of other sizes.
        """
        if not len(self.map):
            options: dict[str, Any] = {"dtype": torch.float32, "device": device}
            first, second = (nn.Linear(d, teacher, **options) for d in (student, teacher))
            self.map = nn.Sequential(first, nn.GELU(), second)
        out, into = self.map.get_parameter("0.weight").shape
        if (into, out) != (student, teacher):
            raise ValueError(
                f"{self.name}: made for hidden sizes {into} and {out}, got {student} and {teacher}"
            )

    def forward(self, view: View) -> Tensor:
        """This micro-batch's share of the mean."""
        ours, theirs = view.hidden(self.over)
        if not len(self.map):
            self.build(ours.shape[1], theirs.shape[1], ours.device)
        weight = self.map.get_parameter("0.weight")
        acc = accumulation_dtype(weight)
        ours, theirs = self.map(ours.to(weight.dtype)).to(acc), theirs.detach().to(acc)
        if self.kind == "mse":
            rows = (ours - theirs).square().mean(-1)
        else:
            rows = 1 - F.cosine_similarity(ours, theirs, dim=-1)
        return rows.sum() / view.count(self.over)
