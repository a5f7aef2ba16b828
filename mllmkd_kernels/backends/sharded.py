"""The chunked algorithm where the columns of the logits lie on several ranks.

Every rank makes its own columns of both logit blocks of the same C rows, C × V/R entries each.
What a row needs of the other ranks are sums over the vocabulary, three exchanges a chunk:

    maximum of z_s, maximum of z_t                                  MAX
    Σ exp z_s, Σ exp a, Σ exp b, each less its maximum; z_s at the label  SUM
    D, and Σ q g where the gradient needs it                        SUM

Eight numbers a row at most: 32 bytes in fp32. Where the divergence sees z-scored logits there is
one more after the maxima, sums of z and z² about them in fp64 (32 bytes a row), and Σ G a with D,
as two numbers where G needs Σ q g. The terms and slopes are those of `divergence`, whose sums over
slices add up; so a KL of nearly equal models is as exact here as it is whole. ``dh`` (N, D_s) is
summed over the ranks once, at the end; ``dw`` and ``db`` are of this rank's rows.

It is made of the eager backend's pieces. Kernels that return per-row maxima and sums of a slice
(those that stream the vocabulary do, inside) could take their place; the exchanges would stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mllmkd_kernels import divergence as div
from mllmkd_kernels.backends import eager
from mllmkd_kernels.backends.calls import Head, Options, Targets, dtype_of
from mllmkd_kernels.backends.products import Gradients, chunks
from mllmkd_kernels.vocab_slices import VocabSlice
from mllmkd_kernels.zscore import Score


@dataclass(frozen=True)
class Call:
    """What is the same for all rows: heads hold this rank's rows of the vocabulary, labels are
    tokens of the whole.
    """

    teacher: Head | None
    targets: Targets
    options: Options
    held: VocabSlice
    group: dist.ProcessGroup | None

    @property
    def columns(self) -> int:
        """Of this rank."""
        return self.held.stop - self.held.start


def distill_rows(
    student: Head,  # its rows the same on every rank
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, CE and D per row, the same on every rank; unscaled dh (N, D_s) of all ranks, dw and
    db of this one.
    """
    targets, options, h = call.targets, call.options, student.h
    acc = dtype_of(student, call.teacher)
    ce, kd = (torch.zeros(h.shape[0], dtype=acc, device=h.device) for _ in range(2))
    loss = torch.zeros((), dtype=torch.float64, device=h.device)
    grads = Gradients(h, student.w, acc, *options.wants, options.into)
    eager.check_labels(targets.labels, options.vocab, targets.ignore_index)
    for rows in chunks(h.shape[0], options.chunk):
        block = _Block(student, rows, acc, call)
        dz = torch.zeros_like(block.z) if grads.wanted else None
        if targets.labels is not None and targets.ce_weight is not None:
            labels = targets.labels[rows]
            weight = targets.ce_weight[rows].masked_fill(labels == targets.ignore_index, 0)
            ce[rows] = block.cross_entropy(labels, weight, dz)
            loss += torch.where(weight != 0, weight * ce[rows], 0).sum(dtype=torch.float64)
        if targets.kd_weight is not None:
            weight = targets.kd_weight[rows]
            kd[rows] = block.divergence(weight, dz)
            loss += torch.where(weight != 0, weight * kd[rows], 0).sum(dtype=torch.float64)
        if dz is not None:
            dead = eager.dead_rows(h, rows, targets)
            grads.add(rows, eager._through_softcap_(dz, block.z, student.cap), dead=dead)
    dh, dw, db = grads.result()
    if options.want_dh:
        dist.all_reduce(dh, group=call.group)
    return loss.to(acc), ce, kd, dh, dw, db


