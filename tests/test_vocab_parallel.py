"""Do heads that are cut over ranks give what whole heads give? Two gloo processes against one call.

The pair of processes is started once and runs every case; each test below looks at its part of what
they brought back. A cut is named by where the first rank's tokens end, in parts of V: "half",
"uneven" (a quarter) and "empty" (none at all on the first rank).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mllmkd_kernels as mk
from tests.gloo import on_ranks
from tests.problems import (
    DIVERGENCES,
    Problem,
    Result,
    check_result,
    expected,
    near_converged,
    problem,
    run,
)
from tests.tolerances import LADDER, check, ladder_bound, ladder_value_bound, relative_error

CUTS = {"half": 0.5, "uneven": 0.25, "empty": 0.0}
NAMES = (
    "ragged", "peaked", "masked", "one_row", "empty", "huge", "one_hot_teacher", "identical",
    "zero_weight_rows", "larger_student", "larger_teacher", "small_vocab_size", "one_token",
)  # fmt: skip
#: Where fp32 has something to lose; what else may go wrong shows in fp64, bit for bit.
NARROW = ("ragged", "peaked", "huge", "one_hot_teacher", "identical", "larger_teacher")
EXACT = 1e-12
# image rows of the relation: the second image has none
ENDS = torch.tensor([0, 5, 5, 9], dtype=torch.int32)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN included: a reverse KL to a masked token is infinite."""
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def rows_here(tokens: int, vocab: int, cut: str) -> slice:
    """This rank's rows of a head: the second rank also has what lies beyond V."""
    at = int(vocab * CUTS[cut])
    return slice(at, tokens) if dist.get_rank() else slice(0, at)


def cut_head(p: Problem, cut: str) -> dict[str, Any]:
    """This rank's slices of both heads, those of the student as leaves."""
    mine = rows_here(p.ws.shape[0], p.vocab, cut)
    its = rows_here(p.wt.shape[0], p.vocab, cut)
    return {
        "ws": p.ws[mine].clone().requires_grad_(),
        "wt": p.wt[its],
        "bs": None if p.bs is None else p.bs[mine].clone().requires_grad_(),
        "bt": None if p.bt is None else p.bt[its],
    }


def run_cut(p: Problem, cut: str, divergence: Any, **options: Any) -> Result:
    """`tests.problems.run` of this rank's slices: dw and db are its own rows."""
    head, hs = cut_head(p, cut), p.hs.clone().requires_grad_()
    ce_weight, kd_weight = p.weights()
    out = mk.vocab_parallel_distill(
        hs, head["ws"], p.ht, head["wt"], p.labels, ce_weight=ce_weight, kd_weight=kd_weight,
        divergence=divergence, student_bias=head["bs"], teacher_bias=head["bt"],
        **(p.options | options),
    )  # fmt: skip
    out.loss.backward(retain_graph=True)
    assert hs.grad is not None and head["ws"].grad is not None
    first = hs.grad.clone(), head["ws"].grad.clone()
    hs.grad = head["ws"].grad = None
    if head["bs"] is not None:
        head["bs"].grad = None
    out.loss.backward()  # again over the retained graph: the same bits
    assert hs.grad is not None and head["ws"].grad is not None
    assert same(hs.grad, first[0]) and same(head["ws"].grad, first[1])
    db = None if head["bs"] is None else head["bs"].grad
    return Result(out.loss.detach(), out.ce, out.kd, hs.grad, head["ws"].grad, db)


def relation_cut(p: Problem, cut: str, joint: bool) -> Result:
    """The relation loss of this rank's slices; `kd` and `ce` stand for nothing."""
    head, hs = cut_head(p, cut), p.hs.clone().requires_grad_()
    held = mk.vocab_slice(head["ws"], head["wt"], vocab_size=p.options.get("vocab_size"))
    loss = mk.vocab_parallel_relation(
        hs, head["ws"], p.ht, head["wt"], ENDS, student_bias=head["bs"], teacher_bias=head["bt"],
        joint=joint, held=held,
    )  # fmt: skip
    loss.backward()
    assert hs.grad is not None and head["ws"].grad is not None
    db = None if head["bs"] is None else head["bs"].grad
    return Result(loss.detach(), loss, loss, hs.grad, head["ws"].grad, db)


