"""The four terms of LLaVA-KD and their weights, from two models' hidden states.

``L = ce·L_reg + response·L_res + visual·L_vis + relation·L_rel`` (arXiv 2410.16236, eq. 2–6):
cross-entropy and KL on the response rows, KL on the visual rows, relation of the visual logits of
each image. The first three are *one* sweep over both heads, because every row carries its own two
weights; the fourth goes through the Gram matrices of the heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mllmkd_kernels.distill import fused_linear_distill
from mllmkd_kernels.divergence import Divergence
from mllmkd_kernels.heads import (
    HeadInputs,
    check_batch,
    check_images,
    check_selected,
    take_rows,
)
from mllmkd_kernels.kept_gram import KeptGram
from mllmkd_kernels.relation import fused_linear_relation, head_gram
from mllmkd_kernels.rows import IGNORE_INDEX, RowCounts, image_seqlens, response_rows, visual_rows


class LlavaKDOutput(NamedTuple):
    """The loss and its four terms.

    The terms are means in nats (`relation` in [0, 2]) before their weights are applied, detached:
    with the counts of a whole optimiser step they are this micro-batch's share, and sum to the
    step's mean. A term that was not asked for, or has no rows, is 0.

    With ``diagnostics=True`` entropies (in nats) and top-1 agreement of the response rows follow,
    shares of means likewise; see `DistillOutput`. They are None where they are not asked for or not
    known: all three if no term has response rows, the last two if no term has a teacher's head.
    """

    loss: Tensor
    ce: Tensor
    response_kl: Tensor
    visual_kl: Tensor
    relation: Tensor
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    agreement: Tensor | None = None


# Which of `RowCounts` each mean of a `LlavaKDOutput` is over.
MEAN_OVER = dict.fromkeys(LlavaKDOutput._fields[1:], "response") | {
    "visual_kl": "visual",
    "relation": "images",
}


class LlavaKDLoss(nn.Module):
    """LLaVA-KD's loss for any pair of models that share a vocabulary.

    Args:
        ce, response, visual, relation: weights of the four terms; the paper's are 1, 1, 1, 0.5 (its
            released code has 1 for all four). A weight of 0 skips the work of its term.
        temperature: T of both softmaxes in the two KL terms.
        divergence: what the two KL terms use, a name or a `Divergence`.
        ignore_index: label of positions without one.
        vocab_size: shared vocabulary, default the smaller head.
        response_shift: False distils the *unshifted* answer positions, as the released code of
            LLaVA-MoD and LLAVADI does against its papers; cross-entropy is shifted either way.
        relation_batch: True takes one cosine over the R of all images of the batch together, as the
            released LLaVA-KD code does; the paper's form, the default, has one per image.
        diagnostics: also return entropies and agreement of the response rows, at next to no cost.
        backend, workspace_mb: as in `fused_linear_distill`.

    Raises:
        ValueError: a negative weight, an unknown divergence.
    """

    def __init__(
        self,
        ce: float = 1.0,
        response: float = 1.0,
        visual: float = 1.0,
        relation: float = 0.5,
        temperature: float = 1.0,
        divergence: str | Divergence = "forward_kl",
        *,
        ignore_index: int = IGNORE_INDEX,
        vocab_size: int | None = None,
        response_shift: bool = True,
        relation_batch: bool = False,
        diagnostics: bool = False,
        backend: str = "auto",
        workspace_mb: float | None = None,
    ) -> None:
        super().__init__()
        for name, weight in (
            ("ce", ce),
            ("response", response),
            ("visual", visual),
            ("relation", relation),
        ):
            if not weight >= 0:
                raise ValueError(f"{name}: expected a weight >= 0, got {weight}")
        self.ce, self.response, self.visual, self.relation = ce, response, visual, relation
        self.temperature, self.divergence = temperature, Divergence.of(divergence)
        self.ignore_index, self.vocab_size = ignore_index, vocab_size
        self.response_shift, self.relation_batch = response_shift, relation_batch
        self.diagnostics = diagnostics
        self.backend, self.workspace_mb = backend, workspace_mb
        self._grams = {"student": KeptGram("student"), "teacher": KeptGram("teacher")}

    def forward(
        self,
        student: HeadInputs,
        teacher: HeadInputs | None,
        labels: Tensor,  # (B, T)
        image_mask: Tensor | None = None,  # (B, T) bool
        *,
        num_items_in_batch: RowCounts | int | Tensor | None = None,
        image_lens: Tensor | list[int] | None = None,
        teacher_labels: Tensor | None = None,  # (B, T')
        teacher_image_mask: Tensor | None = None,  # (B, T')
    ) -> LlavaKDOutput:
        """The loss of one micro-batch.

        Args:
            student, teacher: heads and hidden states; a None teacher leaves cross-entropy alone
                (the SFT stage). The teacher's hidden states may be (M + K, D), stored ones say: its
                M response rows and then its K visual rows, each in the order of the batch. A loss
                without visual terms takes the M alone as well.
            labels: (B, T) int64, unshifted, `ignore_index` where there is none.
            image_mask: (B, T) bool, True at image positions. None, or no True: no visual terms, as
                for text alone.
            num_items_in_batch: what the means divide by. `RowCounts` over the whole optimiser step
                is exact under gradient accumulation and data parallelism. A single number counts
                response rows; the visual terms, for which it says nothing, are then means of this
                micro-batch weighted by its share of response rows. None means the rows of this
                micro-batch.
            image_lens: visual rows of each image in order; None takes each run of image positions
                for one image.
            teacher_labels, teacher_image_mask: (B, T') where the teacher's sequence has other
                positions.

        Raises:
            ValueError: shapes that do not fit; teacher and student select different numbers of rows
                (both named).
            RuntimeError: a frozen head was written to through ``.data`` since its Gram was made.
        """
        check_batch(student, labels, image_mask)
        shape = labels.shape
        mask = (
            torch.zeros(shape, dtype=torch.bool, device=labels.device)
            if image_mask is None
            else image_mask
        )
        rows_s = _Rows.select(self, labels, mask)
        cu = image_seqlens(mask, image_lens)
        rows_t = rows_s
        if teacher is not None and teacher.hidden.ndim == 2:
            given = teacher_labels is not None or teacher_image_mask is not None
            rows_t = rows_s.packed(self, teacher.hidden, given)
        elif teacher is not None:
            t_labels = labels if teacher_labels is None else teacher_labels
            t_mask = mask if teacher_image_mask is None else teacher_image_mask
            check_batch(teacher, t_labels, t_mask, "teacher_")
            rows_t = _Rows.select(self, t_labels, t_mask)
            rows_s.check_against(rows_t)
            if teacher_image_mask is not None and image_lens is None:
                check_images(cu, image_seqlens(t_mask))
        norms = _Norms.of(num_items_in_batch, rows_s, cu.numel() - 1)
        loss, ce, response, visual, seen = self._rows_loss(student, teacher, rows_s, rows_t, norms)
        relation = loss.new_zeros(())
        if teacher is not None and self.relation and rows_s.visual.numel():
            share = (cu.numel() - 1) / norms.images
            relation = self._relation(student, teacher, rows_s, rows_t, cu) * share
            loss = loss + self.relation * relation
        return LlavaKDOutput(loss, ce, response, visual, relation.detach(), **seen)

    def weighted(self, terms: Mapping[str, float]) -> float:
        """The loss of four terms that go by their names in `LlavaKDOutput`."""
        return (
            self.ce * terms["ce"]
            + self.response * terms["response_kl"]
            + self.visual * terms["visual_kl"]
            + self.relation * terms["relation"]
        )

    def _rows_loss(
        self,
        student: HeadInputs,
        teacher: HeadInputs | None,
        rows_s: _Rows,
        rows_t: _Rows,
        norms: _Norms,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Cross-entropy and both KL terms in one sweep: (weighted loss, ce, response_kl, visual_kl,
        diagnostics).
        """
        segments = rows_s.segments(self, teacher is not None)
        if not any(s.kd for s in segments):
            teacher = None  # nothing asks for a divergence: its head is not read
        device, none = student.hidden.device, rows_s.response[:0]
        columns = [(none.float(), none.float(), none)]
        columns += [s.columns(norms, self) for s in segments]
        ce_weight, kd_weight, following = (
            torch.cat(parts).to(device) for parts in zip(*columns, strict=True)
        )
        hidden_t = weight_t = bias_t = softcap_t = None
        if teacher is not None:
            hidden_t = take_rows(
                teacher.hidden, [none, *(getattr(rows_t, s.rows) for s in segments)]
            )
            weight_t, bias_t, softcap_t = teacher.weight, teacher.bias, teacher.softcap
        out = fused_linear_distill(
            take_rows(student.hidden, [none, *(getattr(rows_s, s.rows) for s in segments)]),
            student.weight, hidden_t, weight_t, following,
            ce_weight=ce_weight if any(s.has_ce for s in segments) else 0.0, kd_weight=kd_weight,
            divergence=self.divergence, temperature=self.temperature,
            ignore_index=self.ignore_index, student_bias=student.bias, teacher_bias=bias_t,
            student_softcap=student.softcap, teacher_softcap=softcap_t, vocab_size=self.vocab_size,
            backend=self.backend, workspace_mb=self.workspace_mb, diagnostics=self.diagnostics,
        )  # fmt: skip
        seen: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = dict.fromkeys(
            ("ce", "response", "visual"), out.loss.new_zeros(())
        )
        start = 0
        for s in segments:
            rows = slice(start, start + s.index.numel())
            start = rows.stop
            if s.has_ce:
                sums["ce"] = sums["ce"] + out.ce[rows].sum() / norms.response
            if s.kd:
                sums[s.kd] = sums[s.kd] + out.kd[rows].sum() / getattr(norms, s.kd)
            if s.kd == "response" or s.has_ce:  # the rows of the KL, if the two differ
                seen = {k: x[rows].sum() / norms.response for k, x in out.diagnostics.items()}
        return out.loss, sums["ce"], sums["response"], sums["visual"], seen

    def _relation(
        self, student: HeadInputs, teacher: HeadInputs, rows_s: _Rows, rows_t: _Rows, cu: Tensor
    ) -> Tensor:
        """Relation of the visual logits, mean over images, with the Gram matrices of frozen
        heads kept.
        """
        vocab = self.vocab_size or min(student.weight.shape[0], teacher.weight.shape[0])
        capped = student.softcap is not None or teacher.softcap is not None
        return fused_linear_relation(
            take_rows(student.hidden, [rows_s.visual]),
            student.weight,
            take_rows(teacher.hidden, [rows_t.visual]),
            teacher.weight,
            cu,
            student_gram=None if capped else self._frozen_gram("student", student, vocab),
            teacher_gram=None if capped else self._frozen_gram("teacher", teacher, vocab),
            student_bias=student.bias, teacher_bias=teacher.bias,
            student_softcap=student.softcap, teacher_softcap=teacher.softcap,
            vocab_size=vocab, joint=self.relation_batch, backend=self.backend,
        )  # fmt: skip

    def _frozen_gram(self, who: str, head: HeadInputs, vocab: int) -> Tensor | None:
        """The kept Gram of a frozen head; None for a trained one."""
        trained = who == "student" and (
            head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
        )
        if trained:
            self._grams[who].drop()
            return None

        def make(weight: Tensor, bias: Tensor | None) -> Tensor:
            return head_gram(weight, bias, vocab_size=vocab)

        return self._grams[who].of(head.weight, head.bias, vocab, make)


class _Segment(NamedTuple):
    """Rows that share their terms: their indices, next tokens, whether they have CE, and which
    KL they feed.
    """

    rows: str  # attribute of _Rows: the teacher's own indices stand under the same name
    index: Tensor
    following: Tensor
    has_ce: bool
    kd: str  # "response", "visual" or "" for none

    def columns(self, norms: _Norms, loss: LlavaKDLoss) -> tuple[Tensor, Tensor, Tensor]:
        ones = torch.ones(self.index.numel(), dtype=torch.float32, device=self.index.device)
        ce = loss.ce / norms.response if self.has_ce else 0.0
        kd = getattr(loss, self.kd) / getattr(norms, self.kd) if self.kd else 0.0
        return ones * ce, ones * kd, self.following


class _Rows(NamedTuple):
    """Flat row indices of one model's batch."""

    response: Tensor
    following: Tensor  # next tokens of the response rows
    visual: Tensor
    unshifted: Tensor | None  # response rows of the KL where it is not shifted

    @classmethod
    def select(cls, loss: LlavaKDLoss, labels: Tensor, image_mask: Tensor) -> _Rows:
        index, following = response_rows(labels, loss.ignore_index)
        unshifted = None
        if not loss.response_shift:
            unshifted = (labels.reshape(-1) != loss.ignore_index).nonzero().squeeze(1)
        return cls(index, following, visual_rows(image_mask), unshifted)

    def segments(self, loss: LlavaKDLoss, with_teacher: bool) -> list[_Segment]:
        def unlabelled(index: Tensor) -> Tensor:
            return torch.full_like(index, loss.ignore_index)

        kd = "response" if with_teacher and loss.response and self.unshifted is None else ""
        found = []
        if loss.ce or kd:
            found.append(_Segment("response", self.response, self.following, bool(loss.ce), kd))
        if with_teacher and loss.response and self.unshifted is not None:
            found.append(
                _Segment("unshifted", self.unshifted, unlabelled(self.unshifted), False, "response")
            )
        if with_teacher and loss.visual:
            found.append(_Segment("visual", self.visual, unlabelled(self.visual), False, "visual"))
        return found

    def packed(self, loss: LlavaKDLoss, hidden: Tensor, other_labels: bool) -> _Rows:
        """The same rows, where they stand in (M + K, D) hidden states that hold nothing else."""
        m, k = self.response.numel(), self.visual.numel()
        check_selected(hidden, m, k, bool(loss.visual or loss.relation))
        if other_labels or self.unshifted is not None:
            raise ValueError(
                "teacher.hidden: its rows are selected already, so teacher_labels, "
                "teacher_image_mask and response_shift=False cannot select others"
            )
        index = torch.arange(m + k, dtype=torch.int64, device=hidden.device)
        return self._replace(response=index[:m], visual=index[m:])

    def check_against(self, teacher: _Rows) -> None:
        """Rows correspond one to one, or it is an error: nothing is skipped."""
        for name in ("response", "visual"):
            mine, other = getattr(self, name).numel(), getattr(teacher, name).numel()
            if mine != other:
                raise ValueError(
                    f"{name} rows: the student selects {mine}, the teacher {other}; "
                    "tokenizers, templates or image processors of the two differ"
                )


class _Norms(NamedTuple):
    """What the means divide by, never zero: a term without rows is 0, not 0/0."""

    response: Tensor
    visual: Tensor
    images: Tensor

    @classmethod
    def of(cls, given: RowCounts | int | Tensor | None, rows: _Rows, images: int) -> _Norms:
        local = RowCounts(rows.response.numel(), rows.visual.numel(), images)
        if given is None:
            counts = local
        elif isinstance(given, RowCounts):
            counts = given
        else:
            share = max(local.response, 1) / torch.as_tensor(given, dtype=torch.float32)
            counts = RowCounts(given, local.visual / share, local.images / share)
        device = rows.response.device
        tensors = (torch.as_tensor(c, dtype=torch.float32, device=device) for c in counts)
        return cls(*(t.clamp(min=torch.finfo(torch.float32).tiny) for t in tensors))
