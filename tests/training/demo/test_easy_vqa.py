"""Is easy-VQA carried over as published: split, wording, answers, images?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.training.llava_files import paint
from training.data.dataset import LlavaDataset
from training.demo.config import DemoConfig
from training.demo.easy_vqa import captions, easy_vqa, question_kind
from training.demo.folder import LABELLED, write_folder
from training.demo.words import build_processor, collect_words
from training.settings import ConfigError

# (question, answer, image): the published wording of each kind
TRAIN: list[tuple[str, str, int]] = [
    ("what is the blue shape?", "rectangle", 0),
    ("what color is the shape?", "blue", 0),
    ("is there not a red shape?", "yes", 0),
    ("what shape is present?", "circle", 1),
    ("does the image contain a circle?", "yes", 1),
    ("is no teal shape present?", "yes", 2),
]
TEST: list[tuple[str, str, int]] = [("what is the color of the circle?", "gray", 0)]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in with the published package's functions; image n of a split has its own grey."""
    module = ModuleType("easy_vqa")
    for split, questions, grey in (("train", TRAIN, 10), ("test", TEST, 200)):
        (tmp_path / split).mkdir()
        paths = {n: str(paint(tmp_path / split / f"{n}.png", grey + n)) for _, _, n in questions}
        setattr(module, f"get_{split}_image_paths", lambda paths=paths: paths)
        columns = [list(column) for column in zip(*questions, strict=True)]
        setattr(module, f"get_{split}_questions", lambda columns=columns: columns)
    monkeypatch.setitem(sys.modules, "easy_vqa", module)
    return module


def write_easy_vqa(out: Path, student_n: int = 1_000) -> Path:
    write_folder(out, easy_vqa(DemoConfig(data="easy-vqa", student_n=student_n)))
    return out


def read(path: Path) -> list[tuple[str, str, str, str]]:
    """(image, kind, question, answer) of each entry."""
    rows = []
    for entry in json.loads(path.read_text()):
        human, gpt = (message["value"] for message in entry["conversations"])
        rows.append((entry["image"], entry["kind"], human.removeprefix("<image>\n"), gpt))
    return rows


@pytest.mark.usefixtures("package")
def test_split_wording_and_answers_are_the_published_ones(tmp_path: Path) -> None:
    folder = write_easy_vqa(tmp_path / "out", student_n=3)
    for split, questions in (("train", TRAIN), ("test", TEST)):
        rows = read(folder / f"{split}.json")
        assert [(q, a) for _, _, q, a in rows] == [(q, a) for q, a, _ in questions]
        assert [image for image, *_ in rows] == [f"images/{split}/{n}.png" for _, _, n in questions]
        for image, *_ in rows:
            source = tmp_path / split / Path(image).name
            assert (folder / image).read_bytes() == source.read_bytes()
    kinds = [kind for _, kind, _, _ in read(folder / "train.json")]
    assert kinds == ["shape", "colour", "negated", "shape", "yesno", "negated"]


@pytest.mark.usefixtures("package")
def test_captions_say_what_the_questions_said(tmp_path: Path) -> None:
    folder = write_easy_vqa(tmp_path / "out", student_n=6)
    assert [(image, answer) for image, _, _, answer in read(folder / "pretrain.json")] == [
        ("images/train/0.png", "blue rectangle"),
        ("images/train/1.png", "circle"),
    ]


@pytest.mark.usefixtures("package")
def test_student_captions_use_the_student_s_questions_only(tmp_path: Path) -> None:
    seen = set()
    for n in range(1, 7):
        folder = write_easy_vqa(tmp_path / f"{n}", student_n=n)
        student = json.loads((folder / "student_train.json").read_text())
        assert len(student) == n
        assert all(entry in json.loads((folder / "train.json").read_text()) for entry in student)
        file = folder / "student_pretrain.json"
        assert (json.loads(file.read_text()) if file.is_file() else []) == captions(student)
        seen.add(tuple(entry["id"] for entry in student))
    assert len(seen) == 6


@pytest.mark.usefixtures("package")
def test_trains_like_anyone_s(tmp_path: Path) -> None:
    folder = write_easy_vqa(tmp_path / "out", student_n=6)
    words = collect_words(folder / "train.json", folder / "test.json")
    processor = build_processor(words, image_size=16, patch_size=8)
    for split in LABELLED:
        data = LlavaDataset(folder / f"{split}.json", folder, processor)
        assert "pixel_values" in data[0]


@pytest.mark.usefixtures("package")
def test_too_large_a_student_n(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="student_n: got 7, expected up to 6"):
        write_easy_vqa(tmp_path / "out", student_n=7)
    assert not (tmp_path / "out").exists()


def test_missing_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)  # import then fails as if not installed
    with pytest.raises(ConfigError, match=r"pip install --no-deps easy-vqa==1\.0"):
        write_easy_vqa(tmp_path / "out")


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what is the color of the shape?", "colour"),
        ("what color is the triangle?", "colour"),
        ("what shape does the image contain?", "shape"),
        ("is a teal shape present?", "yesno"),
        ("does the image not contain a red shape?", "negated"),
        ("is no circle present?", "negated"),
    ],
)
def test_kinds(question: str, kind: str) -> None:
    assert question_kind(question) == kind


def test_the_published_package(tmp_path: Path) -> None:
    """Where easy-vqa is installed: its real sizes, and each kind's answers and no others."""
    easy: Any = pytest.importorskip("easy_vqa", reason="easy-vqa is not installed")
    folder = write_easy_vqa(tmp_path / "out")
    rows = read(folder / "train.json") + read(folder / "test.json")
    assert len(rows) == 38_575 + 9_673
    answers = {kind: {a for _, k, _, a in rows if k == kind} for kind in ("yesno", "negated")}
    assert answers == {"yesno": {"yes", "no"}, "negated": {"yes", "no"}}
    shapes = {"circle", "rectangle", "triangle"}
    assert {a for _, k, _, a in rows if k == "shape"} == shapes
    colours = {a for _, k, _, a in rows if k == "colour"}
    assert colours == set(easy.get_answers()) - shapes - {"yes", "no"} and len(colours) == 8
