"""What do the C++ kernels make of logits of 1e4, masked tokens, NaN, no rows, odd strides?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mllmkd_kernels.backends import cpu
from tests.cpu_cases import DIVERGENCES, FLOATS, compare, error, make, oracle

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or "built")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=lambda d: str(d)[6:])
def test_identical_models_have_no_divergence(divergence: str, dtype: torch.dtype) -> None:
    case = replace(make(dtype=dtype), labels=None, ce_weight=None)
    case.ht, case.wt = case.hs, case.ws
    _, ce, kd, dh, dw, _ = case.run(divergence)
    assert not ce.any()
    if divergence != "soft_cross_entropy":
        assert not kd.any()
    assert not dh.any() and not dw.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_ten_thousand(divergence: str) -> None:
    case = make(20, 300, 16, 24)
    case.hs, case.ht = case.hs * 8e3, case.ht * 5e3 if case.ht is not None else None
    for name, got, want in zip(
        ("loss", "ce", "kd", "dh", "dw"),
        case.run(divergence),
        oracle(case, divergence),
        strict=False,
    ):
        # logits of 1e4 in fp32 are off by 1e-3, and so is what rows near a tie make of them
        assert error(got, want) <= 5e-3, name


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_masked_by_the_teacher(divergence: str) -> None:
    case = make(20, 300, 16, 24)
    case.bt = torch.zeros(304).index_fill_(0, torch.arange(0, 300, 3), -torch.inf)
    case.bt[:230] = -torch.inf  # the whole first tile
    loss, _, kd, dh, dw, _ = case.run(divergence)
    if divergence == "reverse_kl":  # the student gives mass to what the teacher forbids
        assert kd.isinf().all() and loss.isinf()
        return
    want = oracle(case, divergence)
    if divergence == "soft_cross_entropy":
        assert kd.isfinite().all()
        want = (want[0], want[1], kd, *oracle(case, "forward_kl")[3:])  # the same gradient
    for name, got, expected in zip(("kd", "dh", "dw"), (kd, dh, dw), want[2:5], strict=True):
        assert error(got, expected) <= 2e-5, name


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_masked_by_both(divergence: str) -> None:
    case = replace(make(20, 300, 16, 24), labels=None, ce_weight=None)
    mask = torch.arange(250)
    case.bs = torch.zeros(309).index_fill_(0, mask, -torch.inf)
    case.bt = torch.zeros(304).index_fill_(0, mask, -torch.inf)
    _, _, kd, dh, dw, _ = case.run(divergence)
    short = replace(
        case,
        ws=case.ws[250:300],
        wt=None if case.wt is None else case.wt[250:300],
        bs=None,
        bt=None,
        vocab=50,
    )
    _, _, kd_short, dh_short, dw_short, _ = short.run(divergence)
    assert error(kd, kd_short) <= 1e-6 and error(dh, dh_short) <= 2e-6
    assert error(dw[250:300], dw_short) <= 2e-6 and not dw[:250].any()


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_row_of_nan(where: str) -> None:
    case = make(dtype=torch.float32)
    clean = case.run("jsd")
    broken = case.hs.clone() if where == "student" else case.ht.clone()  # pyright: ignore[reportOptionalMemberAccess]
    broken[4, 3] = torch.nan
    case = replace(case, hs=broken) if where == "student" else replace(case, ht=broken)
    loss, _, kd, _, dw, _ = case.run("jsd")
    assert kd[4].isnan() and loss.isnan() and dw.isnan().any()
    others = torch.arange(70) != 4
    assert torch.equal(kd[others], clean[2][others])
    # without weight the row is reported, and touches nothing
    weights = [w.clone() for w in (case.ce_weight, case.kd_weight) if w is not None]
    for w in weights:
        w[4] = 0
    silent = replace(case, ce_weight=weights[0], kd_weight=weights[1])
    loss, _, kd, dh, dw, _ = silent.run("jsd")
    assert kd[4].isnan() and loss.isfinite() and dw.isfinite().all() and not dh[4].any()


@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_an_infinite_hidden_state_is_nan(cap: float) -> None:
    case = replace(make(), cap_s=cap)
    case.hs[5, 0] = torch.inf
    _, ce, kd, _, _, _ = case.run("forward_kl")
    assert kd[5].isnan() and ce[5].isnan()


def test_no_rows() -> None:
    case = make(n=0)
    loss, ce, kd, dh, dw, db = case.run("forward_kl")
    assert loss == 0 and ce.shape == kd.shape == (0,) and dh.shape == (0, 70)
    assert dw.shape == case.ws.shape and not dw.any() and not db.any()


def test_unused_rows_of_the_weight_get_zero() -> None:
    case = make(dtype=torch.bfloat16)
    *_, dw, db = case.run("forward_kl")
    assert dw[:501].any() and not dw[501:].any() and not db[501:].any()


def test_only_what_is_wanted_is_made() -> None:
    case = make()
    full = case.run("jsd")
    for want in [
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (False, False, False),
    ]:
        got = case.run("jsd", want)
        for name, x, y, wanted in zip(("dh", "dw", "db"), got[3:], full[3:], want, strict=True):
            assert torch.equal(x, y) if wanted else x.shape == (0,), name
        assert torch.equal(got[2], full[2])


def test_without_a_teacher_or_without_labels() -> None:
    case = replace(make(), ht=None, wt=None, kd_weight=None)
    compare(case, "forward_kl", 2e-5)
    assert not case.run("forward_kl")[2].any()
    compare(replace(make(), labels=None, ce_weight=None), "forward_kl", 2e-5)


def test_dtypes_mix() -> None:
    case = make()
    case.ws, case.ht = case.ws.bfloat16(), case.ht.half() if case.ht is not None else None
    out = case.run("jsd")
    assert {x.dtype for x in out} == {torch.float32}, "gradients are rounded once, when scaled"
    for name, got, want in zip(("loss", "ce", "kd", "dh"), out, oracle(case, "jsd"), strict=False):
        assert error(got, want) <= 2e-5, name


def test_strided_and_transposed_inputs() -> None:
    case = make()
    want = case.run("forward_kl")
    wide = torch.full((70, 100), torch.nan)
    wide[:, 10:80] = case.hs
    got = replace(case, hs=wide[:, 10:80], ws=case.ws.T.contiguous().T).run("forward_kl")
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
