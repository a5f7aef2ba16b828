"""The loop: folders are whole, a finished stage is not trained again."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllmkd_kernels.llava_kd import TERMS
from tests.training import tiny
from tests.training.tiny_processors import UNENDED
from training import checkpoint, settings
from training.cli import main
from training.journal import Journal
from training.loop import run
from training.models import build_model, load_vlm
from training.progress import LOG
from training.settings import ConfigError


def test_run_leaves_what_the_docstring_lists(tmp_path):
    config = tiny.run_config(tmp_path, tmp_path / "out")
    before = load_vlm(str(config.teacher))[0].state_dict()
    results = run(config, say=lambda _: None)
    assert [result.name for result in results] == ["dpt", "sft", "dft"]
    for number, result in enumerate(results, 1):
        folder = tmp_path / "out" / f"{number}-{result.name}"
        assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
            "log.jsonl",
            "model",
            "scores.json",
            "summary.json",
        ]
        assert [entry["step"] for entry in result.history] == [1, 2, 3, 4, 5, 6]
        for entry in result.history:
            assert entry.keys() & TERMS == ({"ce"} if result.name == "sft" else set(TERMS))
            assert entry.keys() >= {
                "loss",
                "learning_rate",
                "tokens_per_second",
                "peak_gib",
                "student_entropy",
            }
            # a distribution over 16 words cannot be wider than uniform
            assert 0 < entry["student_entropy"] <= math.log(16) + 1e-3
            assert ("agreement" in entry) == ("teacher_entropy" in entry) == (result.name != "sft")
            assert 0 <= entry.get("agreement", 0) <= 1
        assert result.scores is not None and result.scores.tokens > 0
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["steps"] == 6 and summary["seconds"] > 0 and summary["peak_gib"] > 0
        AutoModelForImageTextToText.from_pretrained(result.model)
        AutoProcessor.from_pretrained(result.model)
    after = load_vlm(str(config.teacher))[0].state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "the teacher never moves"
    towers = [load_vlm(result.model)[0].model.vision_tower.state_dict() for result in results]
    assert all(torch.equal(towers[0][key], tower[key]) for tower in towers[1:] for key in tower)


def curves(results):
    keys = ("step", "loss", *TERMS)
    return [[{k: entry.get(k) for k in keys} for entry in result.history] for result in results]


def test_a_run_goes_on_where_it_was(tmp_path):
    config = tiny.run_config(tmp_path, tmp_path / "out")
    whole = run(config, say=lambda _: None)
    stamps = [result.model.stat().st_mtime_ns for result in whole]
    for left in ("3-dft", "2-sft"):
        (tmp_path / "out" / left / "model").rename(tmp_path / f"taken-{left}")
    messages = []
    left = tmp_path / "out" / "1-dpt" / "checkpoint-6"
    left.mkdir()  # of a kill between the model and the removal of what it was made from
    again = run(config, say=messages.append)
    assert not left.exists() and again[0].model.stat().st_mtime_ns == stamps[0], (
        "a finished stage is not trained again"
    )
    assert sum("already done" in message for message in messages) == 1
    assert curves(again) == curves(whole)


def test_only_what_does_not_change_the_result_may_change(tmp_path):
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("sft",))
    first = run(settings.changed(config, resume=False), say=lambda _: None)
    changed = settings.changed(config, stage={"sft": {"lr": 1e-3}})
    with pytest.raises(ConfigError, match=r"stage\.sft\.lr: 0.01 -> 0.001"):
        run(changed, say=lambda _: None)
    with pytest.raises(ConfigError, match="in use and resume is false"):
        run(settings.changed(config, resume=False), say=lambda _: None)
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = settings.changed(config, out=str(tmp_path / "moved"), keep=1, eval_batch_size=2)
    assert curves(run(moved, say=lambda _: None)) == curves(first)


def test_command_line_runs_and_scores(tmp_path, capsys):
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("sft",))
    file = tmp_path / "run.yaml"
    file.write_text(settings.dump(config))
    assert main(["run", "--config", str(file)]) == 0
    printed = capsys.readouterr().out
    model, data = str(tmp_path / "out" / "1-sft" / "model"), str(tmp_path / "data.json")
    assert main(["eval", model, data, "--image-root", str(tmp_path)]) == 0
    scores = capsys.readouterr().out.strip()
    assert "exact match" in scores and scores in printed
    assert main(["eval", str(tmp_path / "tower"), data, "--image-root", str(tmp_path)]) == 2
    assert "model_type is 'siglip_vision_model'" in capsys.readouterr().err
    assert main(["eval", model, str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith("DataError")


class TestCheckpointFolders:
    def staged(self, folder, step):
        path = folder / checkpoint.STAGING / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"x" * step)
        return path

    def test_publish_keeps_the_newest(self, tmp_path):
        for step in (2, 10, 9, 30):
            checkpoint.publish(self.staged(tmp_path, step), tmp_path / f"checkpoint-{step}", keep=2)
        assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
            "checkpoint-10",
            "checkpoint-30",
        ]
        found, messages = checkpoint.newest(tmp_path)
        assert found == tmp_path / "checkpoint-30" and messages == []
        assert checkpoint.step_of(tmp_path / "checkpoint-30") == 30

    @pytest.mark.parametrize(
        ("damage", "why"),
        [
            (lambda path: (path / "manifest.json").unlink(), "no manifest.json"),
            (lambda path: (path / "manifest.json").write_text("{"), "cut short"),
            (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
            (lambda path: (path / "model.safetensors").write_bytes(b"x"), "1 bytes, expected 20"),
        ],
        ids=["no manifest", "half manifest", "file gone", "file short"],
    )
    def test_damaged_ones_are_passed_over(self, tmp_path, damage, why):
        for step in (10, 20):
            checkpoint.publish(self.staged(tmp_path, step), tmp_path / f"checkpoint-{step}", keep=5)
        damage(tmp_path / "checkpoint-20")
        found, messages = checkpoint.newest(tmp_path)
        assert found == tmp_path / "checkpoint-10"
        assert len(messages) == 1 and "checkpoint-20" in messages[0] and why in messages[0]

    def test_what_is_being_written_is_no_checkpoint(self, tmp_path):
        self.staged(tmp_path, 10)
        assert checkpoint.newest(tmp_path) == (None, [])


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    """Same micro-batches, over two ranks instead of accumulated: same curve, same weights."""
    # 16 samples make two whole steps; accelerate would fill up an uneven last one with repeats
    config = tiny.run_config(tmp_path, tmp_path / "one", stages=("dpt", "dft"), samples=16)
    plan = {"steps": 4, "batch_size": 8, "micro_batch": 4}
    config = settings.changed(config, stage={"dpt": plan, "dft": plan})
    one = run(config, say=lambda _: None)
    file = tmp_path / "two.yaml"
    file.write_text(settings.dump(settings.changed(config, out=str(tmp_path / "two"))))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*launch, "-m", "training", "run", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    two = [Journal(tmp_path / "two" / stage / LOG).read() for stage in ("1-dpt", "2-dft")]
    for result, curve in zip(one, two, strict=True):
        for ours, theirs in zip(result.history, curve, strict=True):
            for key in ("loss", "grad_norm", *TERMS):
                # as for accumulation: fp32 sums in another order, then optimiser steps on them
                assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-6), key


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with none of the options of large ones."""
    root = tmp_path_factory.mktemp("plain")
    config = tiny.run_config(root, root / "out", stages=("dpt", "dft"))
    return config, run(config, say=lambda _: None)


