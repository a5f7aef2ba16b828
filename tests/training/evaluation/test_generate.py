"""Answers to a benchmark, from a saved folder to a table, by a tiny model that has learned some."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.training import tiny, tiny_pairs
from training.cli import main
from training.data.images import open_image
from training.data.records import DataError, Place
from training.data.sample import IMAGE_MARK, Sample
from training.evaluation.questions import Files
from training.evaluation.run import Options, run_benchmark
from training.generate import Answer, Asked, Writer, load
from training.settings import ConfigError

SILENT = Console(quiet=True)
QUESTIONS = ["what colour is this", "this", "say what is this and what colour", "colour"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Data, and a model in `model` that says different things to different prompts, and stops."""
    root = tiny.write_data(tmp_path_factory.mktemp("eval"))
    tiny.write_talker(root / "model", tiny.write_tower(root / "tower"))
    pope = [
        {
            "question_id": i,
            "image": f"{colour}.png",
            "text": QUESTIONS[i % len(QUESTIONS)],
            "label": "yes" if i % 2 else "no",
        }
        for i, colour in enumerate([*tiny.COLOURS] * 2)
    ]
    (root / "pope.json").write_text("\n".join(map(json.dumps, pope)) + "\n")
    return root


def ask(text: str, *images: Path) -> Asked:
    place = Place(Path("prompt"))
    sample = Sample(place, tuple(map(str, images)), ((f"{IMAGE_MARK}\n" * len(images) + text, ""),))
    return Asked(sample, lambda: [open_image(place, "image", image) for image in images])


def prompts(root: Path) -> list[Asked]:
    images = [root / "images" / f"{name}.png" for name in tiny.COLOURS]
    seeing = [ask(text, images[i]) for i, text in enumerate(QUESTIONS)]
    return [*seeing[:2], ask("say red"), ask("what is this and this"), *seeing[2:]]


def options(root: Path, out: Path, **more) -> Options:
    where = Files(root / "pope.json", root / "images")
    return Options(str(root / "model"), "pope", where, out, **{"max_new_tokens": 6, **more})


def test_a_batch_writes_what_each_prompt_alone_does(root):
    """Different lengths, with and without images: padding on the left changes nothing, in fp32."""
    model, processor = load(str(root / "model"))
    writer = Writer(model.float(), processor, max_new_tokens=8)
    together = writer.write(prompts(root))
    assert together == [writer.write([prompt])[0] for prompt in prompts(root)]
    assert len({answer.text for answer in together}) > 2, "one answer to all would prove nothing"
    assert {answer.ended for answer in together} == {True, False}


@pytest.mark.parametrize("name", tiny_pairs.MODELS)
def test_every_class_saved_and_loaded(name, root, tmp_path):
    """Images of other shapes than the first take other numbers of rows: more padding."""
    path = tiny_pairs.write_model(tmp_path / name, name)
    model, processor = load(str(path))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    writer = Writer(model.float(), processor, max_new_tokens=6)
    shapes = {"square": (32, 32), "wide": (64, 24)}
    for shape, size in shapes.items():
        Image.effect_noise(size, 90).save(tmp_path / f"{shape}.png")
    asked = [
        ask("what is this ?", tmp_path / "square.png"),
        ask("a blue one", tmp_path / "wide.png"),
        ask("this and this ?", tmp_path / "wide.png", tmp_path / "square.png"),
        ask("what is red"),
    ]
    together = writer.write(asked)
    assert together == [writer.write([prompt])[0] for prompt in asked]
    assert len({answer.text for answer in together}) == 4


def test_held_out_data_for_every_class(root, tmp_path, capsys):
    """`eval MODEL DATA.json` as a user types it, for a class that is not LLaVA."""
    model = tiny_pairs.write_model(tmp_path / "model", "qwen2.5-vl")
    data = ["eval", str(model), str(root / "data.json"), "--image-root", str(root)]
    assert main([*data, "--batch-size", "4"]) == 0
    shown = capsys.readouterr().out
    assert "colour 0.000, pair 0.000, text 0.000" in shown
    # random weights: the tokens of an answer are about as likely as any others
    perplexity = float(shown.split("perplexity")[1])
    assert perplexity == pytest.approx(len(load(str(model))[1].tokenizer), rel=0.3)


