"""Do the experts of each mixture get equal shares of the tokens? (LLaVA-MoD, MoE-LLaVA)

    L = Σ over layers of  E · Σ_e share_e · mean_e

share_e of the tokens have expert e for their first, mean_e is the mean of the router's softmax.
This is DeepSpeed's E² · mean_e(share_e · mean_e). With equal shares a layer's summand is at its
least, 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllmkd_kernels import rows
from mllmkd_kernels.balance import balance_loss
from mllmkd_kernels.experts import routers
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.view import View


class Balance:
    """See above. Each micro-batch is balanced for itself, and weighs by its tokens.

    Args:
        name, weight: as of every `Term`.
        padding: padding counts as tokens do, as in the released code.
    """

    over = "valid"
    needs = Needs(router=True)

    def __init__(self, name: str, weight: float, padding: bool = False) -> None:
        self.name, self.weight, self.padding = name, weight, padding
        self._loads: list[tuple[int, list[str]]] = []  # of each mixture k, and a name an expert

    def __call__(self, view: View) -> Tensor:
        """This micro-batch's share of the mean."""
        mask = None if self.padding else self._tokens(view)
        return balance_loss(view.student.recorded.router, mask) * view.share(self.over)

    def report_on(self, student: Any) -> list[str]:
        """Names of what `report` then gives: ``load/L/E`` of expert E in layer L."""
        self._loads = [
            (gate.top_k, [f"load/{layer}/{i}" for i in range(len(gate.weight))])
            for layer, gate in routers(student).items()
        ]
        return [name for _, names in self._loads for name in names]

    def report(self, view: View) -> dict[str, Tensor]:
        """This micro-batch's part in the share of tokens that goes to each expert, 1 / E of each
        where the load is even; a token counts 1 / k for each of its k experts.
        """
        tokens, total, found = self._tokens(view), view.count(self.over), {}
        for (k, names), logits in zip(self._loads, view.student.recorded.router, strict=True):
            chosen = logits.detach()[tokens].topk(k).indices.flatten()
            counts = torch.bincount(chosen, minlength=len(names))
            found |= zip(names, (counts / (k * total)).unbind(), strict=True)
        return found

    def _tokens(self, view: View) -> Tensor:  # (B·T,) bool
        return rows.row_mask(self.over, view.batch).flatten()
