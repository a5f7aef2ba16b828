"""Do rows of HF data sets become the samples they say, from tables, files and streams?"""

from __future__ import annotations

import base64
import json
from functools import cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.llava_files import entry, paint, write
from tests.training.tiny_processors import qwen2_5_vl
from training.config import DataConfig, SourceConfig, load
from training.data.dataset import SampleDataset
from training.data.encoding import Encoding
from training.data.item import IGNORE
from training.data.load import epoch_size, open_data, order_of
from training.data.preferences import Told
from training.data.records import DataError, Place
from training.data.sample import CHAT, Sample, placed, sample_of
from training.data.sources import open_source, row_sample
from training.data.stream import StreamDataset
from training.settings import ConfigError, changed, dump

PLACE = Place(Path("d"), "row 0")


@cache
def processor() -> Any:
    return qwen2_5_vl()


def user(*parts: Any) -> dict[str, Any]:
    content = [{"type": "image"} if part is None else part for part in parts]
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
    return {"role": "user", "content": content}


def parsed(messages: Any, n_images: int, system: str | None = None) -> Sample:
    sample, paths = sample_of(PLACE, Told(messages, "messages"), CHAT, system)
    return placed(sample, tuple(paths) or ("",) * n_images, anywhere=True)


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
        ([user(None, "q"), said("a")], 2, r"1 <image> mark\(s\) for 2 image"),
        ([user({"type": "video"}), said("a")], 0, r"content\[0\]'.*an image part"),
        ([{"role": "user", "content": 3}, said("a")], 0, "a string or a list of parts"),
    ],
)
def test_faulty_rows_say_where(messages: Any, n_images: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parsed(messages, n_images)


def test_a_part_that_sets_its_own_size_is_refused() -> None:
    part = {"type": "image", "image": "a.png", "max_pixels": 99}
    with pytest.raises(DataError, match=r"content\[0\]\.max_pixels': got int 99"):
        parsed([user(part, "q"), said("a")], 0)


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
    streamed = [row_sample(row, f"row {i}", config, 0) for i, row in enumerate(table)]
    for entries, unread in ((tabled, ("licence",)), (streamed, ())):
        first, tools, film = entries
        assert isinstance(first, Sample) and (first.system, first.kind) == ("be brief", "3")
        assert first.unread == unread
        assert "row 1: field 'tools': got str '[{}]'" in str(tools)
        assert "row 2: field 'video': got dict" in str(film)
    both = [{"role": "system", "content": "s"}, user("q"), said("a")]
    with pytest.raises(DataError, match=r"field 'system': got str 't', .*besides messages\[0\]"):
        parsed(both, 0, "t")


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


RED, BLUE = ((200, 0, 0), (0, 0, 200))


def talk(rows: int) -> list[list[dict[str, Any]]]:
    return [[with_keys(m) for m in (user(None, "what"), said(f"a {i}"))] for i in range(rows)]


def table(values: list[Any], feature: Any) -> Any:
    """Rows with one conversation about one image each, the images in a column of this type."""
    features = {"images": feature} if feature is not None else {}
    messages = datasets.Dataset.from_dict({"messages": talk(len(values))})
    images = datasets.Dataset.from_dict(
        {"images": values}, features=datasets.Features(features) if features else None
    )
    return datasets.concatenate_datasets([messages, images], axis=1)


def painted(*colours: tuple[int, int, int]) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), colour) for colour in colours]


def columns() -> dict[str, tuple[list[Any], Any]]:
    """Two images, red and blue, in every way that a column can hold one image a row."""
    images = painted(RED, BLUE)
    files = []
    for image in images:
        buffer = BytesIO()
        image.save(buffer, "PNG")
        files.append(buffer.getvalue())
    arrays = [np.asarray(image) for image in images]
    urls = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in files]
    picture = datasets.Image()
    return {
        "decoded": (images, picture),
        "undecoded": (images, datasets.Image(decode=False)),
        "list": ([[image] for image in images], datasets.List(picture)),
        "nested": ([[[image]] for image in images], datasets.List(datasets.List(picture))),
        "bytes": (files, datasets.Value("binary")),
        "array": (arrays, datasets.Array3D((32, 32, 3), "uint8")),
        "arrays": ([[a] for a in arrays], datasets.List(datasets.Array3D((32, 32, 3), "uint8"))),
        "lists of numbers": ([a.tolist() for a in arrays], None),
        "data URL": (urls, datasets.Value("string")),
        "data URLs": ([[url] for url in urls], datasets.List(datasets.Value("string"))),
    }


@pytest.mark.parametrize("form", columns())
@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
def test_one_image_a_row_in_every_form(form: str, stream: bool, tmp_path: Path) -> None:
    table(*columns()[form]).save_to_disk(tmp_path / "one")
    expected = {
        f"row {i}": processor().image_processor(images=[image], return_tensors="pt").pixel_values
        for i, image in enumerate(painted(RED, BLUE))
    }
    one = source(tmp_path / "one", stream=stream)
    items: Any = islice(StreamDataset([one], ".", Encoding(processor())), 2) if stream else None
    for item in items or [dataset(one)[i] for i in range(2)]:
        assert torch.equal(item["pixel_values"], expected.pop(item["sample_id"]))  # pyright: ignore
    assert not expected


