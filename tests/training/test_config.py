"""Configuration: YAML and --set reach every field, and every mistake is named."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import yaml

from training import settings
from training.__main__ import main
from training.config import Config, LossConfig, ModelConfig, StageConfig
from training.demo.recipes import DemoConfig
from training.recipes import names, recipe
from training.settings import ConfigError


def test_yaml_file_then_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "stages: [pt, sft]\nsft:\n  lr: 2e-3\n  batch_size: 8\ndata: {skip_bad: true}\n"
    )
    config = settings.load(Config, file, ["sft.lr=1e-4", "model.path=m", "pt.loss.ce=2"])
    assert config.stages == ("pt", "sft")
    assert (config.sft.lr, config.sft.batch_size) == (1e-4, 8)
    assert config.data.skip_bad is True and config.model.path == "m"
    assert config.pt.loss.ce == 2.0
    assert config.pt.lr == 1e-3, "fields not named keep the stage's own default"


def test_yaml_without_a_dot_is_still_a_number():
    assert isinstance(yaml.safe_load("2e-3"), str), "what YAML 1.1 makes of it"
    assert settings.build(Config, {"sft": {"lr": "2e-3"}}).sft.lr == 2e-3


@pytest.mark.parametrize("name", names())
def test_dump_is_read_back(name, tmp_path):
    config = recipe(name)
    file = tmp_path / "c.yaml"
    file.write_text(settings.dump(config))
    assert settings.load(Config, file) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sft.lrr=1", ["sft.lrr", "no such field", "'lr'"]),
        ("sftt.lr=1", ["sftt", "no such field", "'sft'"]),
        ("sft.lr=-1", ["sft.lr", "'-1'", "float > 0"]),
        ("sft.lr=fast", ["sft.lr", "'fast'", "float"]),
        ("sft.lr=.nan", ["sft.lr", "float"]),
        ("stages=pt,xx", ["stages[1]", "'xx'", "pt, dpt, sft, dft"]),
        ("stages=[]", ["Config.stages", "at least one"]),
        ("seed=1.5", ["seed", "'1.5'", "int"]),
        ("seed=true", ["seed", "'true'", "int"]),
        ("sft=3", ["sft", "'3'", "a mapping of", "batch_size"]),
        ("data.skip_bad=maybe", ["data.skip_bad", "'maybe'", "bool"]),
        ("dft.loss.divergence=kl", ["dft.loss.divergence", "'kl'", "forward_kl"]),
        ("on_nan=retry", ["on_nan", "'retry'", "stop, skip"]),
        ("sft.warmup=1.0", ["warmup", "1.0", "below 1"]),
        ("seed", ["'seed'", "key=value"]),
    ],
)
def test_faults_name_field_value_and_expectation(override, parts):
    with pytest.raises(ConfigError) as caught:
        settings.load(Config, None, [override])
    for part in parts:
        assert part in str(caught.value)


def test_python_construction_is_checked_too():
    with pytest.raises(ConfigError, match=r"StageConfig.batch_size: got 0, expected int > 0"):
        StageConfig(batch_size=0)
    with pytest.raises(ConfigError, match=r"LossConfig.relation: got -0.5"):
        LossConfig(relation=-0.5)
    with pytest.raises(ConfigError, match="multiple of heads"):
        ModelConfig(hidden=10, heads=4)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("seed: 1\nout: x\nseed: 2\n", "seed", (3, 1)),
        ("sft:\n  lr: 1\n  loss: {ce: 1}\n  lr: 2\n", "lr", (4, 2)),
        ("data:\n  sources:\n    - {path: a,\n       path: b}\n", "path", (4, 3)),
        ("seed: 1\n'seed': 2\n", "seed", (2, 1)),
    ],
    ids=["top", "section", "list", "quoted"],
)
def test_a_key_twice_is_an_error_naming_key_and_lines(tmp_path, text, key, lines):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    expected = rf"c\.yaml: .*line {lines[0]}: '{key}' again, expected once \(line {lines[1]}\)"
    with pytest.raises(ConfigError, match=expected):
        settings.load(Config, file)


def test_a_key_twice_typed(tmp_path):
    with pytest.raises(ConfigError, match="sft: got"):
        settings.load(Config, None, ["sft={lr: 1, lr: 2}"])


def test_a_merge_gives_way_to_what_is_written(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("pt: &a {lr: 1, batch_size: 2}\nsft: {<<: *a, lr: 3}\n")
    config = settings.load(Config, file)
    assert (config.sft.lr, config.sft.batch_size) == (3, 2)


def test_a_byte_order_mark_is_skipped_and_other_bytes_are_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfseed: 3\nout: \xc3\xa9\n")
    config = settings.load(Config, file)
    assert (config.seed, config.out) == (3, "é")
    file.write_bytes(b"seed: 3\nout: \xff\n")
    with pytest.raises(ConfigError, match=r"not valid YAML: .*0xff"):
        settings.load(Config, file)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        settings.load(Config, tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        settings.load(Config, broken)
    broken.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        settings.load(Config, broken)


@pytest.mark.parametrize("cls", [Config, DemoConfig])
def test_help_documents_every_field(cls):
    text = "\n".join(settings.describe(cls))

    def paths(kind, where=""):
        default = kind()
        for item in dataclasses.fields(kind):
            value = getattr(default, item.name)
            yield f"{where}{item.name}", item
            if dataclasses.is_dataclass(value):
                yield from paths(type(value), f"{where}{item.name}.")

    for path, item in paths(cls):
        assert path in text
        assert item.metadata["help"] in text


def test_command_line_reports_a_fault_in_one_line(capsys):
    assert main(["show", "--set", "sft.lrr=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ConfigError: sft.lrr: no such field") and error.count("\n") == 1


def test_command_line_show_and_help():
    shown = subprocess.run(
        [sys.executable, "-m", "training", "show", "--recipe", "llava-kd-1b"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert yaml.safe_load(shown.stdout)["dft"]["loss"]["relation"] == 0.5
    helped = subprocess.run(
        [sys.executable, "-m", "training", "--help"], capture_output=True, text=True, check=True
    )
    assert "dft.loss.temperature" in helped.stdout
    assert re.search(r"qwen2.5-vl-7b-3b +Qwen2.5-VL-3B from Qwen2.5-VL-7B", helped.stdout)
