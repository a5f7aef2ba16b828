"""Do runs train from sources: ordered as asked, packed, streamed, and the same after a stop?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training import tiny
from training import settings, trainer
from training.config import Config
from training.loop import run

STAGE = {"steps": 5, "batch_size": 4, "micro_batch": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("runs")


def config(root: Path, name: str, **data: Any) -> Config:
    """One SFT stage of five steps; the second pass over the data begins within it."""
    base = tiny.run_config(root, root / name, stages=("sft",))
    plan = {"conversations": None, "held_out": None, **data}
    return settings.build(Config, {"data": plan, "sft": STAGE, "save_steps": 2}, base=base)


def losses(config: Config) -> list[float]:
    (result,) = run(config, say=lambda _: None)
    return [entry["loss"] for entry in result.history]


def stopped_then_continued(config: Config, monkeypatch: Any) -> list[float]:
    """The curve of a run that dies in step 4 and is started again."""
    original = trainer.DistillTrainer.compute_loss

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise RuntimeError("died")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.DistillTrainer, "compute_loss", dies)
        with pytest.raises(RuntimeError, match="died"):
            run(config, say=lambda _: None)
    return losses(config)


def test_a_grouped_weighted_run_goes_on_as_it_was(root: Path, monkeypatch: Any) -> None:
    data = {
        "sources": [
            {"path": str(root / "data.json"), "weight": 0.5},
            {"path": str(root / "captions.json")},
        ],
        "order": "grouped",
    }
    whole = losses(config(root, "whole", **data))
    assert stopped_then_continued(config(root, "again", **data), monkeypatch) == whole
    shuffled = losses(config(root, "shuffled", **data | {"order": "shuffled"}))
    assert len(whole) == 5 and whole != shuffled


def test_a_packed_run_has_the_curve_of_a_padded_one(root: Path) -> None:
    data = {"conversations": str(root / "data.json")}
    padded = losses(config(root, "padded", **data))
    packed = losses(config(root, "packed", **data, packing=True))
    # the same sums in another order: fp32 rounding, grown over five steps of Adam at 1e-2
    assert packed == pytest.approx(padded, rel=1e-3)


def test_a_streamed_run_goes_on_as_it_was(root: Path, monkeypatch: Any) -> None:
    names = list(tiny.COLOURS)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {name}"},
                {"role": "assistant", "content": f"this is {name}"},
            ]
        }
        for name in names
    ]
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = {"sources": [{"path": str(root / "rows.jsonl"), "stream": True}], "shuffle_buffer": 3}
    whole = losses(config(root, "stream", **data))
    assert stopped_then_continued(config(root, "stream-again", **data), monkeypatch) == whole
    endless = settings.build(Config, {"sft": {"steps": None}}, base=config(root, "endless", **data))
    with pytest.raises(settings.ConfigError, match="a streamed source has no epochs"):
        run(endless, say=lambda _: None)
