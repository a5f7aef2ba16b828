"""The demo end to end on drawn photographs: every part runs, the report says what was measured."""

from __future__ import annotations

import csv
import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training import settings
from training.cli import main
from training.config import load
from training.demo import early
from training.demo.answers import said
from training.demo.config import DemoConfig
from training.demo.garments import FILES
from training.demo.recipes import entries
from training.demo.recomposed import labelled_photos
from training.demo.report import (
    DISTILLED,
    EQUAL_STEPS,
    EQUAL_TIME,
    TEACHER,
    UNLABELLED,
    judge,
    limits,
)
from training.demo.results import markdown, on_its_side, table
from training.demo.run import demo
from training.demo.scenes import POSITIONS
from training.demo.study import findings
from training.loop import StageResult
from training.settings import ConfigError

SMALL = [
    "train_n=40",
    "test_n=12",
    "student_n=16",
    "per_image=2",
    "batch_size=8",
    "teacher_pt_steps=2",
    "teacher_sft_steps=40",  # before that it does not end its answers
    "dpt_steps=2",
    "sft_steps=2",
    "dft_steps=2",
    "tower.steps=3",
    "tower.batch_size=4",
    "tower.hidden=16",
    "threads=1",
    "save_steps=4",
]


@pytest.fixture(scope="module")
def garments(tmp_path_factory):
    """Fashion-MNIST's four files with drawn content: a class is a brightness."""
    folder = tmp_path_factory.mktemp("garments")
    rng = np.random.default_rng(0)
    for name in FILES:
        count = 60 if name.startswith("train") else 20
        labels = np.arange(count, dtype=np.uint8) % 10
        if "images" in name:
            photos = rng.integers(0, 20, (count, 28, 28), dtype=np.uint8)
            photos += (20 * labels)[:, None, None].astype(np.uint8)
            header = struct.pack(">4I", 0x803, count, 28, 28)
            content = header + photos.tobytes()
        else:
            content = struct.pack(">2I", 0x801, count) + labels.tobytes()
        (folder / name).write_bytes(gzip.compress(content))
    return folder


