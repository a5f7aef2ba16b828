"""Does a stage over the rows of one kind of samples train on those and no others?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import mllmkd_kernels as mk
from mllmkd_kernels.methods import llava_kd
from tests.training import tiny
from training import settings
from training.data.records import DataError
from training.loop import run

STAGES = llava_kd.STAGES


def of_rows(rows: str = "response", **settings: Any) -> mk.Objective:
    """Cross-entropy.

    Args:
        rows: over which rows.
    """
    return mk.Objective(mk.RowTerm("ce", 1.0, rows), **settings)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: Any) -> Path:
    """Beside 14 samples of three kinds those of one, without their kind."""
    rows = [dataclasses.replace(s, objective=of_rows) if s.name == "sft" else s for s in STAGES]
    monkeypatch.setattr(llava_kd, "STAGES", tuple(rows))
    tiny.run_config(tmp_path, tmp_path / "unused")
    samples = json.loads((tmp_path / "data.json").read_text())
    kept = [sample for sample in samples if sample.pop("kind") == "colour"]
    assert 0 < len(kept) < len(samples)
    (tmp_path / "colour.json").write_text(json.dumps(kept))
    return tmp_path


def first_loss(root: Path, rows: str, data: str = "data.json", **more: Any) -> float:
    """Of a step over all samples."""
    count = len(json.loads((root / data).read_text()))
    config = tiny.run_config(root, root / f"{data}-{len(list(root.iterdir()))}", stages=("sft",))
    stage = {"sft": {"loss": {"rows": rows}, "steps": 1, "batch_size": count, "micro_batch": 1}}
    data_of_run = {"conversations": str(root / data), "held_out": None, **more}
    (result,) = run(settings.changed(config, stage=stage, data=data_of_run), say=lambda _: None)
    return result.history[0]["loss"]


def test_the_loss_is_that_of_the_samples_of_the_kind(root: Path) -> None:
    of_kind = first_loss(root, "response:colour")  # micro-batches of one: most have no such row
    assert of_kind == pytest.approx(first_loss(root, "response", "colour.json"), rel=1e-5)
    assert of_kind != pytest.approx(first_loss(root, "response"), rel=1e-3)


def test_a_kind_that_no_sample_is_of_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"no sample is of kind 'cot', .*: colour, pair, text$"):
        first_loss(root, "response:cot")


def test_rows_of_a_kind_and_packing_are_refused_before_the_first_step(root: Path) -> None:
    config = tiny.run_config(root, root / "packed", stages=("sft",))
    stage = {"sft": {"loss": {"rows": "response:colour"}, "micro_batch": 2}}
    packed = settings.changed(config, stage=stage, data={"packing": True})
    with pytest.raises(
        settings.ConfigError, match=r"packing: got true, .*: ce tells samples apart"
    ):
        run(packed, say=lambda _: None)
