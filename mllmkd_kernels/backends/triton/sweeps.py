"""In which order is the vocabulary swept? The streamed algorithm: functions of a backend, from the
three sweeps of `stream`.

    statistics      each head once; with the label's logit that is CE
    values          each head again: D, where no gradient is wanted or the gradient needs a mean
    gradient        each head again, some columns at a time: dz (N, columns), and D on the way where
                    `values` was left out; two products fold dz into dh, and write dw[columns]

Logits never exist outside registers. dz is bf16 where hidden states and head are, else fp32, and is
the only workspace that grows with N·V. dw of a range of columns is one product over all rows, which
is written once: there is no accumulator beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mllmkd_kernels.backends import eager, products
from mllmkd_kernels.backends.calls import Head, Options, Targets
from mllmkd_kernels.backends.triton import stream
from mllmkd_kernels.backends.triton.diagnostics import counted
from mllmkd_kernels.backends.triton.divergence import NEEDS_MEAN
from mllmkd_kernels.divergence import sweeps

#: Columns are taken in multiples of a tile's width, so that a logit comes out of the same tile in
#: every sweep. Where logits are 1e4, one that is an ulp off the maximum that an earlier sweep found
#: has a probability that is wrong by 0.2%.
ALIGNED = 128

#: Fewer columns at a time than this would leave most of a GPU idle.
LEAST_COLUMNS = 512


def flops(
    rows: int, vocab: int, d_s: int, d_t: int, divergence: str | None, want_dh: bool, want_dw: bool
) -> int:
    """2·m·n·k of all matrix products; `d_t` 0 and `divergence` None without a teacher."""
    times = sweeps(divergence, want_dh or want_dw)
    return 2 * rows * vocab * (times * (d_s + d_t) + (int(want_dh) + int(want_dw)) * d_s)


def distill_stream(
    student: Head, teacher: Head | None, targets: Targets, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `eager.distill_rows`, but the gradient is made `options.chunk` columns at a time."""
    if teacher is None or targets.kd_weight is None:  # temperature is the divergence's alone
        teacher, targets = None, replace(targets, kd_weight=None, temperature=1.0)
    if targets.ce_weight is None:
        targets = replace(targets, labels=None)
    eager.check_labels(targets.labels, options.vocab, targets.ignore_index)
    ce_weight, kd_weight, n = targets.ce_weight, targets.kd_weight, student.h.shape[0]
    sweep = _Sweep(student, teacher, targets, options)
    ce, kd = sweep.facts.new_zeros(2, n)
    loss = torch.zeros((), dtype=torch.float64, device=student.h.device)
    grads = products.Gradients(student.h, student.w, torch.float32, False, False, False).result()
    sweep.statistics()
    if targets.labels is not None and ce_weight is not None:
        ignored = targets.labels == targets.ignore_index
        ce = sweep.cross_entropy().masked_fill(ignored, 0)
        sweep[stream.CE_WEIGHT].copy_(ce_weight).masked_fill_(ignored, 0)
        valid = (ce_weight != 0) & ~ignored
        loss += torch.where(valid, ce_weight * ce, 0).sum(dtype=torch.float64)
    if kd_weight is not None:
        sweep[stream.KD_WEIGHT].copy_(kd_weight / targets.temperature)
    wanted = any(options.wants)
    if teacher is not None and (not wanted or targets.divergence.name in NEEDS_MEAN):
        kd = sweep.values()
    if wanted:
        dead = (sweep[stream.CE_WEIGHT] == 0) & (sweep[stream.KD_WEIGHT] == 0)
        grads, on_the_way = sweep.gradients(dead, options.chunk, torch.float32)
        kd = kd if on_the_way is None else on_the_way
    if kd_weight is not None:
        loss += torch.where(kd_weight != 0, kd_weight * kd, 0).sum(dtype=torch.float64)
    return loss.float(), ce, kd, *grads


def logprob_rows(head: Head, targets: Targets, options: Options) -> tuple[Tensor, Tensor]:
    """As `eager.logprob_rows`. The chunk is not used: all rows at once need no workspace."""
    labels = eager.labels_of(targets)
    eager.check_labels(labels, options.vocab, targets.ignore_index)
    sweep = _Sweep(head, None, targets, options)
    sweep.statistics()
    lse = sweep[stream.TOP_S] / targets.temperature + sweep[stream.LOG_S]
    return -sweep.cross_entropy().masked_fill(labels == targets.ignore_index, 0), lse