def test_a_row_without_its_image_and_one_that_names_another_are_faults(tmp_path: Path) -> None:
    picture = datasets.Image()
    table([painted(RED)[0], None], picture).save_to_disk(tmp_path / "null")
    data = dataset(source(tmp_path / "null"), skip_bad=True)
    assert len(data) == 1
    assert "row 1: field 'messages': got 1 <image> mark(s) for 0 image(s)" in data.skipped[0].reason
    table([[painted(RED)[0]], [None]], datasets.List(picture)).save_to_disk(tmp_path / "nulls")
    data = dataset(source(tmp_path / "nulls"), skip_bad=True)
    assert "row 1: field 'image[0]': got NoneType None" in data.skipped[0].reason
    named = user({"type": "image", "image": "a.png"}, {"type": "image", "image": "b.png"}, "q")
    row = {"messages": [named, said("a")], "images": ["c.png"]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"got 1 image\(s\) in the column and 2 named in messages"):
        dataset(source(tmp_path / "m.jsonl"))


def test_two_sources_never_share_an_image_by_its_name(tmp_path: Path) -> None:
    """The same relative name under two roots, the same rows of two splits or columns."""
    for folder, grey in (("a", 10), ("b", 200)):
        (tmp_path / folder).mkdir()
        paint(tmp_path / folder / "x.png", grey, size=32)
        write(tmp_path / folder / "d.json", [entry("<image> q", "a", image="x.png")])
    red, blue = (table([image], datasets.Image()) for image in painted(RED, BLUE))
    splits = datasets.DatasetDict({"train": red, "test": blue})
    splits.save_to_disk(tmp_path / "splits")
    other = blue.select_columns(["images"]).rename_column("images", "pictures")
    datasets.concatenate_datasets([red, other], axis=1).save_to_disk(tmp_path / "columns")
    sources = [
        source(tmp_path / "a" / "d.json", image_root=str(tmp_path / "a")),
        source(tmp_path / "b" / "d.json", image_root=str(tmp_path / "b")),
        source(tmp_path / "splits", split="train"),
        source(tmp_path / "splits", split="test"),
        source(tmp_path / "columns"),
        source(tmp_path / "columns", images="pictures"),
    ]
    plain, cached = (dataset(*sources, cache_mb=mb) for mb in (0, 64))
    for _ in range(2):
        for i in range(len(sources)):
            assert torch.equal(cached[i]["pixel_values"], plain[i]["pixel_values"])  # pyright: ignore
    for i in (0, 2, 4):
        assert not torch.equal(plain[i]["pixel_values"], plain[i + 1]["pixel_values"])  # pyright: ignore
    same = dataset(sources[0], changed(sources[0], weight=2.0), cache_mb=64)
    assert len([same[0], same[1]]) == 2 and len(same.encoding.cache[0]) == 1  # one root, one image


def test_a_source_that_is_not_there_or_has_no_messages(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"s\[0\].path: .*nowhere.parquet: no such"):
        dataset(source(tmp_path / "nowhere.parquet"))
    with pytest.raises(ConfigError, match="expected one named 'talk'"):
        dataset(source(saved / "saved", messages="talk"))


def test_sources_are_settings(tmp_path: Path) -> None:
    given = {"data": {"sources": [{"path": "a.json"}, {"path": "b", "weight": 2}]}}
    config = changed(load(), **given)
    assert config.data.sources == (source(Path("a.json")), source(Path("b"), weight=2.0))
    (tmp_path / "c.yaml").write_text(dump(config))
    assert load(tmp_path / "c.yaml") == config


def test_labels_of_a_row_are_its_answer(saved: Path) -> None:
    data = dataset(source(saved / "saved"))
    item = data[0]
    answer = item["labels"][item["labels"] != IGNORE]
    assert processor().tokenizer.decode(answer) == "the first<|im_end|>"


def test_a_run_names_its_data_once_and_streams_all_or_none(saved: Path) -> None:
    one, two = source(saved / "saved"), source(saved / "saved", weight=2.0)
    data = open_data(DataConfig(sources=(one, two)), processor(), "conversations", "chat")
    assert epoch_size(data) == 15
    assert order_of(DataConfig(sources=(one, two)), data, 2, 0) is not None
    assert order_of(DataConfig(), dataset(one), 2, 0) is None  # a plain shuffle is the trainer's
    with pytest.raises(ConfigError, match=r"'x\.json' and 1 of data\.sources, expected one"):
        both = DataConfig(sources=(one,), conversations="x.json")
        open_data(both, processor(), "conversations", "chat")
    streamed = changed(two, stream=True)
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.stream: got false"):
        open_data(DataConfig(sources=(one, streamed)), processor(), "conversations", "chat")
    alone = open_data(DataConfig(sources=(streamed,)), processor(), "conversations", "chat")
    assert epoch_size(alone) is None
