"""What does a stream give to whom? Every row, under its own name, to one reader a pass."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader

import training.data.stream
from tests.gloo import on_ranks
from tests.training import tiny
from tests.training.data.test_sources import (
    columns,
    dataset,
    processor,
    rows,
    said,
    source,
    table,
    user,
    with_keys,
)
from training import loop, settings, trainer
from training.config import Config, DataConfig
from training.data.encoding import Encoding
from training.data.item import IGNORE
from training.data.load import open_data, order_of
from training.data.records import DataError
from training.data.sources import load_rows
from training.data.stream import StreamDataset
from training.settings import ConfigError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("rows")
    rows(root).save_to_disk(root / "saved")
    return root


def test_streamed_rows_are_the_same_items_in_an_order_of_the_seed(saved: Path) -> None:
    parts = {tuple(item["input_ids"].tolist()) for item in dataset(source(saved / "saved"))}  # pyright: ignore

    def stream(seed: int) -> list[tuple[int, ...]]:
        sources = [source(saved / "saved", stream=True)]
        data = StreamDataset(sources, ".", Encoding(processor()), seed=seed, buffer=5)
        return [tuple(item["input_ids"].tolist()) for item in islice(data, 12)]

    first = stream(0)
    assert set(first[:5]) == set(first[5:10]) == parts  # it starts again where it ends
    assert first[:5] != first[5:10] and first == stream(0) != stream(1)


def test_a_stream_is_not_grouped(saved: Path) -> None:
    data: Any = StreamDataset([source(saved / "saved", stream=True)], ".", Encoding(processor()))
    config = DataConfig(order="grouped")
    with pytest.raises(ConfigError, match=r"^data\.order: got 'grouped', expected 'shuffled'"):
        order_of(config, data, 4, 0)


def test_streams_are_mixed_by_weight(saved: Path, tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "q"}, said("only text")]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(talk))
    heavy = source(tmp_path / "talk.jsonl", stream=True, weight=9.0)
    light = source(saved / "saved", stream=True)
    mixed = StreamDataset([heavy, light], ".", Encoding(processor()), buffer=2)
    items = [item["sample_id"] for item in islice(mixed, 60)]
    assert 46 <= items.count("row 0") < 60
    bad = {"messages": [{"role": "user", "content": "q"}]}
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(bad)}\n{json.dumps(talk)}")
    one = [source(tmp_path / "bad.jsonl", stream=True)]
    with pytest.raises(DataError, match="1 messages"):
        list(islice(StreamDataset(one, ".", Encoding(processor())), 3))
    kept = StreamDataset(one, ".", Encoding(processor()), skip_bad=True)
    assert len(list(islice(kept, 3))) == 3 and kept.skipped >= 2


def test_a_damaged_image_in_a_stream_is_one_fault(tmp_path: Path) -> None:
    good = columns()["bytes"][0][0]
    values = [{"bytes": good, "path": None}, {"bytes": b"no picture", "path": None}]
    table(values, datasets.Image()).save_to_disk(tmp_path / "bad")
    one = [source(tmp_path / "bad", stream=True)]
    kept = StreamDataset(one, ".", Encoding(processor()), skip_bad=True)
    assert [item["sample_id"] for item in islice(kept, 3)] == ["row 0"] * 3 and kept.skipped >= 2
    with pytest.raises(DataError, match=r"row 1: field 'image\[0\]': got bytes: Unidentified"):
        list(islice(StreamDataset(one, ".", Encoding(processor())), 2))


def test_a_stream_that_decodes_ahead_has_its_rows_as_they_are_stored(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """As `datasets` streams pictures from a hub, in threads that raise for a whole batch."""
    values = [{"bytes": b"no picture", "path": None}, columns()["undecoded"][0][0]]
    table(values, datasets.Image()).save_to_disk(tmp_path / "bad")
    ahead = load_rows(source(tmp_path / "bad", stream=True), "s").decode(num_threads=2)
    monkeypatch.setattr(training.data.stream, "load_rows", lambda *_: ahead)
    kept = StreamDataset([source(tmp_path)], ".", text(), skip_bad=True)
    assert [item["sample_id"] for item in islice(kept, 3)] == ["row 1"] * 3 and kept.skipped >= 2


def test_a_stream_s_rows_are_numbered_by_their_source_in_every_pass(tmp_path: Path) -> None:
    """And so the image cache gives each row its own pixels."""
    grey = [Image.new("RGB", (32, 32), (i * 30,) * 3) for i in range(8)]
    table(grey, datasets.Image()).save_to_disk(tmp_path / "grey")
    one = [source(tmp_path / "grey", stream=True)]
    expected = [
        processor().image_processor(images=[image], return_tensors="pt").pixel_values
        for image in grey
    ]
    stream = StreamDataset(one, ".", Encoding(processor(), cache_mb=64), buffer=5)
    passes = [list(islice(iter(stream), 24))[i : i + 8] for i in (0, 8, 16)]
    orders = [[int(item["sample_id"].split()[-1]) for item in items] for items in passes]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] != list(range(8)) and orders[0] != orders[1]
    for items, order in zip(passes, orders, strict=True):
        for item, row in zip(items, order, strict=True):
            answer = item["labels"][item["labels"] != IGNORE]
            assert stream.encoding.encoders[0].tokenizer.decode(answer) == f"a {row}<|im_end|>"  # pyright: ignore
            assert torch.equal(item["pixel_values"], expected[row])  # pyright: ignore
    words = [with_keys(message) for message in (user("q"), said("a"))]
    bad = [words[: 1 if i == 5 else 2] for i in range(9)]
    rows = datasets.Dataset.from_dict({"messages": bad})
    rows.save_to_disk(tmp_path / "bad", num_shards=3)
    with pytest.raises(DataError, match=r"bad, row 5: field 'messages': got 1 messages"):
        list(islice(StreamDataset([source(tmp_path / "bad", stream=True)], ".", text()), 20))


def text() -> Encoding:
    return Encoding(processor())


def test_rows_of_several_shards_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines = [json.dumps({"messages": [user("q"), said(f"{name}{i}")]}) for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    one = source(tmp_path, stream=True)
    items = list(islice(StreamDataset([one], ".", text(), buffer=2), 12))
    for part in (items[:6], items[6:]):
        names = {item["sample_id"] for item in part}
        assert names == {f"shard {k}, row {i}" for k in range(2) for i in range(3)}


def talks(folder: Path, shards: int, rows: int, faulty: int | None = None) -> Any:
    """A source of short talks in so many files, of which the row of this number is faulty."""
    folder.mkdir()
    for k in range(shards):
        lines = [{"messages": [user(folder.name), said(f"{k} {i}")]} for i in range(rows)]
        if faulty is not None:
            lines[faulty]["messages"].pop()
        (folder / f"{k}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return source(folder, stream=True)


def readers(one: Any, world: int, **options: Any) -> list[StreamDataset]:
    ranks = ({"rank": rank, "world": world} for rank in range(world))
    return [StreamDataset([one], ".", text(), buffer=3, **rank, **options) for rank in ranks]


def names(items: Iterator[Any], count: int) -> list[str]:
    return [item["sample_id"] for item in islice(items, count)]


# Rows of one shard, whole shards, shards that do not go round, fewer shards than ranks.
@pytest.mark.parametrize(("shards", "rows", "world"), [(1, 12, 3), (4, 3, 2), (3, 4, 2), (2, 8, 4)])
def test_every_row_goes_to_one_rank_in_a_pass(
    tmp_path: Path, shards: int, rows: int, world: int
) -> None:
    shard_names = [f"shard {k}, " for k in range(shards)] if shards > 1 else [""]
    every = {f"{shard}row {i}" for shard in shard_names for i in range(rows)}
    ranks = readers(talks(tmp_path / "talks", shards, rows), world)
    read = [names(iter(rank), 2 * len(every)) for rank in ranks]
    for one in read:  # every part comes round, and again in another order
        assert set(one[: len(every)]) == set(one[len(every) :]) == every
        assert one[: len(every)] != one[len(every) :]
    if shards % world == 0 or shards < world:
        size = len(every) // world
        for at in range(0, 2 * len(every), size):
            assert sorted(n for one in read for n in one[at : at + size]) == sorted(every)


def test_workers_share_a_pass_and_one_has_the_order_of_none(tmp_path: Path) -> None:
    one = talks(tmp_path / "talks", 1, 8)

    def read(workers: int) -> list[str]:
        config = DataConfig(sources=(one,), workers=workers, shuffle_buffer=3)
        data: Any = open_data(config, processor(), "conversations", "chat")
        return names(iter(DataLoader(data, batch_size=None, num_workers=workers)), 16)

    alone, two = read(0), read(2)  # more of them than shards
    assert read(1) == alone
    for part in (alone[:8], alone[8:], two[:8], two[8:]):
        assert sorted(part) == [f"row {i}" for i in range(8)]


def test_ranks_draw_their_sources_apart(tmp_path: Path) -> None:
    two = [talks(tmp_path / name, 1, 1) for name in ("a", "b")]
    ranks = [StreamDataset(two, ".", text(), rank=rank, world=2) for rank in range(2)]
    drawn = [[tuple(i["input_ids"].tolist()) for i in islice(rank, 24)] for rank in ranks]
    assert drawn[0] != drawn[1]


def test_a_row_that_one_rank_lacks_is_no_fault_and_a_source_of_faults_is(tmp_path: Path) -> None:
    """Two rows for two ranks: in every pass one of them has nothing but the faulty one."""
    ranks = readers(talks(tmp_path / "half", 1, 2, faulty=0), 2, skip_bad=True)
    for rank in ranks:
        assert names(iter(rank), 5) == ["row 1"] * 5 and rank.skipped >= 4
    single = readers(talks(tmp_path / "single", 1, 1), 3)  # fewer rows than ranks
    assert [names(iter(rank), 4) for rank in single] == [["row 0"] * 4] * 3
    for rank in readers(talks(tmp_path / "none", 2, 1, faulty=0), 2, skip_bad=True):
        with pytest.raises(DataError, match=r"every row is faulty \(2 skipped\)"):
            next(iter(rank))


def test_faults_that_workers_meet_are_counted(tmp_path: Path, capfd: Any) -> None:
    (stream,) = readers(talks(tmp_path / "talks", 2, 3, faulty=1), 1, skip_bad=True)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert len(names(iter(loader), 12)) == 12
    assert stream.skipped >= 4
    assert capfd.readouterr().out.count("row 1: field 'messages': got 1 messages") == 1


# --- two processes --------------------------------------------------------------------------------

STEPS = 6


def run_config(root: Path, name: str) -> Config:
    """Eight rows in one file, two a rank and step: three passes."""
    base = tiny.run_config(root, root / name, stages=("sft",))
    sources = [{"path": str(root / "rows.jsonl"), "stream": True}]
    data = {"conversations": None, "held_out": None, "sources": sources, "shuffle_buffer": 3}
    stage = {"sft": {"steps": STEPS, "batch_size": 4, "micro_batch": 1}}
    return settings.changed(base, data=data, stage=stage, save_steps=2)


def seen(config: Config, dies_in: int | None = None) -> tuple[list[list[str]], list[float]]:
    """The samples of each step of this rank, and the curve; the run may die in a step."""
    original, steps = trainer.DistillTrainer.compute_loss, [[] for _ in range(STEPS)]

    def watched(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == dies_in:
            raise RuntimeError("died")
        steps[self.state.global_step] += inputs["sample_ids"]
        return original(self, model, inputs, *args, **kwargs)

    trainer.DistillTrainer.compute_loss = watched
    try:
        (result,) = loop.run(config, say=lambda _: None)
        return steps, [entry["loss"] for entry in result.history]
    except RuntimeError:
        return steps, []
    finally:
        trainer.DistillTrainer.compute_loss = original


def work(root: Path) -> Any:
    """On each rank: a run, and one that is stopped and started again."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}  # as a launcher says
    whole = seen(run_config(root, "whole"))
    seen(run_config(root, "again"), dies_in=3)
    return whole, seen(run_config(root, "again"))


def test_two_processes_stream_each_row_once_a_pass_and_go_on_after_a_stop(tmp_path: Path) -> None:
    tiny.run_config(tmp_path, tmp_path / "unused")
    lines = [{"messages": [user(f"say {w}"), said(f"this is {w}")]} for w in tiny.WORDS[:8]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "ranks").mkdir()
    ranks = on_ranks(2, work, tmp_path / "ranks", tmp_path)
    for k in range(0, STEPS, 2):
        of_a_pass = [row for (steps, _), _ in ranks for step in steps[k : k + 2] for row in step]
        assert sorted(of_a_pass) == [f"row {i}" for i in range(8)]
    for (steps, curve), (again, its) in ranks:
        assert again[2:] == steps[2:] and again[:2] == [[], []]  # from the checkpoint on
        assert its == curve == ranks[0][0][1] and len(curve) == STEPS
