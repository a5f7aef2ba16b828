"""What are the weights of a model that FSDP2 has in pieces? Whole ones, out and in. All processes
must call these together. And does DeepSpeed have them in pieces?
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor


def whole(x: Any) -> Any:
    """A number or tensor, gathered where it is in pieces."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def zero_stage(accelerator: Any) -> int:
    """Of DeepSpeed, whose third has weights in pieces; 0 without it."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.deepspeed_config["zero_optimization"]["stage"]


def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy whole weights, which every process has, into a model that may be in pieces."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        values: dict[str, Any] = dict(state)
        set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)
