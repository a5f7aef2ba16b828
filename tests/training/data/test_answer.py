"""A teacher answers a data set: what comes out is what it says, in the form that went in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from tests.training import tiny
from tests.training.llava_files import write
from training import loop, settings
from training.cli import main
from training.config import SourceConfig
from training.data.answer import Request, answer
from training.data.records import DataError
from training.data.sample import IMAGE_MARK
from training.data.sources import open_source
from training.generate import load
from training.settings import ConfigError


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A teacher that talks, 14 entries of data and two whose last question is open."""
    root = tiny.write_data(tmp_path_factory.mktemp("answer"))
    tiny.write_talker(root / "teacher", tiny.write_tower(root / "tower"))
    entries = json.loads((root / "data.json").read_text())
    for i, (image, question) in enumerate((("red", "colour"), ("blue", "what is this and"))):
        asked = [{"from": "human", "value": f"<image>\n{question}"}]
        entries.append({"id": f"o{i}", "image": f"images/{image}.png", "conversations": asked})
    entries[0] |= {"source": "web", "system": "say this"}
    write(root / "open.json", entries)
    return root


def request(root: Path, out: Path, **more: Any) -> Request:
    values: dict[str, Any] = {"data": str(root / "open.json"), "max_new_tokens": 12, **more}
    return Request(str(root / "teacher"), out=out, image_root=str(root), **values)


