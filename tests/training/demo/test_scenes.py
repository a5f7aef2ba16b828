"""Do the questions say the truth about the photographs, and do held-out ones stay held out?

Everything is checked from the outside: pixels are cut out of the written PNGs and compared with
the photos, and answers are worked out again from those photos' labels.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.llava_files import pixels
from training.data.dataset import LlavaDataset
from training.demo.config import DemoConfig, TowerConfig
from training.demo.folder import LABELLED, Record, more_questions, record, write_folder
from training.demo.garments import (
    CLASSES,
    FILES,
    PACKAGE_FOLDER,
    GarmentError,
    Photos,
    photo_arrays,
)
from training.demo.scenes import KINDS, canvases, scenes
from training.demo.tower import photo_tower
from training.demo.words import build_processor, collect_words
from training.settings import ConfigError, build

TRAIN_N, TEST_N, STUDENT_N = 1200, 400, 60


def fake_photos() -> Photos:
    """Photos of noise, no two alike, so that a cell of a scene tells which photo it is."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (700, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, 700).astype(np.uint8)
    return Photos(images[:500], labels[:500], images[500:], labels[500:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "scenes")


def write(
    out: Path, train_n: int = TRAIN_N, test_n: int = TEST_N, student_n: int = STUDENT_N
) -> Path:
    sizes = {"train_n": train_n, "test_n": test_n, "student_n": student_n}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.demo.scenes.photo_arrays", lambda _: fake_photos())
        write_folder(out, scenes(build(DemoConfig, sizes)))
    return out


def entries(folder: Path, split: str) -> list[dict]:
    return json.loads((folder / f"{split}.json").read_text())


def cells(path: Path) -> list[np.ndarray]:
    """The four photos of a written scene, cut out at the pixels the layout promises."""
    picture = np.asarray(Image.open(path))
    assert picture.shape == (64, 64, 3)
    assert (picture == picture[..., :1]).all()
    corners = ((2, 2), (2, 34), (34, 2), (34, 34))
    border = picture.copy()
    for top, left in corners:
        border[top : top + 28, left : left + 28] = 0
    assert not border.any()
    return [picture[top : top + 28, left : left + 28, 0] for top, left in corners]


def true_answer(question: str, names: list[str]) -> str:
    """The answer by the question's own words, independent of the generator's code."""
    if question == "describe the image":
        return " ".join(names)
    if question.startswith("what is at the "):
        row, column = question.removeprefix("what is at the ").split()
        return names[2 * (row == "bottom") + (column == "right")]
    if question.startswith("how many "):
        return str(Counter(names)[question.removeprefix("how many ")])
    assert question.startswith("is there any ")
    return "yes" if question.removeprefix("is there any ") in names else "no"


@pytest.mark.parametrize("split", LABELLED)
def test_answers_follow_from_the_labels_of_the_photos_in_the_picture(
    folder: Path, split: str
) -> None:
    photos = fake_photos()
    test = split == "test"
    images, labels = photos[2:] if test else photos[:2]
    label_of = {
        image.tobytes(): CLASSES[label] for image, label in zip(images, labels, strict=True)
    }
    assert len(label_of) == len(images)
    for entry in entries(folder, split):
        # A KeyError here is a photo of the other split: none may cross over.
        names = [label_of[cell.tobytes()] for cell in cells(folder / entry["image"])]
        human, gpt = entry["conversations"]
        assert human["value"].startswith("<image>\n")
        assert gpt["value"] == true_answer(human["value"].removeprefix("<image>\n"), names)


def test_counts_kinds_and_balance(folder: Path) -> None:
    train, test = entries(folder, "train"), entries(folder, "test")
    assert (len(train), len(test)) == (TRAIN_N, TEST_N)
    assert len(entries(folder, "pretrain")) == TRAIN_N // 2
    kinds = Counter(entry["kind"] for entry in train)
    assert set(kinds) == set(KINDS)
    # 30% captions and 23.3% of each other kind, within five standard deviations
    for kind in KINDS:
        share = 0.3 if kind == "caption" else 0.7 / 3
        deviation = (TRAIN_N * share * (1 - share)) ** 0.5
        assert abs(kinds[kind] - TRAIN_N * share) < 5 * deviation
    for split in (train, test):
        said = Counter(e["conversations"][1]["value"] for e in split if e["kind"] == "exist")
        assert set(said) == {"yes", "no"} and 0 <= said["yes"] - said["no"] <= 1


def test_two_questions_of_a_scene_differ(folder: Path) -> None:
    train = entries(folder, "train")
    for first, second in zip(train[::2], train[1::2], strict=True):
        assert first["image"] == second["image"] and first["kind"] != second["kind"]


def test_ids_and_images_are_unique_where_they_should_be(folder: Path) -> None:
    every = entries(folder, "pretrain") + entries(folder, "train") + entries(folder, "test")
    assert len({entry["id"] for entry in every}) == len(every)
    captions = entries(folder, "pretrain")
    assert len({entry["image"] for entry in captions}) == len(captions)
    assert {entry["kind"] for entry in captions} == {"caption"}


def test_student_sees_a_part_of_the_training_questions(folder: Path) -> None:
    student, train = entries(folder, "student_train"), entries(folder, "train")
    assert len(student) == STUDENT_N == len({entry["image"] for entry in student})
    assert all(entry in train for entry in student)
    captions = [entry for entry in student if entry["kind"] == "caption"]
    assert entries(folder, "student_pretrain") == captions and captions


def test_photos_are_used_evenly(folder: Path) -> None:
    photos = fake_photos()
    for split, images in (("train", photos.train_images), ("test", photos.test_images)):
        scenes = {entry["image"] for entry in entries(folder, split)}
        use = Counter(cell.tobytes() for name in scenes for cell in cells(folder / name))
        assert use.keys() == {image.tobytes() for image in images}
        assert max(use.values()) - min(use.values()) <= 1


def test_made_again_every_byte_is_the_same(folder: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again")
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for name in files:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_folder_trains_like_anyone_s(folder: Path) -> None:
    words = collect_words(folder / "train.json")
    processor = build_processor(words, image_size=64, patch_size=32)
    for split in LABELLED:
        template = "pretrain" if "pretrain" in split else "chat"
        data = LlavaDataset(folder / f"{split}.json", folder, processor, template=template)
        assert pixels(data[0]).shape == (1, 3, 64, 64)
        unknown = processor.tokenizer.unk_token_id
        assert all(unknown not in data[i]["input_ids"].tolist() for i in range(len(data)))


def test_finished_folder_is_reused_and_others_are_refused(tmp_path: Path) -> None:
    small = {"train_n": 8, "test_n": 4, "student_n": 4}
    first = write(tmp_path / "a", **small)
    stamp = (first / "train.json").stat().st_mtime_ns
    write(tmp_path / "a", **small)
    assert (first / "train.json").stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match="test_n = 4, expected 6"):
        write(tmp_path / "a", **small | {"test_n": 6})
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError, match="not a finished data folder"):
        write(tmp_path / "b", **small)


