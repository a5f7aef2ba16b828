"""Is `LlavaKDLoss` LLaVA-KD's loss, the paper's by default and the released code's by option?

The expectations are written out over whole logits as the papers and the released code have them
(the quirks of the code included where an option asks for them), not from the package's reference.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import HeadInputs, LlavaKDLoss, RowCounts, llava_kd
from tests.tolerances import check

# 3 samples of 14 tokens: one image; text alone; two images, of other sizes.
B, T, V, D_S, D_T = 3, 14, 50, 6, 9
RUNS = [[(1, 6)], [], [(0, 3), (4, 8)]]
IGNORE = -100


def mask_of(runs: list[list[tuple[int, int]]], length: int = T) -> Tensor:
    mask = torch.zeros(len(runs), length, dtype=torch.bool)
    for row, images in enumerate(runs):
        for start, end in images:
            mask[row, start:end] = True
    return mask


def labels_of(batch: int = B) -> Tensor:
    labels = torch.full((batch, T), IGNORE)
    labels[:, 9:] = torch.randint(0, V, (batch, T - 9))
    labels[0, 12:] = IGNORE  # padding; rows of different number in every sample
    if batch > 1:
        labels[1, 0:4] = torch.randint(0, V, (4,))  # a label at the very first position
    return labels


def heads(batch: int = B, dtype: torch.dtype = torch.float64, **student: Any) -> Any:
    s = HeadInputs(
        torch.randn(batch, T, D_S, dtype=dtype, requires_grad=True),
        torch.randn(V, D_S, dtype=dtype, requires_grad=True), **student,
    )  # fmt: skip
    t = HeadInputs(torch.randn(batch, T, D_T, dtype=dtype), torch.randn(V + 3, D_T, dtype=dtype))
    return s, t


def logits(h: HeadInputs) -> Tensor:
    z = F.linear(h.hidden, h.weight, h.bias)[..., :V]
    return z if h.softcap is None else h.softcap * torch.tanh(z / h.softcap)


def batchmean_kl(z_s: Tensor, z_t: Tensor) -> Tensor:
    return torch.nn.KLDivLoss(reduction="batchmean")(z_s.log_softmax(-1), z_t.softmax(-1))


def relation_of(z_s: Tensor, z_t: Tensor) -> Tensor:
    """1 − cos of the two relation matrices; a leading dimension is flattened with them."""
    r_s, r_t = z_s @ z_s.mT, z_t @ z_t.mT
    return 1 - F.cosine_similarity(r_t.reshape(1, -1), r_s.reshape(1, -1))[0]


def paper(s: HeadInputs, t: HeadInputs, labels: Tensor, runs: list) -> tuple[Tensor, ...]:
    """The four terms: means over tokens, cosine per image (arXiv 2410.16236, eq. 1–6)."""
    z_s, z_t, mask = logits(s), logits(t), mask_of(runs)
    ce = F.cross_entropy(z_s[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=IGNORE)
    answered = labels[:, 1:] != IGNORE
    response = batchmean_kl(z_s[:, :-1][answered], z_t[:, :-1][answered])
    visual = batchmean_kl(z_s[mask], z_t[mask])
    images = [(b, slice(*run)) for b, found in enumerate(runs) for run in found]
    relation = torch.stack([relation_of(z_s[b, run], z_t[b, run]) for b, run in images]).mean()
    return ce, response, visual, relation


def check_loss(out: Any, terms: tuple, weights: tuple, s: HeadInputs) -> None:
    """Loss, terms and both gradients."""
    want = torch.stack([w * x for w, x in zip(weights, terms, strict=True)]).sum()
    check(out.loss, want.detach(), "fp32 weights", what="loss")
    for got, like, name in zip(out[1:5], terms, out._fields[1:5], strict=True):
        check(got, like.detach(), "fp32 weights", what=name)
        assert not got.requires_grad
    leaves = [x for x in (s.hidden, s.weight, s.bias) if x is not None]
    for got, like in zip(
        torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        check(got, like, "fp32 weights", what="gradient")


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 0.5), (0.3, 2.0, 0.7, 1.5)], ids=str)
def test_the_paper(weights: tuple[Any, ...], backend: str) -> None:
    s, t = heads()
    labels = labels_of()
    out = LlavaKDLoss(*weights, backend=backend)(s, t, labels, mask_of(RUNS))
    check_loss(out, paper(s, t, labels, RUNS), weights, s)
    default = LlavaKDLoss()
    assert (default.ce, default.response, default.visual, default.relation) == (1, 1, 1, 0.5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_head_with_bias_and_soft_cap(softcap: float | None, backend: str) -> None:
    s, t = heads(bias=torch.randn(V, dtype=torch.float64, requires_grad=True), softcap=softcap)
    t = replace(t, bias=torch.randn(V + 3, dtype=torch.float64))
    labels = labels_of()
    out = LlavaKDLoss(backend=backend)(s, t, labels, mask_of(RUNS))
    check_loss(out, paper(s, t, labels, RUNS), (1, 1, 1, 0.5), s)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_released_code(batch: int, backend: str) -> None:
    """compute_loss as released, with its one image a sample at one place, and weights of 1."""
    s, t = heads(batch)
    labels, runs = labels_of(batch), [[(2, 8)]] * batch
    z_s, z_t = logits(s), logits(t)
    valid = labels[:, 1:] != IGNORE
    shifted = z_s[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)
    v_s, v_t = z_s[:, 2:8], z_t[:, 2:8]
    terms = (
        F.cross_entropy(*shifted, ignore_index=IGNORE),
        batchmean_kl(z_s[:, :-1][valid], z_t[:, :-1][valid]),
        batchmean_kl(v_s.reshape(-1, V), v_t.reshape(-1, V)),
        relation_of(v_s, v_t),  # (batch, 6, 6), then *one* cosine over everything
    )
    loss = LlavaKDLoss(relation=1.0, relation_batch=True, backend=backend)
    check_loss(loss(s, t, labels, mask_of(runs)), terms, (1, 1, 1, 1), s)


def test_the_papers_sums_are_counts_of_one(backend: str) -> None:
    """Eq. 2 and 3 sum over tokens; what is divided by is the caller's."""
    s, t = heads()
    labels, mask = labels_of(), mask_of(RUNS)
    ce, response, visual, relation = paper(s, t, labels, RUNS)
    rows = int((labels[:, 1:] != IGNORE).sum())
    terms = ce * rows, response * rows, visual * int(mask.sum()), relation * 3
    out = LlavaKDLoss(backend=backend)(s, t, labels, mask, num_items_in_batch=RowCounts(1, 1, 1))
    check_loss(out, terms, (1, 1, 1, 0.5), s)


