"""The chunked algorithm in plain PyTorch: any device, any floating dtype; the fallback and the
cross-check.

Rows are taken C at a time. Both logit blocks of a chunk are formed in fp32 (fp64 for fp64 inputs).
In strips of a few rows they are turned into per-row losses and, in place of the student's, the
gradient block ``dz``, which two products fold into ``dh`` and ``dw``. Gradients are formed with the
loss, unscaled: the caller multiplies them by its incoming gradient.

`Options.diagnostics` (3, N), where it is given, is filled with H(softmax(z_s/T)),
H(softmax(z_t/T)) and 1.0 where some column is the maximum of both rows, else 0.0; without a teacher
only with the first, the student's at T = 1. `settle_` does the rest for all backends.

These functions are the interface of every backend, their arguments are described in `calls`. An
unwanted gradient is returned as an empty tensor. Gradients come in the accumulation dtype (fp32, or
fp64), since rounding is for the one who has scaled them; only `logprob_grad`, which has, gives
``dw`` in the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mllmkd_kernels import checks
from mllmkd_kernels import divergence as div
from mllmkd_kernels.backends import products
from mllmkd_kernels.backends.calls import Head, Options, Targets, dtype_of
from mllmkd_kernels.backends.products import Gradients, chunks
from mllmkd_kernels.zscore import Score

#: Side of a relation tile: R_s and R_t of 512 × 512 fp32 entries are 2 MiB, the size of a core's L2
#: cache.
RELATION_TILE = 512


def distill_rows(
    student: Head, teacher: Head | None, targets: Targets, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (scalar), CE and D per row (N,), and the unscaled gradients dh (N, D_s), dw (V_s,
    D_s), db (V_s,), `options.chunk` rows at a time.
    """
    acc, n = dtype_of(student, teacher), student.h.shape[0]
    ce, kd = (torch.zeros(n, dtype=acc, device=student.h.device) for _ in range(2))
    check_labels(targets.labels, options.vocab, targets.ignore_index)
    want_dh, want_dw, want_db = options.wants
    want_dw = want_dw and not options.factored
    grads = Gradients(student.h, student.w, acc, want_dh, want_dw, want_db, options.into)
    slope = None
    if options.factored:
        shape = dz_shape(n, options.vocab, acc)
        slope = torch.empty(shape, dtype=acc, device=student.h.device)
    wanted = grads.wanted or slope is not None
    block_s, block_t = (
        torch.empty(min(n, options.chunk), options.vocab, dtype=acc, device=student.h.device)
        if needed
        else None
        for needed in (slope is None, teacher is not None)
    )
    for rows in chunks(n, options.chunk):
        block = block_s if slope is None else slope[rows]
        z_chunk = _logits(student.h[rows], student.w, student.b, options.vocab, acc, block)
        b_chunk = None
        if teacher is not None:
            b_chunk = _logits(teacher.h[rows], teacher.w, teacher.b, options.vocab, acc, block_t)
        for strip, z in _strips(rows, z_chunk):
            b = None
            if teacher is not None and b_chunk is not None:
                b = _softcap_(b_chunk[_within(strip, rows)], teacher.cap, teacher.h[strip])
            _softcap_(z, student.cap, student.h[strip])
            dz = _strip_losses(z, b, strip, targets, options, ce, kd, wanted)
            if dz is not None:
                z.copy_(_through_softcap_(dz, z, student.cap))
        if grads.wanted:
            grads.add(rows, z_chunk, dead=dead_rows(student.h, rows, targets))
    labels = targets.labels
    counted = None if labels is None else labels != targets.ignore_index
    loss = _weighted_sum(ce, targets.ce_weight, counted) + _weighted_sum(kd, targets.kd_weight)
    dh, dw, db = grads.result()
    return loss.to(acc), ce, kd, dh, dw if slope is None else slope, db


