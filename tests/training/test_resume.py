"""Killed at any moment, a run goes on to the same loss curve and the same weights.

The run is a process of its own, killed with SIGKILL: between steps, and in the middle of writing a
checkpoint (the killer watches for the staging folder). Compared exactly: same machine, same bits.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training import tiny
from training import checkpoint, settings
from training.loop import run
from training.models import load_model
from training.step import TERMS

STEPS = 12
SCRIPT = """
import sys
from training import settings
from training.config import Config
from training.loop import run
import training.trainer as trainer
mode, at = sys.argv[2], int(sys.argv[3])
if mode == "step":
    original = trainer.Bar.on_step_end
    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == at:
            open(sys.argv[4], "w").close()
            import time; time.sleep(600)
    trainer.Bar.on_step_end = stop
if mode == "saving":
    original = trainer.DistillTrainer._save_optimizer_and_scheduler
    def stop(self, folder):
        if self.state.global_step == at:
            open(sys.argv[4], "w").close()
            import time; time.sleep(600)
        original(self, folder)
    trainer.DistillTrainer._save_optimizer_and_scheduler = stop
if mode == "saved":
    import training.loop as loop
    def stop(*_):
        open(sys.argv[4], "w").close()
        import time; time.sleep(600)
    loop.save_model = stop
run(settings.load(Config, sys.argv[1]))
"""


def kill_at(config_file: Path, mode: str, at: int, mark: Path) -> None:
    """Start the run and SIGKILL it when it has reached the given point."""
    command = [sys.executable, "-c", SCRIPT, str(config_file), mode, str(at), str(mark)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    until = time.monotonic() + 300
    while not mark.exists():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            _, errors = process.communicate()
            pytest.fail(f"the run never reached {mode} {at}: {errors.decode()[-2000:]}")
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    config = make_config(root, root / "out")
    return root, run(config, say=lambda _: None)[0]


def make_config(root, out):
    config = tiny.run_config(root, out, stages=("dft",))
    # 14 samples, 4 a step: the kills fall into the first, second and fourth pass over the data
    plan = {"dft": {"steps": STEPS, "batch_size": 4, "micro_batch": 2}, "save_steps": 2}
    return settings.build(type(config), plan, base=config)


@pytest.mark.parametrize(
    ("mode", "at", "resumes_from"),
    [
        ("step", 1, None),
        ("step", 5, 4),
        ("step", 11, 10),
        ("saving", 2, None),
        ("saving", 8, 6),
        ("saved", STEPS, STEPS),
    ],
    ids=lambda value: str(value),
)
def test_same_curve_after_a_kill(uninterrupted, tmp_path, mode, at, resumes_from):
    root, expected = uninterrupted
    config = make_config(root, tmp_path / "out")
    file = tmp_path / "config.yaml"
    file.write_text(settings.dump(config))
    kill_at(file, mode, at, tmp_path / "mark")
    found, _ = checkpoint.newest(tmp_path / "out" / "1-dft")
    assert (checkpoint.step_of(found) if found else None) == resumes_from
    messages = []
    (result,) = run(config, say=messages.append)
    assert any("resuming from" in m for m in messages) == (resumes_from is not None)
    keys = ("step", "loss", "grad_norm", "learning_rate", *TERMS)
    curve = [[entry[key] for key in keys] for entry in result.history]
    assert curve == [[entry[key] for key in keys] for entry in expected.history]
    ours, theirs = (load_model(r.model)[0].state_dict() for r in (result, expected))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_damaged_checkpoint_is_passed_over_with_a_message(uninterrupted, tmp_path):
    root, expected = uninterrupted
    config = make_config(root, tmp_path / "out")
    file = tmp_path / "config.yaml"
    file.write_text(settings.dump(config))
    kill_at(file, "step", 5, tmp_path / "mark")
    weights = tmp_path / "out" / "1-dft" / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    messages = []
    (result,) = run(config, say=messages.append)
    assert any("checkpoint-4: ignored" in m and "model.safetensors" in m for m in messages)
    assert any("resuming from checkpoint-2" in m for m in messages)
    assert [e["loss"] for e in result.history] == [e["loss"] for e in expected.history]


def test_a_checkpoint_of_another_architecture_is_refused(uninterrupted, tmp_path):
    root, _ = uninterrupted
    config = make_config(root, tmp_path / "out")
    file = tmp_path / "config.yaml"
    file.write_text(settings.dump(config))
    kill_at(file, "step", 5, tmp_path / "mark")
    wider = settings.build(type(config), {"model": {"hidden": 24}}, base=config)
    (tmp_path / "out" / "config.yaml").write_text(settings.dump(wider))
    with pytest.raises(ValueError, match=r"checkpoint-4.*another architecture.*expected"):
        run(wider, say=lambda _: None)
