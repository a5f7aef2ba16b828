"""What does a trainer write without this package? LLaVA-KD's four terms over whole logits.

The heads run over *every* position, as `forward` of a Hugging Face model does, the result is
widened by ``.float()``, rows are picked by masks and autograd does the rest: the published code's
computation in the paper's form (one cosine an image, relation weight 0.5), written anew. It takes
the place of `mk.LlavaKDLoss`, so that a step with it differs in nothing but the losses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mllmkd_kernels as mk


class WholeLogitsLoss(mk.LlavaKDLoss):
    """`mk.LlavaKDLoss` with forward KL, through logits of shape (B, T, V)."""

    def forward(
        self,
        student: mk.HeadInputs,
        teacher: mk.HeadInputs | None,
        labels: Tensor,  # (B, T)
        image_mask: Tensor | None = None,  # (B, T) bool
        *,
        image_lens: Any = None,
        **_: Any,
    ) -> mk.LlavaKDOutput:
        """The loss of one batch whose samples have an image each."""
        assert teacher is not None and image_mask is not None and image_lens is not None
        z_s = F.linear(student.hidden, student.weight).float()
        with torch.no_grad():
            z_t = F.linear(teacher.hidden, teacher.weight).float()
        following = labels[:, 1:]
        answered = following != self.ignore_index
        ce = F.cross_entropy(
            z_s[:, :-1].flatten(0, 1), following.flatten(), ignore_index=self.ignore_index
        )
        response = _kl(z_s[:, :-1][answered], z_t[:, :-1][answered])
        v_s, v_t = z_s[image_mask], z_t[image_mask]
        visual = _kl(v_s, v_t)
        rows = image_lens.tolist()
        relation = torch.stack(
            [_relation(s, t) for s, t in zip(v_s.split(rows), v_t.split(rows), strict=True)]
        ).mean()
        terms = (ce, response, visual, relation)
        weights = (self.ce, self.response, self.visual, self.relation)
        loss = sum((w * term for w, term in zip(weights, terms, strict=True)), ce.new_zeros(()))
        return mk.LlavaKDOutput(loss, *(term.detach() for term in terms))


def _kl(z_s: Tensor, z_t: Tensor) -> Tensor:
    return F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="batchmean")


def _relation(z_s: Tensor, z_t: Tensor) -> Tensor:
    r_s, r_t = z_s @ z_s.mT, z_t @ z_t.mT
    return 1 - F.cosine_similarity(r_s.flatten(), r_t.flatten(), dim=0)
