"""Does the vocabulary-streamed algorithm keep to the definitions: every problem, divergence and way
of loading, however rows, vocabulary and columns are cut into blocks?

`sweeps` is called directly, with the tiny blocks that tables have for the interpreter (16 × 32 ×
16) or, on a GPU, the real ones. Under the former a few hundred tokens are several tiles, splits and
ranges of columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import reference
from mllmkd_kernels.backends.calls import Head, Options, Targets
from tests.problems import (
    DIVERGENCES,
    PROBLEMS,
    Problem,
    _random,
    asked,
    expected,
    naive,
    near_converged,
)
from tests.problems import problem as make
from tests.tolerances import LADDER, check, ladder_bound, ladder_value_bound, relative_error

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = (True, True, True)
NOTHING = (False, False, False)


class Out(NamedTuple):
    """What `distill_stream` returns."""

    loss: Tensor
    ce: Tensor
    kd: Tensor
    dh: Tensor
    dw: Tensor
    db: Tensor


@pytest.fixture(params=["pointers", "descriptors"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of loading a tile, whose sums are of several segments where blocks are tiny.
    Descriptors want rows of whole 16-byte units.
    """
    from mllmkd_kernels.backends.triton import heads

    if heads.INTERPRETED.value:
        monkeypatch.setattr(heads, "SEGMENT", heads.tl.constexpr(16))

    monkeypatch.setattr(heads, "tma", lambda head: request.param == "descriptors")
    return request.param


