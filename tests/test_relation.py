"""Is the relation of the logits, made without logits, the relation of the logits?"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import cells, reference
from mllmkd_kernels.backends import cpu, eager, products
from tests.problems import BACKENDS, DTYPES
from tests.tolerances import check

# Rows of the images: one alone, none, and more than one. Heads larger both ways, sizes prime.
LENS = [1, 7, 0, 12]
ROWS, V_S, V_T, D_S, D_T = sum(LENS), 89, 101, 11, 19


def cu_of(lens: list[int]) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(torch.int32)


def inputs(
    dtype: torch.dtype = torch.float32, rows: int = ROWS, v_s: int = V_S, v_t: int = V_T
) -> dict[str, Tensor]:
    """Logits of standard deviation 2; the student's tensors are leaves."""
    shapes = {"hs": (rows, D_S), "ws": (v_s, D_S), "bs": (v_s,),
              "ht": (rows, D_T), "wt": (v_t, D_T), "bt": (v_t,)}  # fmt: skip
    scales = {"ws": 2 / D_S**0.5, "wt": 2 / D_T**0.5}
    return {
        k: (torch.randn(s) * scales.get(k, 1.0)).to(dtype).requires_grad_(k[1] == "s")
        for k, s in shapes.items()
    }


def call(t: dict[str, Tensor], lens: list[int] | None, with_bias: bool, **options: Any) -> Tensor:
    biases = {"student_bias": t["bs"], "teacher_bias": t["bt"]} if with_bias else {}
    cu = None if lens is None else cu_of(lens)
    return mk.fused_linear_relation(t["hs"], t["ws"], t["ht"], t["wt"], cu, **biases, **options)


