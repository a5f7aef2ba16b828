"""Is what is recorded on the way to the head what the model itself says it computed?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import mllmkd_kernels as mk
from mllmkd_kernels import Needs, Objective
from mllmkd_kernels.record import recording
from mllmkd_kernels.view import View
from tests.tiny_models import IMAGE, TEXT, VISION, llava

MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": [1],
    "num_hidden_layers": 3,
}  # fmt: skip


def vision_language() -> tuple[Any, dict[str, Tensor]]:
    model, batch = llava(tf.SiglipVisionConfig(**VISION))
    model.set_attn_implementation("eager")
    return model, batch


def mixture() -> tuple[Any, dict[str, Tensor]]:
    """LLaVA around a mixture of experts: `output_router_logits=True` raises there."""
    config = tf.LlavaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Qwen2MoeConfig(**{**TEXT, **MOE}),
        image_token_index=IMAGE, vision_feature_select_strategy="full",
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config)
    return model, llava(tf.SiglipVisionConfig(**VISION))[1]


def ours(model: nn.Module) -> list[Any]:
    """Hooks that recording left behind; transformers leaves its own."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if hook.__module__ == recording.__module__]


def checkpoint(model: Any, use_reentrant: bool) -> None:
    """By the name that the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})


def test_layers_and_attention_are_the_models_own() -> None:
    model, batch = vision_language()
    needs = Needs(layers=frozenset({0, -1, -2}), attention=frozenset({1}))
    got = mk.head_inputs(model, needs, **batch)
    own = model(**batch, output_hidden_states=True, output_attentions=True)
    assert got.recorded.layers.keys() == needs.layers
    assert torch.equal(got.recorded.layers[0], own.hidden_states[1])
    assert torch.equal(got.recorded.layers[-2], own.hidden_states[-2])
    norm = model.get_decoder().norm
    assert torch.equal(norm(got.recorded.layers[-1]), got.hidden)
    assert torch.equal(got.recorded.attention[1], own.attentions[1])
    assert not ours(model)
    assert torch.equal(got.hidden, mk.head_inputs(model, **batch).hidden)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_logits_and_their_gradient(checkpointing: bool) -> None:
    model, batch = mixture()
    model.train()
    gates = [model.get_decoder().layers[i].mlp.gate for i in (0, 2)]
    expected: list[Tensor] = []
    with torch.no_grad():
        handles = [g.register_forward_hook(lambda *a: expected.append(a[2][0])) for g in gates]
        model(**batch)
    for handle in handles:
        handle.remove()
    if checkpointing:
        checkpoint(model, use_reentrant=False)
    got = mk.head_inputs(model, Needs(router=True), **batch).recorded.router
    assert [x.shape for x in got] == [(batch["input_ids"].numel(), 4)] * 2
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    torch.stack([x.square().sum() for x in got]).sum().backward()
    assert all(gate.weight.grad.any() for gate in gates) and len(got) == 2
    assert model.get_decoder().layers[1].mlp.up_proj.weight.grad.any()


class Balance:
    """A term of one's own that reads routers; no figure of anybody's."""

    name, weight, over, needs = "balance", 1.0, "samples", Needs(router=True)

    def __call__(self, view: View) -> Tensor:
        shares = [x.softmax(-1).mean(0) for x in view.student.recorded.router]
        return torch.stack([s.square().sum() for s in shares]).sum() * view.share("samples")


def test_a_batch_records_what_the_objective_needs() -> None:
    model, batch = mixture()
    teacher, _ = vision_language()
    batch |= {"labels": batch["input_ids"]}
    rows = mk.RowTerm("kl", 1.0, "response", "forward_kl")
    out = mk.distill_batch(Objective(Balance(), rows), model, teacher, batch)
    assert out.terms["balance"] > 0.5  # two layers, a quarter each at least
    out.loss.backward()
    assert model.get_decoder().layers[0].mlp.gate.weight.grad.any()


def test_what_cannot_be_recorded_is_refused() -> None:
    model, batch = vision_language()
    with pytest.raises(ValueError, match=r"layers: got 9, expected one of \d layers"):
        mk.head_inputs(model, Needs(layers=frozenset({9})), **batch)
    with pytest.raises(ValueError, match="router: LlavaForConditionalGeneration has no mixture"):
        mk.head_inputs(model, Needs(router=True), **batch)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"attention: .* expected a model with attn_impl"):
        mk.head_inputs(model, Needs(attention=frozenset({0})), **batch)
    assert not ours(model)
    model, batch = mixture()
    model.train()
    checkpoint(model, use_reentrant=True)
    with pytest.raises(ValueError, match=r"router: .* expected use_reentrant=False"):
        mk.head_inputs(model, Needs(router=True), **batch)
