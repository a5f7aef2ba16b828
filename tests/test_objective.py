"""Is an objective the sum of its terms, each over the rows and the count that it names?"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mllmkd_kernels as mk
from mllmkd_kernels import HeadInputs, Needs, Objective, RowCounts, RowTerm, rows
from mllmkd_kernels import terms as supplied
from mllmkd_kernels.head_functions import HeadFunctions
from mllmkd_kernels.heads import Recorded
from mllmkd_kernels.methods import llava_kd
from mllmkd_kernels.terms import Relation
from mllmkd_kernels.view import View
from tests.test_llava_kd import D_S, D_T, RUNS, B, T, V, heads, labels_of, mask_of
from tests.test_llava_kd import logits as logits_of
from tests.tolerances import check

KINDS = ["cot", "pot", "cot"]


def batch_of() -> dict[str, Any]:
    attention = torch.ones(B, T, dtype=torch.int64)
    attention[0, 12:] = 0
    return {
        "labels": labels_of(), "image_mask": mask_of(RUNS), "attention_mask": attention,
        "kind": KINDS,
    }  # fmt: skip


def rows_of(name: str) -> Tensor:
    """(B, T) bool, written out once more."""
    batch = batch_of()
    following = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    cot = torch.tensor([True, False, True])[:, None]
    return {
        "response": following != -100,
        "response:unshifted": batch["labels"] != -100,
        "visual": batch["image_mask"],
        "valid": batch["attention_mask"] == 1,
        "response:cot": (following != -100) & cot,
        "valid:pot": (batch["attention_mask"] == 1) & ~cot,
        "response:unshifted:cot": (batch["labels"] != -100) & cot,
        "response:none": torch.zeros(B, T, dtype=torch.bool),
    }[name]


NAMES = (
    "response", "response:unshifted", "visual", "valid", "response:cot", "valid:pot",
    "response:unshifted:cot", "response:none",
)  # fmt: skip


def kl(s: HeadInputs, t: HeadInputs, chosen: Tensor) -> Tensor:
    log_q = (s.hidden @ s.weight.T)[chosen].log_softmax(-1)
    log_p = (t.hidden @ t.weight.T)[..., :V][chosen].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# --- row sets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_row_set_by_name(name: str) -> None:
    torch.manual_seed(0)
    want = rows_of(name)
    torch.manual_seed(0)
    batch = batch_of()
    index, labels = rows.select(name, batch)
    assert torch.equal(index, want.flatten().nonzero().squeeze(1))
    following = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert torch.equal(labels, following[want])
    assert rows.count(name, batch) == want.sum()


def test_units_are_counted() -> None:
    batch = batch_of()
    counted = [rows.count(name, batch) for name in ("images", "samples", "pairs")]
    assert counted == [3, 3, 1]
    assert rows.count("images", batch | {"image_lens": [2, 3, 3, 4]}) == 4


@pytest.mark.parametrize("name", ["respone", "response:", ":cot", "images:cot", ""])
def test_a_row_set_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"rows: got '{name}', expected one of response, "):
        RowTerm("ce", 1.0, name)
    with pytest.raises(ValueError, match=f"rows: got '{name}'"):
        rows.row_mask(name, batch_of())


def test_what_a_row_set_reads_has_to_be_there() -> None:
    with pytest.raises(ValueError, match="kind: missing; the batch has attention_mask, image_mask"):
        rows.select("response:cot", {k: v for k, v in batch_of().items() if k != "kind"})


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_any_row_set(name: str, backend: str) -> None:
    s, t = heads()
    torch.manual_seed(1)
    want = kl(s, t, rows_of(name))
    torch.manual_seed(1)
    objective = Objective(RowTerm("kl", 2.0, name, "forward_kl"), backend=backend)
    got = objective(s, t, batch_of())
    mean = want.mean() if len(want) else want.sum()
    check(got.loss, 2 * mean.detach(), "fp32 weights")
    check(got.terms["kl"], mean.detach(), "fp32 weights")
    grads = [torch.autograd.grad(x, [s.hidden, s.weight]) for x in (got.loss, 2 * mean)]
    for a, b in zip(*grads, strict=True):
        check(a, b, "fp32 weights")


# --- terms ----------------------------------------------------------------------------------------


def test_the_method_is_the_loss(backend: str) -> None:
    s, t = heads()
    batch = batch_of()
    options: dict[str, Any] = {"divergence": "jsd", "temperature": 2.0, "diagnostics": True}
    loss = mk.LlavaKDLoss(0.5, 2.0, 0.7, 1.5, **options, backend=backend)
    old = loss(s, t, batch["labels"], batch["image_mask"])
    new = llava_kd.objective(0.5, 2.0, 0.7, 1.5, **options, backend=backend)(s, t, batch)
    assert torch.equal(new.loss, old.loss)
    assert list(new.terms) == list(old._fields[1:])
    assert all(torch.equal(new.terms[name], getattr(old, name)) for name in new.terms)
    grads = [torch.autograd.grad(x.loss, [s.hidden, s.weight]) for x in (old, new)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def inside(*models: HeadInputs) -> list[HeadInputs]:
    """As if what the terms below need had been recorded."""
    seen = Recorded({3: torch.ones(B, T, 4)}, router=(torch.ones(B * T, 2),))
    return [replace(head, recorded=seen) for head in models]


def counted(calls: list[Any]) -> HeadFunctions:
    def distill(*args: Any, **options: Any) -> Any:
        calls.append((len(args[0]), args[2] is not None, options["divergence"].name))
        return mk.fused_linear_distill(*args, **options)

    return HeadFunctions(distill)


def test_terms_that_agree_are_one_call_and_cross_entropy_rides_along() -> None:
    s, t = heads()
    batch, calls = batch_of(), []
    terms = [
        RowTerm("ce", 1.0, "response"),
        RowTerm("visual_kl", 1.0, "visual", "forward_kl"),
        RowTerm("response_jsd", 1.0, "response", "jsd", 2.0),
        RowTerm("valid_kl", 0.5, "valid", "forward_kl"),
        RowTerm("cot", 1.0, "response:cot"),
        RowTerm("none", 0.0, "valid", "reverse_kl"),
    ]
    both = Objective(*terms, functions=counted(calls), backend="eager")(s, t, batch)
    number = {name: int(rows.count(name, batch)) for name in NAMES}
    first = number["visual"] + number["valid"] + number["response:cot"]
    assert calls == [(first, True, "forward_kl"), (number["response"], True, "jsd")]
    alone = [Objective(term, backend="eager")(s, t, batch) for term in terms[:5]]
    check(both.loss, torch.stack([a.loss for a in alone]).sum().detach(), "fp32 weights")
    assert list(both.terms) == ["ce", "visual_kl", "response_jsd", "valid_kl", "cot"]
    for term in alone:
        for name, value in term.terms.items():
            check(both.terms[name], value, "fp64")
    calls.clear()
    Objective(terms[0], functions=counted(calls), backend="eager")(s, None, batch)
    assert calls == [(number["response"], False, "forward_kl")]


@dataclass(frozen=True)
class Affinity:
    """A term as anybody may write one: squared distance of norms, mean over samples."""

    name: str = "norms"
    weight: float = 0.5
    over: str = "samples"
    needs: Needs = Needs(rows=frozenset({"response"}), router=True)  # noqa: RUF009

    def __call__(self, view: View) -> Tensor:
        ours, theirs = view.hidden("response")
        return (ours.norm() - theirs.norm()).square() * view.share(self.over)


class Features(nn.Module):
    """A term with parameters of its own."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.name, self.weight, self.over = "features", weight, "response"
        self.needs = Needs(rows=frozenset({"response"}), layers=frozenset({3}))
        self.map = nn.Linear(D_S, D_T).double()

    def forward(self, view: View) -> Tensor:
        ours, theirs = view.hidden("response")
        return (self.map(ours) - theirs).square().mean(-1).sum() / view.count(self.over)