def expected(
    t: dict[str, Tensor], lens: list[int], with_bias: bool, dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """Loss and gradients of the logits themselves; an image without rows counts as 0."""
    leaves = {k: x.detach().to(dtype).requires_grad_(x.requires_grad) for k, x in t.items()}
    v = options.get("vocab_size") or min(t["ws"].shape[0], t["wt"].shape[0])
    z_s, z_t = (
        reference.logits(leaves[f"h{w}"], leaves[f"w{w}"], leaves[f"b{w}"] if with_bias else None,
                         options.get(f"{who}_softcap"), v)
        for w, who in (("s", "student"), ("t", "teacher"))
    )  # fmt: skip
    filled = [n for n in lens if n]
    loss = reference.relation_cosine(z_s, z_t, cu_of(filled)) * len(filled) / max(len(lens), 1)
    loss.backward()
    return loss.detach(), [leaves[k].grad for k in ("hs", "ws", "bs")]


def check_against_logits(
    t: dict[str, Tensor], lens: list[int], with_bias: bool, backend: str, **options: Any
) -> None:
    got = call(t, lens, with_bias, backend=backend, **options)
    got.backward()
    want, grads = expected(t, lens, with_bias, **options)
    plain, plain_grads = expected(t, lens, with_bias, torch.float32, **options)
    check(got, want, "relation", plain, what="loss")
    for k, like, naive in zip(("hs", "ws", "bs"), grads, plain_grads, strict=True):
        gradient = t[k].grad
        assert (gradient is None) == (like is None)
        if gradient is not None and like is not None:
            row = "relation" if t[k].dtype == torch.float32 else "16-bit gradient"
            check(gradient, like, row, naive, what=k)
            assert gradient.dtype == t[k].dtype


@pytest.mark.parametrize("caps", [(None, None), (3.0, None), (None, 3.0), (2.0, 4.0)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_relation_of_ragged_images_equals_that_of_the_logits(
    dtype: torch.dtype, with_bias: bool, caps: tuple[float | None, ...], backend: str
) -> None:
    options = {"student_softcap": caps[0], "teacher_softcap": caps[1]}
    check_against_logits(inputs(dtype), LENS, with_bias, backend, **options)


@pytest.mark.parametrize(("v_s", "v_t"), [(89, 89), (89, 101), (101, 89)])
@pytest.mark.parametrize("vocab_size", [None, 80])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_vocabulary_mismatch(
    v_s: int, v_t: int, vocab_size: int | None, softcap: float | None, backend: str
) -> None:
    t = inputs(v_s=v_s, v_t=v_t)
    options = {"vocab_size": vocab_size, "student_softcap": softcap}
    check_against_logits(t, [9, 11], True, backend, **options)
    v = vocab_size or min(v_s, v_t)
    for k in ("ws", "bs"):
        gradient = t[k].grad
        assert gradient is not None and not gradient[v:].any() and gradient[:v].any()


def test_more_rows_than_a_tile_and_more_tokens_than_a_slice(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tile has 512 rows; at 8 the same loops run on 20. The tiles of C++ keep their size.
    monkeypatch.setattr(eager, "RELATION_TILE", 8)
    monkeypatch.setattr(products, "VOCAB_SLICE", 32)
    for softcap in (None, 3.0):
        check_against_logits(inputs(), [20], True, backend, student_softcap=softcap)


def test_an_image_larger_than_any_tile(backend: str) -> None:
    # 1,100 rows: three tiles of 512 in eager, more in C++, the last of each incomplete.
    check_against_logits(inputs(rows=1100, v_s=40, v_t=40), [1, 1099], False, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@given(st.lists(st.integers(2, 9) | st.just(0), min_size=1, max_size=4).filter(any),
       st.integers(8, 40))  # fmt: skip
def test_any_images(backend: str, lens: list[int], v: int) -> None:
    """No image of one row: its cosine is 1 whatever the row, its gradient nothing but rounding."""
    if backend == "cpu" and not cpu.available():
        pytest.skip(f"backend 'cpu': {cpu.why_not()}")
    torch.manual_seed(v)
    check_against_logits(inputs(rows=sum(lens), v_s=v, v_t=v + 3), lens, False, backend)


@pytest.fixture(params=[True, False], ids=["on the host", "elsewhere"])
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the host knows where images lie: elsewhere, as on a GPU, all rows meet."""
    if not request.param:
        monkeypatch.setattr(cells, "on_host", lambda *_: False)
    return request.param


@pytest.mark.parametrize("lens", [LENS, [3], [0, 5], [4, 4], [0]], ids=str)
def test_softcapped_heads_of_images_wherever_their_ends_are(
    lens: list[int], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "RELATION_TILE", 4)
    check_against_logits(inputs(rows=sum(lens)), lens, True, "eager", student_softcap=3.0)


@pytest.mark.parametrize("ends", [[0, 3, 8], [0, 12], [1, 10], [0, 7, 3, 10]], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_wrong_prefix_sums_are_refused_where_they_are_read(
    ends: list[int], softcap: float | None, known: bool, backend: str
) -> None:
    """Compiled, a call does not look at them."""
    t, cu = inputs(rows=10), torch.tensor(ends, dtype=torch.int32)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(cu: Tensor) -> Tensor:
        return mk.fused_linear_relation(
            t["hs"], t["ws"], t["ht"], t["wt"], cu, student_softcap=softcap, backend=backend
        )

    with pytest.raises((ValueError, RuntimeError), match="cu_seqlens"):
        compiled(cu)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_jointly_the_images_are_blocks_of_one_matrix(softcap: float | None, backend: str) -> None:
    t = inputs(torch.float64)
    caps = {"student_softcap": softcap, "teacher_softcap": softcap}
    loss = call(t, LENS, True, joint=True, backend=backend, **caps)
    blocks = []
    for who in "st":
        z = reference.logits(t[f"h{who}"], t[f"w{who}"], t[f"b{who}"], softcap, V_S)
        blocks.append(torch.block_diag(*(y @ y.mT for y in z.split(LENS))))
    naive = 1 - (blocks[0] * blocks[1]).sum() / (blocks[0].norm() * blocks[1].norm())
    torch.testing.assert_close(loss, naive)
    leaves = [t["hs"], t["ws"], t["bs"]]
    for ours, truth in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(naive, leaves), strict=True
    ):
        torch.testing.assert_close(ours, truth)


def test_a_batch_is_images_of_equal_size(backend: str) -> None:
    t = inputs(rows=12)
    packed = call(t, [4, 4, 4], False, backend=backend)
    batch = t | {"hs": t["hs"].view(3, 4, D_S), "ht": t["ht"].view(3, 4, D_T)}
    assert torch.equal(call(batch, None, False, backend=backend), packed)
    flat = mk.relation_cosine(t["hs"], t["ht"], cu_of([4] * 3), backend=backend)
    assert torch.equal(mk.relation_cosine(batch["hs"], batch["ht"], backend=backend), flat)
    with pytest.raises(ValueError, match=r"teacher_hidden: .*same B images of P rows"):
        call(batch | {"ht": t["ht"]}, None, False, backend=backend)
    one = [call(t, lens, False, backend=backend) for lens in (None, [12])]
    assert torch.equal(*one)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cached_grams_change_nothing(dtype: torch.dtype, with_bias: bool, backend: str) -> None:
    t = inputs(dtype)
    for k in ("ws", "bs"):
        t[k].requires_grad_(False)
    biases = (t["bs"], t["bt"]) if with_bias else (None, None)
    grams = {
        "student_gram": mk.head_gram(t["ws"], biases[0], vocab_size=V_S),
        "teacher_gram": mk.head_gram(t["wt"], biases[1], vocab_size=V_S),
    }
    assert all(g.dtype == torch.float32 for g in grams.values())
    fresh, cached = (call(t, LENS, with_bias, backend=backend, **g) for g in ({}, grams))
    assert torch.equal(fresh, cached)
    gradients = [torch.autograd.grad(x, t["hs"])[0] for x in (fresh, cached)]
    assert torch.equal(*gradients)


def test_a_differentiable_gram_carries_the_gradient_of_the_head(backend: str) -> None:
    t = inputs()
    (direct,) = torch.autograd.grad(call(t, LENS, False, backend=backend), t["ws"])
    gram = mk.head_gram(t["ws"], vocab_size=V_S)
    (through,) = torch.autograd.grad(
        call(t, LENS, False, backend=backend, student_gram=gram), t["ws"]
    )
    assert torch.equal(direct, through)


def test_gram_oracle(backend: str) -> None:
    """<R_s, R_t> = ‖Y_sᵀ Y_t‖², so the loss is known without R as well."""
    y_s, y_t = torch.randn(ROWS, D_S).double(), torch.randn(ROWS, D_T).double()

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a.mT @ b).square().sum()

    want = 1 - inner(y_s, y_t) / (inner(y_s, y_s) * inner(y_t, y_t)).sqrt()
    check(mk.relation_cosine(y_s, y_t, backend=backend), want, "fp64")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_nearly_aligned_pair_is_not_at_zero(dtype: torch.dtype, backend: str) -> None:
    """1 − cos near 6e-4, which bf16 arithmetic gives as exactly 0 (DESIGN section 2)."""
    hs, w = torch.randn(64, 32), torch.randn(500, 32)
    noise = torch.randn(64, 32) * 0.05
    t = {"hs": hs.to(dtype), "ws": w.to(dtype), "ht": (hs + noise).to(dtype), "wt": w.to(dtype)}
    got = mk.fused_linear_relation(t["hs"], t["ws"], t["ht"], t["wt"], backend=backend)
    z_s, z_t = (t[f"h{k}"].double() @ t[f"w{k}"].double().T for k in "st")
    want = reference.relation_cosine(z_s, z_t, cu_of([64]))
    assert 3e-4 < want < 3e-3
    check(got, want, "relation")
    r_s, r_t = (x @ x.T for x in (z_s.bfloat16(), z_t.bfloat16()))
    naive = 1 - (r_s * r_t).sum() / (r_s.norm() * r_t.norm())
    assert abs(naive - want) > 0.2 * want  # so the bound above is no formality


@pytest.mark.parametrize("rows", [1, 30])
def test_aligned_models(rows: int, backend: str) -> None:
    """As an image of one row always is."""
    y_s = torch.randn(rows, 8, requires_grad=True)
    y_t = torch.randn(1, 9) if rows == 1 else y_s.detach()
    loss = mk.relation_cosine(y_s, y_t, backend=backend)
    loss.backward()
    assert y_s.grad is not None and loss.abs() < 1e-6 and y_s.grad.abs().max() < 1e-6


def test_images_without_rows_count_as_nothing(backend: str) -> None:
    y_s, y_t = torch.randn(6, 4, requires_grad=True), torch.randn(6, 5)
    whole = mk.relation_cosine(y_s, y_t, backend=backend)
    padded = mk.relation_cosine(y_s, y_t, cu_of([0, 6, 0]), backend=backend)
    torch.testing.assert_close(padded, whole / 3)
    for cu in (torch.zeros(1, dtype=torch.int32), cu_of([0]), cu_of([0, 0])):
        none = mk.relation_cosine(y_s[:0], y_t[:0], cu, backend=backend)
        none.backward()
        assert none == 0 and y_s.grad is not None and not y_s.grad.any()


@pytest.mark.parametrize("side", [0, 1])
def test_an_image_of_zeros_has_no_direction(side: int, backend: str) -> None:
    y = [torch.randn(8, 4), torch.randn(8, 4)]
    y[side][:3] = 0
    y_s = y[0].requires_grad_()
    loss = mk.relation_cosine(y_s, y[1], cu_of([3, 5]), backend=backend)
    loss.backward()
    rest = mk.relation_cosine(y_s[3:], y[1][3:], backend=backend)
    torch.testing.assert_close(loss, (1 + rest) / 2)
    assert y_s.grad is not None and not y_s.grad[:3].any() and y_s.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["hs", "ht"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_broken_row_is_nan(bad: float, side: str, softcap: float | None, backend: str) -> None:
    t = inputs()
    with torch.no_grad():
        t[side][3, 2] = bad
    assert call(t, LENS, False, backend=backend, student_softcap=softcap).isnan()


def test_large_logits(backend: str) -> None:
    """R of logits of 1e4 reaches 1e10 and its norm's square 1e21: beyond fp32's precision in sums,
    not beyond its range in tiles.
    """
    t = inputs()
    with torch.no_grad():
        for k in ("ws", "wt"):
            t[k] *= 1e4
    check_against_logits(t, LENS, False, backend)


@pytest.mark.usefixtures("threads")
def test_the_same_bits_every_run(backend: str) -> None:
    t = inputs(rows=700)
    grads = [torch.autograd.grad(call(t, [300, 400], True, backend=backend), [t["hs"], t["ws"]])
             for _ in range(3)]  # fmt: skip
    assert all(torch.equal(a, b) for g in grads[1:] for a, b in zip(grads[0], g, strict=True))


@pytest.mark.parametrize("trained", [(True, False), (False, True)], ids=["hidden", "head"])
def test_a_frozen_side_gets_nothing(trained: tuple[bool, bool], backend: str) -> None:
    full = inputs()
    t = {k: x.detach().clone() for k, x in full.items()}
    t["hs"].requires_grad_(trained[0])
    t["ws"].requires_grad_(trained[1])
    for x in (t, full):
        call(x, LENS, False, backend=backend).backward()
    for k, wanted in zip(("hs", "ws"), trained, strict=True):
        got, want = t[k].grad, full[k].grad
        assert (got is not None) == wanted and want is not None
        if got is not None:
            assert torch.equal(got, want)


def test_gram_of_a_sliced_head_and_its_gradient() -> None:
    w = torch.randn(9000, 5, requires_grad=True)  # more rows than one slice of 8,192
    g = mk.head_gram(w, vocab_size=8500)
    torch.testing.assert_close(g, w[:8500].T @ w[:8500], rtol=1e-4, atol=1e-2)
    dg = torch.randn(5, 5)
    (dw,) = torch.autograd.grad(g, w, dg)
    torch.testing.assert_close(dw[:8500], w.detach()[:8500] @ (dg + dg.T))
    assert not dw[8500:].any()