def refusals() -> dict[str, str]:
    """What this rank is told where the call is wrong."""
    p = problem("larger_teacher")
    head, found = cut_head(p, "half"), {}

    def say(name: str, kind: type[Exception], call: Any) -> None:
        with pytest.raises(kind) as error:
            call()
        found[name] = str(error.value)

    def distill(wt: torch.Tensor, labels: Any = None, **options: Any) -> mk.DistillOutput:
        return mk.vocab_parallel_distill(p.hs, head["ws"], p.ht, wt, labels, **options)

    elsewhere = p.wt[rows_here(p.wt.shape[0], p.vocab, "uneven")]
    held = mk.vocab_slice(head["ws"], head["wt"])
    labels = torch.full_like(p.labels, p.vocab)
    say("cut", ValueError, lambda: distill(elsewhere))
    say("vocab_size", ValueError, lambda: distill(head["wt"], vocab_size=p.vocab + 1))
    say("held", ValueError, lambda: distill(head["wt"], held=replace(held, stop=held.stop + 99)))
    say("other", ValueError, lambda: distill(head["wt"], held=held, vocab_size=7))
    say("label", IndexError, lambda: distill(head["wt"], labels, ce_weight=1.0))
    say("labels", ValueError, lambda: distill(head["wt"], ce_weight=1.0))
    frozen = mk.vocab_parallel_gram(head["ws"].detach(), held=held)
    arguments = p.hs, head["ws"], p.ht, head["wt"]
    say("gram", ValueError, lambda: mk.vocab_parallel_relation(*arguments, student_gram=frozen))

    hs = p.hs.clone().requires_grad_()
    loss = mk.vocab_parallel_distill(hs, head["ws"], p.ht, head["wt"]).loss
    (gradient,) = torch.autograd.grad(loss, hs, create_graph=True)
    say("twice", RuntimeError, lambda: gradient.sum().backward())
    return found


