"""Is the affinity of visual and response tokens that of the definition, tile by tile?"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import cells, reference
from tests.problems import DTYPES
from tests.tolerances import LADDER, check, ladder_bound, ladder_value_bound, relative_error
from tests.watch import Watch

Samples = list[tuple[int, int]]  # visual and response rows of each
SAMPLES: Samples = [(7, 3), (0, 4), (5, 0), (4, 9), (0, 0)]


@pytest.fixture(params=["host", "device"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix sums that may be read, and such as lie on another device."""
    if request.param == "device":
        monkeypatch.setattr(cells, "on_host", lambda *_: False)


def inputs(samples: Samples, d_s: int = 6, d_t: int = 9, dtype: Any = torch.float32) -> list[Any]:
    """Rows lie anywhere, and some are neither visual nor response."""
    generator = torch.Generator().manual_seed(sum(map(sum, samples)))
    visual, response = (sum(sizes) for sizes in zip((0, 0), *samples, strict=True))
    n = visual + response + 2
    order = torch.randperm(n, generator=generator)
    cu = [
        torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
        for sizes in zip(*samples, strict=True)
    ]
    rows = [torch.randn(n, d, generator=generator).to(dtype) for d in (d_s, d_t)]
    return [*rows, order[:visual], order[visual : visual + response], *cu]


def found(x: list[Any], function: Any = mk.affinity_loss, **options: Any) -> tuple[Tensor, Tensor]:
    student = x[0].clone().requires_grad_()
    loss = function(student, *x[1:], **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def check_all(x: list[Any], **options: Any) -> None:
    wide = [
        [t.to(d) if t.is_floating_point() else t for t in x] for d in (torch.float64, torch.float32)
    ]
    want, plain = (found(y, reference.affinity, **options) for y in wide)
    got = found(x, **options)
    half = x[0].dtype in (torch.bfloat16, torch.float16)
    check(got[0], want[0], "value", plain[0], cancels=1.0)
    check(got[1], want[1], "16-bit gradient" if half else "gradient", plain[1], cancels=1.0)
    assert got[0].dtype == torch.float32 and got[1].dtype == x[0].dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("tile", [2, 1024])
@pytest.mark.usefixtures("ends")
def test_values_and_gradients(
    joint: bool, tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "TILE", tile)
    check_all(inputs(SAMPLES, dtype=dtype), joint=joint)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda d: str(d)[6:])
def test_the_contrastive_kind(dtype: torch.dtype) -> None:
    """Between all samples, those without images or answers among them."""
    x, row = inputs(SAMPLES, dtype=dtype), "16-bit gradient" if dtype.itemsize == 2 else "gradient"
    want, plain = (
        found([t.to(d) if t.is_floating_point() else t for t in x], reference.contrast)
        for d in (torch.float64, torch.float32)
    )
    got = found(x, kind="contrastive")
    check(got[0], want[0], "value", plain[0])
    check(got[1], want[1], row, plain[1])


def test_the_contrastive_kind_written_out() -> None:
    x = inputs([(2, 3), (3, 1)], dtype=torch.float64)
    s, t = (F.normalize(h, dim=-1) for h in x[:2])
    total = 0.0
    for images in (x[2][:2], x[2][2:]):
        for answers in (x[3][:3], x[3][3:]):
            for i in images:
                for j in answers:
                    c, target = torch.dot(s[i], s[j]), torch.dot(t[i], t[j])
                    of_answers = torch.stack([torch.dot(s[i], s[k]) for k in answers]).exp().sum()
                    of_images = torch.stack([torch.dot(s[k], s[j]) for k in images]).exp().sum()
                    ahead = target * (of_answers.log() - c) / len(images)
                    back = target * (of_images.log() - c) / len(answers)
                    total += float(ahead + back) / 2 / len(answers) / 4
    assert float(mk.affinity_loss(*x, kind="contrastive")) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("kind", ["squared", "contrastive"])
