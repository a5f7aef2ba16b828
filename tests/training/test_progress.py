"""Without a terminal every part that counts tells a plain line now and then, and no bar."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import pytest
from PIL import Image

from tests.training import tiny
from training import settings
from training.cli import main
from training.loop import run
from training.models import save_model

LINE = re.compile(r"[\w ./-]+: [\d,]+ of [\d,]+ (samples|batches|questions|steps), \d\d:\d\d left")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run's data and models, its configuration with everything that counts, and questions."""
    root = tmp_path_factory.mktemp("progress")
    config = tiny.run_config(root, root / "out", stages=("dft",))
    cached = {"path": str(root / "rows"), "batch_size": 4}
    config = settings.changed(
        config, data={"skip_bad": True}, teacher_cache=cached, stage={"dft": {"steps": 2}}
    )
    (root / "run.yaml").write_text(settings.dump(config))
    lines = [
        {"question_id": i, "image": "red.png", "text": "what colour is this ?", "label": "yes"}
        for i in range(3)
    ]
    (root / "pope.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    model, processor = tiny.build_model(tiny.model_config(root / "tower"), 0)
    save_model(model, processor, root / "model")
    return root


def commands(root):
    """By name: what is typed, and what has to be counted."""
    config = ["--config", str(root / "run.yaml")]
    check = [*config, "--html", str(root / "page.html")]
    held_out = [str(root / "data.json"), "--image-root", str(root)]
    asked = ["--questions", str(root / "pope.json"), "--images", str(root / "images")]
    pope = ["--benchmark", "pope", *asked, "--out", str(root / "pope"), "--max-new-tokens", "2"]
    model = str(root / "model")
    return {
        "data check": (["data", "check", *check], ["samples"]),
        "cache": (["cache", *config], ["reading samples", "teacher dft"]),
        "run": (["run", *config], ["checking data.json", "1-dft held-out"]),
        "eval": (["eval", model, *held_out], ["held-out"]),
        "benchmark": (["eval", model, *pope, "--batch-size", "1"], ["pope"]),
    }


def test_a_plain_line_of_every_part(root, monkeypatch, capfd):
    monkeypatch.setattr("training.bar.SECONDS_BETWEEN_LINES", 0.0)
    for name, (typed, parts) in commands(root).items():
        assert main(typed) == 0, name
        printed, told = capfd.readouterr()
        assert not re.search(r"\r|\x1b|\d%\|", told + printed), name
        lines = [line for line in told.splitlines() if LINE.fullmatch(line)]
        for part in parts:
            assert any(part in line for line in lines), (name, part, told)
        assert not any(LINE.search(line) for line in printed.splitlines()), name


def test_nothing_is_said_before_its_time(root, capfd):
    for name in ("eval", "data check"):
        assert main(commands(root)[name][0]) == 0
        assert not any(LINE.search(line) for line in capfd.readouterr().err.splitlines()), name


def test_slow_steps_tell_a_line_between_two_log_entries(root, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("training.bar.SECONDS_BETWEEN_LINES", 0.0)
    config = tiny.run_config(root, tmp_path / "out", stages=("pt",))
    run(settings.changed(config, data={"held_out": None}, log_steps=100), say=lambda _: None)
    told = capfd.readouterr().err.splitlines()
    lines = [line for line in told if re.match(r"1-pt: \d of 6 steps, \d\d:\d\d left", line)]
    assert [line.split()[1] for line in lines[:6]] == list("123456")
    assert re.search(r"left, loss \d\.\d{3} ce .* tok/s \d.* GiB$", lines[-1])


def test_palette_pictures_warn_once_a_run_at_most(root, tmp_path):
    """Pillow's own warning comes with every picture whose transparency is a table."""
    shutil.copytree(root / "images", tmp_path / "images")
    for file in (tmp_path / "images").iterdir():
        image = Image.open(file).quantize(4)
        image.save(file, transparency=bytes([0, 128, 255, 255]))
    config = tiny.run_config(root, tmp_path / "out", stages=("pt",))
    data = {"image_root": str(tmp_path)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(settings.changed(config, data=data), say=lambda _: None)
    assert len([one for one in caught if "Palette" in str(one.message)]) <= 1
