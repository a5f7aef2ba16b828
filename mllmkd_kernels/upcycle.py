"""How does a dense student become a mixture of experts that computes the same?
(Sparse upcycling, arXiv 2212.05055, as in MoE-LLaVA and LLaVA-MoD)

In every second layer the feed-forward block becomes E experts, each a copy of it, and a router that
sends each token to the best k of them:

    y = Σ_{e in top k} p_e / (Σ_{top k} p) · FFN_e(x),    p = softmax(W_r x)

The shares sum to 1, so as long as the experts are copies y is FFN(x), whatever the new W_r. The
result is a class of transformers' own: whoever loads it needs nothing of this package. No token is
dropped, where DeepSpeed's experts, those of the released code, have a capacity.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mllmkd_kernels.models import path_of

# The dense text model -> the mixture that has its attention, and what the config has to say of it.
# A shared expert of width 0 adds nothing, which `Qwen2Moe` cannot be without.
_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2_moe", {"qkv_bias": True, "shared_expert_intermediate_size": 0}),
    "llama": ("qwen2_moe", {"qkv_bias": False, "shared_expert_intermediate_size": 0}),
    "qwen3": ("qwen3_moe", {}),
}
_DENSE = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_ALIGNED = 8  # numbers that `grouped_mm`, which runs the experts, wants a row to be a multiple of


def upcycle(model: Any, experts: int = 4, top_k: int = 2, every: int = 2, *, seed: int = 0) -> Any:
    """The mixture-of-experts twin of a dense model, of the same function up to rounding.

    Args:
        model: a causal LM or vision-language model of transformers whose text model is one of
            Qwen2 (1.5, 2, 2.5), Llama (SmolLM, Vicuna, MobileLLaMA) or Qwen3. It stays as it is;
            nothing is shared.
        experts: E of each mixture.
        top_k: experts a token goes to.
        every: of so many layers the first is a mixture: 2 is layers 0, 2, 4, ...
        seed: of the routers, which are drawn as `nn.Linear` draws its weights.

    Returns:
        a model of the same class (a causal LM: of the mixture's), dtypes, device and mode, which
        `save_pretrained` and `from_pretrained` know.

    Raises:
        TypeError: no plain model of transformers.
        ValueError: another text model; numbers that do not fit; weights that the mixture has no
            place for (biases, adapters, quantised ones).
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "get_decoder"):
        got = type(model).__name__
        raise TypeError(f"model: got a {got}, expected a causal or vision-language model")
    config = upcycled_config(model.config, experts, top_k, every)
    state = _state(model, config.get_text_config(decoder=True), seed)
    twin = _empty(model, config)
    if odd := sorted(state.keys() ^ twin.state_dict().keys()):
        raise ValueError(
            f"model: the weights of this {type(model).__name__} are not those of a "
            f"{type(twin).__name__} ({', '.join(odd[:3])}), expected no biases, adapters or "
            "quantised weights that it does not have"
        )
    twin.load_state_dict(state, assign=True)
    twin.tie_weights()
    for name, buffer in model.named_buffers():  # also those that no state has
        path, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(path), leaf, buffer.clone())
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.train(model.training)


def upcycled_config(config: Any, experts: int = 4, top_k: int = 2, every: int = 2, **_: Any) -> Any:
    """The configuration of `upcycle`'s result, from that of the dense model alone and the same
    arguments.

    Raises:
        ValueError: as `upcycle`, as far as a configuration tells.
    """
    from transformers import CONFIG_MAPPING  # importing the package must not import transformers

    text = config.get_text_config(decoder=True)
    layers = range(text.num_hidden_layers)
    _check_text(text)
    _check_number("experts", experts, 2)
    _check_number("top_k", top_k, 1, experts)
    _check_number("every", every, 1, len(layers))
    kind, more = _TWINS[text.model_type]
    twin_config: Any = CONFIG_MAPPING[kind]
    values = text.to_dict()
    del values["model_type"], values["architectures"]
    twin = twin_config(
        **values | more,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        moe_intermediate_size=text.intermediate_size,
        decoder_sparse_step=1,
        mlp_only_layers=[i for i in layers if i % every],
    )
    twin._attn_implementation = text._attn_implementation
    if text is config:
        return twin
    whole = copy.deepcopy(config)
    (place,) = [name for name in config.sub_configs if getattr(config, name) is text]
    setattr(whole, place, twin)
    return whole


def _check_text(text: Any) -> None:
    """Refuse a text model that has no twin."""
    if (kind := text.model_type) not in _TWINS:
        why = "is a mixture of experts already" if hasattr(text, "num_experts") else "has no twin"
        raise ValueError(
            f"model: its text model is a {kind!r}, which {why}; expected one of {', '.join(_TWINS)}"
        )
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ValueError("model: has layers of sliding attention, expected full attention")
    for name in ("hidden_size", "intermediate_size"):
        if (size := getattr(text, name)) % _ALIGNED:
            raise ValueError(f"model: its {name} is {size}, expected a multiple of {_ALIGNED}")


def _check_number(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: got {value}, expected {limit}")


def _empty(model: Any, config: Any) -> Any:
    """A model of that configuration without memory: of the same class, unless that is a text
    model's own.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        if config.get_text_config(decoder=True) is config:
            return AutoModelForCausalLM.from_config(config)
        return type(model)(config)


def _state(model: Any, text: Any, seed: int) -> dict[str, Tensor]:
    """The twin's state: copies, and for each mixture its experts and its router."""
    state = {name: x.detach().clone() for name, x in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for number, layer in enumerate(model.get_decoder().layers):
        if number in text.mlp_only_layers:
            continue
        place = f"{path_of(model, layer)}.mlp."
        found = [name.removeprefix(place) for name in state if name.startswith(place)]
        if sorted(found) != sorted(_DENSE):
            expected = ", ".join(_DENSE)
            raise ValueError(f"model: {place[:-1]} has {', '.join(found)}, expected {expected}")
        dense = [state.pop(place + name) for name in _DENSE]
        state |= {place + name: x for name, x in _mixture(*dense, text, generator)}
    return state


def _mixture(
    gate: Tensor,  # (I, D)
    up: Tensor,  # (I, D)
    down: Tensor,  # (D, I)
    text: Any,
    generator: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    experts, width = text.num_experts, text.hidden_size
    yield "experts.gate_up_proj", torch.cat((gate, up)).repeat(experts, 1, 1)  # (E, 2 I, D)
    yield "experts.down_proj", down.repeat(experts, 1, 1)  # (E, D, I)
    limit = width**-0.5
    router = torch.empty(experts, width, dtype=torch.float32, device="cpu").uniform_(
        -limit, limit, generator=generator
    )
    yield "gate.weight", router.to(gate)
    if getattr(text, "shared_expert_intermediate_size", None) == 0:
        for name, shape in zip(_DENSE, ((0, width), (0, width), (width, 0)), strict=True):
            yield f"shared_expert.{name}", gate.new_empty(shape)
        yield "shared_expert_gate.weight", gate.new_zeros(1, width)
