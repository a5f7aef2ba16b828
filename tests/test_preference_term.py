"""Is the term over pairs of answers the published loss, with the teacher as the reference?

Written out over whole logits, as LLaVA-MoD's trainer has it: shifted, summed over an answer, with
all of each model's vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllmkd_kernels import HeadInputs, Objective, RowTerm
from mllmkd_kernels.rows import PAIR
from mllmkd_kernels.terms import Preference
from mllmkd_kernels.terms.preference import REPORTED
from tests import pair
from tests.test_llava_kd import D_S, D_T, T, V
from tests.test_trainer_mixin import MixedTrainer, arguments, copied, moved
from tests.tolerances import check, relative_error

FORMS = ("kto_pair", "sigmoid", "hinge", "ipo")


def problem(pairs: int) -> tuple[HeadInputs, HeadInputs, dict[str, Any]]:
    """Two models, one with a bias and one with a soft-cap, and answers of unlike lengths."""
    torch.manual_seed(pairs)
    options: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    s = HeadInputs(
        torch.randn(2 * pairs, T, D_S, **options), torch.randn(V, D_S, **options),
        torch.randn(V, **options),
    )  # fmt: skip
    wide: Any = {"dtype": torch.float64}
    t = HeadInputs(
        torch.randn(2 * pairs, T, D_T, **wide), torch.randn(V + 3, D_T, **wide), softcap=5.0
    )
    labels = torch.full((2 * pairs, T), -100)
    for i in range(2 * pairs):
        labels[i, 5 : T - i % 4] = torch.randint(0, V, (T - 5 - i % 4,))
    kind = [kind for kind in PAIR for _ in range(pairs)]
    return s, t, {"labels": labels, "kind": kind}


def log_probabilities(head: HeadInputs, labels: Tensor) -> Tensor:
    z = F.linear(head.hidden, head.weight, head.bias)[:, :-1]
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    mask, y = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    return (z.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1) * mask).sum(-1)


def published(
    s: HeadInputs, t: HeadInputs, labels: Tensor, form: str, beta: float, detach: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and β r of both answers."""
    r_c, r_r = (log_probabilities(s, labels) - log_probabilities(t, labels).detach()).chunk(2)
    margin = r_c - r_r
    if form == "kto_pair":
        k_c, k_r = r_c.mean().clamp(min=0), r_r.mean().clamp(min=0)
        k_c, k_r = (k_c.detach(), k_r.detach()) if detach else (k_c, k_r)
        better, worse = 1 - (beta * (r_c - k_r)).sigmoid(), 1 - (beta * (k_c - r_r)).sigmoid()
        loss = torch.cat((better, worse)).mean()
    else:
        loss = {
            "sigmoid": -F.logsigmoid(beta * margin),
            "hinge": torch.relu(1 - beta * margin),
            "ipo": (margin - 1 / (2 * beta)) ** 2,
        }[form].mean()
    return loss, beta * r_c.detach(), beta * r_r.detach()


def objective(form: str = "sigmoid", beta: float = 0.1, detach: bool = True) -> Objective:
    term = Preference("preference", 2.0, form, beta, detach)
    made = Objective(term, backend="eager", diagnostics=True)
    made.report_on(nn.Identity())  # as a trainer does
    return made


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", [1, 3])
def test_loss_gradients_and_what_is_logged(pairs: int, form: str, detach: bool) -> None:
    s, t, batch = problem(pairs)
    want, better, worse = published(s, t, batch["labels"], form, 0.2, detach)
    got = objective(form, 0.2, detach)(s, t, batch)
    assert tuple(got.terms) == ("preference", *REPORTED)
    check(got.terms["preference"], want.detach(), "fp32 weights")
    leaves: Any = (s.hidden, s.weight, s.bias)
    both = (torch.autograd.grad(x, leaves) for x in (got.loss, 2 * want))
    for a, b in zip(*both, strict=True):
        check(a, b, "fp32 weights")
    margin = better - worse
    expected = (better.mean(), worse.mean(), margin.mean(), (margin > 0).double().mean())
    for name, value in zip(REPORTED, expected, strict=True):
        check(got.terms[name], value, "fp32 weights", what=name)


def test_the_gradient_by_finite_differences() -> None:
    s, t, batch = problem(2)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        moved = replace(s, hidden=hidden, weight=weight)
        return objective("kto_pair", detach=False)(moved, t, batch).loss

    assert torch.autograd.gradcheck(loss, (s.hidden, s.weight))


def test_one_pair_is_compared_with_itself_alone() -> None:
    """K of a single pair is what r of its other half is: KTO's baseline of unrelated answers is
    none. With a positive r of both, either half of the loss is a function of r_c − r_r.
    """
    s, t, batch = problem(1)
    s = replace(s, hidden=s.hidden * 0.1, bias=None)  # as if all tokens were equally likely
    r_c, r_r = (x / 0.2 for x in published(s, t, batch["labels"], "ipo", 0.2, True)[1:])
    assert float(r_c) > 0 and float(r_r) > 0
    got = objective("kto_pair", 0.2)(s, t, batch).terms["preference"]
    check(got, (1 - (0.2 * (r_c - r_r)).sigmoid()).mean(), "fp32 weights")


