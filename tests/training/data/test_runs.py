"""Do runs train from sources: ordered as asked, packed, streamed, and the same after a stop?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import IterableDataset

from tests.training import tiny
from training import loop, settings
from training.config import Config
from training.data.records import DataError
from training.loop import run

STAGE = {"steps": 5, "batch_size": 4, "micro_batch": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("runs")


def config(root: Path, name: str, **data: Any) -> Config:
    """One SFT stage of five steps; the second pass over the data begins within it."""
    base = tiny.run_config(root, root / name, stages=("sft",))
    plan = {"conversations": None, "held_out": None, **data}
    return settings.changed(base, data=plan, stage={"sft": STAGE}, save_steps=2)


def losses(config: Config) -> list[float]:
    (result,) = run(config, say=lambda _: None)
    return [entry["loss"] for entry in result.history]


def test_a_grouped_weighted_run_goes_on_as_it_was(root: Path) -> None:
    data = {
        "sources": [
            {"path": str(root / "data.json"), "weight": 0.5},
            {"path": str(root / "captions.json")},
        ],
        "order": "grouped",
    }
    whole = losses(config(root, "whole", **data))
    again = config(root, "again", **data)
    tiny.killed(again, 3)
    assert losses(again) == whole
    shuffled = losses(config(root, "shuffled", **data | {"order": "shuffled"}))
    assert len(whole) == 5 and whole != shuffled


def test_a_packed_run_has_the_curve_of_a_padded_one(root: Path) -> None:
    data = {"conversations": str(root / "data.json")}
    padded = losses(config(root, "padded", **data))
    packed = losses(config(root, "packed", **data, packing=True))
    # the same sums in another order: fp32 rounding, grown over five steps of Adam at 1e-2
    assert packed == pytest.approx(padded, rel=1e-3)


def test_a_streamed_run_sees_all_images_of_a_batch(root: Path) -> None:
    """They are more than its samples: two images a row."""
    paths = [str(root / "images" / f"{name}.png") for name in list(tiny.COLOURS)[:2]]
    parts = [{"type": "image", "image": path} for path in paths]
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": "what colour"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red and green"}]},
    ]
    (root / "two.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 4)
    data = {"sources": [{"path": str(root / "two.jsonl"), "stream": True}]}
    indexed = {"sources": [{"path": str(root / "two.jsonl")}]}  # all rows are alike: so is the run
    assert losses(config(root, "two", **data)) == losses(config(root, "indexed", **indexed))
    endless = config(root, "endless", **data)
    endless = settings.changed(endless, stage={"sft": {"steps": None}})
    with pytest.raises(settings.ConfigError, match="a streamed source has no epochs"):
        run(endless, say=lambda _: None)


class Short(IterableDataset[Any]):
    """A stream that has nothing left in its second pass."""

    def __init__(self, data: Any, count: int) -> None:
        self.items, self.encoding = [data[i] for i in range(count)], data.encoding
        self.entries = data.entries

    def __iter__(self) -> Iterator[Any]:
        items, self.items = self.items, []
        return iter(items)


def test_a_stage_of_fewer_steps_than_planned_is_not_done(root: Path, monkeypatch: Any) -> None:
    planned = config(root, "short", conversations=str(root / "data.json"))
    whole = loop.load_data

    def short(*args: Any) -> Any:
        return Short(whole(*args), 12)  # three steps of five

    with monkeypatch.context() as patch:
        patch.setattr(loop, "load_data", short)
        patch.setattr(loop, "epoch_size", lambda _: None)
        patch.setattr(loop, "order_of", lambda *_: None)
        with pytest.raises(DataError, match=r"1-sft: the data ended after step 3 of 5"):
            run(planned, say=lambda _: None)
    assert not (root / "short" / "1-sft" / "model").exists()
    assert len(losses(planned)) == 5  # with its data whole, the same command continues
