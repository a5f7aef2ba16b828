"""Does `method: llavadi` train from a YAML file, and is what it learns beside the student no part
of the student?
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllmkd_kernels import learned
from tests.gloo import on_ranks
from tests.training import tiny
from training.config import load
from training.loop import run


def write_config(root: Path, out: Path, **kd: object) -> Path:
    loss = {"backend": "eager", "affinity": 0.5, "logit_mse": 0.1, "rows": "valid", **kd}
    return tiny.write_run(root, out, "llavadi", {"pt": {}, "kd": {"loss": loss}})


def test_a_run_of_all_stages_and_its_student(tmp_path: Path) -> None:
    config = load(write_config(tmp_path, tmp_path / "out", standardize=True))
    assert config.of_stage("kd").loss.features == 1.0
    pt, kd = run(config, say=lambda _: None)
    assert set(pt.history[0]) & {"response_kl", "features"} == set()
    for name in ("ce", "response_kl", "features", "affinity", "logit_mse"):
        assert all(entry[name] > 0 for entry in kd.history), name
    assert [p.name for p in kd.model.iterdir() if p.name == learned.FILE] == []
    loader: Any = AutoModelForImageTextToText
    student, info = loader.from_pretrained(kd.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(kd.model)
    text = processor(text="say red", return_tensors="pt")
    assert student.generate(**text, max_new_tokens=2).shape[0] == 1


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    file = write_config(tmp_path, tmp_path / "one")
    expected = run(load(file, ["stages=[kd]"]), say=lambda _: None)[0].history
    more = ["stages=[kd]", "stage.kd.micro_batch=1", f"out={tmp_path / 'two'}"]
    for curve in on_ranks(2, tiny.on_a_rank, tmp_path, file, *more):
        for ours, theirs in zip(curve, expected, strict=True):
            for name in ("loss", "ce", "response_kl", "features", "affinity", "logit_mse"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    one, two = (
        load_file(tmp_path / out / "1-kd/model/model.safetensors") for out in ("one", "two")
    )
    assert one.keys() == two.keys()


def test_a_run_that_goes_on_ends_as_one_that_did_not_stop(tmp_path: Path) -> None:
    """A checkpoint has the perceptron too: with another one the second step would be another."""
    file = write_config(tmp_path, tmp_path / "whole")
    only = ["stages=[kd]", "stage.kd.loss.features=5"]
    whole = run(load(file, only), say=lambda _: None)[0]
    cut = load(file, [*only, f"out={tmp_path / 'cut'}"])
    tiny.killed(cut, 1)
    assert (tmp_path / "cut" / "1-kd" / "checkpoint-1" / learned.FILE).is_file()
    torch.manual_seed(99)
    again = run(cut, say=lambda _: None)[0]
    assert again.history[1]["features"] == whole.history[1]["features"]
    states = [load_file(r.model / "model.safetensors") for r in (whole, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