def test_a_term_of_ones_own_and_its_parameters() -> None:
    s, t = inside(*heads())
    objective = Objective(Affinity(), Features(2.0), RowTerm("ce", 1.0, "response"))
    out = objective(s, t, batch_of())
    assert list(out.terms) == ["norms", "features", "ce"] == list(objective.names)
    assert not any(x.requires_grad for x in out.terms.values())
    total = 0.5 * out.terms["norms"] + 2 * out.terms["features"] + out.terms["ce"]
    check(out.loss, total, "fp64")
    assert objective.weighted({k: float(v) for k, v in out.terms.items()}) == pytest.approx(
        float(total)
    )
    out.loss.backward()
    assert [name for name, _ in objective.named_parameters()] == [
        "learned.features.map.weight", "learned.features.map.bias"
    ]  # fmt: skip
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())
    assert s.hidden.grad is not None and s.hidden.grad.any()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_whole_and_apart(way: Any) -> None:
    s, t = inside(*heads())
    first = Objective(Features(), Relation("relation", 1.0), RowTerm("kl", 1.0, "visual", "jsd"))
    before = first(s, t, batch := batch_of())
    other = way(first)
    assert torch.equal(other(s, t, batch).loss, before.loss)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(other(s, t, batch).loss, before.loss)
    assert torch.equal(first(s, t, batch).loss, before.loss)