class _Block:
    """This rank's columns of the logits of some rows, and their row statistics over all ranks."""

    def __init__(self, student: Head, rows: slice, acc: torch.dtype, call: Call) -> None:
        self.call, targets = call, call.targets

        def logits(head: Head) -> Tensor:  # (C, columns)
            z = eager._logits(head.h[rows], head.w, head.b, call.columns, acc)
            return eager._softcap_(z, head.cap, head.h[rows])

        self.z = logits(student)
        blocks = [self.z]
        if targets.kd_weight is not None:
            assert call.teacher is not None
            blocks.append(logits(call.teacher))
        tops = _reduced([_maximum(z) for z in blocks], dist.ReduceOp.MAX, call.group)
        self.z_top = tops[0]
        sums = []
        if targets.ce_weight is not None:
            self.local = _local(eager.labels_of(targets)[rows], call)
            at_label = eager._at_label(self.z, self.local, -1) if call.columns else self.z_top * 0
            sums = [_exp_sum(self.z, self.z_top), at_label.masked_fill(self.local < 0, 0)]
        if targets.kd_weight is not None:
            self.seen = _seen(blocks, tops, call)
            sums += [_exp_sum(x.a, x.top) for x in self.seen]
        self.sums = _reduced(sums, dist.ReduceOp.SUM, call.group)

    def cross_entropy(self, labels: Tensor, weight: Tensor, dz: Tensor | None) -> Tensor:
        """CE of every row (0 where ignored); adds weight·(softmax(z) − onehot) to `dz`."""
        log_sum, at_label = self.sums[0].log(), self.sums[1]
        if dz is not None:
            q = (self.z - self.z_top[:, None]).sub_(log_sum[:, None]).exp_()
            if q.shape[1]:
                q = eager._minus_one_hot_(q, self.local, -1)
            dz += eager._scaled(q, weight)
        ce = log_sum + (self.z_top - at_label)
        return ce.masked_fill_(labels == self.call.targets.ignore_index, 0)

    def divergence(self, weight: Tensor, dz: Tensor | None) -> Tensor:
        """D of every row; adds weight·∂D/∂z to `dz`."""
        table, group, score = self.call.targets.divergence, self.call.group, self.seen[0].score
        log_q, log_p = (
            (x.a - x.top[:, None]).sub_(total.log()[:, None])
            for x, total in zip(self.seen, self.sums[-2:], strict=True)
        )
        pair = div.Pair(log_p, log_q)
        terms = [div.values(table, pair)]
        # also where no gradient is wanted here: all ranks exchange the same
        if table.name in div.ONE_SWEEP:
            da = div.gradients(table, pair)
            terms += [] if score is None else [score.along(da)]
            kd, *along = _reduced(terms, dist.ReduceOp.SUM, group)
        else:
            slope = div.slopes(table, pair)
            weighted = div.from_slopes(pair.q, slope, torch.zeros_like(terms[0]))
            terms.append(weighted.sum(-1))
            terms += [] if score is None else [score.along(weighted), score.along(pair.q)]
            kd, mean, *parts = _reduced(terms, dist.ReduceOp.SUM, group)
            da = div.from_slopes(pair.q, slope, mean)
            along = [parts[0] - mean * parts[1]] if parts else []
        if dz is None:
            return kd
        if score is None:
            weight = weight / self.call.targets.temperature
        else:
            weight = torch.where(weight == 0, 0, weight * score.scale.squeeze(1))
            da = score.gradient(da, *along)
        dz += eager._scaled(da, weight)
        return kd


@dataclass(frozen=True)
class _Seen:
    """What the divergence sees of this rank's logits of a model: z/T, or z-scored ones."""

    a: Tensor  # (C, columns)
    top: Tensor  # (C,): its maximum over all ranks
    score: Score | None


def _seen(blocks: list[Tensor], tops: tuple[Tensor, ...], call: Call) -> list[_Seen]:
    """Of logits (C, columns) of each model, and their maxima (C,) over all ranks."""
    temperature, vocab = call.targets.temperature, call.options.vocab
    if not call.targets.standardize:
        pairs = zip(blocks, tops, strict=True)
        return [_Seen(z / temperature, top / temperature, None) for z, top in pairs]
    sums = [x for z, top in zip(blocks, tops, strict=True) for x in _moments(z, top)]
    sums = _reduced(sums, dist.ReduceOp.SUM, call.group)
    found = []
    for z, top, first, second in zip(blocks, tops, sums[::2], sums[1::2], strict=True):
        below = first / vocab  # μ − top
        variance = (second / vocab - below.square()).clamp_(min=0)
        mean, variance = ((x[:, None]).to(z.dtype) for x in (top + below, variance))
        score = Score.of_deviations(z - mean, variance, vocab, temperature)
        found.append(_Seen(score.a, -below.to(z.dtype) * score.scale.squeeze(1), score))
    return found


def _moments(z: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (z − top) and Σ (z − top)² of this rank's columns, (C,) fp64: about their own mean first,
    so that only the means of ranks are squared about a maximum, where fp64 has digits to lose.
    """
    mean = z.mean(-1) if z.shape[1] else top
    square = (z - mean[:, None]).square_().sum(-1).double()
    off, n = mean.double() - top.double(), z.shape[1]
    return n * off, n * off.square() + square


def _reduced(
    terms: list[Tensor],  # (C,) each
    op: dist.ReduceOp.RedOpType,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, ...]:
    """Each term over all ranks, in one exchange."""
    if not terms:
        return ()
    stacked = torch.stack(terms)
    dist.all_reduce(stacked, op=op, group=group)
    return stacked.unbind()


def _maximum(z: Tensor) -> Tensor:
    """Row-wise maximum, −inf of no columns. A NaN is left to the sums: what the maximum of a NaN
    and a number is depends on who exchanges them.
    """
    if not z.shape[1]:
        return z.new_full((z.shape[0],), -torch.inf)
    top = z.amax(-1)
    return top.masked_fill_(top.isnan(), -torch.inf)


def _exp_sum(z: Tensor, top: Tensor) -> Tensor:
    """Σ exp(z − top) of this rank's columns."""
    return (z - top[:, None]).exp_().sum(-1)


def _local(labels: Tensor, call: Call) -> Tensor:
    """Labels as columns of this rank, −1 where another rank has the token or there is none."""
    here = (labels >= call.held.start) & (labels < call.held.stop)
    here &= labels != call.targets.ignore_index
    return torch.where(here, labels - call.held.start, -1)
