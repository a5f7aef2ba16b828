"""Does a method with a view train from YAML, go on where it stopped, and say what cannot be?"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.training import tiny
from training.config import load
from training.loop import run
from training.meter import Meter
from training.settings import ConfigError
from training.teacher_cache.fill import make
from training.trainer import DistillTrainer

OWN = ("own_answers", "own_cut", "own_empty")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


def config_of(root: Path, out: Path, method: str, stages: Any, *options: str) -> Any:
    return load(tiny.write_run(root, out, method, stages), options)


LOSS = {"backend": "eager"}
VIEW = {"max_new_tokens": 4, "probability": 1.0}
GKD = {"pt": {}, "sft": {}, "gkd": {"loss": LOSS, "view": VIEW}}
LLAVADI = {"kd": {"loss": {**LOSS, "affinity": 0.5}, "view": VIEW}}


@pytest.mark.parametrize(
    ("method", "stages"), [("on-policy", GKD), ("llavadi", LLAVADI)], ids=["gkd", "llavadi"]
)
def test_a_run_whose_student_answers_itself(
    method: str, stages: Any, root: Path, tmp_path: Path
) -> None:
    *before, last = run(config_of(root, tmp_path / "run", method, stages), say=lambda _: None)
    assert all(name not in entry for result in before for entry in result.history for name in OWN)
    for entry in last.history:
        assert entry["own_answers"] == 4 and 0 <= entry["own_cut"] <= 4 and "own_empty" in entry
        assert entry["ce"] == 0 if "ce" in entry else method == "on-policy"
        assert entry["loss"] > 0
    AutoModelForImageTextToText.from_pretrained(last.model)


def test_a_stopped_run_writes_the_same_answers(root: Path, tmp_path: Path) -> None:
    """The counts of an unfinished entry of the log come through the checkpoint as well."""
    half = {"gkd": {"steps": 4, "loss": {**LOSS, "ce": 0.5}, "view": {"max_new_tokens": 4}}}
    whole = run(
        config_of(root, tmp_path / "whole", "on-policy", half, "log_steps=2"), lambda _: None
    )
    cut = config_of(root, tmp_path / "cut", "on-policy", half, "log_steps=2")
    tiny.killed(cut, 3)
    torch.manual_seed(99)
    again = run(cut, say=lambda _: None)
    names = ("step", "loss", "response", "ce", *OWN)
    curves = [[[e.get(n) for n in names] for e in r.history] for (r,) in (whole, again)]
    assert curves[0] == curves[1] and any(entry[4] for entry in curves[0])
    states = [load_file(r.model / "model.safetensors") for (r,) in (whole, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_more_processes_go_on_with_one_set_of_notes(tmp_path: Path) -> None:
    """Ranks sum their notes alike, or one waits for ever."""
    path, ranks = tmp_path / "checkpoint-3", []
    path.mkdir()
    state = {
        "meter": Meter(("loss",)).state() | {"steps": 2},
        "notes": dict(zip(OWN, (4, 1, 0), strict=True)),
    }
    (path / "sums_0.json").write_text(json.dumps(state))
    for rank in range(2):
        ranks.append(SimpleNamespace(args=SimpleNamespace(process_index=rank), notes=Counter()))
        ranks[-1].meter = Meter(("loss",))
        DistillTrainer._restore(ranks[-1], path)
    assert [list(rank.notes.items()) for rank in ranks] == [
        list(zip(OWN, values, strict=True)) for values in ((4, 1, 0), (0, 0, 0))
    ]
    assert [rank.meter.state()["steps"] for rank in ranks] == [2, 0]


def test_what_does_not_go_with_own_answers_is_refused(root: Path, tmp_path: Path) -> None:
    stored = f"teacher_cache.path={tmp_path / 'cache'}"
    make(config_of(root, tmp_path / "given", "llavadi", {"kd": {"loss": LOSS}}, stored))
    config = config_of(root, tmp_path / "own", "llavadi", LLAVADI, stored)
    for command in (make, run):
        with pytest.raises(ConfigError, match=r"stage\.kd\.view: makes other batches in each step"):
            command(config)
    packed = config_of(
        root, tmp_path / "packed", "on-policy", {"gkd": GKD["gkd"]}, "data.packing=true"
    )
    with pytest.raises(ConfigError, match=r"^view: position_ids: on_policy got packed rows"):
        run(packed, say=lambda _: None)
    with pytest.raises(ConfigError, match=r"stage\.gkd\.view\.probability: got 2.0, expected one"):
        config_of(root, tmp_path / "much", "on-policy", {"gkd": {"view": {"probability": 2.0}}})
