"""Does the dataset give each entry's own ids and pixels, and refuse or list every faulty one?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.training.llava_files import SIZE, TOKENS, entry, paint, pixels, processor, write
from training.data.collate import Collator
from training.data.dataset import LlavaDataset
from training.data.item import own_bytes
from training.data.records import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, grey in (("black", 0), ("grey", 51), ("white", 255)):
        paint(tmp_path / f"{name}.png", grey)
    return tmp_path


def question(image: Any = "black.png", id: str = "e1") -> dict[str, Any]:
    return entry("<image>\nwhat is this", "a coat", image=image, id=id)


def dataset(root: Path, entries: list[Any], **options: Any) -> LlavaDataset:
    return LlavaDataset(write(root / "d.json", entries), root, processor(), **options)


def damage(root: Path, how: str) -> str:
    """Write a broken image and return its name."""
    whole = paint(root / "whole.png", 9, size=64).read_bytes()
    if how == "cut":
        (root / "bad.png").write_bytes(whole[: len(whole) // 2])
    elif how == "flipped":
        (root / "bad.png").write_bytes(whole[:45] + bytes([whole[45] ^ 0xFF]) + whole[46:])
    elif how == "empty":
        (root / "bad.png").touch()
    elif how == "not_an_image":
        (root / "bad.png").write_text("a coat")
    elif how == "cut_jpeg":
        from PIL import Image

        noise = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(0))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(root / "bad.jpg")
        content = (root / "bad.jpg").read_bytes()
        (root / "bad.png").write_bytes(content[: len(content) // 2])
    return "bad.png"


DAMAGES = ("cut", "flipped", "empty", "not_an_image", "cut_jpeg")


def test_pixels_are_the_entry_s_own_images_in_order(root: Path) -> None:
    two = entry("<image> <image> how many", "two", image=["white.png", "grey.png"])
    data = dataset(root, [question(), two, entry("what", "a bag")])
    assert len(data) == 3
    assert pixels(data[0]).shape == (1, 3, SIZE, SIZE)
    assert pixels(data[0]).unique().tolist() == [-1.0]
    both = pixels(data[1])
    assert both.shape == (2, 3, SIZE, SIZE) and both.dtype == torch.float32
    # 255 / 127.5 - 1 = 1 and 51 / 127.5 - 1 = -0.6
    torch.testing.assert_close(both.mean(dim=(1, 2, 3)), torch.tensor([1.0, -0.6]))
    assert "pixel_values" not in data[2]


def test_ids_and_labels_are_the_encoder_s(root: Path) -> None:
    data = dataset(root, [question()], template="pretrain")
    ids, labels = data[0]["input_ids"], data[0]["labels"]
    assert ids.dtype == labels.dtype == torch.int64
    image = data.sources[0].images(data.samples[0])
    encoder = data.encoding.encoders[0]
    again = encoder.item(data.samples[0], encoder.see(image))
    assert torch.equal(ids, again["input_ids"]) and torch.equal(labels, again["labels"])
    assert (ids == encoder.image_id).sum() == TOKENS


def test_first_fault_raises_by_default(root: Path) -> None:
    with pytest.raises(DataError, match=r"d\.json, index 1 \(id 'lost'\).*'image\[0\]'.*no such"):
        dataset(root, [question(), question("lost.png", "lost")])
    with pytest.raises(DataError, match=r"index 0 \(id 'e1'\).*0 <image> mark"):
        dataset(root, [entry("what", "coat", image="black.png")])


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_image_raises_when_it_is_read(root: Path, how: str) -> None:
    data = dataset(root, [question(), question(damage(root, how), "hurt")])
    assert data[0]["input_ids"].numel()
    pattern = (
        r"index 1 \(id 'hurt'\).*'image\[0\]'.*bad\.png: .*expected an image file that decodes"
    )
    with pytest.raises(DataError, match=pattern):
        data[1]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_image_is_found_at_construction_with_skip_bad(root: Path, how: str) -> None:
    bad = damage(root, how)
    data = dataset(root, [question(bad, "x"), question(id="ok"), question(bad)], skip_bad=True)
    assert [one.id for one in data.samples] == ["ok"]
    assert [(skip.index, skip.id) for skip in data.skipped] == [(0, "x"), (2, "e1")]
    assert all("bad.png" in skip.reason for skip in data.skipped)


def test_skips_are_counted_listed_and_announced(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        "not an object",
        question(id="ok"),
        question("lost.png", "lost"),
        entry("what", "a zebra", id="zebra"),
        entry("what " * 40, "a coat", id="long"),
        {**question("white.png", "ok2")},
    ]
    data = dataset(root, entries, skip_bad=True, max_length=20)
    assert [one.id for one in data.samples] == ["ok", "ok2"]
    assert pixels(data[1]).unique().tolist() == [1.0]  # ok2's own image
    assert [(skip.index, skip.id) for skip in data.skipped] == [
        (0, None),
        (2, "lost"),
        (3, "zebra"),
        (4, "long"),
    ]
    reasons = [skip.reason for skip in data.skipped]
    for reason, part in zip(
        reasons,
        ("expected a json object", "no such file", "zebra", "45 tokens, expected at most"),
        strict=True,
    ):
        assert part in reason
    printed = capsys.readouterr().out
    assert "skipped 4 of 6 entries" in printed and reasons[0] in printed


def test_jsonl_lines_that_are_not_json_are_skipped(root: Path) -> None:
    path = write(root / "d.jsonl", [question(), question(id="ok")])
    path.write_text("{broken\n" + path.read_text())
    data = LlavaDataset(path, root, processor(), skip_bad=True)
    assert [one.id for one in data.samples] == ["e1", "ok"]
    assert data.skipped[0].index == 0 and "line 1" in data.skipped[0].reason


def test_nothing_left_is_an_error(root: Path) -> None:
    with pytest.raises(DataError, match="all of its 1 entries are faulty"):
        dataset(root, [question("lost.png")], skip_bad=True)


def test_sound_data_skips_nothing_and_says_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dataset(root, [question()], skip_bad=True).skipped == []
    assert capsys.readouterr().out == ""


def test_too_long_is_an_error_that_tells_the_length(root: Path) -> None:
    # USER: + 4 image tokens + what is this + ASSISTANT: + a coat + </s> = 12
    assert dataset(root, [question()], max_length=12)[0]["input_ids"].numel() == 12
    data = dataset(root, [question()], max_length=11)
    with pytest.raises(DataError, match=r"got 12 tokens, expected at most max_length 11"):
        data[0]


def test_image_lost_after_construction_is_an_error(root: Path) -> None:
    data = dataset(root, [question()], skip_bad=True)
    (root / "black.png").unlink()
    with pytest.raises(DataError, match="FileNotFoundError"):
        data[0]


def test_what_is_kept_is_the_same_and_within_its_budget(root: Path) -> None:
    entries = [question(), question("white.png"), question("grey.png")]
    plain = dataset(root, entries)
    cached = dataset(root, entries, cache_mb=1)
    encoding, tokens = cached.encoding, own_bytes(plain[0])
    # room for two of three samples, and for the tokens of the third: they would hold its image too
    encoding.cache_left = 2 * (3 * SIZE * SIZE * 4 + tokens) + tokens
    for _ in range(2):
        for i in range(3):
            item: dict[str, Any] = dict(cached[i])
            assert torch.equal(item["pixel_values"], pixels(plain[i]))
            assert torch.equal(item["labels"], plain[i]["labels"])
            assert "kind" not in item
        cached[0].update(kind="other")  # whoever has an item may change it
    assert len(encoding.cache[0]) == len(encoding.items) == 2
    assert encoding.cache_left == tokens > 0
    assert not plain.encoding.cache[0] and not plain.encoding.items


def test_worker_processes_deliver_items_and_faults(root: Path) -> None:
    good = dataset(root, [question(), question("white.png")])
    loader = DataLoader(good, 2, num_workers=1, collate_fn=Collator(processor()))
    (batch,) = loader
    assert pixels(batch)[:, 0, 0, 0].tolist() == [-1.0, 1.0]
    bad = dataset(root, [question(damage(root, "cut"), "hurt")])
    loader = DataLoader(bad, 1, num_workers=1, collate_fn=Collator(processor()))
    with pytest.raises(DataError, match="id 'hurt'"):
        list(loader)
