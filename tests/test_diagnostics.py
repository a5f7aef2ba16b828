"""Are entropies and agreement right, in every backend, and does asking for them change anything?"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import plan, reference
from mllmkd_kernels.backends import cpu
from mllmkd_kernels.backends.calls import Options
from tests.problems import DIVERGENCES, DTYPES, Problem, asked, problem, run
from tests.tolerances import check

NAMES = ("student_entropy", "teacher_entropy", "agreement")


WAYS = ("eager", "cpu", "triton chunk", "triton stream")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend, and both algorithms of Triton, whatever the plan would take."""
    name, _, algorithm = request.param.partition(" ")
    if name == "cpu" and not cpu.available():
        pytest.skip(cpu.why_not())
    if algorithm:
        request.getfixturevalue("device")
        forced = functools.partial(plan.distill_plan, algorithm=algorithm)
        monkeypatch.setattr(plan, "distill_plan", forced)
        from mllmkd_kernels.backends.triton import splits

        monkeypatch.setattr(splits, "processors", lambda device: 1)  # a program walks all tiles
    return name


def ask(p: Problem, backend: str, divergence: str = "forward_kl", **options: Any):
    """The output with diagnostics, on the device of the backend."""
    if backend == "triton" and torch.cuda.is_available():
        p = p.on("cuda")
    hs = p.hs.clone().requires_grad_(options.pop("gradient", True))
    ce_weight, kd_weight = p.weights()
    asked = {
        "ce_weight": ce_weight, "kd_weight": kd_weight, "divergence": divergence,
        "student_bias": p.bs, "teacher_bias": p.bt, "backend": backend, "diagnostics": True,
        **p.options, **options,
    }  # fmt: skip
    return mk.fused_linear_distill(hs, p.ws, p.ht, p.wt, p.labels, **asked)


def truth(p: Problem, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """By the definitions, on the same numbers."""
    exact, o = p.to(dtype), p.options
    z_s = reference.logits(exact.hs, exact.ws, exact.bs, o.get("student_softcap"), p.vocab)
    z_t = reference.logits(exact.ht, exact.wt, exact.bt, o.get("teacher_softcap"), p.vocab)
    found = [reference.entropy(z, o.get("temperature", 1.0)) for z in (z_s, z_t)]
    return dict(zip(NAMES, [*found, reference.agreement(z_s, z_t)], strict=True))


def check_all(got: mk.DistillOutput, p: Problem) -> None:
    want, plain = truth(p), truth(p, torch.float32)
    for name in NAMES[:2]:
        mine, uniform = getattr(got, name).cpu(), math.log(p.vocab)
        check(mine, want[name], "value", plain[name], cancels=uniform, what=name)
    assert got.agreement is not None
    assert torch.equal(got.agreement.cpu().double(), want["agreement"])


def test_the_definitions() -> None:
    z = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3.0), -math.inf, -math.inf]])
    two = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(reference.entropy(z), torch.tensor([math.log(4), two]))
    other = torch.tensor([[1.0, 3.0, 3.0, 0.0], [5.0, 2.0, 0.0, 0.0]])
    assert reference.agreement(z, other).tolist() == [1.0, 0.0]
    assert reference.agreement(other, z).tolist() == [1.0, 0.0]


#: The interpreter needs seconds for what is more than a few rows of a few hundred tokens.
PROBLEMS = (
    "masked", "empty", "huge", "one_token", "aligned", "peaked", "near_converged", "one_row",
    "one_hot_teacher", "larger_teacher", "small_vocab_size",
)  # fmt: skip


@pytest.mark.parametrize(
    ("way", "name"),
    [(way, name) for way in WAYS for name in PROBLEMS[: 4 if "triton" in way else None]],
    indirect=["way"],
)
def test_every_problem(name: str, way: str) -> None:
    p = problem(name)
    check_all(ask(p, way), p)


def few(name: str, rows: int = 4) -> Problem:
    """The first rows of a problem."""
    p = problem(name)
    named = ("hs", "ht", "labels", "ce_weight", "kd_weight")
    cut = {n: getattr(p, n) for n in named if getattr(p, n) is not None}
    return replace(p, **{n: x[:rows] for n, x in cut.items()})


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "value"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_with_and_without_a_mean_and_a_gradient(divergence: str, gradient: bool, way: str) -> None:
    """The loss comes from other sweeps in each of the four; chunks and slices are the smallest."""
    p = few("ragged")
    check_all(ask(p, way, divergence, gradient=gradient, workspace_mb=1e-6), p)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bits(dtype: torch.dtype, way: str) -> None:
    p = few("larger_student", 2).to(dtype)
    check_all(ask(p, way), p)


def tied() -> Problem:
    """Integer logits, exact in any order of sums: the student's largest are columns 3 and 250, the
    teacher's 250 and 299 in even rows, 299 alone in odd ones. The first tile of any size agrees.
    """
    hs, ws = torch.ones(6, 4), torch.zeros(300, 4)
    ws[[3, 250]] = 2.0
    wt = torch.zeros(300, 4)
    wt[250, 0] = wt[299, 0] = 1.0
    wt[299, 1] = 1.0
    ht = torch.tensor([[3.0, 0.0, 0.0, 0.0], [3.0, 2.0, 0.0, 0.0]]).repeat(3, 1)
    return Problem(hs, ws, ht, wt, torch.arange(6), kd_weight=torch.full((6,), 0.5))


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "value"])
def test_one_of_several_tied_tokens_is_enough(way: str, gradient: bool) -> None:
    out = ask(tied(), way, gradient=gradient)
    assert out.agreement is not None and out.agreement.tolist() == [1.0, 0.0] * 3


