"""What may a call cost? Operators, products, bytes and launches, exactly: no seconds, so it cannot
flake.

The sizes are small and the expected numbers follow from them; a number that changes is a tensor, a
product or a kernel more (or less) per step for everyone. FLOPs of the plan and the largest tensor
of the eager backend are in `test_backends`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import plan
from mllmkd_kernels.backends import products
from tests.watch import Tally, Watch, inside_operators, launches

N, V, D_S, D_T = 24, 160, 8, 12
HEAD, ROWS = V * D_S, N * D_S  # entries of dW and of dH
FP32 = 4


class Inputs(NamedTuple):
    """Heads and hidden states; `hs` always gets a gradient, `ws` if it is trained."""

    hs: Tensor
    ws: Tensor
    ht: Tensor
    wt: Tensor
    labels: Tensor


def inputs(train_head: bool = True, n: int = N, v: int = V) -> Inputs:
    return Inputs(
        torch.randn(n, D_S, requires_grad=True),
        torch.randn(v, D_S, requires_grad=train_head),
        torch.randn(n, D_T),
        torch.randn(v, D_T),
        torch.randint(v, (n,)),
    )


def distill(x: Inputs, backend: str, **options: Any) -> Tensor:
    return mk.fused_linear_distill(
        x.hs, x.ws, x.ht, x.wt, x.labels, ce_weight=1.0, backend=backend, **options
    ).loss


def cross_entropy(x: Inputs, backend: str) -> Tensor:
    return mk.fused_linear_distill(
        x.hs, x.ws, None, None, x.labels, ce_weight=1.0, backend=backend
    ).loss


def logprob(x: Inputs, backend: str) -> Tensor:
    return mk.fused_linear_logprob(x.hs, x.ws, x.labels, backend=backend).sum()


def relation_of_features(x: Inputs, backend: str) -> Tensor:
    return mk.relation_cosine(x.hs, x.ht, backend=backend)


def relation_of_logits(x: Inputs, backend: str) -> Tensor:
    return mk.fused_linear_relation(x.hs, x.ws, x.ht, x.wt, backend=backend)


def gram(x: Inputs, backend: str) -> Tensor:
    return mk.head_gram(x.ws).sum()


def logit_mse(x: Inputs, backend: str) -> Tensor:
    return mk.fused_linear_logit_mse(x.hs, x.ws, x.ht, x.wt)[0]


Loss = Callable[[Inputs, str], Tensor]


def counted(call: Callable[[], Tensor]) -> tuple[Tally, Tally]:
    """What the caller of a loss sees, forward and backward, and what happens in our operators."""
    with inside_operators() as inside, Watch() as watch:
        value = call()
        if value.requires_grad:
            value.backward()
    return watch.tally, inside


# --- operators: how often is Python, and the dispatcher, entered? ---------------------------------

_SCALED = {"scale_gradient": 2}  # dH and dW, each by the gradient that comes in
CALLS: dict[str, tuple[Loss, bool, dict[str, int]]] = {
    "distill, head trained": (distill, True, {"linear_distill": 1} | _SCALED),
    "distill, head frozen": (distill, False, {"linear_distill": 1, "scale_gradient": 1}),
    "cross-entropy alone": (cross_entropy, True, {"linear_distill": 1} | _SCALED),
    # backward makes the logits again: the weight of each row is only known then
    "logprob": (logprob, True, {"linear_logprob": 1, "linear_logprob_backward": 1}),
    "relation of features": (relation_of_features, True, {"relation": 1, "scale_gradient": 1}),
    # both Grams are made, that of the student has a gradient
    "relation of logits, head trained": (
        relation_of_logits,
        True,
        {"head_gram": 2, "relation": 1, "head_gram_backward": 1} | _SCALED,
    ),
    "relation of logits, head frozen": (
        relation_of_logits,
        False,
        {"head_gram": 2, "relation": 1, "scale_gradient": 1},
    ),
    "gram": (gram, True, {"head_gram": 1, "head_gram_backward": 1}),
    "logit MSE": (logit_mse, True, {"linear_logit_mse": 1} | _SCALED),
}


_BACKWARD = ("scale_gradient", "linear_logprob_backward", "head_gram_backward", "grams_backward")


@pytest.mark.parametrize("name", CALLS)
def test_operators_of_a_call(name: str, backend: str) -> None:
    """In evaluation those of forward alone."""
    loss, train_head, expected = CALLS[name]
    x = inputs(train_head)
    assert counted(lambda: loss(x, backend))[0].ours == expected
    with torch.no_grad():
        outside, _ = counted(lambda: loss(x, backend))
    assert outside.ours == {op: n for op, n in expected.items() if op not in _BACKWARD}


def llava_kd(x: Inputs, loss: mk.LlavaKDLoss) -> Tensor:
    """Two samples: a word, 5 visual rows, 2 words, 4 words of an answer."""
    labels = torch.full((2, 12), -100)
    labels[:, 8:] = x.labels.view(2, 12)[:, 8:]
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 1:6] = True
    student = mk.HeadInputs(x.hs.view(2, 12, D_S), x.ws)
    teacher = mk.HeadInputs(x.ht.view(2, 12, D_T), x.wt)
    return loss(student, teacher, labels, mask).loss


def test_all_terms_of_llava_kd_are_one_sweep_and_one_relation(backend: str) -> None:
    """DPT: both heads frozen, their Grams made at the first step and kept."""
    x, loss = inputs(train_head=False), mk.LlavaKDLoss(backend=backend)
    # dH of both operators is scaled
    expected = Counter({"linear_distill": 1, "relation": 1, "scale_gradient": 2})
    steps = [counted(lambda: llava_kd(x, loss))[0].ours for _ in range(3)]
    assert steps == [expected + Counter({"head_gram": 2}), expected, expected]


def test_a_trained_head_makes_its_gram_every_step(backend: str) -> None:
    """DFT: the teacher's Gram is kept; dW comes from the sweep and from the Gram."""
    x, loss = inputs(), mk.LlavaKDLoss(backend=backend)
    expected = Counter({"linear_distill": 1, "relation": 1, "head_gram": 1,
                        "head_gram_backward": 1, "scale_gradient": 4})  # fmt: skip
    steps = [counted(lambda: llava_kd(x, loss))[0].ours for _ in range(2)]
    assert steps == [expected + Counter({"head_gram": 1}), expected]


