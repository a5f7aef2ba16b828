"""Are answer and image tokens as near to each other as in the teacher? (LLAVADI's affinity)

L = mean over cells of (cos_s(i, j) − cos_t(i, j))², i visual, j response; mean over samples
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mllmkd_kernels import rows
from mllmkd_kernels.affinity import affinity_loss, check_kind
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.view import View


@dataclass(frozen=True)
class Affinity:
    """See above; a sample without images or answer counts as 0.

    Attributes:
        name, weight, over: as of every `Term`.
        rows: name of the row set of the answers.
        joint: one mean over the cells of all samples of a batch together, as LLAVADI's released
            code has it.
        kind: "squared", or "contrastive" between all samples of a micro-batch: see `affinity_loss`.

    Raises:
        ValueError: no such kind.
    """

    name: str
    weight: float
    rows: str = "response"
    joint: bool = False
    over: str = "samples"
    kind: str = "squared"

    def __post_init__(self) -> None:
        check_kind(self.kind, self.joint)

    @property
    def needs(self) -> Needs:
        """Both sets of rows, of the teacher."""
        return Needs(rows=frozenset({"visual", self.rows}))

    def __call__(self, view: View) -> Tensor:
        """This micro-batch's share of the mean."""
        both = [view.hidden(name) for name in ("visual", self.rows)]
        student, teacher = (torch.cat(x) for x in zip(*both, strict=True))
        index = torch.arange(len(student), dtype=torch.int64, device=student.device)
        visual, response = index.split([len(ours) for ours, _ in both])
        cu = [self._ends(name, view) for name in ("visual", self.rows)]
        value = affinity_loss(
            student, teacher, visual, response, *cu, joint=self.joint, kind=self.kind
        )
        return value * view.share(self.over)

    @staticmethod
    def _ends(name: str, view: View) -> Tensor:
        """int32 prefix sum of the rows of each sample."""
        lens = rows.row_mask(name, view.batch, view.settings.ignore_index).sum(1)
        return torch.cat((lens.new_zeros(1), lens.cumsum(0))).to(torch.int32)