def test_autocast_rounds_no_cosine(kind: str) -> None:
    def in_autocast(*x: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mk.affinity_loss(*x, **options)

    x = inputs(SAMPLES)
    got, want = found(x, in_autocast, kind=kind), found(x, kind=kind)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
    st.integers(1, 5), st.integers(1, 5), st.booleans(), st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(samples: Samples, d_s: int, d_t: int, joint: bool, dtype: torch.dtype) -> None:
    """Cosines of one dimension are ±1: their differences are 0 or 2."""
    check_all(inputs(samples, d_s, d_t, dtype), joint=joint)


def test_written_out_cell_by_cell() -> None:
    x = inputs([(2, 3), (3, 1)])
    total = 0.0
    for s, (visual, response) in enumerate([((0, 2), (0, 3)), ((2, 5), (3, 4))]):
        gaps = [
            F.cosine_similarity(x[0][x[2][i]], x[0][x[3][j]], dim=0)
            - F.cosine_similarity(x[1][x[2][i]], x[1][x[3][j]], dim=0)
            for i in range(*visual) for j in range(*response)
        ]  # fmt: skip
        assert len(gaps) == [6, 3][s]
        total += sum(float(gap) ** 2 for gap in gaps) / len(gaps) / 2
    assert float(mk.affinity_loss(*x)) == pytest.approx(total, rel=1e-5)


def test_the_gradient_by_finite_differences() -> None:
    student, *rest = inputs([(3, 2), (2, 2)], 3, 4, torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: mk.affinity_loss(s, *rest), (student,))


@pytest.mark.parametrize("eps", LADDER)
@pytest.mark.usefixtures("ends")
def test_the_ladder(eps: float) -> None:
    x = inputs([(40, 30)], 32, 32)
    x[1] = x[0] + eps * torch.randn_like(x[0])
    got, want = (
        found(x),
        found([t.double() if t.is_floating_point() else t for t in x], reference.affinity),
    )
    assert relative_error(got[0], want[0]) < ladder_value_bound("", eps)
    assert relative_error(got[1], want[1]) < ladder_bound(torch.float32, eps)


def test_no_matrix_of_a_large_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "TILE", 8)
    x = inputs([(300, 200)], 4, 4)
    x[0].requires_grad_()
    with Watch() as watch:
        mk.affinity_loss(*x).backward()
    assert watch.tally.largest < 300 * 200 / 8


@pytest.mark.usefixtures("ends")
def test_hostile_rows() -> None:
    """A row of zeros has cosine 0 with all; NaN stays in its sample's rows and the loss."""
    x = inputs(SAMPLES)
    x[0][x[2][0]] = 0
    check_all(x)
    for model in (0, 1):
        for kind in (2, 3):
            x = inputs(SAMPLES)
            x[model][x[kind][0], 2] = torch.nan
            loss, grad = found(x)
            assert loss.isnan() and grad[x[2][:7]].isnan().any() and grad[x[3][:3]].isnan().any()
            assert grad[x[2][7:]].isfinite().all() and grad[x[3][3:]].isfinite().all()
    x = inputs(SAMPLES)
    x[0] *= 1e18  # squares overflow fp32
    clean = inputs(SAMPLES)
    torch.testing.assert_close(found(x)[0], found(clean)[0], rtol=1e-5, atol=0)


def test_a_frozen_student_costs_no_gradient() -> None:
    x = inputs(SAMPLES)
    assert not mk.affinity_loss(*x).requires_grad
    x[1].requires_grad_()
    assert not mk.affinity_loss(*x).requires_grad


def test_bad_input_is_named() -> None:
    names = ("student", "teacher", "visual", "response", "cu_visual", "cu_response")
    x = dict(zip(names, inputs([(2, 2), (1, 2)]), strict=True))
    faults: list[tuple[dict[str, Any], str]] = [
        ({"teacher": x["teacher"][1:]}, "teacher: has 8 rows, but student has 9"),
        ({"visual": x["visual"].int()}, r"visual: expected int64 of shape \(rows,\), got torch.in"),
        ({"response": [1]}, r"response: expected int64 of shape \(rows,\), got list"),
        ({"cu_visual": x["cu_visual"][1:]}, "cu_visual: expected a non-decreasing prefix sum"),
        ({"cu_response": x["cu_response"][::2].contiguous()}, "cu_response: is of 1 samples, cu_v"),
        ({"kind": "cubed"}, "kind: got 'cubed', expected one of squared, contrastive"),
        ({"kind": "contrastive", "joint": True}, "joint: kind 'contrastive' has no other mean"),
    ]
    for change, message in faults:
        with pytest.raises(ValueError, match=message):
            mk.affinity_loss(**x | change)
    with pytest.raises(IndexError):
        mk.affinity_loss(**x | {"visual": x["visual"] + 9})