# --- bytes: what does a call leave behind, and what does it hold meanwhile? -----------------------

_TERMS = FP32 * (1 + 2 * N)  # the loss; CE and D of every row
MADE: dict[str, tuple[Loss, bool, int]] = {
    # a gradient twice: as it is formed, and times the gradient that comes in
    "distill, head trained": (distill, True, _TERMS + 2 * FP32 * (ROWS + HEAD)),
    "distill, head frozen": (distill, False, _TERMS + 2 * FP32 * ROWS),
    "cross-entropy alone": (cross_entropy, True, _TERMS + 2 * FP32 * (ROWS + HEAD)),
    # log-probability and log-sum-exp; both gradients once
    "logprob": (logprob, True, FP32 * (2 * N + ROWS + HEAD)),
    "relation of features": (relation_of_features, True, FP32 * (1 + 2 * ROWS)),
    # both Grams; dH and dG, each twice; dW once
    "relation of logits, head trained": (
        relation_of_logits,
        True,
        FP32 * (1 + D_S**2 + D_T**2 + 2 * (ROWS + D_S**2) + HEAD),
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_bytes_that_operators_return(name: str, backend: str) -> None:
    """Results and gradients, nothing else: no logits, no mask, no copy of a head is saved."""
    loss, train_head, expected = MADE[name]
    x = inputs(train_head)
    outside, _ = counted(lambda: loss(x, backend))
    assert outside.ours_made == expected


def test_diagnostics_are_three_numbers_a_row(backend: str) -> None:
    """No operator, product or other tensor comes with them."""
    x = inputs()
    plain, asked = (counted(lambda d=d: distill(x, backend, diagnostics=d)) for d in (False, True))
    assert asked[0].ours == plain[0].ours and asked[1].flops == plain[1].flops
    assert asked[0].ours_made == plain[0].ours_made + 3 * FP32 * N


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bytes_of_a_16_bit_head(dtype: torch.dtype, backend: str) -> None:
    x = inputs()
    hs, ws = (t.detach().to(dtype).requires_grad_() for t in (x.hs, x.ws))
    x = Inputs(hs, ws, x.ht.to(dtype), x.wt.to(dtype), x.labels)
    outside, _ = counted(lambda: distill(x, backend))
    # in fp32 until scaled: then rounded, once
    assert outside.ours_made == _TERMS + (FP32 + 2) * (ROWS + HEAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_head_gradient_in_fp32_beside_the_one_returned(dtype: torch.dtype) -> None:
    """Where rows are no more than hidden features, dW is made once, in backward, and is the only
    tensor of its size: dz, smaller, is what is saved.
    """
    n, v, d = 8, 2 * products.VOCAB_SLICE, 32
    hs, ws = (torch.randn(s, d, dtype=dtype, requires_grad=True) for s in (n, v))
    ht, wt = (torch.randn(s, d, dtype=dtype) for s in (n, v))
    with inside_operators() as seen:
        loss = mk.fused_linear_distill(hs, ws, ht, wt, backend="eager").loss
        assert seen.largest == n * v
        forward = seen.made
        loss.backward()
    assert seen.largest == v * d
    slices = v * d * FP32 if dtype == torch.bfloat16 else 0  # one at a time
    assert seen.made - forward <= v * d * dtype.itemsize + slices + 4 * n * d * FP32


def test_the_caller_makes_no_large_tensor(backend: str) -> None:
    """Around the operators only both row weights, in fp64 and then in fp32, and the 1 that backward
    starts from.
    """
    x = inputs()
    outside, _ = counted(lambda: distill(x, backend))
    assert outside.made - outside.ours_made == 2 * N * (8 + FP32) + FP32
    assert outside.largest == HEAD


@pytest.mark.parametrize("rows", [32, 64, 96])
def test_products_and_kernels_of_the_eager_backend(rows: int) -> None:
    """Two products make the logits of a chunk and two fold its gradient into dH and dW; kernels
    grow with chunks, never with N or V within one.
    """

    def count(n: int, v: int) -> Tally:
        x = inputs(n=n, v=v)
        return counted(lambda: distill(x, "eager", workspace_mb=1e-6))[1]

    found, chunks = count(rows, V), rows // 32
    assert found.products == 4 * chunks
    assert found.flops == 2 * rows * V * (3 * D_S + D_T)
    assert found.calls == count(rows, 3 * V).calls
    per_chunk = count(64, V).calls.total() - count(32, V).calls.total()
    assert found.calls.total() == count(32, V).calls.total() + (chunks - 1) * per_chunk


@pytest.mark.parametrize(
    ("divergence", "passes"), [("forward_kl", 82), ("reverse_kl", 98), ("jsd", 179)]
)
def test_passes_over_the_logits_between_the_products(
    divergence: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operator of a strip of the eager backend is a pass over all logits (or a few numbers a
    row); none is `where`, which a CPU does not vectorise.
    """
    monkeypatch.setattr(products, "strip_bytes", lambda device: V * FP32)  # a row

    def count(n: int) -> Tally:
        x = inputs(n=n)
        return counted(lambda: distill(x, "eager", divergence=divergence))[1]

    strip = count(N + 1).calls - count(N).calls
    assert strip.total() == passes and "where" not in strip


def test_a_relation_of_logits_multiplies_no_logits() -> None:
    """Two Grams, two products by them, R and dR of one tile, dH, dG and dW: none has N·V FLOPs."""
    x = inputs()
    _, inside = counted(lambda: relation_of_logits(x, "eager"))
    tile = N * N
    expected = (
        V * (D_S**2 + D_T**2)  # both Grams
        + N * (D_S**2 + D_T**2)  # K = H G
        + tile * (D_S + D_T)  # R_s and R_t, for their inner products
        + tile * (2 * D_S + D_T)  # again, for dR, and M = dR H
        + N * 2 * D_S**2  # dH = 2 M G, dG = Hᵀ M
        + V * D_S**2  # dW = W (dG + dGᵀ)
    )
    assert inside.flops == 2 * expected


# --- launches of Triton's kernels -----------------------------------------------------------------

_BOTH = {"statistics_kernel": 2, "merge_kernel": 2}  # each head once
STREAMED: dict[str, tuple[str, bool, dict[str, int]]] = {
    # Two ranges of columns, a gradient kernel each; KL gets its value on the way.
    "kl": ("forward_kl", True, _BOTH | {"gradient_kernel": 2}),
    # The gradient of reverse KL needs D first.
    "reverse kl": ("reverse_kl", True, _BOTH | {"values_kernel": 1, "gradient_kernel": 2}),
    "evaluation": ("forward_kl", False, _BOTH | {"values_kernel": 1}),
}


def forced(
    monkeypatch: pytest.MonkeyPatch, algorithm: str, device: torch.device, v: int
) -> Callable[..., Counter[str]]:
    """A function that computes CE and a divergence with `algorithm` and counts launches."""
    monkeypatch.setattr(
        plan, "distill_plan", functools.partial(plan.distill_plan, algorithm=algorithm)
    )
    x = Inputs(*(t.detach().to(device) for t in inputs(n=4, v=v)))

    def run(divergence: str, gradients: bool, workspace_mb: float | None = None) -> Counter[str]:
        x.hs.requires_grad_(gradients)
        with launches() as found:
            loss = distill(x, "triton", divergence=divergence, workspace_mb=workspace_mb)
            if gradients:
                loss.backward()
        return found

    return run


@pytest.mark.parametrize("name", STREAMED)
def test_launches_of_the_streamed_algorithm(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass over each head for its statistics, whatever N and V; then one kernel a range of
    columns.
    """
    divergence, gradients, expected = STREAMED[name]
    # No budget means the least number of columns, 128: 160 are two ranges.
    assert forced(monkeypatch, "stream", device, 160)(divergence, gradients, 1e-6) == expected


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_launches_of_the_chunked_algorithm(
    divergence: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel a chunk turns both blocks of logits into losses and gradient: the one for rows
    that fit the registers of a block, or the one for longer rows.
    """
    found = forced(monkeypatch, "chunk", device, 160)(divergence, True)
    assert found.total() == 1 and set(found) < {"whole_row_kernel", "long_row_kernel"}


def test_launches_of_the_relation(device: torch.device) -> None:
    """Inner products of all tiles, their sums, then dR · H: three kernels for all images."""
    x = Inputs(*(t.detach().to(device) for t in inputs()))
    x.hs.requires_grad_()
    ends = torch.tensor([0, 5, 18, N], dtype=torch.int32, device=device)
    with launches() as found:
        mk.relation_cosine(x.hs, x.ht, ends, backend="triton").backward()
    assert found == {
        "relation_stats_kernel": 1, "relation_merge_kernel": 1, "relation_grad_kernel": 1,
    }  # fmt: skip
