"""Do the visual tokens of an image relate to each other in the student as they do in the teacher?
(LLaVA-KD's RDist)

Per image ``R = Y Yᵀ`` of its rows, raw: no softmax, no normalisation. The loss is 1 − cos(R_s,
R_t), averaged over images. Rows are packed, image after image; `cu_seqlens` is their int32 prefix
sum, as in flash-attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mllmkd_kernels import casting, checks, relation_ops
from mllmkd_kernels.casting import wants


def relation_cosine(
    student: Tensor,  # (rows, D_s) or (B, P, D_s)
    teacher: Tensor,  # (rows, D_t) or (B, P, D_t)
    cu_seqlens: Tensor | None = None,  # (images + 1,)
    *,
    joint: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mean over images of ``1 − <R_s,R_t>/(‖R_s‖‖R_t‖)`` with R = Y Yᵀ of the rows themselves: a
    scalar.

    Args:
        student, teacher: features (or logits) of corresponding rows, floating; the sizes D may
            differ. Only the student receives a gradient. (B, P, D) means B images of P rows.
        cu_seqlens: int32 prefix sum of rows per image; None means one image.
        joint: one cosine over the R of all images together, as the released LLaVA-KD code has it,
            instead of the mean of one cosine per image.
        backend: "auto", "cpu" or "eager".

    Returns:
        fp32 scalar (fp64 for fp64 inputs) in [0, 2]. An image without rows counts as 0, one whose R
        vanishes as 1.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or row counts that do not fit, named.
    """
    student, teacher, cu_seqlens = _packed("student", student, "teacher", teacher, cu_seqlens)
    checks.floating("student", student, 2)
    checks.floating("teacher", teacher, 2)
    cu = _images(student, teacher, cu_seqlens, "student", "teacher")
    want = wants(student)[0], False
    chosen = checks.backend(backend)
    return relation_ops.relation(student, None, teacher.detach(), None, cu, *want, chosen, joint)[0]


