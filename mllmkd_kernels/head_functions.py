"""With which functions are heads computed, and what of them is kept from step to step?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mllmkd_kernels.distill import fused_linear_distill
from mllmkd_kernels.heads import HeadInputs
from mllmkd_kernels.kept_gram import KeptGram
from mllmkd_kernels.relation import fused_linear_relation, head_gram


def _two_kept() -> dict[str, KeptGram]:
    return {who: KeptGram(who) for who in ("student", "teacher")}


@dataclass
class HeadFunctions:
    """What an objective calls. Functions of the same arguments may take the place of these: for
    heads that are not whole, or to be watched.
    """

    distill: Callable[..., Any] = fused_linear_distill
    relate: Callable[..., Tensor] = fused_linear_relation
    gram: Callable[..., Tensor] = head_gram
    kept: dict[str, KeptGram] = field(default_factory=_two_kept, repr=False)

    def frozen_gram(self, who: str, head: HeadInputs, vocab: int) -> Tensor | None:
        """The kept Gram of a frozen head; None for a trained one."""
        leaves = (head.weight, head.bias)
        if who == "student" and any(x is not None and x.requires_grad for x in leaves):
            self.kept[who].drop()
            return None

        def make(weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.gram(weight, bias, vocab_size=vocab)

        return self.kept[who].of(head.weight, head.bias, vocab, make)
