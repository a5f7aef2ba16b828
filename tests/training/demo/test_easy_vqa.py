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
from training.demo.easy_vqa import captions, question_kind, write_easy_vqa
from training.demo.folder import LABELLED
from training.demo.words import build_processor
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


def read(path: Path) -> list[tuple[str, str, str, str]]:
    """(image, kind, question, answer) of each entry."""
    rows = []
    for entry in json.loads(path.read_text()):
        human, gpt = (message["value"] for message in entry["conversations"])
        rows.append((entry["image"], entry["kind"], human.removeprefix("<image>\n"), gpt))
    return rows


@pytest.mark.usefixtures("package")
def test_split_wording_and_answers_are_the_published_ones(tmp_path: Path) -> None:
    folder = write_easy_vqa(tmp_path / "out", student_n=3, progress=False)
    for split, questions in (("train", TRAIN), ("test", TEST)):
        rows = read(folder.json(split))
        assert [(q, a) for _, _, q, a in rows] == [(q, a) for q, a, _ in questions]
        assert [image for image, *_ in rows] == [f"images/{split}/{n}.png" for _, _, n in questions]
        for image, *_ in rows:
            source = tmp_path / split / Path(image).name
            assert (folder.root / image).read_bytes() == source.read_bytes()
    kinds = [kind for _, kind, _, _ in read(folder.json("train"))]
    assert kinds == ["shape", "colour", "negated", "shape", "yesno", "negated"]


@pytest.mark.usefixtures("package")
def test_captions_say_what_the_questions_said(tmp_path: Path) -> None:
    folder = write_easy_vqa(tmp_path / "out", student_n=6, progress=False)
    assert [(image, answer) for image, _, _, answer in read(folder.json("pretrain"))] == [
        ("images/train/0.png", "blue rectangle"),
        ("images/train/1.png", "circle"),
    ]


@pytest.mark.usefixtures("package")
def test_student_captions_use_the_student_s_questions_only(tmp_path: Path) -> None:
    seen = set()
    for seed in range(6):
        folder = write_easy_vqa(tmp_path / f"{seed}", student_n=2, seed=seed, progress=False)
        student = json.loads(folder.json("student_train").read_text())
        assert len(student) == 2
        assert all(entry in json.loads(folder.json("train").read_text()) for entry in student)
        file = folder.json("student_pretrain")
        assert (json.loads(file.read_text()) if file.is_file() else []) == captions(student)
        seen.add(tuple(entry["id"] for entry in student))
    assert len(seen) > 1


@pytest.mark.usefixtures("package")
def test_trains_like_anyone_s(tmp_path: Path) -> None:
    folder = write_easy_vqa(tmp_path / "out", student_n=6, progress=False)
    processor = build_processor(folder.words(), image_size=16, patch_size=8)
    for split in LABELLED:
        data = LlavaDataset(folder.json(split), folder.root, processor)
        assert "pixel_values" in data[0]


@pytest.mark.parametrize("student_n", [0, 7])
@pytest.mark.usefixtures("package")
def test_bad_student_n(tmp_path: Path, student_n: int) -> None:
    with pytest.raises(ValueError, match=f"student_n: got {student_n}, expected 1 to 6"):
        write_easy_vqa(tmp_path / "out", student_n=student_n, progress=False)
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


def test_unknown_question() -> None:
    with pytest.raises(ValueError, match="got 'why\\?'"):
        question_kind("why?")


def test_the_published_package(tmp_path: Path) -> None:
    """Where easy-vqa is installed: its real sizes, and each kind's answers and no others."""
    easy: Any = pytest.importorskip("easy_vqa", reason="easy-vqa is not installed")
    folder = write_easy_vqa(tmp_path / "out", progress=False)
    rows = read(folder.json("train")) + read(folder.json("test"))
    assert len(rows) == 38_575 + 9_673
    answers = {kind: {a for _, k, _, a in rows if k == kind} for kind in ("yesno", "negated")}
    assert answers == {"yesno": {"yes", "no"}, "negated": {"yes", "no"}}
    shapes = {"circle", "rectangle", "triangle"}
    assert {a for _, k, _, a in rows if k == "shape"} == shapes
    colours = {a for _, k, _, a in rows if k == "colour"}
    assert colours == set(easy.get_answers()) - shapes - {"yes", "no"} and len(colours) == 8
