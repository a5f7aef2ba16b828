"""Is the mixture of experts of a dense model the same function, in every class that can hold it?"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

import mllmkd_kernels as mk
from mllmkd_kernels.upcycle import upcycled_config
from tests import pair, tiny_models
from tests.test_trainer_mixin import arguments
from tests.test_trainer_objective import MixedTrainer
from tests.tolerances import check

HOLD = ("llama", "qwen2-tied", "llava-siglip-full", "llava-clip-default", "llava-onevision",
        "internvl", "idefics3", "smolvlm")  # fmt: skip


def dense(name: str) -> tuple[Any, dict[str, Any]]:
    if name != "qwen3":
        return tiny_models.build(name)
    torch.manual_seed(0)
    model, batch = tiny_models.text_only(tf.Qwen3ForCausalLM, tf.Qwen3Config)
    return model.eval(), batch


@pytest.mark.parametrize("name", [*HOLD, "qwen3"])
def test_the_twin_is_the_same_function_and_transformers_own(name: str, tmp_path: Path) -> None:
    model, batch = dense(name)
    model.set_attn_implementation("eager")
    before = copy.deepcopy(model.state_dict())
    twin = mk.upcycle(model)
    with torch.no_grad():
        want, got = model(**batch).logits, twin(**batch).logits
        check(got, want.double(), "value", what=name)
        twin.save_pretrained(tmp_path)
        auto = (
            tf.AutoModelForImageTextToText if "pixel_values" in batch else tf.AutoModelForCausalLM
        )
        loaded: Any = auto.from_pretrained(tmp_path, attn_implementation="eager")
        assert torch.equal(loaded(**batch).logits, got)
    assert loaded.state_dict().keys() == twin.state_dict().keys()
    assert type(loaded) is type(twin) and ("pixel_values" not in batch or type(twin) is type(model))
    tied = twin.lm_head.weight is twin.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert twin.config._attn_implementation == "eager" and not twin.training
    assert twin.generation_config.to_dict() == model.generation_config.to_dict()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def mixtures(model: Any) -> list[int]:
    return [
        i for i, layer in enumerate(model.get_decoder().layers) if hasattr(layer.mlp, "experts")
    ]


@pytest.mark.parametrize(
    ("experts", "top_k", "every", "where"),
    [(4, 2, 2, [0, 2, 4]), (2, 1, 3, [0, 3]), (3, 3, 1, [0, 1, 2, 3, 4])],
)
def test_how_many_experts_and_where(experts: int, top_k: int, every: int, where: list[int]) -> None:
    model, batch = tiny_models.text_only(tf.LlamaForCausalLM, tf.LlamaConfig, num_hidden_layers=5)
    twin = mk.upcycle(model, experts, top_k, every)
    assert mixtures(twin) == where
    block = twin.get_decoder().layers[0].mlp
    assert block.experts.gate_up_proj.shape == (experts, 96, 32) and block.gate.top_k == top_k
    check(twin(**batch).logits, model(**batch).logits.double(), "value")


def test_dtypes_mode_and_the_routers_seed() -> None:
    model, batch = tiny_models.build("llava-siglip-full")
    model.model.language_model.bfloat16()
    model.lm_head.bfloat16()
    model.train()
    state = torch.get_rng_state()
    one, same, other = (mk.upcycle(model, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state) and one.training
    dtypes = {name.split(".")[1]: p.dtype for name, p in one.named_parameters()}
    assert dtypes["language_model"] == torch.bfloat16 and dtypes["vision_tower"] == torch.float32
    routers = [m.get_decoder().layers[0].mlp.gate.weight for m in (one, same, other)]
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])
    assert 0 < routers[0].abs().max() <= 32**-0.5
    copies = one.get_decoder().layers[0].mlp.experts.down_proj
    assert torch.equal(copies[0], copies[3]) and one.eval()(**batch).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("phi-bias", {}, "its text model is a 'phi', which has no twin; expected one of qwen2, "),
        ("gemma2-softcap", {}, "is a 'gemma2', which has no twin"),
        ("paligemma2-softcap", {}, "is a 'gemma2', which has no twin"),
        ("gemma3", {}, "is a 'gemma3_text', which has no twin"),
        ("qwen2.5-vl", {}, "is a 'qwen2_5_vl_text', which has no twin"),
        ("qwen3-vl", {}, "is a 'qwen3_vl_text', which has no twin"),
        ("llama", {"top_k": 5}, "^top_k: got 5, expected 1 to 4"),
        ("llama", {"experts": 1}, "^experts: got 1, expected at least 2"),
        ("llama", {"every": 3}, "^every: got 3, expected 1 to 2"),
        ("llama", {"every": 0}, "^every: got 0, expected 1 to 2"),
    ],
)
def test_what_has_no_twin_is_refused(name: str, options: dict[str, int], said: str) -> None:
    model, _ = tiny_models.build(name)
    for refused in (
        lambda: mk.upcycle(model, **options),
        lambda: upcycled_config(model.config, **options),
    ):
        with pytest.raises(ValueError, match=said):
            refused()


def llama(**options: Any) -> Any:
    return tiny_models.text_only(tf.LlamaForCausalLM, tf.LlamaConfig, **options)[0]


def test_weights_that_the_twin_has_no_place_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"are not those of a Qwen2MoeForCausalLM \(.*_proj\.bias"):
        mk.upcycle(llama(attention_bias=True))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp has .*gate_proj\.bias.*, expected gate_"):
        mk.upcycle(llama(mlp_bias=True))
    with pytest.raises(ValueError, match="its intermediate_size is 44, expected a multiple of 8"):
        mk.upcycle(llama(intermediate_size=44))
    sliding, _ = tiny_models.text_only(tf.Qwen2ForCausalLM, tf.Qwen2Config, use_sliding_window=True,
                                       sliding_window=4, max_window_layers=1)  # fmt: skip
    with pytest.raises(ValueError, match="sliding attention"):
        mk.upcycle(sliding)
    with pytest.raises(ValueError, match="is a 'qwen2_moe', which is a mixture of experts already"):
        mk.upcycle(mk.upcycle(llama()))
    with pytest.raises(TypeError, match="got a Linear, expected a causal or vision-lang"):
        mk.upcycle(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("targets", [{"q_proj", "up_proj"}, r".*\.(q|up|gate)_proj|.*\.up_proj"])
def test_adapters_that_miss_the_experts_are_refused(targets: Any, tmp_path: Path) -> None:
    """As PEFT's config says what was asked for."""
    student, teacher = pair.models()
    twin = mk.upcycle(student)

    def train(model: Any, modules: Any, parameters: Any) -> Any:
        adapter = SimpleNamespace(target_modules=modules, target_parameters=parameters)
        model.peft_config = {"default": adapter}
        return MixedTrainer(model=model, teacher=teacher, args=arguments(tmp_path))

    said = (
        r"target_modules: got .*up_proj, which miss .* target_parameters=\['mlp\.experts\.gate_up"
    )
    with pytest.raises(ValueError, match=said):
        train(twin, targets, None)
    train(twin, {"q_proj"}, None)
    train(twin, targets, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    train(student, targets, None)  # dense
