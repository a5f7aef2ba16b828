"""A folder of one's own: what stands for the files that it does not have, and what it must have."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.training.llava_files import entry, paint, write
from training import settings
from training.cli import main
from training.data.dataset import LlavaDataset
from training.data.faults import DataError
from training.demo import tower
from training.demo.config import DemoConfig, TowerConfig
from training.demo.folder import SPLITS, write_folder
from training.demo.own import own as own_data
from training.demo.run import demo
from training.demo.words import build_processor, collect_words

SHADES = {"black": 0, "grey": 120, "white": 255}


def asked(image: str, name: str, shade: str) -> list[dict[str, Any]]:
    """What is asked of a picture: of it alone, in two turns, beside itself."""
    first, mark = "<image>\nwhat shade is it ?", "<image>"
    return [
        entry(first, shade, image=image, kind="shade") | {"id": f"{name}-0"},
        entry(first, shade, "a bag ?", "no", image=[image]) | {"id": f"{name}-1"},
        entry(f"{mark}{mark}the same ?", "yes", image=[image, image]) | {"id": f"{name}-2"},
        entry("is it a coat ?", "no") | {"id": f"{name}-3"},
    ]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files that must be there, and pictures below another folder's name."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "pics").mkdir()
    for split, n in (("train", 12), ("test", 3)):
        entries = []
        for i in range(n):
            shade = list(SHADES)[i % 3]
            image = f"pics/{split}{i}.png"
            paint(folder / image, SHADES[shade])
            entries += asked(image, f"{split}{i}", shade)
        write(folder / f"{split}.json", entries)
    return folder


@pytest.fixture
def copied(own: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(own, tmp_path / "own"))


def write_own(out: Path, data: Path, student_n: int = 1_000) -> Path:
    write_folder(out, own_data(DemoConfig(data=str(data), student_n=student_n)))
    return out


def read(folder: Path, split: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{split}.json").read_text())


def test_demo_of_a_folder_with_two_files(own: Path, tmp_path: Path) -> None:
    """Kinds, entries of several images, of several turns, of none; and no captions."""
    flags = "student_n=12 batch_size=8 teacher_sft_steps=40 dpt_steps=2 sft_steps=2 dft_steps=2"
    flags += " threads=1 tower.steps=3 tower.batch_size=4 tower.hidden=16 save_steps=4"
    given = [f"data={own}", f"out={tmp_path}", *flags.split()]
    config = settings.load(DemoConfig, None, given)
    report = demo(config)
    assert {"shade", "all"} <= set(report.rows["teacher"][0])
    assert [path.name for path in sorted((tmp_path / "teacher").glob("[0-9]-*"))] == ["1-sft"]
    distilled = sorted((tmp_path / "seed0" / "distilled").glob("[0-9]-*"))
    assert [path.name for path in distilled] == ["1-sft", "2-dft"]
    assert {rows[0]["steps"] for rows in list(report.rows.values())[2:]} >= {6}, "as all students"
    told = (report.folder / "report.md").read_text()
    assert "learned from train.json" in told and "photographs" not in told
    rows = ["--set", 'rows=["CE + KL"]', "--set", "jobs=1"]
    flag = [part for item in given for part in ("--set", item)]
    assert main(["study", "--seeds", "1", *flag, *rows]) == 0
    assert "CE + KL" in (tmp_path / "study" / "report.md").read_text()
    answered = json.loads(config.answered.read_text())
    assert all(len(one["conversations"]) % 2 == 0 for one in answered) and answered


def test_what_stands_for_files_that_are_not_there(own: Path, tmp_path: Path) -> None:
    folder = write_own(tmp_path / "data", own, student_n=12)
    train, student = json.loads((own / "train.json").read_text()), read(folder, "student_train")
    ids = {one["id"] for one in student}
    assert len(ids) == 12 < len(train) and ids < {one["id"] for one in train}
    seen = {image for one in student for image in one["image"]}
    questions, dev = read(folder, "student_questions"), read(folder, "dev")
    assert questions and all(one["image"] and set(one["image"]) <= seen for one in questions)
    assert all(one["conversations"][-1]["from"] == "human" for one in questions)
    assert not ids & {one["id"] for one in questions}
    assert dev and all(one["image"] and not set(one["image"]) & seen for one in dev)
    assert not (folder / "pretrain.json").exists()
    assert not (folder / "student_pretrain.json").exists()
    made = (folder / "train.json").stat().st_mtime_ns
    write_own(tmp_path / "data", own, student_n=12)
    assert (folder / "train.json").stat().st_mtime_ns == made
    with pytest.raises(FileExistsError, match="student_n = 12, expected 11"):
        write_own(tmp_path / "data", own, student_n=11)


def test_every_file_that_is_there_is_taken_as_it_is(copied: Path, tmp_path: Path) -> None:
    train = json.loads((copied / "train.json").read_text())
    for split in SPLITS:
        if split not in ("train", "test"):
            write(copied / f"{split}.json", train[:4])
    questions = [one | {"conversations": one["conversations"][:1]} for one in train[4:6]]
    write(copied / "student_questions.json", questions)  # open, as a teacher is asked
    folder = write_own(tmp_path / "data", copied)
    for split in SPLITS:
        theirs = json.loads((copied / f"{split}.json").read_text())
        assert [one["id"] for one in read(folder, split)] == [one["id"] for one in theirs]
    write(copied / "dev.json", train[8:])
    with pytest.raises(FileExistsError, match=r"was made with dev\.json = "):
        write_own(tmp_path / "data", copied)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no train", r"train\.json.*no such file, expected train\.json and test\.json"),
        ("no image", r"test\.json.*id 'test0-0'.*pics/test0\.png"),
        ("open", r"train\.json.*1 messages, expected an answer to every question"),
        ("few", r"train\.json.*got 2 entries.*student_n = 12.*a student_train\.json"),
        ("no more", r"student_questions\.json.*or that train\.json asks more about the images"),
        ("no other", r"dev\.json.*or that train\.json asks about other images"),
    ],
)
def test_a_fault_names_the_file_and_what_is_expected(
    copied: Path, tmp_path: Path, fault: str, message: str
) -> None:
    train = json.loads((copied / "train.json").read_text())
    if fault == "no train":
        (copied / "train.json").unlink()
    elif fault == "no image":
        (copied / "pics" / "test0.png").unlink()
    elif fault == "open":
        write(copied / "train.json", [train[0] | {"conversations": train[0]["conversations"][:1]}])
    elif fault == "few":
        write(copied / "train.json", train[:2])
    elif fault == "no more":
        write(copied / "student_train.json", train[:4])
    else:
        write(copied / "student_train.json", [one for one in train if one["id"].endswith("-0")])
    with pytest.raises(DataError) as raised:
        write_own(tmp_path / "data", copied, student_n=12)
    assert re.search(message, str(raised.value), re.DOTALL), str(raised.value)
    assert not (tmp_path / "data").exists()


def test_data_is_a_known_name_or_a_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["demo", "--data", "scene", "--out", str(tmp_path / "out")]) == 2
    expected = "data: got 'scene', expected scenes, easy-vqa or a folder that is there"
    assert expected in capsys.readouterr().err


def test_tower_refuses_questions_in_too_many_words(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_own(tmp_path / "data", own, student_n=12)
    words = collect_words(folder / "train.json")
    processor = build_processor(words, image_size=16, patch_size=8)
    monkeypatch.setattr(tower, "PROBED", 2)
    dataset = LlavaDataset(folder / "train.json", own, processor)
    expected = (
        "tower: got 1 questions about one image and 3 answers to them, expected up to 2 pairs"
    )
    with pytest.raises(settings.ConfigError, match=expected):
        tower.question_tower(TowerConfig(), dataset)
