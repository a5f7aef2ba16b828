"""Is a Gram matrix kept only while its head is what it was, and nowhere but in the process?"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mllmkd_kernels import HeadInputs, LlavaKDLoss, head_gram
from mllmkd_kernels.kept_gram import KeptGram
from tests.test_llava_kd import D_S, D_T, RUNS, V, heads, labels_of, mask_of


def frozen(s: HeadInputs) -> HeadInputs:
    return replace(s, weight=s.weight.detach())


def saved(loss: LlavaKDLoss) -> LlavaKDLoss:
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[LlavaKDLoss], LlavaKDLoss]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "torch.save": saved,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_used_loss_is_copied_without_its_grams(way: str, backend: str) -> None:
    s, t = heads()
    s, loss, given = frozen(s), LlavaKDLoss(backend=backend), (labels_of(), mask_of(RUNS))
    unused = pickle.dumps(loss)
    first = loss(s, t, *given)
    other = COPIES[way](loss)
    assert pickle.dumps(other) == unused and not loss.state_dict()
    assert torch.equal(other(s, t, *given).loss, first.loss)


def test_a_teacher_made_in_inference_mode(backend: str) -> None:
    s, t = heads()
    loss, given = LlavaKDLoss(backend=backend), (labels_of(), mask_of(RUNS))
    want = loss(s, t, *given).loss
    with torch.inference_mode():
        t = replace(t, hidden=t.hidden.clone(), weight=t.weight.clone())
    for _ in range(2):
        got = loss(s, t, *given).loss
        assert torch.equal(got, want)
        ours, theirs = (torch.autograd.grad(x, s.weight, retain_graph=True)[0] for x in (got, want))
        assert torch.equal(ours, theirs)


def test_grams_made_in_inference_mode_serve_in_training(backend: str) -> None:
    """Evaluation before the first step, as a trainer of one's own may have it."""
    s, t = heads()
    s, loss, given = frozen(s), LlavaKDLoss(backend=backend), (labels_of(), mask_of(RUNS))
    with torch.inference_mode():
        loss(s, t, *given)
    (gradient,) = torch.autograd.grad(loss(s, t, *given).loss, s.hidden)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("who", ["student", "teacher", "another teacher"])
def test_another_head_or_a_counted_write_has_a_gram_of_its_own(who: str, backend: str) -> None:
    s, t = heads()
    s, given = frozen(s), (labels_of(), mask_of(RUNS))
    loss = LlavaKDLoss(backend=backend)
    before, other = loss(s, t, *given).relation, t
    if who == "another teacher":
        other = heads()[1]  # the first is still alive
    else:
        (s if who == "student" else t).weight.mul_(torch.randn(1, D_S if who == "student" else D_T))
    after = loss(s, other, *given).relation
    assert not torch.isclose(before, after)
    assert torch.equal(after, LlavaKDLoss(backend=backend)(s, other, *given).relation)


def _entry(weight: Tensor) -> None:
    weight.data[7, 3] += 1e-9  # fp64


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "average of weights": lambda w: w.data.mul_(0.999).add_(torch.randn_like(w), alpha=0.001),
    "one entry": _entry,
    "other data": lambda w: setattr(w, "data", torch.randn_like(w)),
    "two tokens": lambda w: w.data.index_copy_(0, torch.tensor([3, 5]), 2 * w.data[[5, 3]]),
    "zeroed": lambda w: w.data.zero_(),
}


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_torch_does_not_count_is_an_error(who: str, write: str) -> None:
    s, t = heads()
    s, loss, given = frozen(s), LlavaKDLoss(backend="eager"), (labels_of(), mask_of(RUNS))
    loss(s, t, *given)
    weight = (s if who == "student" else t).weight
    version = weight._version
    WRITES[write](weight)
    assert weight._version == version
    with pytest.raises(RuntimeError, match=rf"^{who}\.weight: the head changed in a way that"):
        loss(s, t, *given)
    assert LlavaKDLoss(backend="eager")(s, t, *given).relation >= 0  # as the message says


def test_a_write_in_inference_mode_is_an_error() -> None:
    with torch.inference_mode():
        weight = torch.randn(V, 4)
    kept = KeptGram("teacher")
    first = kept.of(weight, None, V, head_gram)
    assert kept.of(weight, None, V, head_gram) is first
    with torch.inference_mode():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"teacher\.weight"):
        kept.of(weight, None, V, head_gram)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda w: w,
    "columns": lambda w: w.T.contiguous().T,
    "within another": lambda w: torch.cat((w[:1, :1].flatten(), w.flatten()))[1:].view(w.shape),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 5, 6, 8])
def test_every_entry_is_watched(size: int, layout: str, dtype: torch.dtype) -> None:
    """Also where rows are no multiple of a wide integer, or do not begin at one."""
    weight, bias = LAYOUTS[layout](torch.randn(9, size).to(dtype)), torch.randn(9).to(dtype)
    kept, made = KeptGram("student"), []

    def make(w: Tensor, b: Tensor | None) -> Tensor:
        made.append(w)
        return head_gram(w, b, vocab_size=8)

    gram = kept.of(weight, bias, 8, make)
    weight.data[8], bias.data[8] = 0, 0  # beyond the vocabulary
    assert kept.of(weight, bias, 8, make) is gram
    for part in (weight, bias):
        for at in range(part[:8].numel()):
            entry = part.data[:8].flatten()[at].item()
            index = divmod(at, size) if part is weight else (at,)
            part.data[index] = -entry
            with pytest.raises(RuntimeError, match=r"student\.weight"):
                kept.of(weight, bias, 8, make)
            part.data[index] = entry
            assert kept.of(weight, bias, 8, make) is gram
    assert len(made) == 1


def test_a_head_cast_in_place_has_another_gram() -> None:
    """As `model.to(dtype)` does it: through ``.data``, but for the host to see."""
    head = torch.nn.Linear(4, V, bias=False).requires_grad_(False)
    kept = KeptGram("teacher")
    first = kept.of(head.weight, None, V, head_gram)
    head.bfloat16()
    second = kept.of(head.weight, None, V, head_gram)
    assert torch.equal(second, head_gram(head.weight)) and not torch.equal(first, second)