@pytest.fixture(scope="module")
def finished(garments, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    given = [f"out={out}", f"garments={garments}", "seeds=2", *SMALL]
    config = settings.load(DemoConfig, None, given)
    return config, demo(config)


def test_report_folder(finished):
    config, report = finished
    assert report.folder == config.folder / "report"
    for picture in ("loss.png", "stages.png", "answers.png"):
        with Image.open(report.folder / picture) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 200 and pixels.std() > 5, f"{picture} is blank"
    text = (report.folder / "report.md").read_text()
    for needed in (report.verdict, "trained with the labels of all training images", "commit"):
        assert needed in text
    assert "train_n: 40000 -> 40" in text, "what differs from the defaults is said"


def test_table_holds_every_run(finished):
    _, report = finished
    saved = json.loads((report.folder / "table.json").read_text())
    assert saved["machine"]["processor"]
    runs = saved["runs"]
    assert [(run["model"], run["seed"]) for run in runs] == [
        ("teacher", 0),
        *(
            (name, seed)
            for seed in (0, 1)
            for name in (EQUAL_STEPS, EQUAL_TIME, DISTILLED, UNLABELLED)
        ),
    ]
    for run in runs:
        assert 0 <= run["questions"] <= 1 and run["perplexity"] > 1
        assert run["tokens_per_second"] > 0 and run["peak_gib"] > 0
        assert 0 <= run["low"] <= run["questions"] <= run["high"] <= 1
        assert (run["response_kl"] > 0) == (run["model"] in (DISTILLED, UNLABELLED))
    with (report.folder / "table.csv").open() as lines:
        assert [row["model"] for row in csv.DictReader(lines)] == [run["model"] for run in runs]


def test_fair_comparison(finished):
    config, report = finished
    for plain, long, *distilled in zip(
        *(report.rows[name] for name in (EQUAL_STEPS, EQUAL_TIME, DISTILLED, UNLABELLED)),
        strict=True,
    ):
        assert {plain["steps"], *(run["steps"] for run in distilled)} == {config.student_steps}
        assert long["steps"] >= plain["steps"]
    labelled = {"student_pretrain.json", "student_train.json"}
    for name, stages, shown in (
        ("sft", ["1-sft"], labelled),
        ("distilled", ["1-dpt", "2-sft", "3-dft"], labelled | {"data.json"}),
        ("no-label", ["1-dft"], {"data.json"}),
    ):
        for seed in range(2):
            folder = config.folder / f"seed{seed}" / name
            assert sorted(p.name for p in folder.glob("[0-9]-*")) == stages
            sources = load(folder / "config.yaml").data.sources
            assert {Path(str(s.path)).name for s in sources} == shown | {"test.json"}, name


def test_early_stopping_looks_at_every_checkpoint_of_the_longest_sft(finished):
    config, report = finished
    told = (report.folder / "report.md").read_text()
    assert "asked every 4 steps, would have ended SFT, equal time at step" in told
    for seed, row in enumerate(report.rows[EQUAL_TIME]):
        folder = config.folder / f"seed{seed}" / "long" / "1-sft"
        found = json.loads((folder / "early.json").read_text())
        steps = [step for step, _ in found["development"]]
        assert steps == sorted({*range(4, int(row["steps"]), 4), int(row["steps"])})
        assert not (folder / "kept").exists()
        if found["step"] == row["steps"]:
            assert found["questions"] == row["questions"]


def test_early_stopping_takes_the_first_of_the_best_and_asks_it_alone(tmp_path, monkeypatch):
    """By the development split; the held-out one sees that model only."""
    (tmp_path / "kept" / "8").mkdir(parents=True)
    (tmp_path / "kept" / "12").mkdir()
    scores = {("dev", 8): 0.5, ("dev", 12): 0.7, ("dev", 14): 0.7, ("test", 12): 0.4}
    monkeypatch.setattr(
        early, "accuracies", lambda _, split, models: [(n, scores[split, n]) for n in models]
    )
    stage = StageResult("sft", tmp_path / "model", [], {"steps": 14}, None)
    for _ in range(2):  # the second time from the disk
        found = early.early_stopping(DemoConfig(), stage)
        assert (found.step, found.questions) == (12, 0.4)
        assert [tuple(one) for one in found.development] == [(8, 0.5), (12, 0.7), (14, 0.7)]
        scores.clear()


def test_teacher_answers_what_nobody_labelled(finished):
    config, _ = finished
    data = config.folder / "data"
    asked = json.loads((data / "student_questions.json").read_text())
    answered = json.loads(config.answered.read_text())
    found = json.loads((config.answered.parent / "report.json").read_text())
    assert len(asked) == 32 == found["entries"] and len(answered) == found["written"] > 0
    assert {e["image"] for e in asked} == {
        e["image"] for e in json.loads((data / "student_train.json").read_text())
    }
    for entry in answered:
        assert [turn["from"] for turn in entry["conversations"]] == ["human", "gpt"]


def test_given_again_nothing_is_trained(finished, capsys):
    config, report = finished
    model = config.folder / "seed1" / "distilled" / "3-dft" / "model"
    before = model.stat().st_mtime_ns
    again = demo(config)
    assert model.stat().st_mtime_ns == before
    assert again.rows == report.rows


def test_another_tower_in_the_same_folder_is_refused(finished):
    config, _ = finished
    with pytest.raises(ConfigError, match=r"made with another tower \(hidden: 16 -> 32\)"):
        demo(settings.changed(config, tower={"hidden": 32}))


def test_command_line_prints_table_and_verdict(finished, capsys):
    config, _ = finished
    flags = ["--seeds", "2", "--out", config.out, "--garments", str(config.garments)]
    assert main(["demo", *flags, *(part for item in SMALL for part in ("--set", item))]) == 0
    printed = capsys.readouterr().out
    assert "distilled" in printed and "perplexity" in printed and "points" in printed
    flags[1] = "0"
    assert main(["demo", *flags]) == 2
    assert "seeds: got 0, expected greater than 0" in capsys.readouterr().err


def rows(**accuracies: list[float]) -> dict[str, list[dict[str, float]]]:
    names = {"steps": EQUAL_STEPS, "time": EQUAL_TIME, "ours": DISTILLED}
    found = {names[k]: [{"questions": x} for x in values] for k, values in accuracies.items()}
    return found | {TEACHER: [{"questions": 0.8}], UNLABELLED: found[DISTILLED]}


def test_verdict_follows_the_rule():
    clear = judge(rows(steps=[0.50, 0.52, 0.54], time=[0.55, 0.56, 0.57], ours=[0.61, 0.62, 0.63]))
    assert "+10.0 points, 36% of the gap in the mean of 3 seeds, more than the spread (2" in clear
    assert "+6.0 points" in clear and "NOT" not in clear
    unclear = judge(rows(steps=[0.5, 0.6, 0.7], time=[0.60, 0.61, 0.62], ours=[0.60, 0.65, 0.70]))
    assert "+5.0 points, 25% of the gap in the mean of 3 seeds, NOT more than the spr" in unclear
    one = judge(rows(steps=[0.5], time=[0.5], ours=[0.4]))
    assert "-10.0 points, -33% of the gap (one seed, so no spread" in one


def test_table_shows_mean_and_deviation():
    header, *lines = table({"a": [{"questions": 0.4, "ce": 0.0}, {"questions": 0.6, "ce": 0.0}]})
    assert header == ["model", "questions (all but captions)", "CE"]
    assert lines == [["a", "0.500 ± 0.141", "–"]]


@pytest.mark.parametrize(
    ("data", "held_out", "told", "not_told"),
    [
        ("scenes", "test", ["recompose", "new to all", "templates"], "train.json"),
        ("scenes", "dev", ["recompose", "training questions that no student sees"], "new to all"),
        ("easy-vqa", "test", ["labels of all training images", "templates"], "photographs"),
        ("a folder", "test", ["learned from train.json (accuracy of the", "0.500"], "templates"),
    ],
)
def test_what_the_comparison_does_not_show_fits_the_data(tmp_path, data, held_out, told, not_told):
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "tower.json").write_text('{"accuracy": 0.5}')
    text = limits(DemoConfig(out=str(tmp_path), data=data, held_out=held_out))
    assert all(needed in text for needed in [*told, "random weights"]) and not_told not in text