def test_held_out_samples_may_be_as_long_as_a_run_s(root, tmp_path, capsys):
    talk = tiny.turns("say red", "red " * 2100)
    (tmp_path / "d.json").write_text(json.dumps([{"id": "long", "conversations": talk}]))
    typed = ["eval", str(root / "model"), str(tmp_path / "d.json")]
    assert main(typed) == 2 and "expected at most max_length 2048" in capsys.readouterr().err
    assert main([*typed, "--max-length", "4096"]) == 0
    assert "skipped" not in capsys.readouterr().out


def test_greedy_whatever_the_generation_config_says(root):
    model, processor = load(str(root / "model"))
    plain = Writer(model, processor, 8).write(prompts(root))
    config = model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty = True, 5.0, 9.0
    assert Writer(model, processor, 8).write(prompts(root)) == plain
    assert model.generation_config is config


def test_stops_at_the_end_tokens_of_both(root):
    """An end token of the model's generation config that the tokenizer does not know of."""
    model, processor = load(str(root / "model"))
    (first,) = Writer(model, processor, 1).write([ask("say red")])
    assert first == Answer(first.text, ended=False) and first.text
    own = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = [
        own,
        processor.tokenizer.convert_tokens_to_ids(first.text),
    ]
    (again,) = Writer(model, processor, 8).write([ask("say red")])
    assert again == Answer(first.text, ended=True)


def test_processor_without_a_usable_template(root):
    model, processor = load(str(root / "model"))
    processor.chat_template = "USER: {{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(ConfigError, match="LlavaProcessor: chat template: got 'USER: What is this"):
        Writer(model, processor, 8)


def test_run_continues_after_a_cut_line(root, tmp_path):
    whole = run_benchmark(options(root, tmp_path / "a", batch_size=3), load, SILENT)
    assert whole["questions"] == 8 and whole["scores"].keys() >= {"accuracy", "f1", "yes_ratio"}
    lines = (tmp_path / "a" / "predictions.jsonl").read_text()
    first = json.loads(lines.split("\n")[0])
    assert first["prompt"] == f"{QUESTIONS[0]}\nAnswer the question using a single word or phrase."
    run_benchmark(options(root, tmp_path / "b", limit=2), load, SILENT)
    kept = tmp_path / "b" / "predictions.jsonl"
    with kept.open("a") as file:
        file.write('{"question_id": 2, "ans')
    assert run_benchmark(options(root, tmp_path / "b"), load, SILENT)["scores"] == whole["scores"]
    assert kept.read_text() == lines

    def never(_: str):
        raise AssertionError("all answers are there: no model is needed")

    assert run_benchmark(options(root, tmp_path / "b"), never, SILENT) == whole


def test_a_folder_keeps_answers_to_one_thing(root, tmp_path):
    run_benchmark(options(root, tmp_path, limit=1), load, SILENT)
    with pytest.raises(ConfigError, match=r"something else \(max_new_tokens: 6 ->"):
        run_benchmark(options(root, tmp_path, max_new_tokens=7), load, SILENT)
    with pytest.raises(ConfigError, match=r"something else .*asked: "):
        run_benchmark(options(root, tmp_path, instruction=""), load, SILENT)


