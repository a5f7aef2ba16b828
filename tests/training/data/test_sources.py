"""Do rows of HF data sets become the samples they say, from tables, files and streams?"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from tests.training.llava_files import entry, paint, write
from tests.training.tiny_processors import qwen2_5_vl
from training.config import Config, DataConfig, SourceConfig
from training.data.chat import ChatEncoder
from training.data.dataset import SampleDataset
from training.data.encoding import Encoding
from training.data.item import IGNORE
from training.data.load import epoch_size, open_data, order_of
from training.data.messages import parse_messages
from training.data.records import DataError, Place, Sample
from training.data.sources import open_source, row_sample
from training.data.stream import StreamDataset
from training.settings import ConfigError, build, differences, dump, load

PLACE = Place(Path("d"), "row 0")


@cache
def processor() -> Any:
    return qwen2_5_vl()


def user(*parts: Any) -> dict[str, Any]:
    content = [{"type": "image"} if part is None else part for part in parts]
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
    return {"role": "user", "content": content}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def rows(tmp_path: Path) -> Any:
    """Five rows: two images, one image (no place said), text, a system turn, one image."""
    red, blue = (Image.new("RGB", (32, 32), c) for c in ((200, 0, 0), (0, 0, 200)))
    table = [
        ([user("which ", None, " or ", None), said("the first")], [red, blue]),
        ([user("what colour"), said("red")], [red]),
        ([user("say a"), said("a"), user("and b"), said("b")], []),
        ([{"role": "system", "content": "be brief"}, user("hi"), said("ho")], []),
        ([user(None, "what colour"), said("blue")], [blue]),
    ]
    return datasets.Dataset.from_list(
        [
            {"id": f"r{i}", "messages": json.dumps(messages), "images": images}
            for i, (messages, images) in enumerate(table)
        ],
        features=datasets.Features(
            {
                "id": datasets.Value("string"),
                "messages": datasets.Value("string"),
                "images": datasets.List(datasets.Image()),
            }
        ),
    ).map(lambda row: {"messages": [with_keys(m) for m in json.loads(row["messages"])]})


def with_keys(message: dict[str, Any]) -> dict[str, Any]:
    """A table has one type a column: every message is a list of parts, with every key."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return message | {"content": [{"text": None} | part for part in parts]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("rows")
    table = rows(root)
    table.save_to_disk(root / "saved")
    table.to_parquet(root / "rows.parquet")
    return root


def source(path: Path, **options: Any) -> SourceConfig:
    return SourceConfig(path=str(path), **options)


def dataset(*sources: SourceConfig, root: Path = Path("."), **options: Any) -> SampleDataset:
    opened = [open_source(one, f"s[{i}]", str(root)) for i, one in enumerate(sources)]
    return SampleDataset(opened, processor(), **options)


@pytest.mark.parametrize("name", ["saved", "rows.parquet"])
def test_rows_become_samples(saved: Path, name: str) -> None:
    data = dataset(source(saved / name))
    assert [sample.id for sample in data.samples] == ["r0", "r1", "r2", "r3", "r4"]
    assert data.samples[0].turns == (("which <image> or <image>", "the first"),)
    assert data.samples[1].turns == (("<image>what colour", "red"),)  # no place said: first
    assert data.samples[3].system == "be brief"
    assert [len(data[i]["image_lens"]) for i in range(5)] == [2, 1, 0, 0, 1]
    assert [len(sample.images) for sample in data.samples] == [2, 1, 0, 0, 1]
    first, last = data[1]["pixel_values"], data[4]["pixel_values"]  # pyright: ignore
    assert not torch.equal(first, last)  # each row its own image


def test_streamed_rows_are_the_same_items_in_an_order_of_the_seed(saved: Path) -> None:
    parts = {tuple(item["input_ids"].tolist()) for item in dataset(source(saved / "saved"))}  # pyright: ignore

    def stream(seed: int) -> list[tuple[int, ...]]:
        sources = [source(saved / "saved", stream=True)]
        data = StreamDataset(sources, ".", Encoding(processor()), seed=seed, buffer=5)
        return [tuple(item["input_ids"].tolist()) for item in islice(data, 12)]

    first = stream(0)
    assert set(first[:5]) == set(first[5:10]) == parts  # it starts again where it ends
    assert first[:5] != first[5:10] and first == stream(0) != stream(1)


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


