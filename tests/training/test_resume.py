"""Stopped at any moment, a run goes on to the same loss curve and the same weights.

Killed with SIGKILL, out of disk, on several ranks: `tests.training.killed` makes those runs, in one
process of its own. Compared exactly: same machine, same bits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import killed
from training import checkpoint, settings, trainer
from training.data.dataset import SampleDataset
from training.interrupt import Interrupted
from training.loop import run

WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def answers(root):
    command = [sys.executable, "-m", "tests.training.killed", str(root)]
    home = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "answers.json").read_text())


@pytest.mark.parametrize("number", range(10))
def test_same_curve_after_a_kill(root, answers, number):
    case = answers["killed"][number]
    assert isinstance(case["then"], dict), f"killed at {case['moment']}: {case['then']}"
    assert case["then"]["curves"] == answers["whole"]["curves"], case["moment"]
    for stage in ("1-dpt", "2-dft"):
        ours, theirs = (Path(out) / stage for out in (case["out"], root / "whole"))
        assert (ours / WEIGHTS).read_bytes() == (theirs / WEIGHTS).read_bytes(), case["moment"]
        names = sorted(p.name for p in theirs.iterdir())
        assert sorted(p.name for p in ours.iterdir()) == names, case["moment"]


def test_the_kills_were_of_every_kind(answers):
    moments = [case["moment"] for case in answers["killed"]]
    for name, words in killed.KINDS:
        assert any(word in moment for word in words for moment in moments), (name, moments)
    resumed = [m for c in answers["killed"] for m in c["then"]["messages"] if "resuming" in m]
    assert len(resumed) >= 4


def test_a_full_disk_leaves_the_checkpoint_before(answers):
    case = answers["full"]
    assert case["left"] == "checkpoint-2"
    error = case["error"]
    assert error.startswith("CheckpointError") and "checkpoint-4: could not be written" in error
    assert "checkpoint-2 is whole" in error
    assert case["then"]["curves"] == answers["whole"]["curves"]


def test_every_rank_names_the_bad_batch_of_one(answers):
    nan, _ = answers["ranks"]
    assert nan[0] == nan[1]
    assert nan[0].startswith("NonFiniteError: step 2: micro-batch 1 of 1, rank 1: loss nan")


def test_a_signal_to_one_rank_stops_all_after_the_same_step(answers):
    _, term = answers["ranks"]
    assert term[0] == term[1]
    assert term[0].startswith("Interrupted: SIGTERM") and "at step 2 of 5" in term[0]


def stop_at(step, config, monkeypatch):
    """Run until a SIGTERM that comes in the given step."""

    def stopped(self, *args, **kwargs):
        if self.state.global_step == step - 1 and not self.stop.number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    original = trainer.DistillTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(trainer.DistillTrainer, "compute_loss", stopped)
        with pytest.raises(Interrupted, match=rf"SIGTERM: saved .* at step {step} of 5") as stop:
            run(config, say=lambda _: None)
    assert stop.value.status == 143


def test_a_signal_saves_at_the_end_of_the_step(root, answers, tmp_path, monkeypatch):
    """In step 4 of 5: not a checkpoint's step, inside a log entry, after one pass over the data."""
    config = killed.config(root, tmp_path / "out")
    one = {"stages": ["dpt"], "data": {"held_out": None}, "save_steps": 100}
    config = settings.changed(config, **one)
    before = signal.getsignal(signal.SIGTERM)
    stop_at(4, config, monkeypatch)
    assert signal.getsignal(signal.SIGTERM) is before
    found, _ = checkpoint.newest(tmp_path / "out" / "1-dpt")
    assert found is not None and checkpoint.step_of(found) == 4
    read = []
    original = SampleDataset.__getitem__
    monkeypatch.setattr(
        SampleDataset, "__getitem__", lambda self, i: read.append(i) or original(self, i)
    )
    (result,) = run(config, say=lambda _: None)
    curve = [[entry[key] for key in killed.SHOWN] for entry in result.history]
    assert curve == answers["whole"]["curves"][0]
    # a pass of 14 samples is 4 steps (the last is short), so that the fifth begins the second
    # pass: its 4, and 2 of the loader's that is one micro-batch ahead; none is read to be skipped
    assert len(read) == 6


def test_a_damaged_checkpoint_is_passed_over_with_a_message(root, answers, tmp_path, monkeypatch):
    config = killed.config(root, tmp_path / "out")
    stop_at(3, config, monkeypatch)
    weights = tmp_path / "out" / "1-dpt" / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    messages = []
    results = run(config, say=messages.append)
    assert any("checkpoint-3: ignored" in m and "model.safetensors" in m for m in messages)
    assert any("resuming from checkpoint-2" in m for m in messages)
    curves = [[[entry[key] for key in killed.SHOWN] for entry in r.history] for r in results]
    assert curves == answers["whole"]["curves"]


def test_a_checkpoint_of_another_architecture_is_refused(root, tmp_path, monkeypatch):
    config = killed.config(root, tmp_path / "out")
    stop_at(3, config, monkeypatch)
    wider = settings.changed(config, model={"hidden": 24})
    (tmp_path / "out" / "config.yaml").write_text(settings.dump(wider))
    with pytest.raises(ValueError, match=r"checkpoint-3.*another architecture.*size mismatch"):
        run(wider, say=lambda _: None)