def test_images_that_split_differently_are_refused() -> None:
    s, t = heads(1)
    mask_s, mask_t = mask_of([[(0, 2), (3, 6)]]), mask_of([[(0, 3), (4, 6)]])
    loss = LlavaKDLoss()
    with pytest.raises(ValueError, match=r"teacher_image_mask: .*\[3, 2\].*\[2, 3\]"):
        loss(s, t, labels_of(1), mask_s, teacher_image_mask=mask_t)
    assert loss(s, t, labels_of(1), mask_s, teacher_image_mask=mask_t, image_lens=[5]).relation > 0


def test_unshifted_responses_and_soft_cross_entropy(backend: str) -> None:
    """LLaVA-MoD's mimic loss: −Σ p log q at the answer tokens' own positions; CE stays shifted."""
    s, t = heads()
    labels = labels_of()
    z_s, z_t, answer = logits(s), logits(t), labels != IGNORE
    soft = -(z_t[answer].softmax(-1) * z_s[answer].log_softmax(-1)).sum(-1).mean()
    # The released code divides by the number of answer tokens, the package by that of its rows,
    # which is one less where a label stands at the first position: here in sample 1.
    rows = (labels[:, 1:] != IGNORE).sum()
    soft = soft * answer.sum() / rows
    terms = (paper(s, t, labels, RUNS)[0], soft, torch.zeros(()).double(), torch.zeros(()).double())
    loss = LlavaKDLoss(
        1.0, 1.0, 0.0, 0.0, divergence="soft_cross_entropy", response_shift=False, backend=backend
    )
    check_loss(loss(s, t, labels, mask_of(RUNS)), terms, (1, 1, 0, 0), s)


