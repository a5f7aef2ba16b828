"""Whole runs that train from stored rows: the same curve as with the teacher, whatever the model's
class, its batches or a kill.
"""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
from rich.filesize import decimal as size
from safetensors import safe_open

from mllmkd_kernels.llava_kd import TERMS
from tests.training import tiny
from tests.training.test_recipes import root as recipes_root
from tests.training.test_recipes import shrunk
from tests.training.tiny import killed, quiet
from training import settings
from training.cli import main
from training.config import Config
from training.data.dataset import LlavaDataset
from training.loop import run
from training.models import load_vlm
from training.settings import ConfigError
from training.teacher_cache import fill, store

recipe_data = recipes_root  # the fixture, for the classes that recipes name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def curves(results):
    keys = ("step", "loss", "grad_norm", *TERMS)
    return [
        [[entry[key] for key in keys if key in entry] for entry in result.history]
        for result in results
    ]


def caching(root, path, **options):
    """A run of 6 steps of two micro-batches in both distilled stages."""
    config = tiny.run_config(root, path / "out", stages=("dpt", "dft"))
    stage = {name: {"micro_batch": 2} for name in config.stages}
    cache = {"path": str(path / "rows"), "dtype": "fp32", "batch_size": 3} | options
    return settings.changed(config, stage=stage, data={"held_out": None}, teacher_cache=cache)


def test_a_run_needs_no_teacher_and_survives_a_kill(root, tmp_path, capsys, monkeypatch):
    config = caching(root, tmp_path)
    online = settings.changed(
        config, out=str(tmp_path / "online"), teacher_cache={"path": None, "dtype": "bf16"}
    )
    expected = curves(run(online, say=quiet))
    file = tmp_path / "config.yaml"
    file.write_text(settings.dump(config))
    assert main(["cache", "--config", str(file), "--dry-run"]) == 0
    assert not (tmp_path / "rows").exists() and "6 response" not in capsys.readouterr().out
    assert main(["cache", "--config", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "dpt: 14 samples of " in printed and "dft: whole: 14 samples, " in printed
    with monkeypatch.context() as patch:  # nothing is left to run it on
        patch.setattr(fill, "load_vlm", None)
        assert main(["cache", "--config", str(file)]) == 0
    alone = settings.changed(config, teacher=None, data={"workers": 1})
    whole = curves(run(alone, say=quiet))
    for ours, theirs in zip(whole, expected, strict=True):
        for entry, other in zip(ours, theirs, strict=True):
            # fp32 states of batches of other lengths, then optimiser steps on them
            assert entry == pytest.approx(other, rel=1e-3, abs=1e-6)

    again = settings.changed(alone, out=str(tmp_path / "again"))
    killed(again, 5)
    assert curves(run(again, say=quiet)) == whole


def test_a_stream_cannot_be_stored(root, tmp_path, monkeypatch):
    monkeypatch.setattr(fill, "load_data", lambda *_: iter(()))
    with pytest.raises(ConfigError, match="data: the captions are a stream, expected"):
        fill.make(caching(root, tmp_path), say=quiet)


def test_a_run_stops_before_it_starts(root, tmp_path, capsys):
    config = caching(root, tmp_path, visual=False)
    with pytest.raises(
        ConfigError,
        match=r"stage.dpt.loss: visual_kl reads visual rows",
    ):
        fill.make(config, say=quiet)
    file = tmp_path / "config.yaml"
    file.write_text(settings.dump(config))
    assert main(["run", "--config", str(file)]) == 2
    assert "dpt: no manifest.json there, expected a teacher cache" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"some of the run's stages \['sft'\] that"):
        fill.make(settings.changed(config, stages=("sft",)), say=quiet)
    with pytest.raises(ConfigError, match=r"teacher: got null, expected a path: the model whose"):
        fill.make(settings.changed(config, teacher=None), say=quiet)


def same_with_and_without_the_teacher(config: Config, path, *, visual=True):
    """fp32 states of batches of other lengths, then optimiser steps on them."""
    online = curves(run(settings.changed(config, out=str(path / "online")), say=quiet))
    cache = {"path": str(path / "rows"), "dtype": "fp32", "visual": visual, "batch_size": 3}
    config = settings.changed(config, out=str(path / "stored"), teacher_cache=cache)
    fill.make(config, say=quiet)
    stored = curves(run(settings.changed(config, teacher=None), say=quiet))
    for ours, theirs in zip(stored[0], online[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


# Patches instead of images, three positions a token; tiles of other sizes for student and teacher.
@pytest.mark.parametrize("name", ["qwen2.5-vl-7b-3b", "smolvlm2-2.2b-500m"])
def test_other_classes(name, recipe_data, tmp_path):
    config = settings.changed(shrunk(name, recipe_data), stages=("dft",))
    visual = bool(config.of_stage("dft").loss.visual)
    same_with_and_without_the_teacher(config, tmp_path, visual=visual)


def test_the_cost_is_known_before(root, tmp_path, monkeypatch):
    told = []
    fill.make(caching(root, tmp_path, stages=("dft",)), say=told.append)
    marks = [
        store.mark_of(item) for item in LlavaDataset(root / "data.json", root, tiny.processor())
    ]
    rows = sum(mark.response + mark.visual for mark in marks)
    head = 24 * load_vlm(root / "teacher")[0].lm_head.weight.shape[0] * 4
    written = 0
    for file in (tmp_path / "rows" / "dft").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            written += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert written == rows * 24 * 4 + 14 * store.INDEX + head
    assert f"a row 24 x fp32: {size(written)}, 0 bytes of it stored" in told[1]
    monkeypatch.setattr(fill, "COUNTED", 5)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    again = settings.changed(
        caching(root, tmp_path), teacher_cache={"path": str(tmp_path / "new" / "rows")}
    )
    with pytest.raises(ConfigError, match=r"kB are needed, 1.0 kB are free there"):
        fill.make(again, dry_run=True, say=told.append)
    assert "rows (counted in 5), a row" in told[-1] and not (tmp_path / "new").exists()