def head_gram(
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """G = WᵀW, to compute once and keep while a head is frozen: (D, D) fp32, (D + 1, D + 1) with a
    bias.

    Args:
        weight, bias: the head, floating. A trainable one makes G differentiable.
        vocab_size: rows that take part. For a pair of heads of different sizes pass the smaller to
            both.

    Raises:
        TypeError, ValueError: as `fused_linear_distill`.
    """
    checks.floating("weight", weight, 2)
    checks.head_bias("bias", bias, "weight", weight)
    checks.in_memory("weight", weight)
    vocab = checks.vocabulary(vocab_size, weight.shape[0])
    return relation_ops.head_gram(weight, bias, vocab)


def fused_linear_relation(
    student_hidden: Tensor,  # (rows, D_s) or (B, P, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (rows, D_t) or (B, P, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    cu_seqlens: Tensor | None = None,  # (images + 1,)
    *,
    student_gram: Tensor | None = None,  # (D_s, D_s)
    teacher_gram: Tensor | None = None,  # (D_t, D_t)
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    joint: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`relation_cosine` of the logits Z = H Wᵀ + b, exactly, without logits: R = H (WᵀW) Hᵀ
    (LLaVA-KD eq. 5).

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight, *_bias: the heads as in
            `fused_linear_distill`; only the student's receive gradients.
        cu_seqlens: int32 prefix sum of visual rows per image; None means one image.
        student_gram, teacher_gram: cached `head_gram` of a frozen head (with its bias and this
            `vocab_size`). A cached student Gram cuts the gradient of the weight, so it is refused
            while the weight requires one, unless the Gram itself is differentiable.
        *_softcap: a soft-capped head has no Gram; the vocabulary is streamed instead, at the cost
            of the logits. `cu_seqlens` on the CPU then save work on another device, as in
            `affinity_loss`: without them the rows of all images are multiplied with each other.
        vocab_size: shared columns; default the smaller head.
        joint: as in `relation_cosine`.
        backend: "auto", "cpu" or "eager".

    Raises:
        TypeError, ValueError: arguments that do not fit, named with what was expected.
    """
    pair = Pair.of(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        cu_seqlens,
    )  # fmt: skip
    vocab = checks.vocabulary(vocab_size, student_weight.shape[0], teacher_weight.shape[0])
    caps = [
        checks.softcap("student_softcap", student_softcap),
        checks.softcap("teacher_softcap", teacher_softcap),
    ]
    if any(caps):
        if student_gram is not None or teacher_gram is not None:
            raise ValueError(
                "student_gram, teacher_gram: a soft-capped pair has no Gram matrix; pass None"
            )
        wanted = wants(pair.hs, pair.ws, pair.bs)
        equal = student_hidden.shape[-2] if cu_seqlens is None else 0
        return relation_ops.relation_softcapped(*pair, *caps, vocab, *wanted, joint, equal)[0]

    def gram(weight: Tensor, bias: Tensor | None) -> Tensor:
        return head_gram(weight, bias, vocab_size=vocab)

    return pair.relation(student_gram, teacher_gram, gram, joint, backend)


class Pair(NamedTuple):
    """Two heads and the packed rows that enter them, checked and cast; the teacher's detached."""

    hs: Tensor
    ws: Tensor
    bs: Tensor | None
    ht: Tensor
    wt: Tensor
    bt: Tensor | None
    cu: Tensor

    @classmethod
    def of(
        cls,
        hs: Tensor,
        ws: Tensor,
        bs: Tensor | None,
        ht: Tensor,
        wt: Tensor,
        bt: Tensor | None,
        cu: Tensor | None,
    ) -> Pair:
        """Pack, check and cast, as `fused_linear_relation` describes its arguments."""
        hs, ht, cu = _packed("student_hidden", hs, "teacher_hidden", ht, cu)
        checks.head("student_", hs, ws, bs)
        checks.head("teacher_", ht, wt, bt)
        cu = _images(hs, ht, cu, "student_hidden", "teacher_hidden")
        hs, ws, bs, ht, wt, bt = casting.heads((hs, ws, bs), (ht, wt, bt))
        return cls(hs, ws, bs, ht, wt, bt, cu)

    def relation(
        self,
        student_gram: Tensor | None,
        teacher_gram: Tensor | None,
        gram: Callable[[Tensor, Tensor | None], Tensor],  # of a head whose Gram is not cached
        joint: bool,
        backend: str,
    ) -> Tensor:
        """The loss through both Grams."""
        trained = any(wants(self.ws, self.bs))
        if student_gram is not None and trained and not student_gram.requires_grad:
            raise ValueError(
                "student_gram: a cached Gram would cut the gradient of student_weight, which "
                "requires one; pass None, or freeze the head"
            )
        check_gram("student_", student_gram, self.ws, self.bs)
        check_gram("teacher_", teacher_gram, self.wt, self.bt)
        gs = gram(self.ws, self.bs) if student_gram is None else student_gram
        gt = gram(self.wt, self.bt) if teacher_gram is None else teacher_gram
        hs, ht = with_ones(self.hs, self.bs), with_ones(self.ht, self.bt)
        want = wants(hs, gs)
        chosen = checks.backend(backend)
        return relation_ops.relation(hs, gs, ht, gt.detach(), self.cu, *want, chosen, joint)[0]


def check_gram(who: str, gram: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    """A cached Gram fits its head."""
    if gram is None:
        return
    checks.floating(f"{who}gram", gram, 2)
    if gram.dtype in (torch.bfloat16, torch.float16):  # 1 − cos is a small difference
        raise TypeError(f"{who}gram: expected float32, as `head_gram` gives it, got {gram.dtype}")
    size = weight.shape[1] + (bias is not None)
    if tuple(gram.shape) != (size, size):
        raise ValueError(f"{who}gram: expected shape ({size}, {size}), got {tuple(gram.shape)}")
    checks.same_device(f"{who}gram", gram, f"{who}weight", weight)


def with_ones(hidden: Tensor, bias: Tensor | None) -> Tensor:
    """A bias is one more hidden feature that is always 1."""
    return hidden if bias is None else torch.cat((hidden, torch.ones_like(hidden[:, :1])), 1)


def _packed(
    name_s: str, student: Tensor, name_t: str, teacher: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, P, D) → packed rows and their prefix sum; packed rows stay as they are."""
    if not (isinstance(student, Tensor) and isinstance(teacher, Tensor)):
        return student, teacher, cu_seqlens  # refused by name in the checks that follow
    if 3 not in (student.ndim, teacher.ndim):
        return student, teacher, cu_seqlens
    if student.ndim != teacher.ndim or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"{name_t}: got shape {tuple(teacher.shape)} beside a {name_s} of "
            f"{tuple(student.shape)}; (B, P, D) needs the same B images of P rows in both"
        )
    if cu_seqlens is not None:
        raise ValueError(
            f"cu_seqlens: {name_s} of shape {tuple(student.shape)} is already B images; pass None"
        )
    images, rows, _ = student.shape
    return student.flatten(0, 1), teacher.flatten(0, 1), _even(images, rows, student.device)


def _even(images: int, rows: int, device: torch.device) -> Tensor:
    """The prefix sum of images of `rows` rows each, made where it is read: no copy, no wait."""
    return torch.arange(images + 1, dtype=torch.int32, device=device) * rows


def _images(
    student: Tensor, teacher: Tensor, cu: Tensor | None, name_s: str, name_t: str
) -> Tensor:
    """The prefix sum of rows per image, one image by default, checked against both models' rows."""
    checks.same_rows(name_t, teacher.shape[0], name_s, student.shape[0])
    checks.same_device(name_t, teacher, name_s, student)
    checks.in_memory(name_s, student)
    if cu is None:
        return _even(1, student.shape[0], student.device)
    checks.cu_seqlens("cu_seqlens", cu, student.shape[0])
    return cu
