"""Do the visual tokens of an image relate to each other as they do in the teacher?
(LLaVA-KD, arXiv 2410.16236, eq. 4-5)

    L_rel = 1 − cos(R_s, R_t),  R = Z Zᵀ of the raw visual logits Z of an image; mean over images
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mllmkd_kernels.needs import Needs
from mllmkd_kernels.view import View


@dataclass(frozen=True)
class Relation:
    """See above; computed from the heads' Gram matrices, those of frozen heads kept.

    Attributes:
        name, weight, over, needs: as of every `Term`.
        joint: one cosine over the R of all images of a batch together, as the released LLaVA-KD
            code has it.
    """

    name: str
    weight: float
    joint: bool = False
    over: str = "images"

    @property
    def needs(self) -> Needs:
        """The teacher's visual rows."""
        return Needs(rows=frozenset({"visual"}))

    def __call__(self, view: View) -> Tensor:
        """This micro-batch's share of the mean."""
        hidden_s, hidden_t = view.hidden("visual")
        s, t, functions = view.student, view.teacher, view.settings.functions
        assert t is not None
        if not len(hidden_s):
            return view.zero
        grams: list[Tensor | None] = [None, None]
        images = view.images
        if s.softcap is None and t.softcap is None:  # or there is none
            heads = {"student": s, "teacher": t}
            grams = [functions.frozen_gram(who, x, view.vocab) for who, x in heads.items()]
        else:
            images = images.cpu()  # to count them has waited already, and here it saves work
        value = functions.relate(
            hidden_s, s.weight, hidden_t, t.weight, images,
            student_gram=grams[0], teacher_gram=grams[1],
            student_bias=s.bias, teacher_bias=t.bias,
            student_softcap=s.softcap, teacher_softcap=t.softcap,
            vocab_size=view.vocab, joint=self.joint, backend=view.settings.backend,
        )  # fmt: skip
        return value * view.share("images")