def test_temperature_and_divergence_reach_both_kl_terms(backend: str) -> None:
    s, t = heads()
    labels, mask = labels_of(), mask_of(RUNS)
    out = LlavaKDLoss(temperature=2.0, divergence="reverse_kl", backend=backend)(s, t, labels, mask)
    z_s, z_t = logits(s) / 2, logits(t) / 2
    for got, rows in ((out.response_kl, labels[:, 1:] != IGNORE), (out.visual_kl, mask)):
        width = rows.shape[1]
        check(
            got, batchmean_kl(z_t[:, :width][rows], z_s[:, :width][rows]).detach(), "fp32 weights"
        )


# --- which terms there are -----------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, torch.zeros(B, T, dtype=torch.bool)], ids=["None", "empty"])
def test_text_alone_has_no_visual_terms(mask: Tensor | None, backend: str) -> None:
    s, t = heads()
    out = LlavaKDLoss(backend=backend)(s, t, labels_of(), mask)
    assert out.visual_kl == 0 and out.relation == 0 and out.response_kl > 0
    check(out.loss, out.ce + out.response_kl, "fp32 weights")
    out.loss.backward()
    assert s.hidden.grad.isfinite().all()


def test_no_rows_at_all_is_zero_and_differentiable(backend: str) -> None:
    s, t = heads()
    loss = LlavaKDLoss(diagnostics=True, backend=backend)
    out = loss(s, t, torch.full((B, T), IGNORE), None)
    assert all(x == 0 for x in out)
    out.loss.backward()
    assert not s.hidden.grad.any() and not s.weight.grad.any()


def test_without_a_teacher_it_is_cross_entropy(backend: str) -> None:
    s, t = heads()
    labels = labels_of()
    out = LlavaKDLoss(backend=backend)(s, None, labels, mask_of(RUNS))
    zero = torch.zeros(()).double()
    check_loss(out, (paper(s, t, labels, RUNS)[0], zero, zero, zero), (1, 1, 1, 1), s)