DOCS = Path(__file__).parents[3] / "docs"


def published(name: str) -> tuple[str, dict[str, list[dict[str, float]]]]:
    """A report in `docs`, and the runs that it was made of by model."""
    runs: dict[str, list[dict[str, float]]] = {}
    for run in json.loads((DOCS / name / "table.json").read_text())["runs"]:
        model = run.pop("model")
        runs.setdefault(model, []).append({k: v for k, v in run.items() if k != "seed"})
    return (DOCS / name / "report.md").read_text(), runs


@pytest.mark.parametrize("name", [path.name for path in DOCS.glob("demo-*")])
def test_a_published_demo_is_what_its_runs_say(name):
    text, runs = published(name)
    assert f"**{judge(runs)}**" in text and markdown(on_its_side(table(runs))) in text


@pytest.mark.parametrize("name", [path.name for path in DOCS.glob("study-*")])
def test_a_published_study_is_what_its_runs_say(name):
    text, runs = published(name)
    assert markdown(table(runs)) in text
    assert all(paragraph in text for paragraph in findings(runs))


def test_the_studies_side_by_side_are_what_each_says():
    studies = [findings(published(name)[1])[1] for name in ("study-scenes", "study-easy-vqa")]
    scenes, easy = ({line[0]: line for line in map(cells, text.splitlines())} for text in studies)
    beside = (DOCS / "study.md").read_text().split("| --- |")[-1].split("\n\n")[0]
    shown = [cells(line) for line in beside.splitlines()[1:]]
    assert [line[:2] for line in shown] == [line[:2] for line in list(scenes.values())[2:]]
    for name, _, *points in shown:
        for cell, study in zip(points, (scenes, easy), strict=True):
            if name not in study:
                assert cell == "–"
                continue
            _, _, margin, _, beyond, _, share = study[name]
            assert cell == (f"{margin} ({share})" if beyond == "–" else f"**{margin} ({share})**")


def cells(line: str) -> list[str]:
    """Of a line of a table in Markdown."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_findings_follow_the_rule():
    """Above or below only by more than the spread; shares of what the teacher is ahead of SFT."""
    seeds = {
        TEACHER: [0.9],
        "SFT, regularised": [0.50, 0.52],
        "CE + KL": [0.60, 0.64],
        "KL": [0.63, 0.63],
        "CE + KL + visual": [0.55, 0.57],
        "answered: JSD": [0.1, 0.2],
    }
    runs = {name: [{"questions": x} for x in values] for name, values in seeds.items()}
    words, lines, gap = findings(runs)
    assert words == (
        "- More than the spread above its control: CE + KL (+11.0 on SFT, regularised).\n"
        "- More than the spread below its control: CE + KL + visual (-6.0 on CE + KL).\n"
        "- Within the spread of its control: KL."
    )
    assert "| CE + KL | SFT, regularised | +11.0 | 2.8 | above | 2 of 2 | +28% |" in lines
    assert "| KL | CE + KL | +1.0 | 2.8 | – | 1 of 2 | +3% |" in lines and "JSD" not in lines
    assert gap == "The gap is what the teacher is ahead of SFT, regularised: 39.0 points."
    runs = {name: one[:1] for name, one in runs.items() if name != TEACHER}
    words, lines = findings(runs)
    assert words.startswith("- A row of one seed has no spread")
    assert "| CE + KL | SFT, regularised | +10.0 | – | – | 1 of 1 | – |" in lines


def studied(config: DemoConfig, names: list[str], jobs: int = 1) -> list[dict[str, Any]]:
    """What the study's table says of these rows."""
    given = [f"rows={json.dumps(names)}", f"out={config.out}", f"garments={config.garments}"]
    given.append(f"jobs={jobs}")
    flags = [part for item in [*given, *SMALL] for part in ("--set", item)]
    assert main(["study", "--seeds", "1", *flags]) == 0
    runs = json.loads((config.folder / "study" / "table.json").read_text())["runs"]
    assert runs[0]["model"] == TEACHER
    assert sorted(run["model"] for run in runs[1:]) == sorted(names)
    return runs[1:]