def test_a_teacher_of_its_own_tokens_and_one_of_stored_rows() -> None:
    s, t, batch = problem(2)
    want = objective()(s, t, batch).loss
    own = {
        "labels": F.pad(batch["labels"], (2, 0), value=-100),
        "image_mask": torch.zeros(4, T + 2, dtype=torch.bool),
    }
    shifted = replace(t, hidden=F.pad(t.hidden, (0, 0, 2, 0), value=9.0))
    check(objective()(s, shifted, {**batch, "teacher": own}).loss, want.detach(), "fp64")
    rows = F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    names = tuple(f"response:{kind}" for kind in PAIR)
    stored = replace(t, hidden=t.hidden[rows], rows=names)  # the chosen ones come first
    check(objective()(s, stored, batch).loss, want.detach(), "fp64")


def test_each_pair_of_a_step_counts_alike() -> None:
    """Three micro-batches of unlike sizes, longer and shorter answers: shares of one mean."""
    s, t, batch = problem(6)
    whole, loss, total = objective()(s, t, batch), 0.0, dict.fromkeys(REPORTED, 0.0)
    for pairs in ([0], [1, 2, 3], [4, 5]):
        at = torch.tensor([*pairs, *(6 + i for i in pairs)])
        part = {"labels": batch["labels"][at], "kind": [batch["kind"][i] for i in at]}
        parts = (replace(head, hidden=head.hidden[at]) for head in (s, t))
        got = objective()(*parts, part, {"pairs": torch.tensor(6)})
        loss += float(got.loss.detach())
        total = {name: total[name] + float(got.terms[name]) for name in REPORTED}
    assert loss == pytest.approx(float(whole.loss.detach()), rel=1e-6)
    assert total == pytest.approx({name: float(whole.terms[name]) for name in REPORTED}, rel=1e-6)


def test_what_is_no_batch_of_pairs_is_refused() -> None:
    s, t, batch = problem(2)
    for kinds in (["chosen", "rejected"] * 2, ["chosen"] * 4, ["", "", "", ""]):
        with pytest.raises(ValueError, match=r"kind: got .*expected of a batch of pairs 'chosen'"):
            objective()(s, t, {**batch, "kind": kinds})
    with pytest.raises(ValueError, match="kind: got 2 words for a batch of 4 rows"):
        objective()(s, t, {**batch, "kind": list(PAIR)})
    with pytest.raises(ValueError, match="kind: missing; the batch has"):
        objective()(s, t, {"labels": batch["labels"]})
    with pytest.raises(ValueError, match="kind: got 'dpo', expected one of kto_pair"):
        Preference("preference", 1.0, "dpo")


class Pairs:
    """A collator of pairs: the answers of a sample, and its tokens in the other order."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        worse = []
        for one in features:
            said = [i for i, label in enumerate(one["labels"]) if label != -100]
            swap = dict(zip(said, reversed(said), strict=True))
            turned = {
                key: [one[key][swap.get(i, i)] for i in range(len(one[key]))]
                for key in ("input_ids", "labels")
            }
            worse.append({**one, **turned})
        kinds = [kind for kind in PAIR for _ in features]
        return {**pair.collate([*features, *worse]), "kind": kinds}


def run(out: Path, form: str, micro: int) -> tuple[Any, dict[str, Tensor]]:
    student, teacher = pair.models()
    calls = {"student": 0, "teacher": 0}
    for who, model in (("student", student), ("teacher", teacher)):
        model.model.register_forward_pre_hook(
            lambda *_, who=who: calls.update({who: calls[who] + 1})
        )
    losses = Objective(
        Preference("preference", 1.0, form), RowTerm("ce", 0.1, "response:chosen"),
        backend="eager", diagnostics=True,
    )  # fmt: skip
    trainer = MixedTrainer(
        model=student, teacher=teacher, objective=losses, data_collator=Pairs(),
        train_dataset=pair.samples(), eval_dataset=pair.samples(),
        args=arguments(out, per_device_train_batch_size=micro,
                       gradient_accumulation_steps=8 // micro),
    )  # fmt: skip
    before = copied(student)
    trainer.train()
    assert calls == {"student": 8 // micro, "teacher": 8 // micro}  # both answers at once
    return trainer, moved(before, student)


@pytest.mark.parametrize("form", FORMS)
def test_any_trainer_accumulates_to_the_big_batchs_step(form: str, tmp_path: Path) -> None:
    """But for KTO's K, which is the micro-batch's own."""
    whole, expected = run(tmp_path, form, 8)
    parts, step = run(tmp_path, form, 2)
    first, second = whole.state.log_history[0], parts.state.log_history[0]
    for name in ("ce", *REPORTED):
        assert second[name] == pytest.approx(first[name], rel=1e-4), name
    if form != "kto_pair":
        assert second["preference"] == pytest.approx(first["preference"], rel=1e-4)
        both = (torch.cat([x.flatten() for x in each.values()]) for each in (step, expected))
        assert relative_error(*both) < 1e-5
    metrics = parts.evaluate()
    total = metrics["eval_preference"] + 0.1 * metrics["eval_ce"]
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-6)