def logprob_grad(
    grad: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    head: Head,
    targets: Targets,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager.logprob_grad`. Here columns are taken at a time, all rows of them: as many as make
    a block no larger than `options.chunk` rows of the vocabulary.
    """
    sweep = _Sweep(head, None, targets, options)
    sweep[stream.LOG_S].copy_(lse)
    weight = sweep[stream.CE_WEIGHT].copy_(grad).div_(-targets.temperature)
    ignored = eager.labels_of(targets) == targets.ignore_index
    dead = weight.masked_fill_(ignored, 0) == 0
    columns = max(LEAST_COLUMNS, options.chunk * options.vocab // max(head.h.shape[0], 1))
    return sweep.gradients(dead, columns, head.w.dtype)[0]


class _Sweep:
    """The sweeps over one or two heads, and what they find out about every row."""

    def __init__(
        self, student: Head, teacher: Head | None, targets: Targets, options: Options
    ) -> None:
        for head in (student, teacher):
            _check(head)
        self.student, self.teacher, self.labels = student, teacher, targets.labels
        self.divergence, self.param = targets.divergence.name, targets.divergence.param
        self.vocab, self.wants, self.into = options.vocab, options.wants, options.into
        self.diagnostics, self.scale = options.diagnostics, 1.0 / targets.temperature
        # Only beside a teacher do CE and the softmax at temperature T differ.
        both = teacher is not None and targets.labels is not None
        self.two_scales = both and targets.temperature != 1.0
        rows = student.h.shape[0]
        self.facts = student.h.new_zeros(stream.FACTS, rows, dtype=torch.float32)

    def __getitem__(self, fact: Any) -> Tensor:
        return self.facts[fact.value]

    def statistics(self) -> None:
        """Maxima, log-sums and the labels' logits, into `facts`; entropies."""
        first, second = self.facts[0:4], self.facts[4:8]
        entropies = (None, None) if self.diagnostics is None else self.diagnostics[:2]
        stream.statistics(
            self.student, self.labels, self.scale, self.two_scales, self.vocab, first, entropies[0]
        )
        if self.teacher is not None:
            stream.statistics(
                self.teacher, None, self.scale, False, self.vocab, second, entropies[1]
            )

    def cross_entropy(self) -> Tensor:
        """−log softmax(z)[label] of every row, (N,), at scale 1 beside a teacher."""
        below = self[stream.TOP_S] - self[stream.Z_LABEL]
        if self.two_scales:
            return below + self[stream.LOG_ONE]
        return below * self.scale + self[stream.LOG_S]

    def values(self) -> Tensor:
        """D of every row, (N,); Σ q·slope into `facts`; the agreement."""
        assert self.teacher is not None
        found, votes = stream.values(
            self.student, self.teacher, self.facts, self.divergence, self.param, self.scale,
            self.vocab, self.diagnostics is not None,
        )  # fmt: skip
        self._agree(votes)
        self[stream.MEAN].copy_(found[1])
        return found[0]

    def _agree(self, votes: Tensor | None) -> None:
        """The agreement of all rows, the last of `votes` (3, N)."""
        if self.diagnostics is not None and votes is not None:
            self.diagnostics[2].copy_(votes[2])

    def gradients(
        self, dead: Tensor, columns: int, dw_dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """(dh, dw in `dw_dtype`, db), and D and the agreement of every row where `values` has not
        been there before. `dead` (N,) marks rows of no weight: their hidden states may be NaN, and
        0 · NaN is NaN.
        """
        h, w = self.student.h, self.student.w
        want_dh, want_dw, want_db = self.wants
        want_kd = self.teacher is not None and self.divergence not in NEEDS_MEAN
        kd = torch.zeros_like(self.facts[0]) if want_kd else None
        dh = torch.zeros_like(h, dtype=torch.float32) if want_dh else None
        dw = torch.empty_like(w, dtype=dw_dtype) if want_dw and self.into is None else None
        db = h.new_zeros(w.shape[0], dtype=torch.float32) if want_db else None
        if dw is not None:
            dw[self.vocab :].zero_()
        if want_dw:
            h = h.masked_fill(dead[:, None], 0)
        columns = -(-min(columns, self.vocab) // ALIGNED) * ALIGNED
        halves = h.dtype == w.dtype == torch.bfloat16
        dtype = torch.bfloat16 if halves else torch.float32
        block = h.new_empty(h.shape[0], columns, dtype=dtype)
        ballots = []
        for tokens in products.chunks(self.vocab, columns):
            dz = block[:, : tokens.stop - tokens.start]
            terms, votes = stream.gradient(
                self.student, self.teacher, self.labels, self.facts, dz, tokens, self.divergence,
                self.param, self.scale, self.two_scales, want_kd,
                want_kd and self.diagnostics is not None,
            )  # fmt: skip
            ballots += [] if votes is None else [votes]
            if kd is not None and terms is not None:
                kd += terms
            if dh is not None:
                products.add_product(dh, dz, w[tokens])
            if dw is not None:
                _write_product(dz.mT, h, dw[tokens])
            if self.into is not None:
                main_grad, factor = self.into
                products.add_product(main_grad[tokens], dz.mT, h, factor)
            if db is not None:
                db[tokens] = dz.sum(0, dtype=torch.float32)
        if ballots:
            self._agree(counted(torch.stack(ballots)))
        none = products.Gradients(h, w, torch.float32, False, False, False).result()
        return (
            none[0] if dh is None else dh,
            none[1].to(dw_dtype) if dw is None else dw,
            none[2] if db is None else db,
        ), kd


def _write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, summed in fp32 and rounded once to the dtype of `out`."""
    if out.dtype == torch.float32:
        products.product(a, b, out)
    else:  # a GEMM that gives 16 bits may split its sum and add the parts in them
        exact = torch.empty_like(out, dtype=torch.float32)
        products.product(a, b, exact)
        out.copy_(exact)


def _check(head: Head | None) -> None:
    for x in () if head is None else (head.h, head.w):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"the streamed algorithm takes fp32, bf16 and fp16, got {x.dtype}; "
                "backend='eager' takes any"
            )