def said(model: Any, processor: Any, root: Path, entry: dict[str, Any], most: int) -> list[str]:
    """What transformers alone writes to one entry, turn by turn, after its own answers."""
    names = entry.get("image", [])
    paths = [root / name for name in ([names] if isinstance(names, str) else names)]
    images = [Image.open(path).convert("RGB") for path in paths]
    questions = [m["value"] for m in entry["conversations"] if m["from"] == "human"]
    text, answers = f"{entry['system']} " if "system" in entry else "", []
    for question in questions:
        text += f"USER: {question} ASSISTANT:"
        inputs = processor(images=images or None, text=text, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=most)[0]
        written = processor.tokenizer.decode(
            ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        answers.append(written.strip())
        text += f" {answers[-1]}</s>"
    return answers


def test_from_data_to_answers_to_training(root: Path, tmp_path: Path, capsys: Any) -> None:
    """As it is typed. Each answer, whatever its batch, is that of transformers to its entry."""
    out = tmp_path / "out"
    typed = ["data", "answer", "--teacher", str(root / "teacher"), "--json"]
    typed += [str(root / "open.json"), "--image-root", str(root), "--out", str(out)]
    assert main([*typed, "--batch-size", "5", "--max-new-tokens", "12", "--keep-cut"]) == 0
    shown = capsys.readouterr().out
    before = json.loads((root / "open.json").read_text())
    after = {entry["id"]: entry for entry in json.loads((out / "data.json").read_text())}
    model, processor = load(str(root / "teacher"))
    expected = {one["id"]: said(model, processor, root, one, 12) for one in before}
    whole = [one for one in before if all(expected[one["id"]])]
    assert list(after) == [one["id"] for one in whole] and len(after) > 10
    for one in whole:
        got = after[one["id"]]
        answers = [m["value"] for m in got["conversations"] if m["from"] == "gpt"]
        assert answers == expected[one["id"]]
        asked = [m for m in one["conversations"] if m["from"] == "human"]
        assert [m for m in got["conversations"] if m["from"] == "human"] == asked
        assert got | {"conversations": 0} == one | {"conversations": 0}
    assert len({text for one in whole for text in expected[one["id"]]}) > 4
    report = json.loads((out / "report.json").read_text())
    empty = len(before) - len(whole)
    assert (report["entries"], report["written"], report["empty"]) == (16, len(whole), empty)
    assert f"written            {len(whole)}" in shown and str(out / "data.json") in shown

    check = ["data", "check", "--json", str(out / "data.json"), "--image-root", str(root)]
    check += ["--processor", str(root / "teacher"), "--html", str(tmp_path / "page.html")]
    assert main(check) == 0
    assert f"can be trained on  {len(whole)}" in capsys.readouterr().out
    config = tiny.run_config(root, tmp_path / "run", stages=("sft",))
    config = settings.changed(
        config, data={"conversations": str(out / "data.json")}, stage={"sft": {"steps": 1}}
    )
    assert loop.run(config, say=lambda message: None)[0].summary["steps"] == 1


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}])
def test_killed_anywhere_it_ends_in_the_same_files(root, tmp_path, more) -> None:
    more = {**more, "batch_size": 4}
    torch.manual_seed(1)
    path, report = answer(request(root, tmp_path / "whole", **more))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "the caller's generator is left alone"
    lines = (path.parent / "answers.jsonl").read_bytes()
    assert lines.count(b"\n") == 5  # 16 first questions, then the second ones
    asked = json.loads((path.parent / "request.json").read_text())
    for cut in (0, 10, lines.index(b"\n") + 1, len(lines) // 2, len(lines) - 1, len(lines)):
        out = tmp_path / f"cut-{cut}"
        out.mkdir()
        (out / "request.json").write_text(json.dumps(asked))
        (out / "answers.jsonl").write_bytes(lines[:cut])
        again, same = answer(request(root, out, **more), load if cut < len(lines) else never)
        assert again.read_bytes() == path.read_bytes() and same == report
        assert (out / "answers.jsonl").read_bytes() == lines
    with pytest.raises(ConfigError, match=r"answers to something else \(max_new_tokens: 12 -> 9\)"):
        answer(request(root, path.parent, **more, max_new_tokens=9))


def never(_: str) -> Any:
    raise AssertionError("all answers are there: no model is needed")


def test_sampling_differs_by_seed_and_greedy_does_not(root: Path, tmp_path: Path) -> None:
    made = {
        (temperature, seed): answer(
            request(root, tmp_path / f"{temperature}-{seed}", temperature=temperature, seed=seed)
        )[0].read_text()
        for temperature in (0.0, 2.0)
        for seed in (0, 1)
    }
    assert made[0.0, 0] == made[0.0, 1] != made[2.0, 0] != made[2.0, 1]


def test_what_is_left_out_is_counted(root: Path, tmp_path: Path) -> None:
    entries = json.loads((root / "open.json").read_text())
    entries[0]["image"] = "images/gone.png"
    entries[1]["conversations"][0]["value"] = " "
    entries[2]["image"] = "images/damaged.png"
    (root / "images" / "damaged.png").write_bytes(b"no picture")
    write(root / "bad.json", entries)
    more: Any = {"data": str(root / "bad.json"), "max_new_tokens": 6}
    path, report = answer(request(root, tmp_path / "drop", **more))
    assert report.faulty == 3 and sum(report.reasons.values()) == 3
    assert any("gone.png" in example for example in report.examples.values())
    assert report.cut > 0
    kept, with_cut = answer(request(root, tmp_path / "keep", **more, keep_cut=True))
    assert report.written == len(json.loads(path.read_text())) < with_cut.written
    assert with_cut.written == len(json.loads(kept.read_text())) == 13 - with_cut.empty
    write(root / "none.json", entries[:2])
    with pytest.raises(DataError, match=r"none of 2 .*gone\.png.*expected entries that can be ask"):
        answer(request(root, tmp_path / "none", data=str(root / "none.json")), never)
    with pytest.raises(DataError, match=r"none of 14 \(.* cut, .*expected entries whose answers"):
        limited = {"limit": 14, "max_new_tokens": 1}
        answer(request(root, tmp_path / "cut", **limited), silent)


def silent(path: str) -> Any:
    """The teacher, who never ends an answer."""
    model, processor = load(path)
    with torch.no_grad():
        model.lm_head.weight[processor.tokenizer.eos_token_id] = 0
    return model, processor


def test_an_answer_of_control_tokens_is_a_fault(root: Path, tmp_path: Path) -> None:
    def spelling(path: str) -> Any:
        model, processor = load(path)
        decode = processor.tokenizer.batch_decode
        processor.tokenizer.batch_decode = lambda *a, **k: [f"{t}</s>" for t in decode(*a, **k)]
        return model, processor

    with pytest.raises(DataError, match=r"value': got str '.*</s>', expected an answer without"):
        answer(request(root, tmp_path), spelling)


def test_history_of_the_data(root: Path, tmp_path: Path) -> None:
    """The second question after the data's first answer: what its prompt was, the model saw."""
    seen: dict[str, set[str]] = {}
    for history in ("own", "data"):
        texts = seen[history] = set()

        def watched(path: str, texts: set[str] = texts) -> Any:
            model, processor = load(path)
            generate = model.generate

            def spying(**inputs: Any) -> Any:
                texts.update(processor.tokenizer.batch_decode(inputs["input_ids"]))
                return generate(**inputs)

            model.generate = spying
            return model, processor

        answer(request(root, tmp_path / history, history=history, keep_cut=True), watched)
    second = "greyandred</s>USER:whatisthisASSISTANT:"
    assert any(text.replace(" ", "").endswith(second) for text in seen["data"])
    assert not any(text.replace(" ", "").endswith(second) for text in seen["own"])


@pytest.mark.parametrize("form", ["parquet", "disk", "json"])
def test_messages_keep_their_form_and_images(form: str, root: Path, tmp_path: Path) -> None:
    part = {"type": "text", "text": "what colour"}
    parts = [{"type": "image", "text": None}, part]
    rows = [
        {"id": "a", "messages": talk(parts, [part | {"text": "red"}], parts[1:]), "note": "kept"},
        {"id": "b", "messages": talk([parts[1]], [part]), "note": "too"},
    ]
    if form != "json":
        red = {"bytes": (root / "images" / "red.png").read_bytes(), "path": None}
        rows = [row | {"images": images} for row, images in zip(rows, ([red], []), strict=True)]
    else:
        parts[0]["image"] = "images/red.png"
    table = datasets.Dataset.from_list(rows)
    if form != "json":
        table = table.cast_column("images", datasets.List(datasets.Image()))
    data = tmp_path / {"parquet": "d.parquet", "disk": "d", "json": "d.json"}[form]
    {"parquet": table.to_parquet, "disk": table.save_to_disk, "json": table.to_json}[form](data)
    path, report = answer(request(root, tmp_path / "out", data=str(data), keep_cut=True))
    assert path.name == {"parquet": "data.parquet", "disk": "data", "json": "data.jsonl"}[form]
    config = SourceConfig(path=str(path))
    source = open_source(config, "--json", str(root))
    samples: Any = list(source.samples())
    assert report.written == len(samples) == 2 and report.questions == 3
    assert [sample.id for sample in samples] == ["a", "b"]
    assert samples[0].turns[0][0].count(IMAGE_MARK) == 1 and all(
        text not in ("what colour", "red", "?") for _, text in samples[0].turns
    )
    (image,) = source.images(samples[0])
    assert image.getpixel((0, 0)) == (200, 0, 0)
    assert {"id", "note", "messages"} <= set(source.rows.column_names)  # type: ignore[attr-defined]


def talk(*contents: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_pairs_of_answers_are_not_answered(root: Path, tmp_path: Path) -> None:
    entry = {**json.loads((root / "data.json").read_text())[0], "rejected": "no"}
    write(tmp_path / "pairs.json", [entry])
    with pytest.raises(DataError, match=r"none of 1 .*'rejected': got str 'no', .*not preferred"):
        answer(request(root, tmp_path / "a", data=str(tmp_path / "pairs.json")))
    pair = {"chosen": talk("say red", "red"), "rejected": talk("say red", "blue")}
    datasets.Dataset.from_list([pair]).to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(ConfigError, match="no column 'messages', expected questions"):
        answer(request(root, tmp_path / "b", data=str(tmp_path / "pairs.parquet")), never)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, expected 1 or more"),
        ({"temperature": -1.0}, r"temperature: got -1.0, expected 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_p": 0.0}, "top_p: got 0.0, expected more than 0 and at most 1"),
        ({"history": "none"}, "history: got 'none', expected 'own' or 'data'"),
        ({"max_new_tokens": 4096}, "max_new_tokens: got 4096, expected less than the model's 2048"),
    ],
)
def test_requests_that_cannot_be(wrong: Any, message: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        answer(request(root, tmp_path / "out", **wrong))


def test_what_is_typed_wrongly(root: Path, tmp_path: Path, capsys: Any) -> None:
    """A line on stderr; open questions are for `data answer` alone."""
    data, teacher = str(root / "open.json"), str(root / "teacher")
    typed = ["data", "answer", "--out", str(tmp_path / "out"), "--image-root", str(root)]
    for more, message in (
        (["--json", data, "--teacher", "/no/model"], "/no/model: no such folder"),
        (["--json", "/no/data.json", "--teacher", teacher], "/no/data.json: field 'file': got no"),
        (["--json", "/no/rows", "--teacher", teacher], "/no/rows: no such file or folder"),
        (["--json", data, "--teacher", str(root / "tower")], "expected an image-text-to-text"),
        (["--json", data, "--teacher", teacher, "--max-new-tokens", "4096"], "got 4096, expected"),
    ):
        assert main([*typed, *more]) == 2
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("data*"))
    # a try that answered nothing binds nobody
    assert main([*typed, "--json", data, "--teacher", teacher, "--limit", "2", "--keep-cut"]) == 0
    assert "written            2" in capsys.readouterr().out
    check = ["data", "check", "--json", data, "--image-root", str(root), "--processor", teacher]
    assert main([*check, "--html", str(tmp_path / "page.html")]) == 0
    assert "2 x conversations: expected an answer to every question" in capsys.readouterr().out
