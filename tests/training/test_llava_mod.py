"""Do `method: llava-mod` and `method: moe-llava` train a mixture of experts from a YAML file, one
that plain transformers loads?
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllmkd_kernels.upcycle import upcycle
from tests.training import tiny
from training.anatomy import anatomy
from training.cli import main
from training.config import load
from training.loop import run

LOADS = [f"load/{layer}/{expert}" for layer in (0, 2) for expert in range(4)]


def write_config(root: Path, out: Path, method: str = "llava-mod", **more: Any) -> Path:
    if not (root / "teacher").is_dir():
        tiny.write_data(root)
        tiny.write_tower(root / "tower")
        tiny.write_teacher(root / "teacher", root / "tower")
    stage = {
        "steps": 2,
        "batch_size": 4,
        "micro_batch": 2,
        "lr": 1e-2,
        "loss": {"backend": "eager"},
    }
    names = {"llava-mod": ("init", "d2d", "d2s"), "moe-llava": ("pt", "sft", "moe")}[method]
    values = {
        "method": method,
        "out": str(out),
        "teacher": str(root / "teacher"),
        "stage": dict.fromkeys(names, stage),
        "model": tiny.model_config(root / "tower", layers=3).model_dump(),
        "data": {
            "captions": str(root / "captions.json"),
            "conversations": str(root / "data.json"),
            "image_root": str(root),
        },
        "log_steps": 1,
        "save_steps": 1,
        "threads": 1,
    }
    file = root / f"{method}.yaml"
    file.write_text(yaml.safe_dump(values | more))
    return file


@pytest.mark.parametrize("method", ["llava-mod", "moe-llava"])
def test_a_run_of_all_stages_and_its_student(method: str, tmp_path: Path) -> None:
    file = write_config(tmp_path, tmp_path / "out", method, grad_checkpointing=True)
    assert main(["run", "--config", str(file)]) == 0
    results = run(load(file), say=lambda _: None)
    terms = ["ce", "response_kl", "balance"] if method == "llava-mod" else ["ce", "balance"]
    for entry in results[2].history:
        assert all(entry[name] > 0 for name in terms)
        assert entry["balance"] >= 2 - 1e-5  # two mixtures, each at least 1
        assert [name for name in entry if name.startswith("load/")] == LOADS
        for layer in (0, 2):  # counted once, though checkpointed layers run twice
            assert sum(entry[name] for name in LOADS if f"/{layer}/" in name) == pytest.approx(1)
    loader: Any = AutoModelForImageTextToText
    before = load_file(results[1].model / "model.safetensors")
    student, info = loader.from_pretrained(results[2].model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    dense = loader.from_pretrained(results[1].model)
    assert dense.get_decoder().config.model_type == "qwen2" and before
    start, changed = upcycle(dense).state_dict(), set()
    roles = anatomy(student).roles
    for name, value in student.state_dict().items():
        if not torch.equal(value, start[name]):
            changed.add(roles[name])
    assert changed == {"projector", "experts", "router"}
    text = AutoProcessor.from_pretrained(results[2].model)(text="say red", return_tensors="pt")
    assert student.generate(**text, max_new_tokens=2).shape[0] == 1
