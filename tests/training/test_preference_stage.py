"""Does a stage of pairs train from a YAML file, and does it refuse before its first step what it
cannot do?
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

import mllmkd_kernels as mk
from mllmkd_kernels.methods import llava_mod
from mllmkd_kernels.terms.preference import REPORTED
from mllmkd_kernels.upcycle import upcycle
from tests.gloo import on_ranks
from tests.training import tiny
from tests.training.test_llava_mod import LOADS
from tests.training.test_teacher_cache_runs import same_with_and_without_the_teacher
from training import settings
from training.anatomy import anatomy, freeze
from training.config import load
from training.data.collate import Collator
from training.data.load import open_data
from training.data.records import DataError
from training.loop import run
from training.models import build_model, load_vlm, save_model
from training.settings import ConfigError


def write_pairs(root: Path, *stages: str, **more: Any) -> Path:
    """A run of these stages; the answers of `data.json`, and beside each one that is wrong."""
    both = {key: {"loss": {"backend": "eager"}} for key in stages}
    file = tiny.write_run(root, root / "out", "llava-mod", both, layers=3, **more)
    samples = json.loads((root / "data.json").read_text())
    for sample in samples:
        answer = sample["conversations"][-1]["value"]
        sample["rejected"] = "green and grey" if answer != "green" else "red"
    (root / "pairs.json").write_text(json.dumps(samples))
    return file


def pairs_of(root: Path) -> list[str]:
    return [f"data.preferences={root / 'pairs.json'}"]


def test_after_d2s_a_run_of_pairs_and_its_student(tmp_path: Path) -> None:
    file = write_pairs(tmp_path, "d2s", "preference", grad_checkpointing=True)
    config = load(file, pairs_of(tmp_path))
    options = config.of_stage("preference").loss
    assert (options.kind, options.beta, options.balance) == ("kto_pair", 0.1, 0.01)
    before, after = run(config, say=lambda _: None)
    for entry in after.history:
        assert 0 < entry["preference"] < 1 and 0 <= entry["reward_accuracy"] <= 1
        margin = entry["reward_chosen"] - entry["reward_rejected"]
        assert entry["reward_margin"] == pytest.approx(margin, abs=1e-6)
        assert entry["loss"] == pytest.approx(
            entry["preference"] + 0.01 * entry["balance"], rel=1e-5
        )
        assert set(LOADS) <= entry.keys()
    old, new = (load_file(x.model / "model.safetensors") for x in (before, after))
    loader: Any = AutoModelForImageTextToText
    student, info = loader.from_pretrained(after.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and old.keys() == new.keys()
    start = loader.from_pretrained(before.model).state_dict()
    roles = anatomy(student).roles
    state = student.state_dict()
    assert {roles[n] for n in state if not torch.equal(state[n], start[n])} == {
        "projector", "experts", "router",
    }  # fmt: skip
    text = AutoProcessor.from_pretrained(after.model)(text="say red", return_tensors="pt")
    assert student.generate(**text, max_new_tokens=2).shape[0] == 1


def sparse(root: Path) -> str:
    """A student that is a mixture already."""
    if not (root / "sparse").is_dir():
        model, processor = build_model(tiny.model_config(root / "tower", layers=3), seed=0)
        torch.manual_seed(3)  # of the routers
        save_model(upcycle(model), processor, root / "sparse")
    return f"model.path={root / 'sparse'}"


def test_what_a_stage_of_pairs_cannot_do_is_refused(tmp_path: Path) -> None:
    file = write_pairs(tmp_path, "preference")
    model, pairs = sparse(tmp_path), pairs_of(tmp_path)
    plain = f"data.preferences={tmp_path / 'data.json'}"
    with pytest.raises(DataError, match="field 'rejected': got nothing, expected a worse answer"):
        run(load(file, [model, plain]), say=lambda _: None)
    with pytest.raises(ConfigError, match=r"data.preferences: got null, expected a path"):
        run(load(file, [model, "data.preferences=null"]), say=lambda _: None)
    with pytest.raises(ConfigError, match=r"packing: got true, .*: preference tells samples apart"):
        run(load(file, [model, *pairs, "data.packing=true"]), say=lambda _: None)
    with pytest.raises(ConfigError, match=r"kind: .*'dpo'"):
        load(file, [model, *pairs, "stage.preference.loss.kind=dpo"])


@pytest.mark.parametrize("visual", [True, False], ids=["visual", "response"])
def test_stored_rows_of_pairs_train_as_the_teacher_does(visual: bool, tmp_path: Path) -> None:
    file = write_pairs(tmp_path, "preference")
    config = load(file, [*pairs_of(tmp_path), sparse(tmp_path)])
    same_with_and_without_the_teacher(config, tmp_path, visual=visual)
    samples = json.loads((tmp_path / "pairs.json").read_text())
    for sample in samples:
        sample["rejected"] = "blue and blue"
    (tmp_path / "pairs.json").write_text(json.dumps(samples))
    rows = {"path": str(tmp_path / "rows"), "visual": visual}
    other = settings.changed(config, out=str(tmp_path / "other"), teacher_cache=rows)
    with pytest.raises(DataError, match=r"sample 's0' is not among the 28 stored"):
        run(other, say=lambda _: None)


def test_two_processes_prefer_what_one_does(tmp_path: Path) -> None:
    """Pairs with an image, with two and with none are dealt to them as they come."""
    file = write_pairs(tmp_path, "preference")
    loss = "stage.preference.loss"
    options = [*pairs_of(tmp_path), sparse(tmp_path), f"{loss}.kind=ipo", f"{loss}.balance=0"]
    options += ["stage.preference.steps=1"]
    expected = run(load(file, options), say=lambda _: None)[0].history
    options += ["stage.preference.micro_batch=1", f"out={tmp_path / 'two'}"]
    for curve in on_ranks(2, tiny.on_a_rank, tmp_path, file, *options):
        for ours, theirs in zip(curve, expected, strict=True):
            for name in ("loss", "preference", *REPORTED):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


class Plain(mk.DistillMixin, tf.Trainer):
    """A trainer of someone else's."""


def test_pairs_in_a_trainer_of_someone_elses_teach_to_prefer(tmp_path: Path) -> None:
    """After some steps the chosen answers have become likelier, by more than in the teacher."""
    file = write_pairs(tmp_path, "preference")
    sparse(tmp_path)
    config = load(file, pairs_of(tmp_path))
    (student, processor), (teacher, _) = (load_vlm(tmp_path / x) for x in ("sparse", "teacher"))
    freeze(student, "projector", "experts", "router")
    arguments = TrainingArguments(
        str(tmp_path / "plain"), max_steps=8, per_device_train_batch_size=4, use_cpu=True,
        remove_unused_columns=False, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    objective = llava_mod.preference("sigmoid", backend="eager", diagnostics=True)
    trainer = Plain(
        model=student, teacher=teacher, objective=objective, args=arguments,
        train_dataset=open_data(config.data, processor, "preferences", "chat", pairs=True),
        data_collator=Collator(processor),
    )  # fmt: skip
    trainer.train()
    first, *_, last, _ = trainer.state.log_history
    assert set(REPORTED) <= first.keys() and first["balance"] > 0
    assert last["reward_margin"] > first["reward_margin"] + 0.1
    assert last["preference"] < first["preference"]
