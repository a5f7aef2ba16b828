"""Is LLaVA-MoD's objective the paper's by default, and its released code's by option?

Written out over whole logits and routers, not from the package's reference; the forms of the code
as its trainer has them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import HeadInputs, rows
from mllmkd_kernels.heads import Recorded
from mllmkd_kernels.methods import llava_mod, moe_llava
from tests import pair
from tests.test_llava_kd import IGNORE, B, T, V, batchmean_kl, heads, logits
from tests.test_objective import batch_of
from tests.test_record import checkpoint
from tests.test_trainer_mixin import arguments
from tests.test_trainer_objective import MixedTrainer
from tests.tolerances import check

E, LAYERS = 4, 2
D2S: dict[str, Any] = {"ce": 1.0, "balance": 0.01}


def models() -> tuple[HeadInputs, HeadInputs, list[Tensor]]:
    """Heads in fp64, and the logits of two routers."""
    s, t = heads()
    routers = [
        torch.randn(B * T, E, dtype=torch.float64, requires_grad=True) for _ in range(LAYERS)
    ]
    return replace(s, recorded=Recorded(router=tuple(routers))), t, routers


def check_same(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    check(got, want.detach(), "fp32 weights")
    for a, b in zip(
        *(torch.autograd.grad(x, leaves, retain_graph=True) for x in (got, want)), strict=True
    ):
        check(a, b, "fp32 weights")


def ce_of(s: HeadInputs, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits(s)[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))


def per_layer(router: Tensor) -> Tensor:
    """E Σ_e share_e mean_e of tokens whose first expert is e, term by term."""
    p = router.softmax(-1)
    first = router.argmax(-1)
    shares = [(first == e).double().mean() * p[:, e].mean() for e in range(E)]
    return E * torch.stack(shares).sum()


def test_the_papers_terms_and_their_gradients() -> None:
    s, t, routers = models()
    batch = batch_of()
    labels, valid = batch["labels"], batch["attention_mask"].flatten() == 1
    answered = F.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE
    want = {
        "ce": ce_of(s, labels),
        "response_kl": batchmean_kl(logits(s)[answered], logits(t)[answered]),
        "balance": torch.stack([per_layer(x[valid]) for x in routers]).sum(),
    }
    got = llava_mod.mimic(0.7, 0.5, 0.3, backend="eager")(s, t, batch)
    for name, value in want.items():
        check(got.terms[name], value.detach(), "fp32 weights", what=name)
    total = 0.5 * want["ce"] + 0.7 * want["response_kl"] + 0.3 * want["balance"]
    check_same(got.loss, total, [s.hidden, s.weight, *routers])
    none = moe_llava.objective(0.5, 0.3, backend="eager")(s, None, batch)
    check_same(none.loss, 0.5 * want["ce"] + 0.3 * want["balance"], [s.hidden, *routers])


def released(
    s: HeadInputs,
    t: HeadInputs,
    labels: Tensor,
    routers: list[Tensor],
    policy: str,
    every: bool,
    cut: int,
) -> Tensor:
    """`AlignTrainer.compute_loss`: soft cross-entropy of unshifted rows over the first `cut`
    words; with "kd_lm" the model's own loss, which has the auxiliary one already.
    """
    z_s, z_t = (logits(x)[..., :cut] for x in (s, t))
    x = torch.nan_to_num(z_t.softmax(-1) * z_s.log_softmax(-1)).sum(-1).view(-1)
    mask = (torch.ones_like(labels) if every else labels != IGNORE).view(-1)
    loss = -(x * mask).sum() / mask.sum()
    if policy == "kd_lm":
        moe_loss = 0.01 * torch.stack([top2gating(x) for x in routers]).sum()
        sft_loss = ce_of(s, labels) + moe_loss
        loss = loss + sft_loss + moe_loss
    return loss


def top2gating(x: Tensor) -> Tensor:
    """DeepSpeed's auxiliary loss of a gate."""
    gates = x.softmax(1)
    mask1 = F.one_hot(gates.argmax(1), E).double()
    return (gates.mean(0) * mask1.mean(0)).mean() * E * E


SOFT: dict[str, Any] = {"divergence": "soft_cross_entropy", "backend": "eager"}
UNSHIFTED = {**SOFT, "rows": "response:unshifted"}


@pytest.mark.parametrize(
    ("policy", "every", "options"),
    [
        ("only_kd", False, UNSHIFTED),
        ("only_kd", False, {**UNSHIFTED, "vocab_size": V - 7}),
        ("only_kd", True, {**SOFT, "rows": "valid"}),
        ("kd_lm", False, {**UNSHIFTED, "ce": 1.0, "balance": 0.02, "padding": True}),
    ],
)
def test_the_released_codes_forms(policy: str, every: bool, options: dict[str, Any]) -> None:
    s, t, routers = models()
    batch = batch_of()
    if every:  # padding as well: nobody says what is
        del batch["attention_mask"]
    cut = options.get("vocab_size", V)
    want = released(s, t, batch["labels"], routers, policy, every, cut)
    got = llava_mod.mimic(**options)(s, t, batch).loss
    check_same(got, want, [s.hidden, s.weight, *(routers if policy == "kd_lm" else ())])


