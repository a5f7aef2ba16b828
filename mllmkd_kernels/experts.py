"""Which parts of a model are a mixture of experts?

In transformers `layer.mlp.gate`, the router, and `layer.mlp.experts`, all of a layer's in two
tensors.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: What adapters on the feed-forward block of a dense model are asked for by.
_DENSE = ("gate_proj", "up_proj", "down_proj")
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of a transformers model's text model, of the model inside adapters too.

    Raises:
        TypeError: it has none.
    """
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = inside.get_decoder() if hasattr(inside, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"model: {type(model).__name__} has no decoder with layers to record")
    return layers


def routers(model: Any) -> dict[int, Any]:
    """The router of each mixture by the number of its layer, from 0.

    Raises:
        TypeError: as `decoder_layers`.
        ValueError: there is none.
    """
    gates = {
        number: getattr(getattr(layer, "mlp", None), "gate", None)
        for number, layer in enumerate(decoder_layers(model))
    }
    found = {
        number: getattr(gate, "base_layer", gate)  # which an adapter on it calls
        for number, gate in gates.items()
        if isinstance(gate, nn.Module)
    }
    if not found:
        raise ValueError(f"router: {type(model).__name__} has no mixture of experts")
    return found


def check_adapters(model: Any) -> None:
    """Refuse adapters of PEFT's that were asked for on feed-forward blocks and are not on experts,
    which are no modules: they would train next to nothing, and nobody would say so.

    Raises:
        ValueError: with what to ask for.
    """
    for adapter in (getattr(model, "peft_config", None) or {}).values():
        asked = getattr(adapter, "target_modules", None) or ()
        given = getattr(adapter, "target_parameters", None) or ()
        found = [name for name in _DENSE if name in asked]  # of names, or in a pattern
        reached = any("experts" in name for name in given)
        if found and not reached and any(".mlp.experts." in n for n, _ in model.named_parameters()):
            raise ValueError(
                f"target_modules: got {', '.join(found)}, which miss the experts; expected "
                f"target_parameters={_EXPERTS} for them"
            )