@pytest.fixture(params=[1, 1000], ids=["one-split", "many-splits"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """With one processor a program walks all tiles, with a thousand it takes one."""
    from mllmkd_kernels.backends.triton import splits

    monkeypatch.setattr(splits, "processors", lambda device: request.param)
    return request.param


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a tile costs the same whatever its size: 128 columns are many times faster."""
    from mllmkd_kernels.backends.triton import tables

    for kernel in ("statistics", "values", "gradient"):
        wide = {"BLOCK_N": 32, "BLOCK_V": 128, "BLOCK_D": 64}
        entry = tables.INTERPRETER[kernel]
        for kind in entry:
            monkeypatch.setitem(entry, kind, entry[kind] | wide)


def stream_of(
    p: Problem,
    divergence: str,
    device: torch.device,
    want: tuple[bool, bool, bool] = EVERYTHING,
    chunk: int = 100,
    teacher: bool = True,
    labelled: bool = True,
    **changes: Any,
) -> Out:
    """`sweeps.distill_stream` of a problem. 100 columns become 128."""
    from mllmkd_kernels.backends.triton import sweeps

    p = replace(p, **changes).on(device)
    student, other, targets = asked(p, mk.Divergence(divergence), teacher, labelled)
    out = sweeps.distill_stream(student, other, targets, Options(p.vocab, chunk, *want))
    return Out(*(t.cpu() for t in out))


def check_all(p: Problem, divergence: str, device: torch.device) -> Out:
    """Everything that comes out, against the reference; returns it."""
    got, want, plain = (
        stream_of(p, divergence, device),
        expected(p, divergence),
        naive(p, divergence),
    )
    half = p.ws.dtype != torch.float32
    for name in ("loss", "ce", "kd"):
        size = float(want.kd.abs().sum()) + 1.0
        check(getattr(got, name), getattr(want, name), "value", getattr(plain, name),
              cancels=size, what=name)  # fmt: skip
    row = "16-bit gradient" if half else "gradient"
    for name, factor in (("dh", p.ws), ("dw", p.hs)):
        size = float(factor.double().norm())
        check(getattr(got, name), getattr(want, name), row, getattr(plain, name),
              cancels=size, what=name)  # fmt: skip
    if want.db is not None:
        check(got.db, want.db, row, plain.db, cancels=1.0, what="db")
    return got


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.usefixtures("wide_tiles")
def test_problems(name: str, divergence: str, device: torch.device) -> None:
    check_all(make(name), divergence, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(divergence: str, dtype: torch.dtype, device: torch.device) -> None:
    got = check_all(make("ragged", dtype), divergence, device)
    assert got.dw.dtype == got.dh.dtype == got.loss.dtype == torch.float32


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_reverse_kl"])
@pytest.mark.usefixtures("splits")
def test_ways_of_loading(loads: str, divergence: str, device: torch.device) -> None:
    # 40 and 24 are no multiples of a block of 16: the tail is masked, or zeros of the descriptor.
    check_all(small(), divergence, device)


def test_parts_of_a_tile(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """A GPU deals with the logits of a tile in many parts, the interpreter with all at once."""
    from mllmkd_kernels.backends.triton import stream

    p = small()
    whole = stream_of(p, "jsd", device)
    monkeypatch.setattr(stream, "parts", lambda kernel, launch: 4)
    for a, b in zip(whole, stream_of(p, "jsd", device), strict=True):
        check(a, b, "value")


@pytest.mark.parametrize("eps", LADDER[::2])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.usefixtures("wide_tiles")
def test_ladder(divergence: str, dtype: torch.dtype, eps: float, device: torch.device) -> None:
    """Gradients and values while the student converges, as tests/test_ladder.py asks."""
    p = near_converged(eps, n=32, v=300, d=24, two_sided=divergence == "total_variation")
    p = replace(p, kd_weight=torch.full((32,), 1000.0)).to(dtype)
    got, want = stream_of(p, divergence, device), expected(p, divergence)
    for name in ("dh", "dw"):
        error = relative_error(getattr(got, name), getattr(want, name))
        assert error <= ladder_bound(dtype, eps), f"{name}: {error:.2e}"
    assert not (got.kd < 0).any()
    assert relative_error(got.kd, want.kd) <= ladder_value_bound(divergence, eps)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.usefixtures("wide_tiles")
def test_values_without_gradient(divergence: str, device: torch.device) -> None:
    got = stream_of(small(), divergence, device, NOTHING)
    for name in ("loss", "ce", "kd"):
        check(getattr(got, name), getattr(expected(small(), divergence), name), "value", what=name)
    assert got.dh.numel() == got.dw.numel() == got.db.numel() == 0


@pytest.mark.parametrize("want", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.usefixtures("wide_tiles")
def test_only_what_is_wanted(want: tuple[bool, bool, bool], device: torch.device) -> None:
    full = stream_of(small(), "jsd", device)
    some = stream_of(small(), "jsd", device, want)
    for wanted, a, b in zip(want, some[3:], full[3:], strict=True):
        assert torch.equal(a, b) if wanted else not a.numel()


@pytest.mark.usefixtures("wide_tiles")
def test_one_term_alone(device: torch.device) -> None:
    p = small()
    zero = torch.zeros(19)
    only_ce = stream_of(p, "jsd", device, teacher=False)
    want = expected(replace(p, kd_weight=zero))
    check(only_ce.ce, want.ce, "value")
    check(only_ce.dw, want.dw, "gradient")
    assert not only_ce.kd.any()
    only_kd = stream_of(p, "jsd", device, labelled=False)
    want = expected(replace(p, ce_weight=zero), "jsd")
    check(only_kd.kd, want.kd, "value")
    check(only_kd.dw, want.dw, "gradient")
    assert not only_kd.ce.any()


@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.usefixtures("wide_tiles")
def test_a_broken_row_is_nan(cap: float, bad: float, divergence: str, device: torch.device) -> None:
    p = small()
    p = replace(p, options={"student_softcap": cap, "teacher_softcap": cap})
    fine = stream_of(p, divergence, device)
    hs, ht = p.hs.clone(), p.ht.clone()
    hs[2, 3], ht[5, 1] = bad, bad
    got = stream_of(p, divergence, device, hs=hs, ht=ht)
    others = [n for n in range(19) if n not in (2, 5)]
    assert got.loss.isnan() and got.kd[[2, 5]].isnan().all() and got.ce[2].isnan()
    assert torch.equal(got.kd[others], fine.kd[others]) and torch.equal(got.ce[5], fine.ce[5])
    assert got.dh[[2, 5]].isnan().any(1).all() and torch.equal(got.dh[others], fine.dh[others])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.usefixtures("wide_tiles")
def test_a_row_of_no_weight_may_hold_nan(divergence: str, device: torch.device) -> None:
    p = make("zero_weight_rows")  # rows 2 and 5
    fine = stream_of(p, divergence, device)
    hs, ht = p.hs.clone(), p.ht.clone()
    hs[2], ht[5], hs[5, 0] = torch.nan, torch.nan, torch.inf
    got = stream_of(p, divergence, device, hs=hs, ht=ht)
    assert torch.equal(got.loss, fine.loss)
    assert torch.equal(got.dh, fine.dh) and torch.equal(got.dw, fine.dw)
    assert not got.dh[[2, 5]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_the_same_bits_twice(dtype: torch.dtype, device: torch.device) -> None:
    first, again = (stream_of(small(dtype), "jsd", device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("wide_tiles")
def test_mixed_dtypes(device: torch.device) -> None:
    """Operands of unequal dtypes are multiplied in fp32."""
    p = small(torch.bfloat16)
    p = replace(p, hs=p.hs.float(), wt=p.wt.half())
    got = stream_of(p, "jsd", device)
    want, plain = expected(p, "jsd"), naive(p, "jsd")
    check(got.loss, want.loss, "value", plain.loss)
    check(got.dh, want.dh, "gradient", plain.dh)
    check(got.dw, want.dw, "16-bit gradient", plain.dw)
    with pytest.raises(TypeError, match="float64"):
        stream_of(p, "jsd", device, hs=p.hs.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.usefixtures("loads", "wide_tiles")
def test_log_probabilities(
    temperature: float, cap: float, dtype: torch.dtype, device: torch.device
) -> None:
    from mllmkd_kernels.backends.triton import sweeps

    p = small(dtype)
    bias, grad = torch.linspace(-1, 1, 70).to(dtype), torch.linspace(-1, 2, 19)
    h, w, b = (x.double().requires_grad_() for x in (p.hs, p.ws, bias))
    z = reference.logits(h, w, b, cap or None)
    want = reference.linear_logprob(z, p.labels, temperature)
    (grad * want).sum().backward()
    hs, ws, bs, labels = (x.to(device) for x in (p.hs, p.ws, bias, p.labels))
    head, targets = Head(hs, ws, bs, cap), Targets(labels, temperature=temperature)
    options = Options(70, 8, *EVERYTHING)
    logp, lse = sweeps.logprob_rows(head, targets, options)
    check(logp.cpu(), want.detach(), "value")
    check(lse.cpu(), (z / temperature).logsumexp(1).detach(), "value")
    assert not logp[labels == -100].any() and (logp <= 0).all()
    grads = sweeps.logprob_grad(grad.to(device), lse, head, targets, options)
    row = "gradient" if dtype == torch.float32 else "16-bit gradient"
    for got, leaf in zip(grads, (h, w, b), strict=True):
        assert leaf.grad is not None
        check(got.cpu(), leaf.grad, row)


def test_a_label_outside_the_vocabulary_is_named(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("there it is a device-side assertion, which ends the process")
    labels = small().labels.clone()
    labels[4] = 70
    with pytest.raises(IndexError, match="got 70 at row 4"):
        stream_of(small(), "jsd", device, labels=labels)


def test_flops_are_those_of_the_sweeps() -> None:
    from mllmkd_kernels.backends.triton.sweeps import flops
    from mllmkd_kernels.divergence import sweeps

    assert [sweeps(d, True) for d in (None, "forward_kl", "soft_cross_entropy")] == [2, 2, 2]
    assert [sweeps(d, True) for d in DIVERGENCES[1:6]] == [3] * 5
    assert [sweeps(d, False) for d in (None, *DIVERGENCES)] == [1] + [2] * 7
    assert flops(2, 3, 5, 7, "jsd", True, True) == 2 * 6 * (3 * 12 + 2 * 5)
    assert flops(2, 3, 5, 0, None, False, False) == 2 * 6 * 5


def test_splits_fill_the_processors() -> None:
    from mllmkd_kernels.backends.triton import splits

    assert splits.split_count(132, 1187, 132) == 1  # one wave of whole walks
    assert splits.split_count(1, 1187, 132) == 63  # 19 tiles each; 64 would not make it 18
    assert splits.split_count(1, 3, 132) == 3  # no more splits than tiles
    assert splits.split_count(0, 3, 132) == 1
    waves = -(-64 * splits.split_count(64, 594, 132) // 132)
    assert waves * -(-594 // splits.split_count(64, 594, 132)) <= 1.05 * 64 * 594 / 132


def small(dtype: torch.dtype = torch.float32) -> Problem:
    """19 rows of 70 tokens, some without a label, one without either weight."""
    p = _random(19, 70, 70, 40, 24)
    weight = torch.linspace(0, 1, 19)
    return replace(
        p, ce_weight=weight, kd_weight=weight.flip(0), options={"temperature": 1.5},
    ).to(dtype)  # fmt: skip