def test_rows_without_weight_say_nothing_and_nan_stays_in_its_row(way: str) -> None:
    p = problem("zero_weight_rows")  # rows 2 and 5
    p.hs[2], p.ht[5] = torch.nan, torch.inf
    p.hs[1, 0], p.ht[4, 0] = torch.inf, torch.nan
    clean = ask(problem("zero_weight_rows"), way)
    out = ask(p, way)
    for name in NAMES:
        got, want = getattr(out, name), getattr(clean, name)
        assert got[[2, 5]].tolist() == want[[2, 5]].tolist() == [0, 0]
        assert torch.equal(got[[0, 3, 6, 7]], want[[0, 3, 6, 7]])
    assert out.student_entropy is not None and out.teacher_entropy is not None
    assert out.student_entropy.isnan().nonzero().flatten().tolist() == [1]
    assert out.teacher_entropy.isnan().nonzero().flatten().tolist() == [4]
    assert out.agreement is not None
    assert out.agreement.isnan().nonzero().flatten().tolist() == [1, 4]


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "value"])
def test_without_a_divergence_there_is_the_students_entropy(way: str, gradient: bool) -> None:
    p = replace(few("larger_student"), ce_weight=torch.ones(4))
    want = truth(p)["student_entropy"]
    want = want.masked_fill(p.labels == -100, 0)  # no label and no teacher: no weight
    for temperature in (1.0, 3.0):  # the divergence's alone
        out = ask(p, way, kd_weight=0.0, gradient=gradient, temperature=temperature)
        assert out.student_entropy is not None
        check(out.student_entropy.cpu(), want, "value")
        assert out.teacher_entropy is None and out.agreement is None


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_asking_changes_no_bit(divergence: str, way: str) -> None:
    p = few("ragged", 2)
    plain, asked = run(p, way, divergence), run(p, way, divergence, diagnostics=True)
    for x, y in zip(plain, asked, strict=True):
        assert x is not None and y is not None and torch.equal(x, y)
    out = ask(p, "eager", divergence, diagnostics=False)
    assert out.student_entropy is None and out.teacher_entropy is None and out.agreement is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kernels", ["eager", "cpu"])
def test_they_do_not_depend_on_the_divergence(divergence: str, kernels: str) -> None:
    p = problem("larger_student", torch.float64)
    if kernels == "cpu" and not cpu.available():
        pytest.skip(cpu.why_not())
    out, want = ask(p, kernels, divergence), truth(p)
    for name in NAMES:
        check(getattr(out, name), want[name], "fp64", what=name)


def test_they_have_no_gradient(backend: str) -> None:
    out = ask(problem("one_row"), backend)
    assert not any(getattr(out, name).requires_grad for name in NAMES)


@pytest.mark.usefixtures("device")
def test_the_row_kernel_of_the_cuda_backend_refuses() -> None:
    from mllmkd_kernels.backends.triton import clustered

    p = few("larger_student")
    student, teacher, targets = asked(p, mk.Divergence("jsd"))
    options = Options(p.vocab, 4, diagnostics=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="diagnostics: the row kernel of backend 'cuda' has none"):
        clustered.distill_rows(student, teacher, targets, options)


# --- in LLaVA-KD's loss ---------------------------------------------------------------------------


def batch() -> tuple[mk.HeadInputs, mk.HeadInputs, Tensor, Tensor]:
    """2 samples of 10 tokens: 3 visual rows each, answers of 4 and of 2 tokens."""
    student = mk.HeadInputs(torch.randn(2, 10, 6), torch.randn(40, 6))
    teacher = mk.HeadInputs(torch.randn(2, 10, 8), torch.randn(43, 8))
    labels, mask = torch.full((2, 10), -100), torch.zeros(2, 10, dtype=torch.bool)
    labels[0, 5:9], labels[1, 8:] = 7, 11
    mask[:, 1:4] = True
    return student, teacher, labels, mask


@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "unshifted"])
def test_means_over_the_rows_of_the_response_kl(shift: bool, backend: str) -> None:
    student, teacher, labels, mask = batch()
    loss = mk.LlavaKDLoss(temperature=2.0, response_shift=shift, diagnostics=True, backend=backend)
    out = loss(student, teacher, labels, mask)
    rows = labels != -100
    if shift:
        rows = rows.roll(-1, 1)
    z_s, z_t = student.hidden[rows] @ student.weight.T, teacher.hidden[rows] @ teacher.weight[:40].T
    entropies = [reference.entropy(z, 2.0).mean() for z in (z_s, z_t)]
    want = [*entropies, reference.agreement(z_s, z_t).mean()]
    torch.testing.assert_close([getattr(out, name) for name in NAMES], want, rtol=1e-5, atol=1e-6)


def test_what_is_not_known_is_none(backend: str) -> None:
    student, teacher, labels, mask = batch()

    def known(loss: mk.LlavaKDLoss, teacher: mk.HeadInputs | None = teacher) -> list[bool]:
        return [x is not None for x in loss(student, teacher, labels, mask)[5:]]

    asked: dict[str, Any] = {"diagnostics": True, "backend": backend}
    assert known(mk.LlavaKDLoss(**asked)) == [True, True, True]
    assert known(mk.LlavaKDLoss(response=0.0, **asked)) == [True, True, True]
    assert known(mk.LlavaKDLoss(**asked), None) == [True, False, False]
    assert known(mk.LlavaKDLoss(ce=0.0, response=0.0, **asked)) == [False, False, False]
    assert known(mk.LlavaKDLoss(backend=backend)) == [False, False, False]