def test_the_codes_soft_cross_entropy_has_the_gradient_of_kl() -> None:
    s, t, _ = models()
    batch = batch_of()
    ours, soft = (
        llava_mod.mimic(divergence=name, backend="eager")(s, t, batch).loss
        for name in ("forward_kl", "soft_cross_entropy")
    )
    p = logits(t).log_softmax(-1)[rows.row_mask("response", batch)]
    check(soft - ours, -(p.exp() * p).sum(-1).mean(), "fp32 weights")
    for a, b in zip(*(torch.autograd.grad(x, [s.hidden, s.weight]) for x in (ours, soft)),
                    strict=True):  # fmt: skip
        check(a, b, "fp32 weights")


def test_layers_are_balanced_one_by_one() -> None:
    """Two that send everything to one expert each, another one, are balanced only together."""
    s, _, _ = models()
    collapsed = [F.one_hot(torch.full((B * T,), e), 2).double() * 50 for e in (0, 1)]
    s = replace(s, recorded=Recorded(router=tuple(collapsed)))
    objective = moe_llava.objective(ce=0.0, balance=1.0, backend="eager")
    got = objective(s, None, batch_of())
    assert float(got.terms["balance"]) == pytest.approx(4.0)  # 2 a layer; 1 would be even


def test_what_is_masked_and_shares_of_micro_batches() -> None:
    s, t, routers = models()
    batch, objective = batch_of(), llava_mod.mimic(**D2S, backend="eager")
    whole = objective(s, t, batch).loss
    with torch.no_grad():  # padding may hold anything
        routers[0][12:14] = torch.nan
    assert torch.equal(objective(s, t, batch).loss, whole)
    counts = {name: rows.count(name, batch) for name in objective.over.values()}
    shares, alone = [], []
    for i in range(B):
        part = tuple(x[i * T : (i + 1) * T] for x in routers)
        pair_ = (replace(h, hidden=h.hidden[i : i + 1]) for h in (s, t))
        s_i, t_i = pair_
        s_i = replace(s_i, recorded=Recorded(router=part))
        one = {k: v[i : i + 1] for k, v in batch.items()}
        shares.append(objective(s_i, t_i, one, counts).terms["balance"])
        alone.append(objective(s_i, t_i, one).terms["balance"] * rows.count("valid", one))
    torch.testing.assert_close(sum(shares), sum(alone) / rows.count("valid", batch))


def test_the_stages_are_the_papers() -> None:
    table = {stage.name: stage for stage in llava_mod.STAGES}
    weights = {
        name: {term.name: term.weight for term in stage.objective().terms.values()}
        for name, stage in table.items()
    }
    assert weights["init"] == {"ce": 1.0} and weights["d2d"] == {"response_kl": 1.0}
    assert weights["d2s"] == {"ce": 1.0, "response_kl": 1.0, "balance": 0.01}
    kl: Any = table["d2s"].objective().terms["response_kl"]
    assert (kl.divergence.name, kl.rows, kl.temperature) == ("forward_kl", "response", 1.0)
    assert [table[name].defaults["batch_size"] for name in ("init", "d2d", "d2s")] == [
        512,
        256,
        256,
    ]
    assert [table[name].defaults["lr"] for name in ("init", "d2d", "d2s")] == [1e-4, 2e-5, 2e-5]
    assert {stage.defaults["beta2"] for stage in table.values()} == {0.98}
    assert table["d2s"].trains == ("projector", "experts", "router") == moe_llava.STAGES[2].trains
    assert table["d2s"].student is mk.upcycle is moe_llava.STAGES[2].student


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_of_transformers(checkpointing: bool, tmp_path: Path) -> None:
    """Balance and load of every expert in its log, once, where layers run again in backward."""
    student, teacher = pair.models()
    twin = mk.upcycle(student)
    if checkpointing:
        checkpoint(twin, use_reentrant=False)
    run = MixedTrainer(
        model=twin, teacher=teacher, train_dataset=pair.samples(), eval_dataset=pair.samples(),
        objective=llava_mod.mimic(**D2S, backend="eager", diagnostics=True),
        data_collator=pair.collate,
        args=arguments(tmp_path, gradient_accumulation_steps=2),
    )  # fmt: skip
    seen: list[Tensor] = []
    gate = twin.get_decoder().layers[0].mlp.gate
    with torch.no_grad():
        hook = gate.register_forward_hook(lambda *a: seen.append(a[2][2]))
        for two in (pair.samples()[:2], pair.samples()[2:4]):
            batch = pair.collate(two)
            model_inputs = {k: v for k, v in batch.items() if k not in ("image_lens", "sample_ids")}
            twin(**model_inputs)
            seen[-1] = seen[-1][batch["attention_mask"].flatten() == 1]
        hook.remove()
    run.train()
    logged = run.state.log_history[0]
    loads = [logged[f"load/0/{e}"] for e in range(E)]
    counts = torch.bincount(torch.cat(seen).flatten(), minlength=E)
    assert loads == pytest.approx((counts / counts.sum()).tolist(), abs=1e-6)
    assert logged["balance"] >= 1 and gate.weight.grad is None
    metrics = run.evaluate()
    assert sum(metrics[f"eval_load/0/{e}"] for e in range(E)) == pytest.approx(1)


def test_a_dense_student_has_nothing_to_balance(tmp_path: Path) -> None:
    student, teacher = pair.models()
    objective = llava_mod.mimic(**D2S, diagnostics=True)
    with pytest.raises(ValueError, match=r"router: LlavaFor.* has no mixture of experts"):
        MixedTrainer(model=student, teacher=teacher, objective=objective, args=arguments(tmp_path))