def test_what_was_not_recorded_is_named() -> None:
    s, t = heads()
    with pytest.raises(ValueError, match=r"student.recorded: lacks layers \[3\], router True, "):
        Objective(Affinity(), Features())(s, t, batch_of())
    with pytest.raises(ValueError, match=r"teacher.recorded: lacks layers \[3\], which"):
        Objective(Affinity(), Features())(inside(s)[0], t, batch_of())


def test_needs_are_those_of_the_terms_that_weigh_something() -> None:
    kinds = RowTerm("pot", 1.0, "response:pot", "forward_kl")
    assert Objective(Affinity(), Features(), kinds).needs == Needs(
        rows=frozenset({"response", "response:pot"}), layers=frozenset({3}), router=True,
        views=frozenset({"kind"}),
    )  # fmt: skip
    off = Objective(Features(0.0), RowTerm("ce", 1.0, "response"), Relation("relation", 0.0))
    assert off.needs == Needs() and not off.needs.teacher and not list(off.parameters())
    assert Relation("relation", 1.0).needs.visual and not kinds.needs.visual


def test_without_row_terms_the_loss_is_differentiable_all_the_same() -> None:
    s, t = heads()
    Objective()(s, t, batch_of()).loss.backward()
    assert not s.hidden.grad.any() and not s.weight.grad.any()


# --- what means divide by -------------------------------------------------------------------------


def test_shares_of_micro_batches_add_up(backend: str) -> None:
    s, t = heads()
    batch = batch_of()
    terms = (
        RowTerm("ce", 1.0, "response"), RowTerm("kl", 0.7, "response:cot", "jsd"),
        RowTerm("all", 0.2, "valid", "jsd"), Relation("relation", 1.0),
        supplied.Affinity("affinity", 3.0), supplied.LogitMse("logit_mse", 0.3),
        supplied.Features("features", 0.7, sizes=(D_S, D_T)),
    )  # fmt: skip
    objective = Objective(*terms, diagnostics=True, backend=backend).double()
    counts = {name: rows.count(name, batch) for name in objective.over.values()}
    whole = objective(s, t, batch)
    parts = []
    for i in range(B):
        heads_i = (replace(x, hidden=x.hidden[i : i + 1]) for x in (s, t))
        parts.append(objective(*heads_i, {k: v[i : i + 1] for k, v in batch.items()}, counts))
    assert all(tuple(part.terms) == objective.names for part in parts)
    for name in objective.names:
        total = torch.stack([part.terms[name] for part in parts]).sum()
        torch.testing.assert_close(total, whole.terms[name], rtol=1e-6, atol=0)
    total = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(total, whole.loss, rtol=1e-6, atol=0)


def test_counts_by_name_and_row_counts_are_the_same() -> None:
    s, t = heads()
    batch, objective = batch_of(), llava_kd.objective(backend="eager")
    named = objective(s, t, batch, {"response": 31, "visual": torch.tensor(29), "images": 7})
    assert torch.equal(named.loss, objective(s, t, batch, RowCounts(31, 29, 7)).loss)


def test_a_count_that_is_not_there() -> None:
    s, t = heads()
    objective = Objective(RowTerm("kl", 1.0, "valid", "jsd"), backend="eager")
    with pytest.raises(ValueError, match="counts: have no 'valid', only 'response', 'visual'"):
        objective(s, t, batch_of(), RowCounts(1, 2, 3))


# --- the teacher ----------------------------------------------------------------------------------


def test_selected_rows_of_any_sets(backend: str) -> None:
    s, t = heads()
    batch = batch_of()
    objective = Objective(
        RowTerm("all", 1.0, "valid", "jsd"), RowTerm("cot", 1.0, "response:cot", "jsd"),
        backend=backend,
    )  # fmt: skip
    whole = objective(s, t, batch)
    names = ("response:cot", "valid", "visual")
    parts = [t.hidden.flatten(0, 1)[rows.select(name, batch)[0]] for name in names]
    for held in (parts, parts[:2]):  # the visual rows are read by nothing
        stored = replace(t, hidden=torch.cat(held), rows=names)
        assert torch.equal(objective(s, stored, batch).loss, whole.loss)
    with pytest.raises(ValueError, match=r"expected 8 response:cot rows and then 40 valid rows"):
        objective(s, replace(t, hidden=parts[0], rows=names), batch)
    with pytest.raises(ValueError, match="valid rows: not among the selected ones, response:cot"):
        objective(s, replace(t, hidden=parts[0], rows=names[:1]), batch)


