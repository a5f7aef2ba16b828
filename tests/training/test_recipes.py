"""Every shipped recipe, run for two steps a stage on tiny models of its own classes.

The configuration is the recipe's, changed in paths, steps and batch sizes only; the models are
folders as `save_pretrained` writes them, the processors the real classes.
"""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.training import tiny, tiny_pairs
from training import settings
from training.anatomy import anatomy
from training.cli import main
from training.loop import run
from training.models import build_model
from training.recipes import names, recipe

FAMILIES = {
    "qwen2.5-vl-7b-3b": "qwen2.5-vl",
    "llava-onevision-7b-0.5b": "llava-onevision",
    "internvl3-8b-1b": "internvl",
    "smolvlm2-2.2b-500m": "smolvlm",
}
SIZES = ("steps", "batch_size", "micro_batch")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    tiny.write_data(folder)
    for path in folder.glob(
        "images/*.png"
    ):  # more rows than one in every class: the relation of one row is 0
        Image.open(path).resize((48, 32)).save(path)
    tiny_pairs.write_parts(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(root):
    """What llava-kd-1b-teacher leaves."""
    return run(shrunk("llava-kd-1b-teacher", root), say=lambda _: None)


def shrunk(name, root, *more):
    """The recipe on tiny models, two steps a stage."""
    config = recipe(name)
    changes = [f"out={root / name}", "log_steps=1", "threads=1"]
    for stage in config.stages:
        sizes = zip(SIZES, (2, 4, 2), strict=True)
        changes += [f"stage.{stage}.{key}={value}" for key, value in sizes]
    changes += [
        f"data.captions={root / 'captions.json'}",
        f"data.conversations={root / 'data.json'}",
        f"data.image_root={root}",
    ]
    if name in FAMILIES:
        student, larger = root / f"{name}-student", root / f"{name}-teacher"
        if not student.exists():
            family = FAMILIES[name]
            processor = tiny_pairs.larger_tiles() if family == "smolvlm" else None
            tiny_pairs.write_model(student, family)
            tiny_pairs.write_model(larger, family, 24, 1, processor=processor)
        changes += [f"model.path={student}", f"teacher={larger}"]
    elif config.model.language is None:
        tower = tiny.write_tower(root / "tower")
        changes += [f"model.vision={tower}", f"model.processor={tower}"]
        changes += [f"teacher={tiny.write_teacher(root / 'scratch-teacher', tower)}"]
    else:
        size = "large" if name.endswith("-teacher") else "small"
        changes += [f"model.vision={root / 'siglip'}", f"model.language={root / size}"]
        if config.teacher is not None:
            changes += [f"teacher={root / 'llava-kd-1b-teacher' / '2-sft' / 'model'}"]
    used = settings.load(type(config), None, [*changes, *more], config)
    paths = {"out", "log_steps", "threads", "teacher", "data", "model.path", "model.vision"}
    paths |= {
        "model.language",
        "model.processor",
        *(f"stage.{stage}.{key}" for stage in config.stages for key in SIZES),
    }
    for line in settings.differences(config, used):
        field = line.split(":")[0]
        assert more or field in paths or field.split(".")[0] in paths, line
    return used


@pytest.mark.parametrize("name", [name for name in names() if name != "llava-kd-1b-teacher"])
def test_recipe(name, root, teacher):
    config = shrunk(name, root)
    start = build_model(config.model, config.seed)[0]
    said = []
    results = run(config, say=said.append)
    check_results(config, results, start)
    if config.teacher is not None:
        table = said[0]
        assert "fault" not in table and "answers" in table
        assert ("each model gets its own pixels" in table) == (name == "smolvlm2-2.2b-500m")


def test_recipe_of_the_teacher(root, teacher):
    config = shrunk("llava-kd-1b-teacher", root)
    start = build_model(config.model, config.seed)[0]
    check_results(config, teacher, start)


def check_results(config, results, start):
    assert [result.name for result in results] == list(config.stages)
    for result in results:
        objective, stage = config.objective(result.name), config.table[result.name]
        assert [entry["step"] for entry in result.history] == [1, 2]
        for entry in result.history:
            assert math.isfinite(entry["loss"])
            assert all(entry[term] > 0 for term in objective.terms), entry
        if stage.student is not None:
            start = stage.student(start, **settings.arguments(config.of_stage(stage.name).student))
        before = start.state_dict()
        end = AutoModelForImageTextToText.from_pretrained(result.model, dtype=torch.float32)
        AutoProcessor.from_pretrained(result.model)
        after, roles = end.state_dict(), anatomy(end).roles
        assert before.keys() == after.keys()
        changed = {roles[name] for name in roles if not torch.equal(before[name], after[name])}
        assert changed == set(stage.trains)
        start = end


def test_check_compares_without_training(root, capsys):
    name = "smolvlm2-2.2b-500m"
    config = shrunk(name, root)
    file = root / "check.yaml"
    file.write_text(settings.dump(config))
    assert main(["check", "--config", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "note   visual rows" in shown and "no visual term compares them" in shown
    assert main(["check", "--config", str(file), "--set", "stage.dft.loss.visual=1"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("CheckpointError: teacher and student do not fit: visual rows")
    assert "fault  visual rows" in printed.out
    plain = ["check", "--config", str(file), "--set", "stages=sft"]
    assert main(plain) == 0
    assert "nothing to check" in capsys.readouterr().out