@pytest.mark.parametrize("kept", ["ce", "response", "visual", "relation"])
def test_a_weight_of_zero_leaves_the_term_out(
    kept: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s, t = heads()
    labels = labels_of()
    names = ("ce", "response", "visual", "relation")
    calls: list[Any] = []
    original = llava_kd.fused_linear_distill

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(llava_kd, "fused_linear_distill", spy)
    weights: list[Any] = [float(n == kept) for n in names]
    out = LlavaKDLoss(*weights, backend=backend)(s, t, labels, mask_of(RUNS))
    zero = torch.zeros(()).double()
    terms = paper(s, t, labels, RUNS)
    check_loss(
        out, tuple(x if n == kept else zero for n, x in zip(names, terms, strict=True)),
        tuple(weights), s,
    )  # fmt: skip
    rows = {"ce": 16, "response": 16, "visual": 12, "relation": 0}[kept]
    assert [(c[0].shape[0], c[2] is not None) for c in calls] == [
        (rows, kept in ("response", "visual"))
    ]


def test_image_lengths_tell_adjacent_images_apart(backend: str) -> None:
    s, t = heads(1)
    labels, mask = labels_of(1), mask_of([[(1, 7)]])
    loss = LlavaKDLoss(backend=backend)
    apart = loss(s, t, labels, mask, image_lens=[2, 4]).relation
    check(apart, paper(s, t, labels, [[(1, 3), (3, 7)]])[3].detach(), "fp32 weights")
    assert not torch.isclose(apart, loss(s, t, labels, mask).relation)


# --- teacher and student of different sequences --------------------------------------------------


def test_a_teacher_with_positions_of_its_own(backend: str) -> None:
    """The teacher's template has two tokens more in front; its rows are those of its own labels."""
    s, t = heads()
    labels, mask = labels_of(), mask_of(RUNS)
    labels[:, 0] = IGNORE  # a label there has a row only where a token stands before it
    longer = replace(t, hidden=torch.cat((torch.randn(B, 2, D_T).double(), t.hidden), 1))
    moved = F.pad(labels, (2, 0), value=IGNORE), F.pad(mask, (2, 0))
    loss = LlavaKDLoss(diagnostics=True, backend=backend)
    got = loss(s, longer, labels, mask, teacher_labels=moved[0], teacher_image_mask=moved[1])
    for a, b in zip(got, loss(s, t, labels, mask), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", ["response", "visual"])
def test_rows_that_do_not_correspond(which: str, backend: str) -> None:
    s, t = heads()
    labels, mask = labels_of(), mask_of(RUNS)
    other = {"teacher_labels": labels.clone(), "teacher_image_mask": mask.clone()}
    if which == "response":
        other["teacher_labels"][0, 10] = IGNORE
        numbers = (16, 15)
    else:
        other["teacher_image_mask"][0, 6] = True
        numbers = (12, 13)
    message = f"{which} rows: the student selects {numbers[0]}, the teacher {numbers[1]}"
    with pytest.raises(ValueError, match=message):
        LlavaKDLoss(backend=backend)(s, t, labels, mask, **other)


# --- the normaliser ------------------------------------------------------------------------------


def micro_batches(s: HeadInputs, t: HeadInputs, labels: Tensor, mask: Tensor) -> list[tuple]:
    return [
        (replace(s, hidden=s.hidden[r]), replace(t, hidden=t.hidden[r]), labels[r], mask[r])
        for r in (slice(i, i + 1) for i in range(labels.shape[0]))
    ]


def test_micro_batches_add_up_to_the_batch(backend: str) -> None:
    """Four micro-batches, one of text alone, divided by the counts of the whole step."""
    runs = [*RUNS, [(3, 5)]]
    s, t = heads(4)
    labels, mask = labels_of(4), mask_of(runs)
    loss = LlavaKDLoss(diagnostics=True, backend=backend)
    whole = loss(s, t, labels, mask)
    counts = RowCounts(
        response=int((labels[:, 1:] != IGNORE).sum()),
        visual=torch.tensor(int(mask.sum())),
        images=4,
    )
    parts = [loss(*m, num_items_in_batch=counts) for m in micro_batches(s, t, labels, mask)]
    for name in whole._fields:
        total = torch.stack([getattr(p, name) for p in parts]).sum()
        # The counts become fp32 weights, of which a third is rounded.
        assert abs(total / getattr(whole, name) - 1) < 2e-7, name
    (want,) = torch.autograd.grad(whole.loss, s.weight)
    grads = [torch.autograd.grad(p.loss, s.weight)[0] for p in parts]
    torch.testing.assert_close(sum(grads), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_a_single_number_counts_response_rows(kind: Any, backend: str) -> None:
    """All that a Trainer hands over: exact for text terms, for visual ones a weighted mean."""
    s, t = heads()
    labels, mask = labels_of(), mask_of(RUNS)
    loss = LlavaKDLoss(diagnostics=True, backend=backend)
    rows = int((labels[:, 1:] != IGNORE).sum())
    whole = loss(s, t, labels, mask)
    for a, b in zip(loss(s, t, labels, mask, num_items_in_batch=kind(rows)), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    half = loss(s, t, labels, mask, num_items_in_batch=kind(2 * rows))
    for a, b in zip(half, whole, strict=True):
        torch.testing.assert_close(a, b / 2, rtol=1e-6, atol=0)
    parts = [loss(*m, num_items_in_batch=kind(rows)) for m in micro_batches(s, t, labels, mask)]
    for name in ("ce", "response_kl"):
        total = torch.stack([getattr(p, name) for p in parts]).sum()
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-6, atol=0)


# --- rows of the teacher that were selected before -----------------------------------------------


def selected(t: HeadInputs, labels: Tensor, mask: Tensor, visual: bool = True) -> HeadInputs:
    """Its response rows and then its visual ones."""
    parts = [mk.response_rows(labels)[0], mk.visual_rows(mask)][: 1 + visual]
    return replace(t, hidden=t.hidden.flatten(0, 1)[torch.cat(parts)])


@pytest.mark.parametrize(
    "weights", [{}, {"response": 0.0}, {"visual": 0.0}, {"relation": 0.0}, {"ce": 0.0}], ids=str
)
def test_selected_rows_are_as_good_as_all(weights: dict[str, Any], backend: str) -> None:
    """They are the very rows that the loss would take: everything is the same, exactly."""
    s, t = heads()
    labels, mask = labels_of(), mask_of(RUNS)
    loss = LlavaKDLoss(backend=backend, **weights)
    outs = [loss(s, x, labels, mask) for x in (t, selected(t, labels, mask))]
    assert all(torch.equal(a, b) for a, b in zip(*(out[:5] for out in outs), strict=True))
    assert torch.equal(*(torch.autograd.grad(out.loss, s.hidden)[0] for out in outs))


def test_visual_rows_may_be_missing_where_nothing_reads_them() -> None:
    s, t = heads()
    labels, mask = labels_of(), mask_of(RUNS)
    answers = selected(t, labels, mask, visual=False)
    loss = LlavaKDLoss(visual=0.0, relation=0.0)
    assert torch.equal(loss(s, answers, labels, mask).loss, loss(s, t, labels, mask).loss)
    for needy in (LlavaKDLoss(visual=0.0), LlavaKDLoss(relation=0.0)):
        with pytest.raises(ValueError, match=r"has 16 selected rows, expected 16 .* 12 visual"):
            needy(s, answers, labels, mask)


def test_faults_name_what_was_selected() -> None:
    s, t = heads()
    labels, mask = labels_of(), mask_of(RUNS)
    stored, loss = selected(t, labels, mask), LlavaKDLoss(backend="eager")
    with pytest.raises(ValueError, match="has 27 selected rows, expected 16 response rows"):
        loss(s, replace(stored, hidden=stored.hidden[1:]), labels, mask)
    with pytest.raises(ValueError, match="teacher_labels"):
        loss(s, stored, labels, mask, teacher_labels=labels)
    with pytest.raises(ValueError, match="response_shift=False"):
        LlavaKDLoss(response_shift=False)(s, stored, labels, mask)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ce", "response", "visual", "relation"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none(name: str, value: float) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"{name}: expected a weight >= 0, got {value}"):
        LlavaKDLoss(**arguments)


def test_shapes_that_do_not_fit() -> None:
    s, t = heads()
    labels, mask, loss = labels_of(), mask_of(RUNS), LlavaKDLoss()
    with pytest.raises(
        ValueError, match=r"student.hidden: expected \(B, T, D\), got shape \(14, 6\)"
    ):
        loss(replace(s, hidden=s.hidden[0]), t, labels, mask)
    with pytest.raises(ValueError, match=r"labels: expected shape \(3, 14\).*got \(3, 13\)"):
        loss(s, t, labels[:, 1:], mask)
    with pytest.raises(
        ValueError, match=r"image_mask: expected bool of shape \(3, 14\), got torch.i"
    ):
        loss(s, t, labels, mask.long())
    with pytest.raises(ValueError, match=r"teacher_labels: expected shape \(3, 16\)"):
        loss(s, replace(t, hidden=torch.randn(B, T + 2, D_T)), labels, mask)
    with pytest.raises(ValueError, match=r"image_lens: sums to 4 rows over 1 images, but .* 12"):
        loss(s, t, labels, mask, image_lens=[4])
    with pytest.raises(ValueError, match="divergence: got 'kl'"):
        mk.LlavaKDLoss(divergence="kl")
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        mk.LlavaKDLoss(temperature=0)
    with pytest.raises(TypeError, match=r"labels: expected int64, got torch\.int32"):
        loss(s, t, labels.int(), mask)
    with pytest.raises(ValueError, match=r"labels: missing; the batch has image_mask, teacher$"):
        loss(s, t, None, mask)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"counts: got shape \(1,\) for 'response'"):
        loss(s, t, labels, mask, num_items_in_batch=torch.tensor([16]))
