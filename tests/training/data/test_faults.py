"""Does whatever goes wrong on a sample's way come out as the one error, with sample and file?"""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from tests.training.llava_files import entry, paint, pixels, processor, write
from tests.training.tiny_processors import llava, qwen2_5_vl, smolvlm
from training.config import SourceConfig
from training.data.check import read_data
from training.data.dataset import LlavaDataset, SampleDataset
from training.data.encoding import Encoding
from training.data.faults import DataError, Place, fault, named, short
from training.data.page import write_page
from training.data.sources import LlavaSource, open_source

ERRORS = (StopIteration("end"), KeyError("key"), OSError(5, "disk"), RuntimeError("what"))


@cache
def qwen() -> Any:
    return qwen2_5_vl()


def talk(image: Any, id: str, question: str = "<image>\nwhat", answer: str = "a coat") -> Any:
    return entry(question, answer, image=image, id=id)


def dataset(root: Path, entries: list[Any], made_by: Any, **options: Any) -> LlavaDataset:
    return LlavaDataset(write(root / "d.json", entries), root, made_by, **options)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", ["images", "see", "item"])
@pytest.mark.parametrize("made_by", [processor, qwen], ids=["llava", "chat"])
def test_every_step_from_record_to_item(
    step: str, error: Exception, made_by: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    paint(tmp_path / "a.png", 9, size=32)
    data = dataset(tmp_path, [talk("a.png", "one")], made_by())

    def fails(*_: Any) -> Any:
        raise error

    owner: Any = data.sources[0] if step == "images" else data.encoding.encoders[0]
    monkeypatch.setattr(owner, step, fails)
    expected = rf"d\.json, index 0 \(id 'one'\): field .*: got .*{type(error).__name__}: "
    with pytest.raises(DataError, match=expected):
        list(DataLoader(data, 1, collate_fn=list))  # which would end quietly at a StopIteration
    with pytest.raises(DataError, match=expected):
        data[0]


def test_memory_that_runs_out_is_no_fault_of_the_sample() -> None:
    with pytest.raises(MemoryError), named(Place(Path("d")), "image", "an image"):
        raise MemoryError


def faulty(root: Path) -> list[Any]:
    """Entries that processor, tokenizer or system refuse, in LLaVA's format."""
    paint(root / "a.png", 9, size=32)
    Image.new("RGB", (600, 2), (9, 9, 9)).save(root / "thin.png")  # longer than Qwen takes
    (root / "folder.png").mkdir()
    (root / "empty.png").touch()
    return [
        talk("thin.png", "thin"),
        talk("a.png", "surrogate", answer="a \ud83d coat"),
        talk("a.png", "\ud83d"),  # only its id: it can be trained on
        talk("\ud83d.png", "name"),
        talk("nul\0.png", "nul"),
        talk("x" * 360_000 + ".png", "long"),
        talk("data:image/png;base64," + "A" * 360_000, "url"),
        talk("folder.png", "folder"),
        talk("empty.png", "empty"),
        talk("a.png", "y" * 360_000, answer=" "),
        talk("a.png", "sound"),
    ]


SOUND = {"llava": ["thin", "\ud83d", "sound"], "chat": ["\ud83d", "sound"]}


@pytest.mark.parametrize("name", SOUND)
def test_skip_bad_goes_on_and_lists_each_with_its_place(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    entries = faulty(tmp_path)
    made_by = llava() if name == "llava" else qwen()
    data = dataset(tmp_path, entries, made_by, skip_bad=True)
    assert [sample.id for sample in data.samples] == SOUND[name]
    assert len(data.skipped) + len(data.samples) == len(entries)
    for skip in data.skipped:
        assert f"d.json, index {skip.index} (id " in skip.reason and len(skip.reason) < 1200
        skip.reason.encode()  # can be printed
    assert len([data[i] for i in range(len(data))]) == len(SOUND[name])
    assert "skipped" in capsys.readouterr().out


def test_data_check_goes_on_and_writes_its_page(tmp_path: Path) -> None:
    source = LlavaSource(write(tmp_path / "d.json", faulty(tmp_path)), tmp_path)
    report = read_data([source], Encoding(qwen()))
    assert (report.read, report.sound) == (11, 2) and sum(report.reasons.values()) == 9
    assert "image: expected images that the processor takes" in report.reasons
    write_page(report, qwen().tokenizer, 0, tmp_path / "p.html")
    assert "\\ud83d" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_without_skip_bad_the_error_names_entry_and_file(tmp_path: Path) -> None:
    entries = {str(one["id"]): one for one in faulty(tmp_path)}
    for id, message in (
        ("thin", r"got thin\.png: ValueError: absolute aspect ratio must be smaller than 200"),
        ("surrogate", "surrogates not allowed"),
        ("url", "field 'image.0.': got data URL: Unidentified"),
        ("folder", "IsADirectory|no such file"),
    ):
        with pytest.raises(DataError, match=rf"d\.json, index 0 \(id '{id}'\): .*(?:{message})"):
            dataset(tmp_path, [entries[id]], qwen())[0]


def test_a_data_url_is_an_image_of_a_llava_file_too(tmp_path: Path) -> None:
    file = paint(tmp_path / "a.png", 51, size=32).read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(file).decode()}"
    data = dataset(tmp_path, [talk(["a.png"], "1"), talk(url, "2")], processor(), skip_bad=True)
    assert (pixels(data[0]) == pixels(data[1])).all()


@pytest.mark.parametrize("system", ["see <image>", [{"type": "image"}], "see <|image_pad|>"])
def test_images_in_a_system_turn_do_not_end_the_data(system: Any, tmp_path: Path) -> None:
    """They once raised a StopIteration, which a data loader takes for the end of the data."""
    paint(tmp_path / "a.png", 9, size=32)
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": "<image> q"},
        {"role": "assistant", "content": "a"},
    ]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": messages, "images": ["a.png"]}))
    source = open_source(SourceConfig(path=str(tmp_path / "m.jsonl")), "s", str(tmp_path))
    made_by = qwen() if "pad" in str(system) else smolvlm()  # whose image token is <image>
    with pytest.raises(DataError, match="row 0"):
        list(DataLoader(SampleDataset([source], made_by), 1, collate_fn=list))


def test_long_values_are_cut_in_every_message() -> None:
    error = fault(Place(Path("d"), "row 3", "i" * 999), "text", "x" * 360_000, "less")
    assert len(str(error)) < 800 and error.id == "i" * 999
    assert "360,000 letters" in str(error) and str(error).startswith("d, row 3 (id 'iii")
    assert short("abc") == "abc" and len(short("x" * 10_000)) < 250