def test_rows_of_the_teachers_own_that_do_not_correspond() -> None:
    s, t = heads()
    batch = batch_of()
    batch["teacher"] = {"attention_mask": torch.ones(B, T, dtype=torch.int64)}
    objective = Objective(RowTerm("all", 1.0, "valid", "jsd"))
    with pytest.raises(ValueError, match="valid rows: the student selects 40, the teacher 42"):
        objective(s, t, batch)
    assert llava_kd.objective()(s, t, batch).loss > 0  # nothing there reads them


def test_a_teacher_that_is_missing_is_asked_for() -> None:
    s, _ = heads()
    with pytest.raises(ValueError, match=r"teacher: got None, .*\['response_kl', 'visual_kl', "):
        llava_kd.objective()(s, None, batch_of())
    assert llava_kd.supervised()(s, None, batch_of()).loss > 0


# --- bad input ------------------------------------------------------------------------------------


def test_faults_of_an_objective() -> None:
    for weight in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"kl: expected a weight >= 0, got {weight}"):
            Objective(RowTerm("kl", weight, "valid", "jsd"))
    for weight in ("1", None):
        got = f"kl: expected a weight >= 0, got {type(weight).__name__}"
        with pytest.raises(TypeError, match=got):
            Objective(RowTerm("kl", weight, "valid", "jsd"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"terms: got \['a', 'a'\], expected unlike names"):
        Objective(RowTerm("a", 1.0, "valid", "jsd"), RowTerm("a", 1.0, "response"))
    with pytest.raises(ValueError, match="rows: got 'steps'"):
        Objective(RowTerm("a", 1.0, "response", over="steps"))
    with pytest.raises(TypeError, match="backnd"):
        Objective(backnd="eager")
    with pytest.raises(ValueError, match="divergence: got 'kl'"):
        RowTerm("kl", 1.0, "valid", "kl")


# --- the table of a method ------------------------------------------------------------------------


def test_the_stages_of_llava_kd() -> None:
    assert [stage.name for stage in llava_kd.STAGES] == ["pt", "dpt", "sft", "dft"]
    assert [stage.objective().needs.teacher for stage in llava_kd.STAGES] == [0, 1, 0, 1]
    assert [len(stage.trains) for stage in llava_kd.STAGES] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("term", "error", "message"),
    [
        (lambda view: view.hidden("visual")[0].sum(), ValueError, "needs: .*'visual' rows"),
        (lambda view: view.hidden("response")[0].sum(0), ValueError, r"mine: gave .*\(\d+,\)"),
    ],
    ids=["rows it does not need", "a vector"],
)
def test_a_term_that_breaks_its_word_is_named(term, error, message):
    class Mine:
        name, weight, over = "mine", 1.0, "response"
        needs = Needs(rows=frozenset({"response"}))

        def __call__(self, view):
            return term(view)

    with pytest.raises(error, match=message):
        Objective(Mine())(*heads(), batch_of())


def test_a_term_that_says_too_little_is_named():
    class Mine:
        name, weight = "mine", 1.0

    with pytest.raises(TypeError, match="Mine lacks over, needs"):
        Objective(Mine())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothed_labels_have_the_gradient_of_torch_s_own(smoothing: float) -> None:
    student, _ = heads(softcap=5.0)
    batch = batch_of()
    ours = llava_kd.supervised(2.0, smoothing)(student, None, batch)
    grads = torch.autograd.grad(ours.loss, [student.hidden, student.weight])
    chosen = rows_of("response")
    following = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)[chosen]
    theirs = 2.0 * F.cross_entropy(logits_of(student)[chosen], following, label_smoothing=smoothing)
    constant = 2.0 * smoothing * torch.tensor(V, dtype=torch.float64).log()
    torch.testing.assert_close(ours.loss, theirs - constant, check_dtype=False)
    for got, want in zip(
        grads, torch.autograd.grad(theirs, [student.hidden, student.weight]), strict=True
    ):
        torch.testing.assert_close(got, want)