def test_a_benchmark_goes_on_where_a_question_cannot_be_asked(root, tmp_path, capsys):
    """Its own batch is asked without it; it is told of, and left out of the scores."""
    asked = [json.loads(line) for line in (root / "pope.json").read_text().splitlines()]
    asked[1]["text"] = "say <image>"
    asked[2]["text"] = "say \ud83d"
    asked[4]["image"] = "bad.png"
    (root / "images" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "pope.json").write_text("\n".join(map(json.dumps, asked)))
    files = Files(tmp_path / "pope.json", root / "images")
    more: dict = {"max_new_tokens": 6, "batch_size": 3}
    found = run_benchmark(
        Options(str(root / "model"), "pope", files, tmp_path / "out", **more), load
    )
    sound = run_benchmark(options(root, tmp_path / "sound", batch_size=3), load, SILENT)
    assert "faulty" not in sound and found["faulty"] == 3 and found["questions"] == 5
    got, expected = (
        [
            json.loads(line)
            for line in (tmp_path / out / "predictions.jsonl").read_text().split("\n")[:-1]
        ]
        for out in ("out", "sound")
    )
    for i, message in (
        (1, r"pope\.json \(id '1'\): field 'conversations': got 2 x '<image>' for 1 image"),
        (2, r"pope\.json \(id '2'\): field 'conversations': got .*surrogates not allowed"),
        (4, r"pope\.json \(id '4'\): field 'image\[0\]': got .*bad\.png: Unidentified"),
    ):
        assert got[i]["answer"] == "" and re.search(message, got[i]["fault"])
    for i in (0, 3, 5, 6, 7):
        assert got[i] == expected[i]
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 questions could not be asked, left out; the first: " in shown
    right = sum(line["answer"] != "no" for line in (got[3], got[5], got[7]))  # as POPE counts
    right += sum(line["answer"] == "no" for line in (got[0], got[6]))
    assert found["scores"]["accuracy"] == right / 5
    (tmp_path / "pope.json").write_text(json.dumps(asked[1]))
    with pytest.raises(DataError, match="none of 1 questions that can be asked; the first: "):
        run_benchmark(Options(str(root / "model"), "pope", files, tmp_path / "none"), load, SILENT)


def test_held_out_data_goes_on_and_counts_what_it_left_out(root, tmp_path, capsys):
    entries = json.loads((root / "data.json").read_text())
    entries[0]["image"] = "images/gone.png"
    (tmp_path / "d.json").write_text(json.dumps(entries))
    typed = ["eval", str(root / "model"), str(tmp_path / "d.json"), "--image-root", str(root)]
    assert main(typed) == 0
    shown = capsys.readouterr().out
    assert "skipped 1 of 14 entries" in shown and "gone.png" in shown and "perplexity" in shown


def test_a_benchmark_sees_pictures_upright_and_on_white(root, tmp_path):
    """The very pixels that training sees: `training.data.images`."""
    model, processor = load(str(root / "model"))
    exif = Image.Exif()
    exif[0x0112] = 6
    stripes = Image.new("RGBA", (16, 16), (200, 0, 0, 255))
    stripes.paste((1, 2, 3, 0), (0, 0, 16, 8))
    stripes.save(tmp_path / "stored.png", exif=exif)
    upright = Image.new("RGB", (16, 16), (200, 0, 0))
    upright.paste("white", (8, 0, 16, 16))
    upright.save(tmp_path / "seen.png")
    writer = Writer(model, processor, 4)
    stored, seen = (
        writer.encoding.prompt(*ask("this", tmp_path / name))["pixel_values"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        for name in ("stored.png", "seen.png")
    )
    assert torch.equal(stored, seen)


def test_command_line(root, tmp_path, capsys):
    model, files = str(root / "model"), ["--questions", str(root / "pope.json")]
    asked = ["eval", model, "--benchmark", "pope", *files, "--images", str(root / "images")]
    assert main([*asked, "--out", str(tmp_path), "--limit", "4", "--max-new-tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert "pope: 4 questions" in shown and "recall" in shown
    assert json.loads((tmp_path / "scores.json").read_text())["questions"] == 4
    for wrong, message in (
        (["eval", model], "eval: got no data, expected a LLaVA json file or --benchmark"),
        (["eval", model, "x.json", "--limit", "3"], "--limit: expected it only with --benchmark"),
        (["eval", model, "x.json", "--batch-size", "0"], "--batch-size: got 0, expected 1 or more"),
        (["eval", model, "--benchmark", "pope"], "--questions: got nothing, expected a path"),
        ([*asked[:2], "x.json", *asked[2:]], "json: got 'x.json', expected nothing with"),
        ([*asked, "--limit", "0"], "limit: got 0, expected 1 or more"),
        ([*asked[:-1], str(tmp_path)], "4 of 4 files missing, the first"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
