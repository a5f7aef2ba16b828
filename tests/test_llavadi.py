"""Is LLAVADI's objective the paper's by default, and its released code's by option?

Written out over whole logits and hidden states, not from the package's reference; the forms of the
code with its own calls, sample by sample.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mllmkd_kernels import HeadInputs, Objective, RowTerm, rows
from mllmkd_kernels.methods import llavadi
from mllmkd_kernels.terms import Affinity, Features, LogitMse
from tests.test_llava_kd import D_S, D_T, IGNORE, B, V, batchmean_kl, heads, logits
from tests.test_objective import batch_of
from tests.tolerances import check

ALL = ("ce", "response_kl", "features", "affinity", "logit_mse")
WEIGHTS = dict(zip(("ce", "response", "features", "affinity", "logit_mse"),
                   (0.5, 2.0, 0.7, 3.0, 0.3), strict=True))  # fmt: skip


def built(**options: Any) -> Objective:
    """An objective in fp64 whose perceptron has biases that show."""
    objective = llavadi.objective(**options, backend="eager")
    objective.build(D_S, D_T)
    return objective.double()


def features_of(objective: Objective, s: HeadInputs) -> Tensor:
    """The perceptron, written out."""
    if "features" not in objective.learned:
        return s.hidden
    w, b, w2, b2 = objective.learned["features"].parameters()
    return F.gelu(s.hidden @ w.T + b) @ w2.T + b2


def cosines(h: Tensor, image: Tensor, answer: Tensor) -> Tensor:
    unit = h / h.norm(dim=-1, keepdim=True)
    return unit[image] @ unit[answer].T


def paper(objective: Objective, s: HeadInputs, t: HeadInputs, batch: dict) -> dict[str, Tensor]:
    """The five terms: means over the answers of the batch, affinity per sample."""
    labels, z_s, z_t = batch["labels"], logits(s), logits(t)
    answered = F.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE
    gaps = []
    for i in range(B):
        image = batch["image_mask"][i]
        ours, theirs = (cosines(h.hidden[i], image, answered[i]) for h in (s, t))
        gaps.append((ours - theirs).square().mean() if image.any() else z_s.new_zeros(()))
    mapped = features_of(objective, s)
    return {
        "ce": F.cross_entropy(z_s[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)),
        "response_kl": batchmean_kl(z_s[answered], z_t[answered]),
        "features": F.mse_loss(mapped[answered], t.hidden[answered]),
        "affinity": torch.stack(gaps).mean(),
        "logit_mse": F.mse_loss(z_s[answered], z_t[answered]),
    }


def test_the_papers_terms_and_their_gradients() -> None:
    s, t = heads()
    batch, objective = batch_of(), built(**WEIGHTS)
    want, got = paper(objective, s, t, batch), objective(s, t, batch)
    assert tuple(got.terms) == ALL
    for name, value in want.items():
        check(got.terms[name], value.detach(), "fp32 weights", what=name)
    loss: Any = sum(w * x for w, x in zip(WEIGHTS.values(), want.values(), strict=True))
    leaves = [s.hidden, s.weight, *objective.parameters()]
    pairs = zip(*(torch.autograd.grad(x, leaves) for x in (got.loss, loss)), strict=True)
    for a, b in pairs:
        check(a, b, "fp32 weights")


def test_the_defaults_are_the_papers_best() -> None:
    found = llavadi.objective()
    assert {name: term.weight for name, term in found.terms.items()} == {
        "ce": 1.0, "response_kl": 1.0, "features": 1.0
    }  # fmt: skip
    assert not list(llavadi.objective(features=0.0).parameters())
    s, t = heads(dtype=torch.float32)
    assert found(s, t, batch_of()).loss.isfinite()  # sized by its first call
    assert [tuple(p.shape) for p in found.parameters()] == [
        (D_T, D_S), (D_T,), (D_T, D_T), (D_T,)
    ]  # fmt: skip


def one_by_one(objective: Objective, s: HeadInputs, t: HeadInputs, batch: dict) -> Tensor:
    """The released code's mean: over samples, of the mean of each."""
    each = []
    for i in range(B):
        pair = (replace(h, hidden=h.hidden[i : i + 1]) for h in (s, t))
        each.append(objective(*pair, {k: v[i : i + 1] for k, v in batch.items()}).loss)
    return torch.stack(each).mean()


def normalize(z: Tensor) -> Tensor:
    return (z - z.mean(dim=-1, keepdim=True)) / (1e-7 + z.std(dim=-1, keepdim=True))


def released(kind: str, s: HeadInputs, t: HeadInputs, batch: dict, objective: Objective) -> Tensor:
    """LLAVADI's `DistillModel.forward`, one of its options at a time."""
    total, labels, valid = s.hidden.new_zeros(()), batch["labels"], batch["attention_mask"] == 1
    z_s, z_t, mapped = logits(s), logits(t), features_of(objective, s)
    for i in range(B):
        chosen = valid[i] if kind in ("all", "norm", "features") else labels[i] != IGNORE
        a, b = z_s[i][chosen], z_t[i][chosen]
        if kind == "norm":
            a, b = normalize(a), normalize(b)
        if kind == "features":
            total = total + F.mse_loss(mapped[i][chosen], t.hidden[i][chosen])
        elif kind == "mse":
            total = total + F.mse_loss(a, b)
        elif kind == "reverse":
            total = total + batchmean_kl(b, a)
        elif kind == "early":
            a, b = (z[i, :-1][labels[i, 1:] != IGNORE] / 0.7 for z in (z_s, z_t))
            total = total + 5 * 0.7**2 * batchmean_kl(a, b)
        elif kind == "jsd":
            p, q = a.softmax(-1), b.softmax(-1)
            m = ((p + q) / 2).log()
            both = (F.kl_div(m, x, reduction="batchmean") for x in (p, q))
            total = total + sum(both) / 2
        else:
            total = total + batchmean_kl(a, b)
    return total / B


