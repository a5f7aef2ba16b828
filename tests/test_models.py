"""Is what `head_inputs` hands over what the model's logits are made of, in every class of model?

The truth is always the model's own `model(**batch).logits`; the models are those of tiny_models.py.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from mllmkd_kernels.models import head_inputs
from tests.tiny_models import (
    MODELS,
    TEXT,
    VISION,
    WITH_IMAGES,
    D,
    V,
    build,
    pixels,
    text_only,
    tokens,
)


def logits_of(inputs: Any) -> Tensor:
    """The logits that a `HeadInputs` stands for."""
    z = F.linear(inputs.hidden, inputs.weight, inputs.bias)
    return z if inputs.softcap is None else inputs.softcap * torch.tanh(z / inputs.softcap)


def count_head_calls(model: Any) -> list[int]:
    """A list that grows by one whenever the model's own lm_head runs."""
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_head_inputs_are_what_the_logits_are_made_of(name: str) -> None:
    model, batch = build(name)
    calls = count_head_calls(model)
    inputs = head_inputs(model, **batch, labels=batch["input_ids"])
    assert calls == []  # through everything but the lm_head
    head = model.get_output_embeddings()
    assert inputs.weight is head.weight and inputs.bias is head.bias
    assert inputs.softcap == MODELS[name][2]
    with torch.no_grad():
        expected = model(**batch).logits
        assert calls == [1]  # the model is as it was, and the counter counts
        torch.testing.assert_close(logits_of(inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_models(name: str) -> None:
    model, batch = build(name)
    probe = torch.randn(*batch["input_ids"].shape, V)
    (model(**batch).logits * probe).sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (logits_of(head_inputs(model, **batch)) * probe).sum().backward()
    got = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    assert any("layers.0." in key for key in got)  # down to the first layer
    if name in WITH_IMAGES:
        assert any("vis" in key and grad.abs().max() > 0 for key, grad in got.items())
    for key, grad in got.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_image_tokens_are_the_rows_of_the_image(name: str) -> None:
    model, batch = build(name)
    image_mask = batch["input_ids"] == model.config.image_token_id
    assert image_mask.sum(1).tolist() == [MODELS[name][1]] * 2
    before = head_inputs(model, **batch).hidden
    other = head_inputs(model, **{**batch, "pixel_values": -batch["pixel_values"]}).hidden
    moved = (before - other).abs().amax(-1) > 0
    assert moved[image_mask].all()  # the image is in those rows
    assert not moved[:, 0].any() or name.startswith("paligemma")  # a causal first row sees none


def test_a_frozen_teacher_costs_no_graph() -> None:
    model, batch = build("llava-siglip-full")
    with torch.no_grad():
        assert not head_inputs(model, **batch).hidden.requires_grad
    model.requires_grad_(False)
    inputs = head_inputs(model, **batch)
    assert not inputs.hidden.requires_grad and not inputs.weight.requires_grad


def test_bf16_model_and_packed_arguments() -> None:
    model, batch = build("qwen2-tied")
    positions = torch.arange(batch["input_ids"].shape[1]).expand(2, -1)
    inputs = head_inputs(model.bfloat16(), **batch, position_ids=positions, return_dict=False)
    assert inputs.hidden.dtype == inputs.weight.dtype == torch.bfloat16
    assert torch.equal(logits_of(inputs), model(**batch).logits)


def test_no_cache_is_filled_unless_asked_for() -> None:
    model, batch = build("llava-siglip-full")
    caches: list[Any] = []
    model.model.register_forward_hook(lambda *call: caches.append(call[2].past_key_values))
    head_inputs(model, **batch)
    head_inputs(model, **batch, use_cache=True)
    assert caches[0] is None and caches[1] is not None


class Nested(nn.Module):
    """A causal LM inside, whose head is then not this model's own child (as in BLIP-2)."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def forward(self, input_ids: Tensor, mm_encoder_outputs: dict[str, Any], **rest: Any) -> Any:
        mm_encoder_outputs["image"] = "written"
        return self.language_model(input_ids=input_ids, **rest)


def test_nested_heads_compiled_parts_and_arguments_that_models_write_to() -> None:
    model, batch = build("llama")
    expected = head_inputs(model, **batch).hidden
    model.compile(backend="eager")  # its compiled call is bound to the real head
    vision: dict[str, Any] = {}
    inputs = head_inputs(Nested(model), **batch, mm_encoder_outputs=vision)
    assert torch.equal(inputs.hidden, expected) and inputs.weight is model.lm_head.weight
    assert vision == {}
    model.forward = model.forward  # as accelerate's hooks leave it, bound to this very module
    assert torch.equal(head_inputs(Nested(model), **batch, mm_encoder_outputs={}).hidden, expected)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing() -> None:
    model, batch = build("llava-siglip-full")
    plain = head_inputs(model.train(), **batch)
    plain.hidden.square().sum().backward()
    expected = model.model.multi_modal_projector.linear_1.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    head_inputs(model, **batch).hidden.square().sum().backward()
    got = model.model.multi_modal_projector.linear_1.weight.grad
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "gemma3", "paligemma2"])
def test_images_without_token_types_are_refused(name: str) -> None:
    model, batch = build(name + "-softcap" if name == "paligemma2" else name)
    key = next(key for key in batch if key.endswith("token_type_ids"))
    types = batch.pop(key)
    with pytest.raises(ValueError, match=f"^{key}: missing; {type(model).__name__} places"):
        head_inputs(model, **batch)
    text = {key: tokens(0)[key] for key in ("input_ids", "attention_mask")}
    assert head_inputs(model, **text).hidden.shape == (2, 7, D)  # pyright: ignore[reportArgumentType]
    assert types.shape == batch["input_ids"].shape


def test_given_positions_replace_the_token_types() -> None:
    model, batch = build("qwen2.5-vl")
    expected = head_inputs(model, **batch).hidden
    positions, _ = model.model.get_rope_index(
        batch["input_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
        mm_token_type_ids=batch.pop("mm_token_type_ids"),
    )
    torch.testing.assert_close(head_inputs(model, **batch, position_ids=positions).hidden, expected)


@pytest.mark.parametrize(
    ("model", "config", "options"),
    [
        (tf.CohereForCausalLM, tf.CohereConfig, {"logit_scale": 0.0625}),
        (tf.GraniteForCausalLM, tf.GraniteConfig, {"logits_scaling": 6.0}),
    ],
    ids=["cohere", "granite"],
)
def test_scaled_logits_are_refused_by_what_the_class_does(
    model: type, config: type, options: dict[str, float]
) -> None:
    scaled, batch = text_only(model, config, **options)
    with pytest.raises(ValueError, match=f"{model.__name__} changes its logits"):
        head_inputs(scaled, **batch)
    unscaled, batch = text_only(model, config, **dict.fromkeys(options, 1.0))
    torch.testing.assert_close(logits_of(head_inputs(unscaled, **batch)), unscaled(**batch).logits)


def test_other_models_are_refused() -> None:
    _, batch = build("llama")
    small: dict[str, Any] = {
        "vocab_size": V,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
    }
    t5 = tf.T5ForConditionalGeneration(tf.T5Config(**small))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        head_inputs(t5, **batch)
    with pytest.raises(TypeError, match="LlamaModel has no lm_head"):
        head_inputs(tf.LlamaModel(tf.LlamaConfig(**TEXT)), **batch)
    with pytest.raises(TypeError, match="expected a transformers model with an lm_head, got Line"):
        head_inputs(nn.Linear(2, 2), **batch)


def test_more_states_than_tokens_are_refused() -> None:
    config = tf.GitConfig(
        **{**TEXT, "num_hidden_layers": 1}, vision_config={**VISION, "num_hidden_layers": 1}
    )  # puts its image before the tokens it was given
    with pytest.raises(ValueError, match=r"hidden states \(2, 12, 32\), expected \(2, 7, D\)"):
        head_inputs(tf.GitForCausalLM(config), **tokens(0), pixel_values=pixels(32))  # pyright: ignore[reportArgumentType]


class Headless(tf.LlamaForCausalLM):
    """Its logits come past its head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (F.linear(self.model(*args, **kwargs).last_hidden_state, self.lm_head.weight),)


class Packed(Tensor):
    """A weight that is more than its shape says, as sharded and quantised tensors are."""


class Adapter(nn.Linear):
    """A head that is more than its weight, as adapters and quantised layers are."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1.0


def test_heads_that_are_not_one_matrix_here_are_refused() -> None:
    model, batch = build("llama")
    with pytest.raises(ValueError, match="Headless called its lm_head 0 times"):
        head_inputs(Headless(model.config), **batch)
    model.lm_head = Adapter(D, V, bias=False)
    with pytest.raises(TypeError, match=r"lm_head of LlamaForCausalLM is a \S+\.Adapter, expected"):
        head_inputs(model, **batch)
    model.lm_head = nn.Linear(D, V, bias=False)
    model.lm_head.weight = nn.Parameter(torch.zeros(V, D).as_subclass(Packed))
    with pytest.raises(
        TypeError, match=r"lm_head weight of LlamaForCausalLM is a Packed \(101, 32"
    ):
        head_inputs(model, **batch)
    model.lm_head = nn.Linear(D, V, bias=False, device="meta")
    with pytest.raises(TypeError, match=r"\(101, 32\) of torch\.float32 on meta, expected a float"):
        head_inputs(model, **batch)


def test_arguments_are_never_swallowed() -> None:
    model, batch = build("llama")
    with pytest.raises(TypeError, match=r"^pixel_values: LlamaForCausalLM takes no such argument"):
        head_inputs(model, **batch, pixel_values=pixels(32))
    with pytest.raises(ValueError, match=r"^logits_to_keep: expected none"):
        head_inputs(model, **batch, logits_to_keep=1)
    llava_model, images = build("llava-siglip-full")
    with pytest.raises(TypeError, match=r"^pixel_value: LlavaForConditionalGeneration takes no"):
        head_inputs(llava_model, **images, pixel_value=pixels(32))


# --- wrappers -----------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """The shape of every data-parallel wrapper: the model as `.module`, behind its own forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_compiled_and_parallel_models_are_looked_into() -> None:
    model, batch = build("llama")
    expected = head_inputs(model, **batch).hidden
    whole: Any = torch.compile(model, backend="eager")
    assert torch.equal(head_inputs(whole, **batch).hidden, expected)
    with pytest.raises(TypeError, match="Wrapper synchronises gradients"):
        head_inputs(Wrapper(model), **batch)
    with torch.no_grad():
        assert torch.equal(head_inputs(Wrapper(model), **batch).hidden, expected)
    assert torch.equal(head_inputs(Wrapper(model.requires_grad_(False)), **batch).hidden, expected)


def test_mixed_precision_put_into_the_forward_needs_autocast() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, batch = build("llama")
    expected = head_inputs(model, **batch).hidden
    # accelerate keeps one state a process, and another test may have made it with other options
    state = importlib.import_module("accelerate.state").AcceleratorState
    state._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    with pytest.raises(TypeError, match=r"inside `accelerator\.autocast\(\)`"):
        head_inputs(prepared, **batch)
    with accelerator.autocast():
        error = (head_inputs(prepared, **batch).hidden - expected).abs().max()
    assert 0 < error < 0.05  # ran in bf16
    state._reset_state(True)


def test_importing_costs_no_transformers() -> None:
    code = "import sys, mllmkd_kernels.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