def test_several_sources_with_images_of_their_own(
    saved: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    paint(tmp_path / "a.png", 9, size=32)
    llava = write(tmp_path / "d.json", [entry("<image>\nwhat", "a coat", image="a.png")])
    named = user({"type": "image", "image": "a.png"}, "and this")
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": [named, said("the coat")]}))
    data = dataset(source(saved / "saved"), source(llava), source(path), root=tmp_path)
    assert len(data) == 7
    assert torch.equal(data[5]["pixel_values"], data[6]["pixel_values"])  # pyright: ignore
    monkeypatch.chdir(tmp_path.parent)  # a root that is relative to where one stands
    near = dataset(source(llava), source(path), root=Path(tmp_path.name))
    assert torch.equal(near[0]["pixel_values"], near[1]["pixel_values"])  # pyright: ignore
    weighted = dataset(source(saved / "saved", weight=2.0), source(llava), root=tmp_path)
    order = list(weighted.sampler(2, 0, group=True))
    assert len(order) == 11 and order.count(5) == 1


@pytest.mark.parametrize(
    ("messages", "n_images", "message"),
    [
        ([], 0, "field 'messages': got list"),
        (["q"], 0, r"messages\[0\]'.*expected an object"),
        ([user("q"), user("q")], 0, r"messages\[1\].role': got str 'user', expected 'assistant'"),
        ([user("q")], 0, "an answer to every question"),
        ([user(None, "q"), said("a")], 2, r"1 place\(s\) for 2 image"),
        ([user("q"), said("see <image>")], 0, "in an answer"),
        ([user("q"), said(" ")], 0, "expected some text"),
        ([user({"type": "video"}), said("a")], 0, r"content\[0\]'.*an image part"),
        ([{"role": "user", "content": 3}, said("a")], 0, "a string or a list of parts"),
    ],
)
def test_faulty_rows_say_where(messages: Any, n_images: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_messages(PLACE, messages, n_images)


@pytest.mark.parametrize(
    ("role", "field", "value"),
    [
        ("assistant", "reasoning_content", "hm"),
        ("assistant", "thinking", "hm"),
        ("assistant", "tool_calls", [{"function": {"name": "f"}}]),
        ("assistant", "weight", 0.0),
        ("user", "images", ["a.png"]),
    ],
)
def test_what_a_message_says_besides_is_refused_by_name(role: str, field: str, value: Any) -> None:
    def talk(given: Any) -> list[dict[str, Any]]:
        return [m | ({field: given} if m["role"] == role else {}) for m in (user("q"), said("a"))]

    number = ("user", "assistant").index(role)
    with pytest.raises(DataError, match=rf"field 'messages\[{number}\]\.{field}': got "):
        parse_messages(PLACE, talk(value), 0)
    parse_messages(PLACE, talk(None), 0)  # as a table fills it in
    sample, _ = parse_messages(PLACE, [user("q") | {"name": "Ada"}, said("a")], 0)
    assert sample.unread == ("messages[].name",)


def test_a_part_that_sets_its_own_size_is_refused() -> None:
    part = {"type": "image", "image": "a.png", "max_pixels": 99}
    with pytest.raises(DataError, match=r"content\[0\]\.max_pixels': got int 99"):
        parse_messages(PLACE, [user(part, "q"), said("a")], None)


def test_columns_are_read_refused_or_listed(tmp_path: Path) -> None:
    talk = [with_keys(message) for message in (user("what"), said("red"))]
    films = [None, None, {"bytes": b"film", "path": None}]
    table = [
        {"messages": talk, "system": "be brief", "kind": 3, "tools": None, "video": films[0]},
        {"messages": talk, "system": "", "kind": None, "tools": "[{}]", "video": films[1]},
        {"messages": talk, "system": None, "kind": None, "tools": "[]", "video": films[2]},
    ]
    rows = datasets.Dataset.from_list([row | {"licence": "by"} for row in table])
    rows = rows.cast_column("video", datasets.Video(decode=False)).cast_column(
        "video", datasets.Video()
    )
    rows.save_to_disk(tmp_path / "rows")
    config = source(tmp_path / "rows")
    tabled = list(open_source(config, "s", ".").samples())
    streamed = [row_sample(row, i, config, 0) for i, row in enumerate(table)]
    for entries, unread in ((tabled, ("licence",)), (streamed, ())):
        first, tools, film = entries
        assert isinstance(first, Sample) and (first.system, first.kind) == ("be brief", "3")
        assert first.unread == unread
        assert "row 1: field 'tools': got str '[{}]'" in str(tools)
        assert "row 2: field 'video': got dict" in str(film)
    both = [{"role": "system", "content": "s"}, user("q"), said("a")]
    with pytest.raises(DataError, match=r"field 'system': got str 't', .*besides messages\[0\]"):
        parse_messages(PLACE, both, 0, "t")


@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
def test_rows_of_a_file_with_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"messages": [user("q"), said("a")]}] * 2)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(dataset(source(path))) == 2


