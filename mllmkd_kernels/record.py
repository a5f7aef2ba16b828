"""What besides its last hidden states is wanted of a model, and where is it seen?

On the layers of its decoder, by hooks that are there for the time of one forward. So a class need
not offer it (the router logits of LLaVA around a mixture of experts cannot be asked for), nothing
else is kept, and a checkpointed layer that is run again in backward is not recorded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mllmkd_kernels.experts import decoder_layers, routers
from mllmkd_kernels.heads import Recorded
from mllmkd_kernels.needs import Needs


@contextmanager
def recording(model: Any, needs: Needs | None) -> Iterator[Callable[[], Recorded]]:
    """Record what is needed of the forward inside; yields what gives it afterwards.

    Args:
        model: a transformers model with a `get_decoder()` that has `layers`.
        needs: its `layers`, `attention` and `router`; layers count from 0, negative ones from the
            end. None: nothing.

    Raises:
        TypeError: the model has no such decoder.
        ValueError: a layer that is not there; attention that the implementation does not give; no
            router; reentrant checkpointing, in which no gradient comes back from the inside.
    """
    layers, attention, router = {}, {}, []
    handles, with_grad = [], torch.is_grad_enabled()

    def see(module: nn.Module, keep: Callable[[Tensor], Any], place: int, what: str) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found = output[place] if isinstance(output, tuple) else output
            if found is None:
                raise ValueError(
                    f"{what}: {type(module).__name__} gives none; expected a model with "
                    "attn_implementation='eager'"
                )
            if with_grad and not torch.is_grad_enabled():
                raise ValueError(
                    f"{what}: {type(module).__name__} runs in reentrant gradient checkpointing, "
                    "where it has no gradient; expected use_reentrant=False"
                )
            keep(found)

        handles.append(module.register_forward_hook(hook))

    wanted = needs or Needs()
    if wanted.layers or wanted.attention or wanted.router:
        parts = decoder_layers(model)
        for k in wanted.layers:
            see(_at(parts, k, "layers"), _into(layers, k), 0, "layers")
        for k in wanted.attention:
            part: Any = _at(parts, k, "attention")
            see(part.self_attn, _into(attention, k), 1, "attention")
        if wanted.router:
            for gate in routers(model).values():
                see(gate, router.append, 0, "router")
    try:
        yield lambda: Recorded(layers, attention, tuple(router))
    finally:
        for handle in handles:
            handle.remove()


def _at(layers: nn.ModuleList, index: int, what: str) -> nn.Module:
    if not -len(layers) <= index < len(layers):
        raise ValueError(f"{what}: got {index}, expected one of {len(layers)} layers")
    return layers[index]


def _into(found: dict[int, Tensor], key: int) -> Callable[[Tensor], None]:
    def keep(x: Tensor) -> None:
        found[key] = x

    return keep