def no_gradient_and_rows() -> dict[str, Any]:
    """A frozen head, no gradient at all, and which rows `vocab_rows` gives."""
    p = problem("larger_student")
    head = cut_head(p, "half")
    head["ws"] = head["ws"].detach()
    hs = p.hs.clone().requires_grad_()
    out = mk.vocab_parallel_distill(hs, head["ws"], p.ht, head["wt"])
    out.loss.backward()
    with torch.no_grad():
        plain = mk.vocab_parallel_distill(hs, head["ws"], p.ht, head["wt"])
    ce = mk.vocab_parallel_distill(hs, head["ws"], labels=p.labels, ce_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mk.vocab_parallel_distill(hs, head["ws"], p.ht, head["wt"])
    pairs, trained = [], head["ws"].clone().requires_grad_()
    for options in ({}, {"main_grad": torch.zeros(trained.shape), "loss_gradient": 3.0}):
        weights = [torch.ones(len(p.labels), requires_grad=True) for _ in range(2)]
        weighed = mk.vocab_parallel_distill(
            p.hs, trained, p.ht, head["wt"], p.labels, ce_weight=weights[0], kd_weight=weights[1],
            **options,
        )  # fmt: skip
        (3 * weighed.loss).backward()
        pairs += [(w.grad, 3 * x) for w, x in zip(weights, (weighed.ce, weighed.kd), strict=True)]
    masked = torch.full((len(head["wt"]),), -torch.inf)
    masked[1:] = 0
    infinite = mk.vocab_parallel_distill(
        p.hs, trained, p.ht, head["wt"], kd_weight=weights[1], divergence="reverse_kl",
        teacher_bias=masked,
    )  # fmt: skip
    return {
        "weights": pairs,
        "infinite": infinite.loss.detach(),
        "dh": hs.grad,
        "loss": plain.loss,
        "ce": ce.ce.detach(),
        "autocast": cast.loss.detach(),
        "rows": [mk.vocab_rows(tokens, 7) for tokens in (7, 9)],
        "held": mk.vocab_slice(p.ws[mk.vocab_rows(211, 190)], p.wt[mk.vocab_rows(190, 190)]),
    }


def work() -> dict[Any, Any]:
    """Every case on this rank."""
    found: dict[Any, Any] = {"refusals": refusals(), "others": no_gradient_and_rows()}
    for dtype in (torch.float64, torch.float32):
        for divergence in DIVERGENCES:
            for name in NAMES if dtype == torch.float64 else NARROW:
                for cut in cuts_of(name):
                    p = problem(name, dtype)
                    # many chunks: the exchanges of one chunk must not mix with the next one's
                    options = {"workspace_mb": 1e-6} if name == "larger_teacher" else {}
                    found[dtype, divergence, name, cut] = run_cut(p, cut, divergence, **options)
        for name in ("larger_student", "small_vocab_size"):
            for cut in CUTS:
                for joint in (False, True):
                    p = relation_problem(name, dtype)
                    found["relation", dtype, name, cut, joint] = relation_cut(p, cut, joint)
    for divergence in DIVERGENCES:
        for dtype in (torch.float32, torch.bfloat16):
            for eps in LADDER[::2]:
                p = rung(divergence, eps, dtype)
                found["ladder", divergence, dtype, eps] = run_cut(p, "uneven", divergence)
        for name, cut, dtype in scored_cases():
            case = "z-scored", divergence, name, cut, dtype
            found[case] = run_cut(scored(name, dtype), cut, divergence)
    return found


def scored_cases() -> list[tuple[str, str, torch.dtype]]:
    """(problem, cut, dtype), the first with every option there is."""
    names = ("larger_teacher", "peaked", "constant", "spike", "identical", "zero_weight_rows")
    both = (torch.float64, torch.float32)
    return [("ragged", cut, torch.float64) for cut in CUTS] + [
        (name, "uneven", dtype) for name in names for dtype in both
    ]


def scored(name: str, dtype: torch.dtype) -> Problem:
    """ "spike": beside one large logit on the first rank the others are nearly equal, and all are
    far from 0; σ is as small as it can be beside the distance of maximum and mean.
    """
    p = problem("larger_student" if name == "spike" else name, dtype)
    if name == "spike":
        ws, bs = p.ws * 1e-2, torch.full((p.ws.shape[0],), 1e3, dtype=dtype)
        bs[5] += 100
        p = replace(p, ws=ws, bs=bs)
    return replace(p, options=p.options | {"standardize": True})


def cuts_of(name: str) -> tuple[str, ...]:
    """One problem is cut in every way."""
    return tuple(CUTS) if name == "ragged" else ("uneven",)


def relation_problem(name: str, dtype: torch.dtype) -> Problem:
    """Nine rows, which `ENDS` divides into images; the second problem has biases."""
    p = problem(name, dtype)
    p = replace(p, hs=p.hs[:9], ht=p.ht[:9])
    if name == "larger_student":
        return p
    g = torch.Generator().manual_seed(3)
    bs, bt = (torch.randn(w.shape[0], generator=g, dtype=torch.float64) for w in (p.ws, p.wt))
    return replace(p, bs=bs.to(dtype), bt=bt.to(dtype))


def rung(divergence: str, eps: float, dtype: torch.dtype) -> Problem:
    return near_converged(eps, two_sided=divergence == "total_variation").to(dtype)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return on_ranks(2, work, tmp_path_factory.mktemp("ranks"))


def joined(ranks: list[dict[Any, Any]], case: Any) -> Result:
    """The ranks' rows of dw and db together; the rest is the same on both, bit for bit."""
    a, b = (rank[case] for rank in ranks)
    for mine, other in zip(a[:4], b[:4], strict=True):
        assert same(mine, other)
    db = None if a.db is None else torch.cat((a.db, b.db))
    return a._replace(dw=torch.cat((a.dw, b.dw)), db=db)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients_are_those_of_whole_heads(ranks, divergence: str, name: str) -> None:
    for cut in cuts_of(name):
        for dtype in (torch.float64, *[torch.float32] * (name in NARROW)):
            got = joined(ranks, (dtype, divergence, name, cut))
            check_result(got, problem(name, dtype), divergence, dtype)
        got = joined(ranks, (torch.float64, divergence, name, cut))
        whole = run(problem(name, torch.float64), "eager", divergence)
        for field, mine, other in zip(Result._fields, got, whole, strict=True):
            if mine is None or other is None:
                continue
            finite = other.isfinite()
            assert same(mine[~finite], other[~finite])
            # what vanishes but for rounding (equal models) has no size of its own
            size = max(float(other[finite].norm()), 1e-3)
            assert float((mine - other)[finite].norm()) <= EXACT * size, (field, cut)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_z_scored_logits_are_those_of_whole_heads(ranks, divergence: str) -> None:
    for name, cut, dtype in scored_cases():
        got = joined(ranks, ("z-scored", divergence, name, cut, dtype))
        p = scored(name, dtype)
        if name != "constant":  # where autograd divides by σ = 0
            check_result(got, p, divergence, dtype)
        if dtype == torch.float64:
            least = 1e4 if name == "constant" else 1e-3  # there 1/(σ + ε) is 1e7
            for mine, other in zip(got, run(p, "eager", divergence), strict=True):
                if mine is not None and other is not None:
                    size = max(float(other.norm()), least)
                    assert float((mine - other).norm()) <= EXACT * size, (name, cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_near_convergence(ranks, divergence: str, dtype: torch.dtype) -> None:
    for eps in LADDER[::2]:
        got = joined(ranks, ("ladder", divergence, dtype, eps))
        want = expected(rung(divergence, eps, dtype), divergence)
        for name in ("dh", "dw"):
            error = relative_error(getattr(got, name), getattr(want, name))
            assert error <= ladder_bound(dtype, eps), f"{name} at {eps}: {error:.2e}"
        assert not (got.kd < 0).any()
        assert relative_error(got.kd, want.kd) <= ladder_value_bound(divergence, eps)


@pytest.mark.parametrize("name", ["larger_student", "small_vocab_size"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_relation_is_that_of_whole_heads(ranks, dtype: torch.dtype, name: str) -> None:
    for cut in CUTS:
        for joint in (False, True):
            got = joined(ranks, ("relation", dtype, name, cut, joint))
            want = whole_relation(relation_problem(name, torch.float64), joint)
            for field in ("loss", "dh", "dw", "db"):
                mine, other = getattr(got, field), getattr(want, field)
                if dtype == torch.float64 and other is not None:
                    assert relative_error(mine, other) <= EXACT, (field, cut, joint)
                elif other is not None:
                    check(mine, other, "relation", what=f"{field} {cut} {joint}")


def whole_relation(p: Problem, joint: bool) -> Result:
    hs, ws = p.hs.clone().requires_grad_(), p.ws.clone().requires_grad_()
    bs = None if p.bs is None else p.bs.clone().requires_grad_()
    loss = mk.fused_linear_relation(
        hs, ws, p.ht, p.wt, ENDS, student_bias=bs, teacher_bias=p.bt, joint=joint,
        vocab_size=p.options.get("vocab_size"), backend="eager",
    )  # fmt: skip
    loss.backward()
    assert hs.grad is not None and ws.grad is not None
    return Result(loss.detach(), loss, loss, hs.grad, ws.grad, None if bs is None else bs.grad)


def test_frozen_heads_no_gradient_and_no_teacher(ranks) -> None:
    p = problem("larger_student")
    hs = p.hs.clone().requires_grad_()
    whole = mk.fused_linear_distill(hs, p.ws, p.ht, p.wt)
    whole.loss.backward()
    ce = mk.fused_linear_distill(p.hs, p.ws, labels=p.labels, ce_weight=1.0, vocab_size=211).ce
    for rank in (rank["others"] for rank in ranks):
        torch.testing.assert_close(rank["dh"], hs.grad)
        torch.testing.assert_close(rank["loss"], whole.loss.detach())
        torch.testing.assert_close(rank["ce"], ce)
        for gradient, rows in rank["weights"]:
            torch.testing.assert_close(gradient, rows)
        assert rank["infinite"] == torch.inf  # not NaN, although the weights want a gradient
        assert rank["autocast"].dtype == torch.float32
        assert relative_error(rank["autocast"], whole.loss) < 0.1
        assert not torch.equal(rank["autocast"], rank["loss"])


def test_which_rows_a_rank_keeps(ranks) -> None:
    first, second = (rank["others"] for rank in ranks)
    assert first["rows"] == [slice(0, 3), slice(0, 3)]
    assert second["rows"] == [slice(3, 7), slice(3, 9)]
    assert first["held"] == mk.VocabSlice(0, 95, 190, 95)
    assert second["held"] == mk.VocabSlice(95, 190, 190, 95)


def test_refusals_name_what_came_and_come_on_every_rank(ranks) -> None:
    for rank in (rank["refusals"] for rank in ranks):
        assert "rank 0 holds tokens [0, 47] of the teacher's head and [0, 95]" in rank["cut"]
        assert "got 191, expected 1 to 190 (heads of (190, 211) tokens)" in rank["vocab_size"]
        assert "held: tokens" in rank["held"] and "rows" in rank["held"]
        assert "vocab_size: got 7, but held is of 190" in rank["other"]
        assert "labels: got 190 at row 0, expected a token in [0, 190)" in rank["label"]
        assert "labels: expected next tokens" in rank["labels"]
        assert "student_gram: a cached Gram would cut" in rank["gram"]
        assert "double backward" in rank["twice"]
