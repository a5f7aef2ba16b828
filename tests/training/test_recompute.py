"""Does `grad_checkpointing` save memory? Nothing is kept of what is frozen, and nothing changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from tests.training import tiny, tiny_pairs
from training.anatomy import anatomy
from training.loop import run
from training.models import recompute_activations
from training.stages import STAGES, freeze

PIXELS = {"llava-onevision": (1, 3, 16, 16), "internvl": (1, 3, 32, 32)}


def test_no_graph_of_the_frozen_tower(tmp_path):
    """In every step of every stage, with text-only micro-batches among them."""
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("dpt", "sft"))
    found: dict[str, list[bool]] = {}

    def look(module, args, output):
        state = getattr(output, "last_hidden_state", None)
        if torch.is_tensor(state) and torch.is_grad_enabled():
            found.setdefault(type(module).__name__, []).append(state.requires_grad)

    hook = register_module_forward_hook(look)
    try:
        run(dataclasses.replace(config, grad_checkpointing=True), say=lambda _: None)
    finally:
        hook.remove()
    assert len(found["SiglipVisionModel"]) >= 6 and not any(found["SiglipVisionModel"])
    assert all(found["Qwen2Model"]), "what trains has its graph"


def test_recomputing_changes_no_number(tmp_path):
    config = tiny.run_config(tmp_path, tmp_path / "kept", stages=("dpt", "dft"))
    again = dataclasses.replace(config, out=str(tmp_path / "again"), grad_checkpointing=True)
    kept, recomputed = (run(one, say=lambda _: None) for one in (config, again))
    for a, b in zip(kept, recomputed, strict=True):
        assert [entry["loss"] for entry in a.history] == [entry["loss"] for entry in b.history]


@pytest.mark.parametrize("name", PIXELS)
def test_a_frozen_tower_saves_nothing_for_backward(name):
    model, _ = tiny_pairs.build(name)
    freeze(model, STAGES["sft"])
    recompute_activations(model)
    (tower,) = anatomy(model).modules["vision"]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda kept: kept):
        model.get_submodule(tower)(torch.rand(PIXELS[name]))
    assert saved == []
