"""Each benchmark's own format, and what is said of files that are not in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.data.records import DataError
from training.evaluation import questions as q
from training.evaluation.benchmarks import BENCHMARKS, ask
from training.evaluation.questions import Files, Question

PEOPLE = [{"answer": f"net {i // 4}", "answer_id": i + 1} for i in range(10)]
VQA = {
    "data_subtype": "val2014",
    "questions": [{"image_id": 42, "question": "What is it?", "question_id": 420}],
}
ANNOTATIONS = {"annotations": [{"question_id": 420, "answer_type": "other", "answers": PEOPLE}]}
TEXTVQA = {
    "data": [{"question_id": 5, "image_id": "ab1", "question": "Brand?", "answers": ["x", "y"]}]
}
GQA = {
    "201": {
        "imageId": "n1",
        "question": "Is it red?",
        "answer": "yes",
        "types": {"structural": "verify"},
    }
}
POPE = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "no"}
SCIENCE = {
    "question": "Which is solid?",
    "choices": ["ice", "steam"],
    "answer": 0,
    "hint": "Look.",
    "image": "image.png",
    "split": "test",
    "subject": "natural science",
}
COCO = {
    "images": [{"id": 9, "file_name": "c.jpg"}],
    "annotations": [{"image_id": 9, "caption": "A dog."}, {"image_id": 9, "caption": "a cat"}],
}
INSTANCES = {
    "images": [{"id": 9, "file_name": "c.jpg"}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}],
    "annotations": [{"image_id": 9, "category_id": n} for n in (5, 1, 5)],
}
CAPTIONS = {"annotations": [{"image_id": 9, "caption": "A dog."}]}
KARPATHY = {
    "images": [
        {
            "filepath": "val2014",
            "filename": "d.jpg",
            "cocoid": 7,
            "split": split,
            "sentences": [{"raw": "A dog."}],
        }
        for split in ("test", "train")
    ]
}
LLAVA = [
    {
        "id": "z",
        "image": "e.png",
        "conversations": [
            {"from": "human", "value": "what is this\n<image>"},
            {"from": "gpt", "value": "a coat"},
        ],
    }
]
NET = tuple(f"net {i // 4}" for i in range(10))
CASES = {
    "vqav2": (VQA, 420, "What is it?", "COCO_val2014_000000000042.jpg", NET, "other"),
    "textvqa": (TEXTVQA, 5, "Brand?", "ab1.jpg", ("x", "y"), ""),
    "gqa": (GQA, "201", "Is it red?", "n1.jpg", ("yes",), "verify"),
    "pope": (POPE, 1, POPE["text"], "a.jpg", ("no",), ""),
    "scienceqa": (
        {"8": SCIENCE, "9": {**SCIENCE, "image": None}, "10": {**SCIENCE, "split": "val"}},
        "8",
        "Context: Look.\nWhich is solid?\nA. ice\nB. steam",
        "test/8/image.png",
        ("A",),
        "natural science",
    ),
    "coco": (COCO, 9, "", "c.jpg", ("A dog.", "a cat"), ""),
    "chair": (INSTANCES, 9, "", "c.jpg", ("dog", "cat", "A dog."), ""),
    "karpathy": (KARPATHY, 7, "", "val2014/d.jpg", ("A dog.",), ""),
    "llava": (LLAVA, "z", "what is this", "e.png", ("a coat",), ""),
}


def files(root: Path, content: Any, **more: Any) -> Files:
    (root / "q.json").write_text(json.dumps(content))
    return Files(root / "q.json", root, **more)


@pytest.mark.parametrize("name", CASES)
def test_each_format_becomes_questions(name, tmp_path):
    content, number, text, image, answers, kind = CASES[name]
    more = {}
    if beside := {"vqav2": ANNOTATIONS, "chair": CAPTIONS}.get(name):
        more["annotations"] = tmp_path / "a.json"
        more["annotations"].write_text(json.dumps(beside))
    where = files(tmp_path, content, **more)
    found = BENCHMARKS[name].read(where)
    assert found == [Question(number, text, (tmp_path / image,), answers, kind)]
    with pytest.raises(DataError, match="1 of 1 files missing, the first .*" + Path(image).name):
        q.checked(found, where)
    (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(tmp_path / image)
    assert q.checked(found, where) == found


def test_all_benchmarks_have_a_case():
    assert CASES.keys() == BENCHMARKS.keys()


def test_tests_without_answers(tmp_path):
    """The published test splits: test-dev's images are those of test."""
    test = {**VQA, "data_subtype": "test-dev2015"}
    (question,) = q.read_vqav2(files(tmp_path, test))
    assert question.images == (tmp_path / "COCO_test2015_000000000042.jpg",)
    assert question.answers == ()
    (image,) = q.read_coco(files(tmp_path, {"images": COCO["images"]}))
    assert image.answers == ()


def test_prompts():
    pope = BENCHMARKS["pope"]
    question = Question(1, "Is there a dog?")
    assert ask(pope, question) == (
        "Is there a dog?\nAnswer the question using a single word or phrase."
    )
    assert ask(pope, question, "") == "Is there a dog?"
    assert ask(BENCHMARKS["coco"], Question(1, "")).startswith("Provide a one-sentence caption")


FAULTS = {
    "vqav2": (
        {"data_subtype": "val2014", "questions": [{"question_id": 1}]},
        r"q.json, questions\[0\]: field 'image_id': got nothing \(there is question_id\)",
    ),
    "textvqa": (GQA, "q.json: field 'data': got nothing .there is 201., expected list"),
    "gqa": ([1], "field 'file': got list .*, expected dict"),
    "pope": ({**POPE, "label": "maybe"}, "line 1: field 'label': got 'maybe', expected 'yes'"),
    "scienceqa": ({"8": {**SCIENCE, "answer": 2}}, "'answer': got 2, expected the place of one of"),
    "coco": ({**COCO, "annotations": [{"image_id": 3, "caption": "x"}]}, "'id': got 9, expected"),
    "karpathy": ({"images": ["x"]}, r"images\[0\]: field 'entry': got str 'x', expected dict"),
    "llava": (
        [
            {
                **LLAVA[0],
                "image": ["e.png", "f.png"],
                "conversations": LLAVA[0]["conversations"] * 2,
            }
        ],
        r"conversations\[0\].value': got 'what is this\\n<image>', expected all 2 images",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_place(name, tmp_path):
    content, message = FAULTS[name]
    with pytest.raises(DataError, match=message):
        BENCHMARKS[name].read(files(tmp_path, content))


def test_unusable_files(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json: field 'file': got no such file"):
        q.read_gqa(Files(tmp_path / "gone.json", tmp_path))
    (tmp_path / "cut.json").write_text('{"201": {"imageId": "n1"')
    with pytest.raises(DataError, match=r"expected valid json \(is the file cut short"):
        q.read_gqa(Files(tmp_path / "cut.json", tmp_path))
    where = files(tmp_path, VQA, annotations=tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"annotations": []}))
    with pytest.raises(
        DataError, match=r"'question_id': got 420, expected a question that .*a\.json"
    ):
        q.read_vqav2(where)
    with pytest.raises(DataError, match="no questions of split 'train', expected at least one"):
        q.checked([], Files(tmp_path / "q.json", tmp_path, split="train"))
    with pytest.raises(DataError, match="got 1 twice, expected each id once"):
        q.checked([Question(1, "a"), Question(1, "b")], where)
