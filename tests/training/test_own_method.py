"""Does a method of a user's own run from its file alone, and is its loss the one it says?"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

import training
from examples import own_method
from mllmkd_kernels.methods import llava_kd
from tests.training import tiny
from training import config as configuration
from training import settings
from training.anatomy import image_token_id
from training.claim import claimed
from training.data.collate import Collator
from training.data.dataset import LlavaDataset
from training.models import build_model, load_vlm

ROOT = Path(training.__file__).parents[1]
SAMPLES = 14  # one step sees all of them
WEIGHTS = {"ce": 1.0, "answers": 0.7, "images": 0.1, "sureness": 0.3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


def run_file(root: Path) -> Path:
    """A configuration with what the file's method has of its own: stages and their losses."""
    values = settings.to_dict(tiny.run_config(root, root / "out", samples=SAMPLES))
    sizes = {"steps": 3, "batch_size": SAMPLES, "micro_batch": 7, "lr": 1e-2}
    weights = {"answers": WEIGHTS["answers"], "sure": WEIGHTS["sureness"], "backend": "eager"}
    values["stage"] = {name: sizes | {"loss": weights} for name in ("align", "tune")}
    for key in ("method", "stages"):
        del values[key]
    file = root / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def means(student: Any, teacher: Any, batch: Any) -> dict[str, float]:
    """The formula in the example's docstring, over whole logits in fp64."""

    def rows(model: Any) -> tuple[Tensor, Tensor]:
        known = ("labels", "image_lens", "sample_ids")
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k not in known}).logits.double()
        return logits[:, :-1][answers], logits[batch["input_ids"] == image_token_id(model)] / 2

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    labels = batch["labels"][:, 1:]
    answers = labels != -100
    tokens = labels[answers]
    (z_s, y_s), (z_t, y_t) = rows(student), rows(teacher)
    s, t, p, q = (z.log_softmax(-1) for z in (z_s, z_t, y_s, y_t))
    middle = ((s.exp() + t.exp()) / 2).log()
    apart = (s - t).gather(1, tokens[:, None]).square().mean()
    terms = {
        "ce": cross_entropy(z_s, tokens),
        "answers": (kl(s, middle) + kl(t, middle)) / 2,
        "images": kl(p, q),
        "sureness": apart,
    }
    found = {name: float(value) for name, value in terms.items()}
    return {"loss": sum(WEIGHTS[name] * value for name, value in found.items()), **found}


def test_it_runs_by_its_own_command(root: Path) -> None:
    file = run_file(root)
    line = [sys.executable, "-m", "examples.own_method", "run", "--config", str(file)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    config = configuration.load(file, stages=own_method.STAGES)
    assert config.stages == ("align", "tune")
    processor = tiny.processor()
    student: Any = build_model(config.model, config.seed)[0]
    teacher = load_vlm(root / "teacher")[0]
    for number, (name, data) in enumerate((("align", "captions"), ("tune", "data")), 1):
        folder = root / "out" / f"{number}-{name}"
        curve = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        template: Any = own_method.STAGES[number - 1].template
        items = LlavaDataset(root / f"{data}.json", root, processor, template=template)
        batch = Collator(processor)([items[i] for i in range(SAMPLES)])
        for key, value in means(student, teacher, batch).items():
            # fp32 states, and sums of two micro-batches
            assert curve[0][key] == pytest.approx(value, rel=1e-4), key
        assert len(curve) == 3 and curve[-1]["loss"] < curve[0]["loss"]
        student = load_vlm(folder / "model")[0]
        assert math.isfinite(json.loads((folder / "scores.json").read_text())["perplexity"])


def test_its_objective_may_be_a_partial(root: Path, tmp_path: Path) -> None:
    """As methods of ours have them; its file is an input of the run all the same."""
    stages = tuple(
        replace(stage, objective=partial(stage.objective, images=0.2))
        for stage in own_method.STAGES
    )
    config = configuration.load(run_file(root), [f"out={tmp_path / 'out'}"], stages=stages)
    with claimed(config):
        noted = json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert list(noted["files of the method"]) == ["own_method.py"]


def test_its_file_may_move_and_may_not_change(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "1-align" / "model").mkdir(parents=True)  # a stage is done

    def begin(folder: str, text: str) -> None:
        file = tmp_path / folder / "press.py"
        file.parent.mkdir()
        file.write_text(text)
        monkeypatch.syspath_prepend(str(file.parent))
        stages = importlib.import_module("press").STAGES
        del sys.modules["press"]
        config = configuration.load(run_file(root), [f"out={tmp_path / 'out'}"], stages=stages)
        with claimed(config):
            pass

    text = Path(own_method.__file__).read_text()
    begin("here", text)
    begin("elsewhere", text)
    with pytest.raises(
        settings.ConfigError, match=r"^files of the method: has changed .*press\.py"
    ):
        begin("changed", f"{text}# more\n")


def test_its_loss_is_named_nowhere_else() -> None:
    """What trains it knows no term by name."""
    files = [*(ROOT / "training").rglob("*.py"), *(ROOT / "mllmkd_kernels").rglob("*.py")]
    assert len(files) > 50
    assert not [file for file in files if "sureness" in file.read_text(encoding="utf-8").lower()]
    assert "sureness" not in {*llava_kd.objective().terms}


def test_its_settings_are_its_arguments() -> None:
    config = configuration.load(None, ["stage.tune.loss.sure=0"], None, own_method.STAGES)
    assert list(config.objective("tune").terms) == ["ce", "answers", "images"]
    assert list(config.objective("align").terms) == list(WEIGHTS)
    fault = r"^stage\.tune\.loss\.shure: no such field; nearest is 'sure'"
    with pytest.raises(settings.ConfigError, match=fault):
        configuration.load(None, ["stage.tune.loss.shure=1"], None, own_method.STAGES)
