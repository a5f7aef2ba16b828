"""Do `method: llava-mod` and `method: moe-llava` train a mixture of experts from a YAML file, one
that plain transformers loads?
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllmkd_kernels.upcycle import upcycle
from tests.training import tiny
from training.anatomy import anatomy, freeze
from training.cli import main
from training.config import load
from training.loop import run
from training.models import build_model

LOADS = [f"load/{layer}/{expert}" for layer in (0, 2) for expert in range(4)]


STAGES = {"llava-mod": ("init", "d2d", "d2s"), "moe-llava": ("pt", "sft", "moe")}


def write_config(root: Path, out: Path, method: str = "llava-mod", **more: Any) -> Path:
    stages = {key: {"loss": {"backend": "eager"}} for key in STAGES[method]}
    return tiny.write_run(root, out, method, stages, layers=3, **more)


@pytest.mark.parametrize("method", ["llava-mod", "moe-llava"])
def test_a_run_of_all_stages_and_its_student(method: str, tmp_path: Path) -> None:
    file = write_config(tmp_path, tmp_path / "out", method, grad_checkpointing=True)
    assert main(["run", "--config", str(file)]) == 0
    _, dense, sparse = run(load(file), say=lambda _: None)
    terms = ["ce", "response_kl", "balance"] if method == "llava-mod" else ["ce", "balance"]
    for entry in sparse.history:
        assert all(entry[name] > 0 for name in terms)
        assert entry["balance"] >= 2 - 1e-5  # two mixtures, each at least 1
        assert [name for name in entry if name.startswith("load/")] == LOADS
        for layer in (0, 2):
            assert sum(entry[name] for name in LOADS if f"/{layer}/" in name) == pytest.approx(1)
    loader: Any = AutoModelForImageTextToText
    student, info = loader.from_pretrained(sparse.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    start, roles = upcycle(loader.from_pretrained(dense.model)).state_dict(), anatomy(student).roles
    changed = {roles[n] for n, x in student.state_dict().items() if not torch.equal(x, start[n])}
    assert changed == {"projector", "experts", "router"}
    text = AutoProcessor.from_pretrained(sparse.model)(text="say red", return_tensors="pt")
    assert student.generate(**text, max_new_tokens=2).shape[0] == 1


def test_language_is_experts_and_routers_too(tmp_path: Path) -> None:
    dense, _ = build_model(load(write_config(tmp_path, tmp_path / "out")).model, 0)
    with pytest.raises(ValueError, match=r"trains: got experts, router, expected some of vision, "):
        freeze(dense, "projector", "experts", "router")
    model = upcycle(dense)
    whole, experts, router = (freeze(model, r) for r in ("language", "experts", "router"))
    places = [f"model.language_model.layers.{i}.mlp" for i in (0, 2)]
    kinds = ("experts.gate_up_proj", "experts.down_proj")
    assert experts == [f"{place}.{kind}" for place in places for kind in kinds]
    assert router == [f"{place}.gate.weight" for place in places]
    assert set(whole) > {*experts, *router, "lm_head.weight"}
    assert not [name for name in whole if ".shared_expert." in name]  # which has no numbers


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stage.d2s.student.top_k=5", "stage.d2s.student: top_k: got 5, expected 1 to 4"),
        ("stage.d2s.student.every=4", "stage.d2s.student: every: got 4, expected 1 to 3"),
        ("stage.d2s.student.expert=8", "stage.d2s.student.expert: no such field; nearest is 'expe"),
        ("stage.d2s.student.experts=two", "stage.d2s.student.experts: got 'two', expected"),
        ("stage.d2d.student.experts=4", "stage.d2d.student.experts: no such field"),
        ("stages=[d2d,preference]", "stage.preference: trains: got experts, router, expected some"),
        ("stage.d2d.loss.balance=0.1", "stage.d2d: router: LlavaForConditionalGeneration has no"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_student_that_cannot_be_made_is_known_before_the_first_stage(
    command: str, setting: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_config(tmp_path, tmp_path / "out")
    assert main([command, "--config", str(file), "--set", setting]) == 2
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("1-*"))
