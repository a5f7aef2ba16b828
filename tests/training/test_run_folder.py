"""What a resumed or a second run could confuse is an error that names it; a first try that fails
leaves nothing behind.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.training import tiny
from tests.training.tiny import killed, quiet
from training import journal, settings
from training.cli import main
from training.config import SourceConfig
from training.journal import WriteError
from training.lock import held
from training.loop import run
from training.settings import ConfigError
from training.teacher_cache import fill
from training.trainer import DistillTrainer
from training.watch import NonFiniteError


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Data and models, and a run over them that was killed after its first checkpoint."""
    root = tmp_path_factory.mktemp("begun")
    killed(resumed(root), 3)
    assert (root / "out" / "1-dpt" / "checkpoint-2").is_dir()
    return root


@pytest.fixture
def root(begun, tmp_path):
    """A copy of it, to be changed."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "out").glob("*"):
        if file.is_file():  # which name the files of the first copy
            file.write_text(file.read_text().replace(str(begun), str(tmp_path)))
    return tmp_path


def resumed(root):
    return tiny.run_config(root, root / "out", stages=("dpt",))


def edit_weights(folder, part):
    """One entry of one tensor: what training a projector alone may come to."""
    file = folder / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if part in name)
    state[name].view(-1)[0] += 1
    save_file(state, file, metadata={"format": "pt"})


def swap_label(root, name="captions.json", label="this is blue", other="this is grey"):
    """The same size, one answer another."""
    text = (root / name).read_text()
    assert label in text and len(label) == len(other)
    (root / name).write_text(text.replace(label, other, 1))


def other_picture(root):
    """The same name, and (a grey one of as many bytes) the same size."""
    path = root / "images" / "red.png"
    size = path.stat().st_size
    Image.new("RGB", (16, 16), (1, 2, 3)).save(path)
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))


CHANGES = {
    "data.captions": swap_label,
    "data.held_out": lambda root: swap_label(root, "data.json", "and green", "and grey "),
    "images of data.captions": other_picture,
    "teacher": lambda root: edit_weights(root / "teacher", "projector"),
    "model.vision": lambda root: edit_weights(root / "tower", "patch_embedding"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_other_files_under_the_same_path_are_named(field, root):
    CHANGES[field](root)
    with pytest.raises(ConfigError, match=rf"{field}: has changed since .* -> ") as caught:
        run(resumed(root), say=quiet)
    assert "inputs.json" in str(caught.value), "the way to go on all the same"


def test_the_same_files_under_the_same_path_go_on(root):
    for file in (root / "captions.json", root / "teacher" / "model.safetensors"):
        os.utime(file, (1, 1))  # copied back from elsewhere
    with (root / "out" / "config.yaml").open("a") as file:
        file.write("on_nan: stop\n")  # a field of earlier versions, which decided nothing
    said = []
    run(resumed(root), say=said.append)
    assert any("resuming from checkpoint-2" in line for line in said)


def test_what_was_accepted_by_hand_goes_on(root):
    swap_label(root)
    (root / "out" / "inputs.json").unlink()
    run(resumed(root), say=quiet)


@pytest.mark.parametrize("stored", [False, True], ids=["teacher", "stored rows"])
def test_what_only_finished_stages_read_may_be_gone(stored, tmp_path, monkeypatch):
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("dpt", "sft"))
    if stored:
        config = settings.changed(config, teacher_cache={"path": str(tmp_path / "rows")})
        fill.make(config, say=quiet)
    run(config, say=quiet)
    shutil.rmtree(tmp_path / "out" / "2-sft" / "model")
    (tmp_path / "captions.json").unlink()
    shutil.rmtree(tmp_path / ("rows" if stored else "teacher"))
    whole = run(config, say=quiet)
    for loads in ("loop.load_vlm", "start.load_vlm", "start.build_model"):
        monkeypatch.setattr(f"training.{loads}", None)
    assert run(config, say=quiet) == whole, "a finished run needs no model"


def test_files_of_a_source_are_known_too(tmp_path):
    """A folder of rows, and one of several sources."""
    datasets = pytest.importorskip("datasets")
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("sft",))
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "red"}]
    rows = tmp_path / "rows"
    datasets.Dataset.from_list([{"messages": turns}] * 4).save_to_disk(rows)
    sources = [{"path": str(tmp_path / "data.json")}, {"path": str(rows)}]
    data = {"conversations": None, "held_out": None, "sources": sources}
    config = settings.changed(config, data=data)
    killed(config, 3)
    shutil.rmtree(rows)
    turns[1]["content"] = "blue"
    datasets.Dataset.from_list([{"messages": turns}] * 4).save_to_disk(rows)
    with pytest.raises(ConfigError, match=r"data\.sources\[1\]\.path: has changed .*arrow"):
        run(config, say=quiet)


def test_another_cache_under_the_same_path_is_named(begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out")
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("dpt",))
    cached = {"path": str(tmp_path / "rows"), "batch_size": 4}
    config = settings.changed(config, teacher_cache=cached)
    fill.make(config, say=quiet)
    killed(config, 3)
    shutil.rmtree(tmp_path / "rows")
    edit_weights(tmp_path / "teacher", "projector")
    fill.make(config, say=quiet)
    with pytest.raises(ConfigError, match=r"teacher_cache.path, dpt: has changed"):
        run(config, say=quiet)


def test_answers_to_other_images_are_not_gone_on_with(begun, tmp_path, capsys):
    shutil.copytree(begun / "images", tmp_path / "images")
    line = {"question_id": 1, "image": "red.png", "text": "what is this ?", "label": "yes"}
    (tmp_path / "pope.json").write_text(json.dumps(line) + "\n")
    asked = ["--questions", str(tmp_path / "pope.json"), "--images", str(tmp_path / "images")]
    typed = ["eval", str(begun / "teacher"), "--benchmark", "pope", *asked]
    typed += ["--out", str(tmp_path / "out"), "--max-new-tokens", "2"]
    assert main(typed) == 0
    other_picture(tmp_path)
    assert main(typed) == 2
    assert "holds answers to something else (images: " in capsys.readouterr().err


def hold(folder, ready):
    with held(folder, "out"):
        ready.set()
        signal.pause()


@pytest.fixture
def other(tmp_path):
    """Another process at work in tmp_path/out."""
    spawn = multiprocessing.get_context("fork")
    ready = spawn.Event()
    process = spawn.Process(target=hold, args=(tmp_path / "out", ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("what", ["run", "cache", "eval"])
def test_a_second_process_is_told_whose_the_folder_is(what, other, tmp_path, capsys):
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("dpt",))
    if what == "cache":
        cached = {"path": str(tmp_path / "out")}
        config = settings.changed(config, out=str(tmp_path / "run"), teacher_cache=cached)
    (tmp_path / "run.yaml").write_text(settings.dump(config))
    typed = [what, "--config", str(tmp_path / "run.yaml")]
    if what == "eval":
        typed = ["eval", str(tmp_path / "teacher"), "--benchmark", "pope"]
        typed += ["--questions", "q", "--images", "i", "--out", str(tmp_path / "out")]
    before = sorted(tmp_path.glob("out/*"))
    capsys.readouterr()  # bars of what was written here
    assert main(typed) == 2
    told = capsys.readouterr().err
    assert f"is in use by process {other.pid} on {socket.gethostname()} since 20" in told
    assert len(told.splitlines()) == 1 and sorted(tmp_path.glob("out/*")) == before


def test_the_lock_goes_with_a_process_that_is_killed(other, tmp_path):
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("pt",))
    with pytest.raises(ConfigError, match="in use by process"):
        run(config, say=quiet)
    other.kill()
    other.join()
    run(config, say=quiet)
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "a model that is not there": (
        {"model": {"vision": "/nothing/there"}},
        "/nothing/there: no such folder",
    ),
    "data that are not there": (
        {"data": {"captions": "/nothing/there.json"}},
        "field 'file': got no such file",
    ),
    "no data": ({"data": {"captions": None}}, r"data.captions: got null"),
    "no teacher": ({"teacher": None}, r"teacher: got null.*stage dpt"),
    "a batch that does not divide": (
        {"stage": {"dpt": {"batch_size": 4, "micro_batch": 3}}},
        "batch_size: got 4, expected a multiple",
    ),
    "samples too long": ({"data": {"max_length": 2}}, "at most max_length 2"),
    "a tracker that is not installed": (
        {"report_to": ("trackio",)},
        r"report_to: got 'trackio', .* pip install trackio",
    ),
}


@pytest.mark.parametrize("why", FAILURES)
def test_a_first_try_that_fails_leaves_nothing(why, tmp_path, monkeypatch):
    config = tiny.run_config(tmp_path, tmp_path / "new" / "out", stages=("dpt",))
    changes, message = FAILURES[why]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        run(settings.changed(config, **changes), say=quiet)
    assert not (tmp_path / "new").exists()


def test_a_first_try_without_a_checkpoint_binds_nobody(tmp_path):
    """What was wrong with the data is mended, and the same command given again."""
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("dpt",))
    killed(config, 1)
    log = tmp_path / "out" / "1-dpt" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 1, "what was learned of the failure stays"
    swap_label(tmp_path)
    (result,) = run(settings.changed(config, seed=3), say=quiet)
    assert [entry["step"] for entry in result.history] == [1, 2, 3, 4, 5, 6]


def test_a_batch_that_cannot_be_kept_is_named_all_the_same(tmp_path, monkeypatch):
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("dpt",))
    original = DistillTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        (tmp_path / "out" / "1-dpt" / "bad_batch.pt" / "in the way").mkdir(parents=True)
        inputs["pixel_values"] = inputs["pixel_values"] * torch.nan
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "compute_loss", poisoned)
    said = []
    with pytest.raises(NonFiniteError, match="step 1: micro-batch 1 of 1, rank 0: loss nan"):
        run(config, say=said.append)
    assert any("bad_batch.pt: cannot be written: " in line for line in said)


def test_scores_of_a_model_that_was_removed_are_made_again(tmp_path):
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("pt",))
    run(config, say=quiet)
    folder = tmp_path / "out" / "1-pt"
    scores = (folder / "scores.json").read_text()
    (folder / "scores.json").write_text(scores.replace('"tokens": ', '"tokens": 1'))
    shutil.rmtree(folder / "model")
    run(config, say=quiet)
    assert (folder / "scores.json").read_text() == scores


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    config = tiny.run_config(tmp_path, tmp_path / "data.json" / "out", stages=("pt",))
    (tmp_path / "run.yaml").write_text(settings.dump(config))
    assert main(["run", "--config", str(tmp_path / "run.yaml")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("WriteError: ") and "data.json/out: cannot be written: " in told
    assert len(told.splitlines()) == 1


def test_a_disk_that_fills_while_logging_is_named(tmp_path):
    """No file may be larger than 8 KiB, which the log is after some 20 entries."""
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("pt",))
    config = settings.changed(config, stage={"pt": {"steps": 100}}, save_steps=1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(WriteError, match=r"log\.jsonl: cannot be written: File too large$"):
            run(config, say=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_missing_folders_of_output_are_made(begun, tmp_path):
    target = tmp_path / "not" / "there" / "file"
    one = ["--json", str(begun / "captions.json"), "--image-root", str(begun)]
    check = ["data", "check", *one, "--processor", str(begun / "tower")]
    assert main([*check, "--html", str(target)]) == 0
    assert target.stat().st_size


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tiny.run_config(tmp_path, tmp_path / "out", stages=("pt",))
    text = settings.dump(config).replace(f"{tmp_path}/", "~/")
    assert text.count("~/") == 7
    (tmp_path / "run.yaml").write_text(text)
    assert settings.load(type(config), tmp_path / "run.yaml") == config
    assert main(["run", "--config=~/run.yaml", "--set", "out=~/elsewhere"]) == 0
    assert (tmp_path / "elsewhere" / "1-pt" / "model").is_dir()
    one = SourceConfig(path="~/captions.json", image_root="~")
    assert (one.path, one.image_root) == (str(tmp_path / "captions.json"), str(tmp_path))
    capsys.readouterr()
    assert main(["show", "--set=model.path=~nobody-of-this-name/model"]) == 2
    assert "path: got '~nobody-of-this-name/model', expected" in capsys.readouterr().err


def test_a_folder_that_replaces_another_is_never_half(tmp_path, monkeypatch):
    """Killed while the old one is being removed, file by file."""

    def half(path: Any) -> None:
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    def write(text: str) -> None:
        with journal.whole(tmp_path / "data") as staged:
            staged.mkdir()
            for name in "ab":
                (staged / name).write_text(text)

    write("old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.shutil, "rmtree", half)
        write("new")
    assert [(tmp_path / "data" / name).read_text() for name in "ab"] == ["new", "new"]
    write("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