def test_study_has_a_line_for_each_row_and_trains_none_twice(finished, capsys):
    config, _ = finished
    names = ["SFT, regularised", "CE + KL", "answered: DPT, SFT, DFT"]
    assert [run["model"] for run in studied(config, names, jobs=2)] == names
    logs = [log.read_text() for log in (config.folder / "study").glob("*.log")]
    assert 1 <= len(logs) <= 2 and sum(log.count(", seed 0\n") for log in logs) == len(names)
    printed = capsys.readouterr().out
    assert "CE + KL" in printed and "SEEDS=3 measures it" in printed
    assert (config.folder / "study" / "accuracy.png").is_file()
    model = config.folder / "seed0" / "ce-kl" / "1-dft" / "model"
    before = model.stat().st_mtime_ns
    studied(config, names)
    assert model.stat().st_mtime_ns == before
    assert main(["study", "--set", "rows=[nothing]"]) == 2
    assert "rows: got ['nothing'], expected some of SFT, regularised" in capsys.readouterr().err


def test_study_rows_that_come_after_another_start_from_its_model(finished):
    """And count its steps: half of D2D before D2S, a finished student before the pairs."""
    config, _ = finished
    pairs, sparse = "answered: CE + KL + visual + relation, 25% KTO pairs", "answered: D2D, D2S"
    found = {run["model"]: run["steps"] for run in studied(config, [pairs, sparse])}
    steps = config.student_steps
    assert found == {pairs: steps + round(steps / 4), sparse: steps}
    model = config.folder / "seed0" / "answered-d2d-d2s" / "1-d2s" / "model"
    assert json.loads((model / "config.json").read_text())["text_config"]["num_experts"] == 4
    teacher = {e["id"]: said(e) for e in json.loads(config.answered.read_text())}
    folder = config.folder / "seed0" / "pairs"
    own = {e["id"]: said(e) for e in json.loads((folder / "data.json").read_text())}
    told = json.loads((folder / "pairs.json").read_text())
    assert [e["id"] for e in told] == [n for n in teacher if own.get(n, teacher[n]) != teacher[n]]
    assert told and all(said(e) == teacher[e["id"]] for e in told)
    assert all(e["rejected"] == own[e["id"]] for e in told)


def test_recomposed_scenes_show_own_labelled_photographs_with_true_answers(finished):
    config, _ = finished
    studied(config, ["SFT, photographs recomposed"])
    root = config.recomposed.parent
    told = json.loads(config.recomposed.read_text())
    assert len(told) == entries(config.folder / "data" / "student_questions.json")
    names: dict[bytes, set[str]] = {}
    for photo, name in labelled_photos(config):
        names.setdefault(photo.tobytes(), set()).add(name)
    for entry in told:
        with Image.open(root / entry["image"]) as image:
            scene = np.asarray(image.convert("L"))
        cells = [
            names[scene[y + 2 : y + 30, x + 2 : x + 30].tobytes()] for y in (0, 32) for x in (0, 32)
        ]
        assert all(len(known) == 1 for known in cells)
        there = [next(iter(known)) for known in cells]
        question, answer = (turn["value"] for turn in entry["conversations"])
        where = [
            name for name, place in zip(there, POSITIONS, strict=True) if question.endswith(place)
        ]
        truth = {
            "caption": " ".join(there),
            "where": "".join(where),
            "count": str(there.count(question.split()[-1])),
            "exist": "yes" if question.split()[-1] in there else "no",
        }
        assert answer == truth[entry["kind"]]
