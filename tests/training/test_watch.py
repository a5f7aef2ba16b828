"""A number that is not finite never reaches the weights, and the batch it came from has a name."""

from __future__ import annotations

import json
import math
import re
import signal

import pytest
import torch

import mllmkd_kernels as mk
from tests.training import tiny
from training import settings
from training.cli import main
from training.interrupt import Interrupted
from training.journal import Journal
from training.loop import run
from training.meter import Meter
from training.models import load_vlm
from training.trainer import DistillTrainer
from training.watch import NonFiniteError

BATCH, MICRO = 4, 2  # two micro-batches a step


@pytest.fixture
def config(tmp_path):
    base = tiny.run_config(tmp_path, tmp_path / "out", stages=("dft",))
    stage = {"steps": 4, "batch_size": BATCH, "micro_batch": MICRO, "warmup": 0.0}
    return settings.changed(base, stage={"dft": stage}, data={"held_out": None})


def poison(monkeypatch, where, at):
    """Make micro-batches bad: `at` holds (optimiser step, micro-batch), both from 1."""
    original = DistillTrainer.compute_loss

    def bad(self, model, inputs, *args, **kwargs):
        step = self.state.global_step + 1
        micro = len(self.watch._seen) + 1
        if (step, micro) not in at:
            return original(self, model, inputs, *args, **kwargs)
        inputs["sample_ids"] = [f"s{step}.{micro}.{i}" for i in range(MICRO)]
        if where == "pixels":
            inputs["pixel_values"][0] = torch.nan
            return original(self, model, inputs, *args, **kwargs)
        if where == "gradient":
            loss = original(self, model, inputs, *args, **kwargs)
            return loss + (self.student.lm_head.weight * 0).sum().clamp(min=0).sqrt()
        self.teacher.lm_head.weight.data[0, 0] = torch.nan
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "compute_loss", bad)


def test_stop_names_the_batch_and_keeps_it(config, tmp_path, monkeypatch):
    poison(monkeypatch, "pixels", {(3, 2)})
    with pytest.raises(NonFiniteError) as caught:
        run(config, say=lambda _: None)
    text = str(caught.value)
    assert text.startswith("step 3: micro-batch 2 of 2, rank 0: loss nan, ce nan")
    for who in ("student", "teacher"):
        assert re.search(rf"{who}'s hidden states: [1-9]\d* of \d+ rows not finite", text)
    assert "samples s3.2.0, s3.2.1" in text
    folder = tmp_path / "out" / "1-dft"
    assert "bad_batch.pt" in text and sorted(p.name for p in folder.glob("c*")) == ["checkpoint-2"]

    bad = torch.load(folder / "bad_batch.pt")  # plain values: no unpickling of anything else
    assert bad["step"] == 3 and bad["why"][0] in text
    student, _ = load_vlm(folder / "checkpoint-2")
    teacher, _ = load_vlm(str(config.teacher))
    (batch,) = bad["batches"]
    again = (config.objective("dft"), student, teacher, batch, bad["counts"])
    assert not mk.distill_batch(*again).loss.isfinite()
    batch["pixel_values"].nan_to_num_()
    assert mk.distill_batch(*again).loss.isfinite()


@pytest.mark.parametrize("where", ["teacher", "gradient"])
def test_what_is_bad_is_named(config, monkeypatch, where):
    poison(monkeypatch, where, {(1, 1)})
    expected = {
        "teacher": r"micro-batch 1 of 2, rank 0: loss nan, ce [\d.]+, response_kl nan",
        "gradient": r"step 1: the gradient norm is (nan|inf) although every term is finite; "
        r"samples s1\.1\.0",
    }[where]
    with pytest.raises(NonFiniteError, match=expected):
        run(config, say=lambda _: None)


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(config):
        raise Interrupted(signal.SIGINT, "saved; the same command continues there")

    monkeypatch.setattr("training.loop.run", interrupted)
    assert main(["run", "--set", f"out={tmp_path}"]) == 130
    assert capsys.readouterr().err == "SIGINT: saved; the same command continues there\n"


def test_a_journal_reads_whole_lines(tmp_path):
    journal = Journal(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        journal.append({"step": step, "loss": math.inf if step == 2 else 0.5})
    with journal.path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert [entry["step"] for entry in journal.read()] == [1, 2, 3]
    journal.write(journal.read()[:2])
    assert journal.path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n'
    assert math.isnan(journal.read()[1]["loss"])


def test_a_meter_goes_on_as_if_nothing_had_been():
    counts = torch.tensor([5, 8, 2])
    whole, first, second = (Meter(("loss", "ce")) for _ in range(3))
    for meter, steps in ((whole, (0.1, 0.2, 0.7)), (first, (0.1, 0.2))):
        for loss in steps:
            meter.add(torch.tensor([loss, 2 * loss]), counts)
    state = json.loads(json.dumps(first.state()))
    second.load(state)
    second.add(torch.tensor([0.7, 1.4]), counts)
    a, b = whole.entry(), second.entry()
    assert {k: a[k] for k in ("loss", "ce", "padding")} == {
        k: b[k] for k in ("loss", "ce", "padding")
    }
    assert a["padding"] == 1 - 5 / 8 and second.tokens == 15 and second.samples == 6
    assert second.seconds >= state["seconds"] > 0