def dz_shape(rows: int, vocab: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Of what `distill_rows` returns in the place of dw where `options.factored`."""
    return rows, vocab


def _strip_losses(
    z: Tensor,  # (rows of the strip, V)
    b: Tensor | None,  # the teacher's
    strip: slice,
    targets: Targets,
    options: Options,
    ce: Tensor,  # (N,), written
    kd: Tensor,  # (N,), written
    wanted: bool,
) -> Tensor | None:
    """Terms and diagnostics of a few rows, from their logits; the gradient, if it is wanted."""
    dz = torch.zeros_like(z) if wanted else None
    seen, temperature = options.diagnostics, targets.temperature
    log_q = z.log_softmax(-1)
    if targets.labels is not None and targets.ce_weight is not None:
        labels, weight = targets.labels[strip], targets.ce_weight[strip]
        ce[strip] = _cross_entropy(log_q, labels, weight, targets.ignore_index, dz)
    if b is not None and targets.kd_weight is not None:
        if seen is not None:
            seen[2, strip] = _agree(z, b)
        weight, score = targets.kd_weight[strip], None
        if targets.standardize:
            score = Score.of(z, temperature)
            log_q, log_p = score.a.log_softmax(-1), Score.of(b, temperature).a.log_softmax(-1)
            weight = torch.where(weight == 0, 0, weight * score.scale.squeeze(1))
        else:
            log_p, weight = b.div_(temperature).log_softmax(-1), weight / temperature
            log_q = log_q if temperature == 1 else (z / temperature).log_softmax(-1)
        pair = div.Pair(log_p, log_q)
        kd[strip] = div.values(targets.divergence, pair)
        if dz is not None:
            slope = div.gradients(targets.divergence, pair)
            if score is not None:
                slope = score.gradient(slope, score.along(slope))
            dz += _scaled(slope, weight)
        if seen is not None:
            seen[1, strip] = div.entropies(pair.log_p)
    if seen is not None:
        seen[0, strip] = div.entropies(log_q)
    return dz


def logprob_rows(head: Head, targets: Targets, options: Options) -> tuple[Tensor, Tensor]:
    """log softmax(z/T)[label] and the log-sum-exp of z/T, both (N,); 0 log-probability where
    ignored.
    """
    labels, ignored = labels_of(targets), targets.ignore_index
    acc, h = dtype_of(head), head.h
    logp, lse = (torch.zeros(h.shape[0], dtype=acc, device=h.device) for _ in range(2))
    check_labels(labels, options.vocab, ignored)
    for rows in chunks(h.shape[0], options.chunk):
        a = _softcap_(_logits(h[rows], head.w, head.b, options.vocab, acc), head.cap, h[rows])
        a = a.div_(targets.temperature)
        lse[rows] = _logsumexp(a)
        logp[rows] = _at_label(a, labels[rows], ignored) - lse[rows]
    return logp.masked_fill_(labels == ignored, 0), lse


def logprob_grad(
    grad: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    head: Head,
    targets: Targets,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dh, dw, db of Σ_n grad[n]·logp[n]; the logits are made again, chunk by chunk."""
    labels, ignored, temperature = labels_of(targets), targets.ignore_index, targets.temperature
    acc, h, cap = dtype_of(head), head.h, head.cap
    grads = Gradients(h, head.w, acc, *options.wants)
    weight = -torch.where(labels == ignored, 0, grad.to(acc)) / temperature
    for rows in chunks(h.shape[0], options.chunk):
        z = _logits(h[rows], head.w, head.b, options.vocab, acc)
        for strip, block in _strips(rows, z):
            q = (_softcap_(block, cap, h[strip]) / temperature).sub_(lse[strip, None]).exp_()
            dz = _scaled(_minus_one_hot_(q, labels[strip], ignored), weight[strip])
            block.copy_(_through_softcap_(dz, block, cap))
        grads.add(rows, z, dead=weight[rows] == 0)
    dh, dw, db = grads.result()
    return dh, dw.to(head.w.dtype), db


def labels_of(targets: Targets) -> Tensor:
    """The labels, of a call that needs them."""
    assert targets.labels is not None
    return targets.labels


def relation_stats(
    hs: Tensor,  # (N, D_s) fp32 or fp64
    ks: Tensor,  # (N, D_s): hs @ G_s, or hs itself for a relation of features
    ht: Tensor,  # (N, D_t)
    kt: Tensor,  # (N, D_t)
    cu_seqlens: Tensor,  # (images + 1,) int32
) -> Tensor:
    """<R_s, R_s>, <R_t, R_t>, <R_s, R_t> of every image, (images, 3) fp64, with R = K Hᵀ seen
    tile by tile.
    """
    ends = checks.ends("cu_seqlens", cu_seqlens, hs.shape[0])
    stats = torch.zeros(len(ends) - 1, 3, dtype=torch.float64, device=hs.device)
    for image, i, j in _relation_tiles(ends):
        r_s, r_t = (ks[i] @ hs[j].mT).double(), (kt[i] @ ht[j].mT).double()
        # R is symmetric: an off-diagonal tile stands for its mirror image too
        twice = 1.0 if i == j else 2.0
        products = ((r_s, r_s), (r_t, r_t), (r_s, r_t))
        stats[image] += twice * torch.stack([(x * y).sum() for x, y in products])
    return stats


def relation_grad(
    hs: Tensor,  # (N, D_s)
    ks: Tensor,  # (N, D_s)
    ht: Tensor,  # (N, D_t)
    kt: Tensor,  # (N, D_t)
    cu_seqlens: Tensor,  # (images + 1,) int32
    coef: Tensor,  # (images, 2) fp64
) -> Tensor:
    """M = dR · H_s of every image, (N, D_s), with dR = coef[0]·R_t + coef[1]·R_s formed tile by
    tile.
    """
    m = torch.zeros_like(hs)
    coef = coef.to(hs.dtype)
    ends = checks.ends("cu_seqlens", cu_seqlens, hs.shape[0])
    for image, i, j in _relation_tiles(ends):
        dr = coef[image, 0] * (kt[i] @ ht[j].mT) + coef[image, 1] * (ks[i] @ hs[j].mT)
        m[i] += dr @ hs[j]
        if i != j:
            m[j] += dr.mT @ hs[i]
    return m


def _logits(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    vocab: int,
    acc: torch.dtype,
    block: Tensor | None = None,
) -> Tensor:
    """h Wᵀ + b in the accumulation dtype, in the first rows of `block` where there is one."""
    if block is None:
        block = torch.empty(h.shape[0], vocab, dtype=acc, device=h.device)
    z = block[: h.shape[0]]
    products.product(h, w[:vocab].mT, z)
    return z if b is None else z.add_(b[:vocab])


def _strips(rows: slice, block: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A few of `rows` at a time, and their part of `block`: see `products.strip_bytes`."""
    size = max(1, products.strip_bytes(block.device) // max(block.shape[1] * block.itemsize, 1))
    for here in chunks(rows.stop - rows.start, size):
        yield slice(rows.start + here.start, rows.start + here.stop), block[here]


def _within(strip: slice, rows: slice) -> slice:
    """Where `strip` lies in a block of `rows`."""
    return slice(strip.start - rows.start, strip.stop - rows.start)


def _softcap_(z: Tensor, cap: float, h: Tensor) -> Tensor:
    """c·tanh(z/c) of the logits of `h`; NaN for a row of h that holds an inf, which tanh would
    hide.
    """
    if not cap:
        return z
    broken = ~h.isfinite().all(1, keepdim=True)
    return z.div_(cap).tanh_().mul_(cap).masked_fill_(broken, torch.nan)


def _through_softcap_(dz: Tensor, z: Tensor, cap: float) -> Tensor:
    """dz/dy = 1 − (z/c)² for z = c·tanh(y/c). A NaN among z is one of dz, or of a row without
    weight, whose dz is 0.
    """
    return dz.mul_((1 - (z / cap).square_()).nan_to_num_()) if cap else dz


def _logsumexp(z: Tensor) -> Tensor:
    """Row-wise log-sum-exp that keeps NaN: an inf among the logits is an error upstream, not a
    finite loss.
    """
    top = z.amax(-1)
    return (z - top[:, None]).exp_().sum(-1).log_() + top


def _at_label(z: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    safe = labels.masked_fill(labels == ignore_index, 0)
    return z.gather(1, safe[:, None]).squeeze(1)


def _minus_one_hot_(q: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    valid = labels != ignore_index
    return q.scatter_add_(1, labels.masked_fill(~valid, 0)[:, None], -valid.to(q.dtype)[:, None])


def _scaled(dz: Tensor, weight: Tensor) -> Tensor:
    """weight[n]·dz[n], exactly 0 for a row of zero weight whatever it holds."""
    scaled = dz * weight[:, None].to(dz.dtype)
    return scaled.masked_fill_((weight == 0)[:, None], 0)


def dead_rows(h: Tensor, rows: slice, targets: Targets) -> Tensor:
    """Which of `rows` have no weight at all, neither for a label nor for the teacher."""
    dead = torch.ones(rows.stop - rows.start, dtype=torch.bool, device=h.device)
    if targets.labels is not None and targets.ce_weight is not None:
        ignored = targets.labels[rows] == targets.ignore_index
        dead = (targets.ce_weight[rows] == 0) | ignored
    return dead if targets.kd_weight is None else dead & (targets.kd_weight[rows] == 0)


def alive(h: Tensor, targets: Targets) -> Tensor:
    """A copy of h (N, D) that is 0 in rows without any weight: so is their dz, but 0 · NaN is
    NaN.
    """
    dead = dead_rows(h, slice(0, h.shape[0]), targets)
    return h.masked_fill(dead[:, None], 0)


def _cross_entropy(
    log_q: Tensor, labels: Tensor, weight: Tensor, ignore_index: int, dz: Tensor | None
) -> Tensor:
    """CE of every row (0 where ignored) of log-probabilities; adds weight·(q − onehot) to `dz`."""
    ignored = labels == ignore_index
    if dz is not None:
        slope = _minus_one_hot_(log_q.exp(), labels, ignore_index)
        dz += _scaled(slope, weight.masked_fill(ignored, 0))
    return -_at_label(log_q, labels, ignore_index).masked_fill_(ignored, 0)


def _weighted_sum(x: Tensor, weight: Tensor | None, valid: Tensor | None = None) -> Tensor:
    """Σ weight·x in fp64; rows of zero weight count nothing, whatever they hold."""
    if weight is None:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    counts = weight != 0 if valid is None else (weight != 0) & valid
    return torch.where(counts, weight * x, 0).sum(dtype=torch.float64)


def _agree(a: Tensor, b: Tensor) -> Tensor:
    """Is some column the maximum of both rows? (C,) bool."""
    return ((a == a.amax(-1)[:, None]) & (b == b.amax(-1)[:, None])).any(-1)


def settle_(
    diagnostics: Tensor,  # (3, N)
    h: Tensor,  # (N, D_s)
    targets: Targets,
) -> None:
    """Agreement is NaN where an entropy is; rows without weight are 0, whatever they hold."""
    diagnostics[2] += 0 * (diagnostics[0] + diagnostics[1])
    diagnostics.masked_fill_(dead_rows(h, slice(0, h.shape[0]), targets), 0)


def check_labels(labels: Tensor | None, vocab: int, ignore_index: int) -> None:
    """On the CPU, where looking costs nothing, a label outside the vocabulary is named;
    elsewhere asserted on device.
    """
    if labels is None or labels.numel() == 0:
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if labels.device.type != "cpu":
        torch.ops.aten._assert_async.msg(~wrong.any(), "labels: a token outside the vocabulary")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"labels: got {int(labels[row])} at row {row}, "
            f"expected a token in [0, {vocab}) or ignore_index = {ignore_index}"
        )


def _relation_tiles(ends: list[int]) -> Iterator[tuple[int, slice, slice]]:
    """(image, row slice, column slice) of the lower triangle of every image's R."""
    for image, (start, end) in enumerate(pairwise(ends)):
        blocks = [
            slice(start + s.start, start + s.stop) for s in chunks(end - start, RELATION_TILE)
        ]
        for n, i in enumerate(blocks):
            for j in blocks[: n + 1]:
                yield image, i, j
