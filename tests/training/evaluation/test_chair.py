"""CHAIR against figures worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.cli import main
from training.data.records import DataError
from training.evaluation.chair import Objects, chair, plural
from training.evaluation.intervals import reported
from training.evaluation.questions import Files, Question, read_chair

CATEGORIES = ("person", "dog", "hot dog", "cup", "bus", "knife", "dining table", "tv")
SYNONYMS = """person, man, woman, child
dining table, table, desk

cup, mug
"""


def folder(root: Path, synonyms: str | None = SYNONYMS) -> Files:
    """Image 1: a person and a dog, and a cup by a caption; image 2: a bus; image 3: nothing."""
    there = [(1, 0), (1, 1), (1, 1), (2, 4)]
    instances: dict[str, Any] = {
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(CATEGORIES)],
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (1, 2, 3)],
        "annotations": [{"image_id": i, "category_id": 10 + k} for i, k in there],
    }
    said = ((1, "A man drinks from a mug."), (1, "A dog"), (2, "nothing here"), (3, "a wall"))
    captions = {"annotations": [{"image_id": i, "caption": text} for i, text in said]}
    (root / "instances.json").write_text(json.dumps(instances))
    (root / "captions.json").write_text(json.dumps(captions))
    for i in (1, 2, 3):
        Image.new("RGB", (2, 2)).save(root / f"{i}.png")
    if synonyms is not None:
        (root / "synonyms.txt").write_text(synonyms)
    words = None if synonyms is None else root / "synonyms.txt"
    return Files(root / "instances.json", root, root / "captions.json", synonyms=words)


#: Of the three images.
SAID = [
    "Two men and their dogs sit at a table with mugs. The woman eats a hot dog.",
    # person, dog, [dining table], cup, person, [hot dog]: 6 mentions, 2 not there
    "The buses are late; a bus-stop.",  # bus, bus: 2 mentions
    "Knives on tables, TVs.",  # [knife], [dining table], [tv]
]
EXPECTED = {"chair_i": 5 / 11, "chair_s": 2 / 3, "recall": 4 / 4, "mentions": 11 / 3}


def test_by_hand(tmp_path: Path) -> None:
    files = folder(tmp_path)
    found = chair(read_chair(files), SAID, Objects.of(files))
    assert reported(found, ())["scores"] == pytest.approx(EXPECTED)


def test_without_synonyms_and_captions_fewer_words_are_known(tmp_path: Path) -> None:
    """men, table, mug and woman are no names of categories: [hot dog], [knife], [tv] of 6."""
    whole = folder(tmp_path, None)
    files = Files(whole.questions, whole.images)
    found = chair(read_chair(files), SAID, Objects.of(files))
    want = {"chair_i": 3 / 6, "chair_s": 2 / 3, "recall": 2 / 3, "mentions": 2.0}
    assert reported(found, ())["scores"] == pytest.approx(want)


def test_an_answer_without_objects_and_no_answers() -> None:
    objects = Objects({("dog",): "dog"})
    asked = [Question(1, "", (), ("dog",))]
    nothing = {"chair_i": 0, "chair_s": 0, "recall": 0, "mentions": 0}
    for found in (chair(asked, ["a wall"], objects), chair([], [], objects)):
        assert reported(found, ())["scores"] == nothing


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("dog", "dogs"), ("bus", "buses"), ("bench", "benches"), ("box", "boxes"),
        ("puppy", "puppies"), ("monkey", "monkeys"), ("knife", "knives"), ("calf", "calves"),
        ("giraffe", "giraffes"), ("woman", "women"), ("human", "humans"), ("person", "people"),
    ],
)  # fmt: skip
def test_plurals(one: str, many: str) -> None:
    assert plural(one) == many


@pytest.mark.parametrize(
    ("synonyms", "words"),
    [
        ("person, man\nbeast, dog", "line 2: field 'category': got 'beast', expected one of per"),
        ("cup, glass\ntv, glasses", "line 2: .*'glasses' for 'tv' and for 'cup'"),
        ("tv, dogs", "'dogs' for 'tv' and for 'dog'"),
    ],
)
def test_bad_synonyms_are_named(synonyms: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        Objects.of(folder(tmp_path, synonyms))


def test_bad_annotations_are_named(tmp_path: Path) -> None:
    files = folder(tmp_path)
    found = json.loads(files.questions.read_text())
    found["annotations"][2]["category_id"] = 99
    files.questions.write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"annotations\[2\]: field 'category_id': got 99"):
        read_chair(files)


def test_the_command_scores_descriptions_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written before, so that no model is loaded; other synonyms score them anew."""
    folder(tmp_path)
    out = tmp_path / "eval"
    out.mkdir()
    lines = [
        {"question_id": i, "question": "", "prompt": "", "answer": text, "ended": True}
        for i, text in enumerate(SAID, 1)
    ]
    (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["eval", str(tmp_path), "--benchmark", "chair", "--images", str(tmp_path)]
    command += ["--questions", str(tmp_path / "instances.json"), "--out", str(out)]
    command += ["--annotations", str(tmp_path / "captions.json")]
    assert main([*command, "--synonyms", str(tmp_path / "synonyms.txt")]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores["scores"] == pytest.approx(EXPECTED)
    assert scores["intervals"].keys() == EXPECTED.keys()
    assert scores["synonyms"].endswith("synonyms.txt")
    assert main(command) == 0
    assert json.loads((out / "scores.json").read_text())["synonyms"] is None
    printed = capsys.readouterr().out
    assert "chair i" in printed and "0.4545" in printed and "95% confidence" in printed