def test_skip_bad_lists_rows_and_a_damaged_image_names_its_row(tmp_path: Path) -> None:
    talk = [with_keys(message) for message in (user("what"), said("red"))]
    table = [
        {"messages": talk, "images": [{"bytes": b"no image", "path": None}]},
        {"messages": talk, "images": []},
    ]
    datasets.Dataset.from_list(table).save_to_disk(tmp_path / "bad")
    data = dataset(source(tmp_path / "bad"), skip_bad=True)
    assert len(data) == 1 and "row 0" in data.skipped[0].reason
    with pytest.raises(DataError, match=r"row 0: field 'image\[0\]': got bytes: Unidentified"):
        dataset(source(tmp_path / "bad"))[0]


def test_a_source_that_is_not_there_or_has_no_messages(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"s\[0\]: .*nowhere.parquet cannot be read"):
        dataset(source(tmp_path / "nowhere.parquet"))
    with pytest.raises(ConfigError, match="expected one named 'talk'"):
        dataset(source(saved / "saved", messages="talk"))


def test_sources_are_settings(tmp_path: Path) -> None:
    given = {"data": {"sources": [{"path": "a.json"}, {"path": "b", "weight": 2}]}}
    config = build(Config, given)
    assert config.data.sources == (source(Path("a.json")), source(Path("b"), weight=2.0))
    (tmp_path / "c.yaml").write_text(dump(config))
    assert load(Config, tmp_path / "c.yaml") == config
    assert list(differences(config, config)) == []
    for value, message in (
        ({"weight": 0}, r"data\.sources\[1\]\.weight: got 0, expected float > 0"),
        ({"weigth": 1}, r"data\.sources\[1\]\.weigth: no such field; nearest is 'weight'"),
        (3, r"data\.sources\[1\]: got 3, expected a mapping"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(Config, {"data": {"sources": [{"path": "a"}, value]}})
    with pytest.raises(ConfigError, match="expected list of SourceConfig"):
        DataConfig(sources=3)  # pyright: ignore[reportArgumentType]


def test_labels_of_a_row_are_its_answer(saved: Path) -> None:
    data = dataset(source(saved / "saved"))
    assert isinstance(data.encoder, ChatEncoder) and isinstance(data.samples[0], Sample)
    item = data[0]
    answer = item["labels"][item["labels"] != IGNORE]
    assert data.encoder.tokenizer.decode(answer) == "the first<|im_end|>"


def test_a_run_names_its_data_once_and_streams_all_or_none(saved: Path) -> None:
    one, two = source(saved / "saved"), source(saved / "saved", weight=2.0)
    data = open_data(DataConfig(sources=(one, two)), processor(), "conversations", "chat")
    assert epoch_size(data) == 15
    assert order_of(DataConfig(sources=(one, two)), data, 2, 0) is not None
    assert order_of(DataConfig(), dataset(one), 2, 0) is None  # a plain shuffle is the trainer's
    with pytest.raises(ConfigError, match=r"'x\.json' and 1 of data\.sources, expected one"):
        both = DataConfig(sources=(one,), conversations="x.json")
        open_data(both, processor(), "conversations", "chat")
    streamed = dataclasses.replace(two, stream=True)
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.stream: got false"):
        open_data(DataConfig(sources=(one, streamed)), processor(), "conversations", "chat")
    alone = open_data(DataConfig(sources=(streamed,)), processor(), "conversations", "chat")
    assert epoch_size(alone) is None