@pytest.mark.parametrize("option", ["precision=bf16", "report_to=tensorboard"])
def test_options_of_large_runs(plain, tmp_path, option):
    config, expected = plain
    changed = settings.changed(config, out=str(tmp_path / "changed"))
    results = run(settings.load(type(config), None, [option], changed), say=lambda _: None)
    for result, other in zip(results, expected, strict=True):
        for ours, theirs in zip(result.history, other.history, strict=True):
            # bf16 has 8 bits; the others change nothing but the way
            bound = 0.05 if "bf16" in option else 1e-5
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=bound)


def test_what_is_to_be_known_of_template_and_length_is_said_before_the_first_step(tmp_path):
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("sft",), samples=5)
    processor = tiny.processor()
    processor.chat_template = UNENDED
    processor.save_pretrained(tmp_path / "tower")
    long = json.loads((tmp_path / "data.json").read_text())
    long[0]["conversations"][1]["value"] = "red " * 2300  # about 2300 of the new LM's 2048
    (tmp_path / "data.json").write_text(json.dumps(long))
    stage = {"sft": {"steps": 1, "batch_size": 1}}
    data = {"max_length": 4000, "held_out": None}
    said = []
    run(settings.changed(config, stage=stage, data=data), say=said.append)
    expected = [
        "1-sft: LlavaProcessor: its chat template makes ",
        "1-sft: the model has 2,048 positions, and data.max_length allows samples of 4,000 tokens; "
        "about 1 of 5 are longer",
        "1-sft: 1 steps of",
    ]
    for start, line in zip(expected, said, strict=False):
        assert line.startswith(start)


def test_a_stage_of_one_step_learns(tmp_path):
    """Its warm-up would begin, and end, at a learning rate of 0."""
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("sft",))
    config = settings.changed(config, stage={"sft": {"steps": 1}}, data={"held_out": None})
    (result,) = run(config, tiny.quiet)
    head = build_model(config.model, config.seed)[0].lm_head.weight
    assert not torch.equal(load_vlm(result.model)[0].lm_head.weight, head)
    assert result.history[-1]["learning_rate"] > 0