def test_interrupted_writing_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"train_n": 8, "test_n": 4, "student_n": 4}
    with monkeypatch.context() as patch:
        patch.setattr("training.demo.scenes.more_questions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / "a", **small)
    assert not (tmp_path / "a").exists()
    assert len(entries(write(tmp_path / "a", **small), "train")) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_n": 7}, "train_n: got 7, expected a multiple of 2"),
        ({"test_n": 0}, "test_n: got 0"),
        ({"train_n": 8, "student_n": 5}, "student_n: got 5, expected up to train_n / 2 = 4"),
    ],
)
def test_bad_sizes(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / "a", **sizes)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("sizes", [(96, 24), (64, 64), (128, 32)])
def test_a_tower_whose_patches_do_not_divide_the_cells(sizes: tuple[int, int]) -> None:
    config = TowerConfig(image_size=sizes[0], patch_size=sizes[1])
    message = f"image_size, patch_size: got {sizes[0]} and {sizes[1]}, expected 64 and a divisor"
    with pytest.raises(ConfigError, match=message):
        photo_tower(config, fake_photos())


def test_layout_is_in_reading_order() -> None:
    photos = np.stack([np.full((28, 28), value, np.uint8) for value in (10, 20, 30, 40)])
    (scene,) = canvases(photos[None])
    assert [int(scene[y, x]) for y, x in ((16, 16), (16, 48), (48, 16), (48, 48))] == [
        10,
        20,
        30,
        40,
    ]


def test_real_photographs() -> None:
    """Where the Debian package is at hand (this never fetches it), it holds what we think."""
    from training.demo.garments import CACHE

    found = [f for f in (Path("/") / PACKAGE_FOLDER, CACHE / PACKAGE_FOLDER) if f.is_dir()]
    if not found:
        pytest.skip(f"{FILES[0]} is neither installed nor fetched")
    try:
        photos = photo_arrays(found[0])
    except GarmentError as error:
        pytest.fail(str(error))
    assert np.bincount(photos.train_labels).tolist() == [6000] * 10
    assert np.bincount(photos.test_labels).tolist() == [1000] * 10
    train = {image.tobytes() for image in photos.train_images}
    assert len(train) == 60_000
    assert not any(image.tobytes() in train for image in photos.test_images)


def test_more_questions_are_drawn_without_looking_at_labels(folder: Path) -> None:
    student, asked = entries(folder, "student_train"), entries(folder, "student_questions")
    images = {entry["image"] for entry in student}
    texts = {entry["conversations"][0]["value"] for entry in student}
    assert {entry["image"] for entry in asked} == images
    for image in images:
        own = [e["conversations"] for e in asked if e["image"] == image]
        assert len(own) == len({turns[0]["value"] for turns in own}) == min(8, len(texts))
        assert all(len(turns) == 1 and turns[0]["value"] in texts for turns in own)
    lied = [record(e["id"], e["image"], e["kind"], text_of(e), "a lie") for e in student]
    assert more_questions(lied, 8) == more_questions(student, 8) == asked
    assert len({entry["id"] for entry in asked}) == len(asked)


def text_of(entry: Record) -> str:
    return entry["conversations"][0]["value"].removeprefix("<image>\n")


def test_the_development_split_is_of_images_that_students_do_not_see(folder: Path) -> None:
    dev, train = entries(folder, "dev"), entries(folder, "train")
    seen = {entry["image"] for entry in entries(folder, "student_train")}
    assert dev and all(entry in train and entry["image"] not in seen for entry in dev)
