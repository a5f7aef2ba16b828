"""Are a teacher's selected rows, (M + K, D), as good as all its hidden states?

They are the very rows that the loss would take, so everything is compared exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mllmkd_kernels import HeadInputs, LlavaKDLoss, LlavaKDOutput, response_rows, visual_rows

# 3 samples of 12 tokens: one image; text alone; two images, of other sizes.
B, T, V, D_S, D_T = 3, 12, 40, 6, 9
IGNORE = -100


def batch_of() -> tuple[Tensor, Tensor]:
    """Labels and image mask, both (B, T); a label at a first position, which no row predicts."""
    labels = torch.full((B, T), IGNORE)
    labels[:, 9:] = torch.randint(0, V, (B, T - 9))
    labels[1, 0:3] = torch.randint(0, V, (3,))
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 1:5] = mask[2, 0:2] = mask[2, 3:7] = True
    return labels, mask


def heads() -> tuple[HeadInputs, HeadInputs]:
    student = HeadInputs(torch.randn(B, T, D_S, requires_grad=True), torch.randn(V, D_S))
    return student, HeadInputs(torch.randn(B, T, D_T), torch.randn(V + 3, D_T))


def selected(teacher: HeadInputs, labels: Tensor, mask: Tensor) -> HeadInputs:
    rows = torch.cat((response_rows(labels)[0], visual_rows(mask)))
    return replace(teacher, hidden=teacher.hidden.reshape(B * T, -1)[rows])


def outcome(loss: LlavaKDLoss, *arguments: Any, **options: Any) -> tuple[LlavaKDOutput, Tensor]:
    out = loss(*arguments, **options)
    (gradient,) = torch.autograd.grad(out.loss, [arguments[0].hidden])
    return out, gradient


@pytest.mark.parametrize(
    "weights", [{}, {"response": 0.0}, {"visual": 0.0}, {"relation": 0.0}, {"ce": 0.0}], ids=str
)
def test_the_same_loss_and_gradient(weights: dict[str, Any], backend: str) -> None:
    (student, teacher), (labels, mask) = heads(), batch_of()
    loss, lens = LlavaKDLoss(backend=backend, **weights), [4, 2, 4]
    whole, d_whole = outcome(loss, student, teacher, labels, mask, image_lens=lens)
    stored = selected(teacher, labels, mask)
    rows, d_rows = outcome(loss, student, stored, labels, mask, image_lens=lens)
    for name in ("loss", "ce", "response_kl", "visual_kl", "relation"):
        assert torch.equal(getattr(rows, name), getattr(whole, name)), name
    assert torch.equal(d_rows, d_whole)


def test_visual_rows_may_be_missing_where_nothing_reads_them(backend: str) -> None:
    (student, teacher), (labels, mask) = heads(), batch_of()
    stored = selected(teacher, labels, mask)
    answers = replace(stored, hidden=stored.hidden[: response_rows(labels)[0].numel()])
    loss = LlavaKDLoss(visual=0.0, relation=0.0, backend=backend)
    assert torch.equal(
        outcome(loss, student, answers, labels, mask)[1],
        outcome(loss, student, teacher, labels, mask)[1],
    )
    for needy in (LlavaKDLoss(visual=0.0), LlavaKDLoss(relation=0.0)):
        with pytest.raises(ValueError, match=r"has 11 selected rows, expected 11 .* 10 visual"):
            needy(student, answers, labels, mask)


def test_no_rows_at_all(backend: str) -> None:
    student, teacher = heads()
    labels = torch.full((B, T), IGNORE)
    none = replace(teacher, hidden=teacher.hidden.new_zeros(0, D_T))
    out, gradient = outcome(LlavaKDLoss(backend=backend), student, none, labels)
    assert out.loss.item() == 0 and not gradient.any()


def test_faults_name_what_was_selected() -> None:
    (student, teacher), (labels, mask) = heads(), batch_of()
    stored, loss = selected(teacher, labels, mask), LlavaKDLoss(backend="eager")
    with pytest.raises(ValueError, match="has 20 selected rows, expected 11 response rows"):
        loss(student, replace(stored, hidden=stored.hidden[1:]), labels, mask)
    with pytest.raises(ValueError, match="teacher_labels"):
        loss(student, stored, labels, mask, teacher_labels=labels)
    with pytest.raises(ValueError, match="response_shift=False"):
        LlavaKDLoss(response_shift=False)(student, stored, labels, mask)
    with pytest.raises(ValueError, match=r"student.hidden: expected \(B, T, D\)"):
        loss(replace(student, hidden=student.hidden[0]), stored, labels, mask)
