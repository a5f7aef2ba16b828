"""When can two models use one vision tower, and what does it hand to their projectors?

LLaVA-KD's teacher and student are LLaVAs with the same frozen tower. Then it is in memory once and
runs once a batch, and each model applies its own projector to its output. Other classes interleave
tower and projector, so their models run whole.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration


def share_tower(
    student: LlavaForConditionalGeneration, teacher: LlavaForConditionalGeneration
) -> bool:
    """Let the teacher use the student's vision tower if the two are equal; say whether they are.

    Equal means weight by weight, in the coarser of their two dtypes (a bf16 teacher's tower is the
    student's, rounded), and read at the same layer. Then the tower is in memory once and runs once
    a batch; each model applies its own projector to its output.
    """
    ours, theirs = student.model.vision_tower, teacher.model.vision_tower
    same_output = _selection(student.config) == _selection(teacher.config)
    a, b = ours.state_dict(), theirs.state_dict()
    equal = a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if equal and same_output:
        teacher.model.vision_tower = ours
    return equal and same_output


def image_features(
    model: LlavaForConditionalGeneration,
    pixel_values: torch.Tensor,  # (n_images, 3, H, W)
) -> torch.Tensor:  # (n_images, P, C)
    """The tower's hidden states that the projector reads; what `LlavaModel.get_image_features`
    projects."""
    layers, strategy = _selection(model.config)
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    return torch.cat([h[:, 1:] if strategy == "default" else h for h in chosen], dim=-1)


def _selection(config: LlavaConfig) -> tuple[Any, str]:
    return config.vision_feature_layer, config.vision_feature_select_strategy


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(a.to(dtype), b.to(a.device, dtype))
