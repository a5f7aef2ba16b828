"""Does `data check` count what is there, and show exactly the tokens that are trained?"""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf
from PIL import Image

from tests.training.llava_files import entry, paint, write
from tests.training.tiny_processors import llava, qwen2_5_vl
from training.cli import main
from training.data.check import Report, read_data, reason_of
from training.data.encoding import Encoding
from training.data.item import IGNORE
from training.data.page import boxes, rows_of, write_page
from training.data.sources import LlavaSource


@pytest.fixture
def source(tmp_path: Path) -> LlavaSource:
    paint(tmp_path / "a.png", 90, size=32)
    entries = [
        entry("<image>\nwhat is é", "a <b>bag</b> 袋\nhere", image="a.png", id="one"),
        entry("what", "two", "and", "three", source="web", licence=""),
        entry("<image><image> both", "yes", image=["a.png", "a.png"]),
        entry("<image> q", "a", image="lost.png"),
        entry("<image> q", "a", image="gone.png"),
        entry("q", "  "),
        entry("q", "far too long " * 60),
    ]
    return LlavaSource(write(tmp_path / "d.json", entries), tmp_path)


def checked(source: LlavaSource, **options: Any) -> tuple[Report, Encoding]:
    encoding = Encoding(qwen2_5_vl(), max_length=120)
    return read_data([source], encoding, **options), encoding


def test_every_entry_is_counted_once(source: LlavaSource) -> None:
    report, encoding = checked(source)
    assert (report.read, report.sound) == (7, 3) and report.images == {0: 1, 1: 1, 2: 1}
    items = [shown.item for shown in report.shown]
    assert report.lengths == [len(item["input_ids"]) for item in items]
    assert report.labels == sum(int((item["labels"] != IGNORE).sum()) for item in items)
    assert report.image_tokens == 3 * 4  # 32 x 32 pixels: 4 x 4 patches, merged 2 x 2
    assert sum(count for _, _, count in report.histogram()) == 3
    assert sorted(report.reasons.values()) == [1, 1, 2]
    lost = "image[]: expected an image file that decodes whole"
    assert report.reasons[lost] == 2 and "lost.png" in report.examples[lost][0]
    assert any("max_length 120" in reason for reason in report.reasons)
    assert report.unread == {"source": 1}
    one, _ = checked(source, limit=1)
    assert one.read == 1 and encoding.max_length == 120


def test_samples_longer_than_the_model_s_positions_are_noted(source: LlavaSource) -> None:
    report, _ = checked(source)
    longest = max(report.lengths)
    assert checked(source, positions=longest)[0].notes == []
    (note,) = checked(source, positions=longest - 1)[0].notes
    assert note.startswith(f"1 samples are longer than the model's {longest - 1:,} positions")
    assert f"(up to {longest:,} tokens)" in note


def test_the_page_colours_exactly_the_labels(source: LlavaSource, tmp_path: Path) -> None:
    report, encoding = checked(source)
    tokenizer = encoding.encoders[0].tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    for shown in report.shown:
        html = "".join(boxes(shown.item, tokenizer, 0))
        trained = re.findall(r"<span class='t y(?: s)?'>(.*?)</span>", html, re.S)
        text = unescape("".join(trained)).replace("<br>", "").replace("·", " ").replace("⏎", "\n")
        answers = "".join(f"{answer}<|im_end|>" for _, answer in shown.sample.turns)
        assert text == answers
    write_page(report, tokenizer, 0, tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert page.count("<img ") == 3 and "<b>bag</b>" not in page  # the entry's text is escaped
    assert "袋" in page and "é" in page  # letters of several tokens are whole
    assert "http" not in page and "src='data:image/jpeg" in page


def test_conversions_of_pictures_are_counted(tmp_path: Path) -> None:
    paint(tmp_path / "plain.png", 90, size=32)
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 32)).save(tmp_path / "lying.jpg", exif=exif)
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "deep.png")
    names = ["plain.png", "clear.png", "clear.png", "lying.jpg", "deep.png"]
    entries = [entry("<image> q", "a", image=name, id=name) for name in names]
    source = LlavaSource(write(tmp_path / "d.json", entries), tmp_path)
    report, encoding = checked(source)
    assert report.conversions == {
        "transparent, laid on white": 2,
        "turned as EXIF says": 1,
        "uint16 scaled to 8 bits": 1,
    }
    assert ("images converted", "2 of 5: transparent, laid on white") in list(rows_of(report))
    write_page(report, encoding.encoders[0].tokenizer, 0, tmp_path / "p.html")  # pyright: ignore[reportAttributeAccessIssue]
    page = (tmp_path / "p.html").read_text()
    assert "2 of 5: transparent, laid on white" in page and "32 x 48" in page  # upright


def test_image_tokens_are_one_box(source: LlavaSource) -> None:
    report, encoding = checked(source)
    one: Any = encoding.encoders[0]
    html = "".join(boxes(report.shown[2].item, one.tokenizer, one.image_id))
    assert html.count("image &times; 4") == 2


def test_reasons_leave_out_what_is_the_entry_s_own() -> None:
    place = (
        "d.json, index {} (id 'a'): field 'image[{}]': got no such file: x{}.png, expected a file"
    )
    assert reason_of(place.format(1, 0, 7)) == reason_of(place.format(2, 3, 9))


def test_command(source: LlavaSource, tmp_path: Path, capsys: Any) -> None:
    llava().save_pretrained(tmp_path / "p")
    typed = ["data", "check", "--json", str(source.path), "--image-root", str(tmp_path)]
    outs = ["--html", str(tmp_path / "o.html")]
    tf.LlavaConfig(text_config=tf.LlamaConfig(max_position_embeddings=9)).save_pretrained(
        tmp_path / "p"
    )
    assert main([*typed, "--processor", str(tmp_path / "p"), *outs, "--samples", "2"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"note +\d samples are longer than the model's 9 positions", said)
    assert re.search(r"fields not read +source: 1\n", said)
    assert re.search(r"would be skipped +3\n", said) and "2 x image[]: no such file" not in said
    assert re.search(r"entries read +7\n", said)
    assert (tmp_path / "o.html").read_text().count("class=sample") == 2
    # captions as the stages of the method read them: here in a conversation
    method = tmp_path / "c.yaml"
    method.write_text("method: llava-mod\n")
    more = ["--processor", str(tmp_path / "p"), *outs, "--use", "captions"]
    assert main([*typed, *more, "--config", str(method)]) == 0
    assert re.search(r"would be skipped +3\n", capsys.readouterr().out)
    assert main(typed) == 2 and "--processor: expected with --json" in capsys.readouterr().err