UNSHIFTED: dict[str, Any] = {"rows": "response:unshifted"}
FORMS: dict[str, dict[str, Any]] = {
    "kl": {"response": 1.0, **UNSHIFTED},
    "reverse": {"response": 1.0, "divergence": "reverse_kl", **UNSHIFTED},
    "jsd": {"response": 1.0, "divergence": "jsd", **UNSHIFTED},
    "mse": {"logit_mse": 1.0, **UNSHIFTED},
    "all": {"response": 1.0, "rows": "valid"},
    "norm": {"response": 1.0, "rows": "valid", "standardize": True,
             "temperature": (V / (V - 1)) ** 0.5},
    "features": {"features": 1.0, "rows": "valid"},
    "early": {"response": 5 * 0.7**2, "temperature": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_the_released_codes_forms(kind: str) -> None:
    s, t = heads()
    t = replace(t, weight=t.weight[:V])
    batch, none = batch_of(), {"ce": 0.0, "response": 0.0, "features": 0.0}
    objective = built(**none | FORMS[kind])
    want, got = released(kind, s, t, batch, objective), one_by_one(objective, s, t, batch)
    check(got, want.detach(), "fp32 weights")
    leaves = [s.hidden, *objective.parameters()]
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (got, want)), strict=True):
        check(a, b, "fp32 weights")


def test_the_released_affinity_is_one_mean_over_all_cells() -> None:
    s, t = heads()
    batch = batch_of()
    one = Affinity("affinity", 1.0, "response:unshifted", joint=True)
    got = Objective(one)(s, t, batch).loss
    units = [F.normalize(h.hidden, dim=-1) for h in (s, t)]
    ours, theirs = (u @ u.transpose(-1, -2) for u in units)
    gap = F.mse_loss(ours, theirs, reduction="none")
    masks = batch["image_mask"].unsqueeze(2) * (batch["labels"] != IGNORE).unsqueeze(1)
    want = (gap * masks).sum() / (masks.sum() + 1e-6)
    check(got, want.detach(), "fp32 weights")


def test_the_released_contrastive_affinity() -> None:
    s, t = heads()
    batch = batch_of()
    term = {"affinity": 1.0, "affinity_kind": "contrastive", "ce": 0.0, "response": 0.0}
    got = built(**term, features=0.0, **UNSHIFTED)(s, t, batch).loss
    images, answers, want = batch["image_mask"], batch["labels"] != IGNORE, torch.zeros(())
    for i in range(B):
        for j in range(B):
            if not images[i].any() or not answers[j].any():
                continue
            pairs = [
                (F.normalize(h.hidden[i][images[i]], dim=-1),
                 F.normalize(h.hidden[j][answers[j]], dim=-1))
                for h in (s, t)
            ]  # fmt: skip
            ours, theirs = (a @ b.T for a, b in pairs)
            both = F.cross_entropy(ours, theirs) + F.cross_entropy(ours.T, theirs.T)
            want = want + both / 2 / answers[j].sum()
    check(got, want.detach() / B / B, "fp32 weights")


def test_cosine_features() -> None:
    s, t = heads()
    batch, objective = batch_of(), built(response=0.0, ce=0.0, feature_loss="cosine")
    index, _ = rows.select("response", batch)
    mapped, theirs = features_of(objective, s).flatten(0, 1), t.hidden.flatten(0, 1)
    want = (1 - F.cosine_similarity(mapped[index], theirs[index], dim=-1)).mean()
    check(objective(s, t, batch).loss, want.detach(), "fp32 weights")


def test_z_scored_and_plain_divergences_are_two_calls() -> None:
    s, t = heads()
    batch = batch_of()
    losses = [
        llavadi.objective(ce=0.0, features=0.0, standardize=z, backend="eager")(s, t, batch).loss
        for z in (False, True)
    ]
    plain, scored = (
        RowTerm(str(z), 1.0, "response", "forward_kl", standardize=z) for z in (False, True)
    )
    both = Objective(plain, scored, backend="eager")
    check(both(s, t, batch).loss, torch.stack(losses).sum().detach(), "fp32 weights")


def test_bad_input_is_named() -> None:
    s, t = heads()
    with pytest.raises(ValueError, match="kind: got 'l1', expected one of mse, cosine"):
        Features("features", 1.0, kind="l1")
    features = Features("features", 1.0, sizes=(D_S, D_T))
    with pytest.raises(ValueError, match="features: made for hidden sizes 6 and 9, got 6 and 8"):
        features.build(D_S, D_T - 1)
    with pytest.raises(ValueError, match=r"student\.softcap: got 3\.0, expected None: logit_mse"):
        Objective(LogitMse("logit_mse", 1.0))(replace(s, softcap=3.0), t, batch_of())
    with pytest.raises(ValueError, match="rows: got 'answers', expected one of response, "):
        llavadi.objective(rows="answers")  # pyright: ignore[reportArgumentType]


def test_the_stages() -> None:
    assert [stage.name for stage in llavadi.STAGES] == ["pt", "sft", "kd"]
    assert [stage.objective().needs.teacher for stage in llavadi.STAGES] == [False, False, True]
    assert [stage.usual for stage in llavadi.STAGES] == [True, False, True]
