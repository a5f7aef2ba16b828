"""Configuration: YAML and --set reach every field, and every mistake is named."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import mllmkd_kernels as mk
import training
from mllmkd_kernels.methods import Stage, llava_kd
from training import config as configuration
from training import settings
from training.cli import main
from training.config import Config, config_class, load
from training.demo.config import DemoConfig
from training.recipes import names, recipe
from training.settings import ConfigError, Section


def test_yaml_file_then_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "stages: [pt, sft]\nstage:\n  sft:\n    lr: 2e-3\n    batch_size: 8\n"
        "data: {skip_bad: true}\n"
    )
    config = load(file, ["stage.sft.lr=1e-4", "model.path=m", "stage.pt.loss.ce=2"])
    assert config.stages == ("pt", "sft")
    assert (config.of_stage("sft").lr, config.of_stage("sft").batch_size) == (1e-4, 8)
    assert config.data.skip_bad is True and config.model.path == "m"
    assert config.of_stage("pt").loss.ce == 2.0
    assert config.of_stage("pt").lr == 1e-3, "fields not named keep the stage's own default"


def test_yaml_without_a_dot_is_still_a_number(tmp_path):
    assert isinstance(yaml.safe_load("2e-3"), str), "what YAML 1.1 makes of it"
    file = tmp_path / "c.yaml"
    file.write_text("stage: {sft: {lr: 2e-3}}\n")
    assert load(file).of_stage("sft").lr == 2e-3


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("out=5", "5"),
        ("out=2026-01-01", "2026-01-01"),
        ("out=true", "true"),
        ("out=a: b", "a: b"),
        ("out=[a", "[a"),
        ("model.path=1e3", "1e3"),
        ("teacher=none", None),
        ("stage.sft.steps=None", None),
        ("stages=pt", ("pt",)),
        ("stages=pt, sft,", ("pt", "sft")),
        ("stages=[pt, sft]", ("pt", "sft")),
        ("report_to=", ()),
    ],
)
def test_what_is_typed_is_text_where_its_field_is(override, value):
    found = load(overrides=["stage.sft.steps=3", "teacher=t", override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize("name", names())
def test_dump_is_read_back(name, tmp_path):
    config = recipe(name)
    file = tmp_path / "c.yaml"
    file.write_text(settings.dump(config))
    assert load(file) == config


FAULTS = [
    ("stage.sft.lrr=1", "stage.sft.lrr: no such field; nearest is 'lr'; fields here: epochs, "),
    ("stage.sftt.lr=1", "stage.sftt: no such field; nearest is 'sft'; fields here: pt, dpt, "),
    ("stage.sft.loss.relation=1", "stage.sft.loss.relation: no such field; "),
    ("stage.sft.student.experts=4", "stage.sft.student.experts: no such field; "),
    # a field that is elsewhere, as in a file of the older form
    ("dft.lr=1", "dft: no such field; there is stage.dft; fields here: out, "),
    ("hidden=8", "hidden: no such field; there is model.hidden; "),
    ("stage.sft.view.x=1", "stage.sft.view.x: no such field; fields here: none"),
    ("teacher_cache.stages=dtf", "teacher_cache.stages[0]: got 'dtf', expected 'pt', 'dpt', 'sft'"),
    # known before the first stage, not at the first step of the last
    ("stage.dft.loss.backend=gpu", "stage.dft.loss.backend: got 'gpu', expected one of 'auto', "),
    ("stage.dft.loss.workspace_mb=0", "stage.dft.loss.workspace_mb: expected None or a positive"),
    ("stage.sft.loss.vocab_size=0", "stage.sft.loss.vocab_size: got 0, expected 1 or more"),
    ("stage.sft.lr=-1", "stage.sft.lr: got -1, expected greater than 0"),
    ("stage.sft.lr=fast", "stage.sft.lr: got 'fast', expected a valid number"),
    ("stage.sft.lr=.nan", "stage.sft.lr: got nan, expected a finite number"),
    ("stage.sft.lr=none", "stage.sft.lr: got None, expected a valid number"),
    ("stage.sft.warmup=1.0", "stage.sft.warmup: got 1.0, expected less than 1"),
    ("stage.sft=3", "stage.sft: got 3, expected a mapping of epochs, steps, batch_size"),
    ("stages=pt,xx", "stages[1]: got 'xx', expected 'pt', 'dpt', 'sft' or 'dft'"),
    ("stages=[]", "stages: got [], expected at least one"),
    ("seed=1.5", "seed: got 1.5, expected a valid integer"),
    ("seed=true", "seed: got True, expected a valid integer"),
    ("threads=0", "threads: got 0, expected greater than 0"),
    ("threads=some", "threads: got 'some', expected a valid integer"),
    ("data.skip_bad=maybe", "data.skip_bad: got 'maybe', expected a valid boolean"),
    ("data.sources=[{path: a}, 3]", "data.sources[1]: got 3, expected a mapping of path, use"),
    ("data.sources=[{path: a, wait: 1}]", "data.sources[0].wait: no such field; nearest is 'wei"),
    ("data.sources=[{weight: 0}]", "data.sources[0].weight: got 0, expected greater than 0"),
    ("method=llava", "method: got 'llava', expected one of llava-kd"),
    ("method=[llava-kd]", "method: got ['llava-kd'], expected one of llava-kd"),
    ("model={hidden: 10, heads: 4}", "model.hidden: got 10, expected a multiple of heads (4)"),
    ("out.folder=a", "out: got {'folder': 'a'}, expected a valid string"),
    ("out=~nobody-here/x", "out: got '~nobody-here/x', expected a path: no home folder of"),
    ("seed", "--set 'seed': expected key=value"),
    ("=3", "--set '=3': expected key=value"),
    # what a method's functions refuse
    ("stage.dft.loss.relation=-0.5", "stage.dft.loss.relation: expected a weight >= 0, got -0.5"),
    ("stage.dft.loss.temperature=0", "stage.dft.loss.temperature: expected a positive number"),
    ("stage.dft.loss.shift=1", "stage.dft.loss.shift: got 1, expected a valid boolean"),
    # a union: the member that was meant
    ("stage.dft.loss.divergence=kl", "stage.dft.loss.divergence: got 'kl', expected one of forw"),
    (
        "stage.dft.loss.divergence=[1]",
        "stage.dft.loss.divergence: got [1], expected a valid",
    ),
    (
        "stage.dft.loss.divergence={name: jsd, betta: 0.3}",
        "stage.dft.loss.divergence.betta: no such field; nearest is 'beta'; fields here: name, be",
    ),
    (
        "stage.dft.loss.divergence={name: jsd, beta: half}",
        "stage.dft.loss.divergence.beta: got 'half', expected a valid number",
    ),
    (
        "stage.dft.loss.divergence={name: jsd, beta: 3}",
        "stage.dft.loss.divergence: beta of 'jsd' must lie in (0, 1), got 3",
    ),
]


@pytest.mark.parametrize(("override", "expected"), FAULTS, ids=[fault for fault, _ in FAULTS])
def test_faults_name_field_value_and_expectation(override, expected):
    with pytest.raises(ConfigError) as caught:
        load(None, [override])
    message = str(caught.value)
    assert message.startswith(expected) and "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out: 5\n", "out: got 5, expected a valid string"),
        ("stages: sft\n", "stages: got 'sft', expected a list"),
        ("data:\n", "data: got None, expected a mapping of captions"),
        ("3: 4\n", "3: no such field; fields here: out, method"),
        (
            "stage: {dft: {loss: {divergence: 3}}}\n",
            "stage.dft.loss.divergence: got 3, expected a valid string",
        ),
    ],
)
def test_a_file_is_read_strictly(tmp_path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(expected)


def test_values_of_python_are_checked_too():
    with pytest.raises(ConfigError, match=r"^stage.sft.batch_size: got 0, expected greater than 0"):
        settings.changed(load(), stage={"sft": {"batch_size": 0}})
    with pytest.raises(ConfigError, match=r"^heds: no such field; nearest is 'heads'"):
        settings.build(configuration.ModelConfig, {"heds": 4})
    config = load(overrides=["stage.sft.lr=1e-4", "data.held_out=h"])
    other = settings.changed(config, data={"held_out": None}, stage={"dft": {"steps": 2}}, seed=1)
    assert list(settings.differences(config, other)) == [
        "data.held_out: 'h' -> None",
        "stage.dft.steps: None -> 2",
        "seed: 0 -> 1",
    ]
    assert other.of_stage("sft").lr == 1e-4 and config.seed == 0, "sections keep what is not named"


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("seed: 1\nout: x\nseed: 2\n", "seed", (3, 1)),
        ("stage:\n  sft:\n    lr: 1\n    loss: {ce: 1}\n    lr: 2\n", "lr", (5, 3)),
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
        load(file)


def test_a_key_twice_typed():
    with pytest.raises(ConfigError, match=r"stage.sft: got '\{lr: 1, lr: 2\}'"):
        load(None, ["stage.sft={lr: 1, lr: 2}"])


def test_a_merge_gives_way_to_what_is_written(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("stage:\n  pt: &a {lr: 1, batch_size: 2}\n  sft: {<<: *a, lr: 3}\n")
    stage = load(file).of_stage("sft")
    assert (stage.lr, stage.batch_size) == (3, 2)


def test_a_byte_order_mark_is_skipped_and_other_bytes_are_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfseed: 3\nout: \xc3\xa9\n")
    config = load(file)
    assert (config.seed, config.out) == (3, "é")
    file.write_bytes(b"seed: 3\nout: \xff\n")
    with pytest.raises(ConfigError, match=r"not valid YAML: .*0xff"):
        load(file)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(broken)
    broken.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load(broken)


@pytest.mark.parametrize("cls", [type(load()), DemoConfig])
def test_help_documents_every_field(cls):
    text = "\n".join(settings.describe(cls))

    def paths(kind, where=""):
        for name, field in kind.model_fields.items():
            yield f"{where}{name}", field.description
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from paths(inner, f"{where}{name}.")

    found = dict(paths(cls))
    assert all(found.values()), "each has its sentence"
    for path, description in found.items():
        assert re.search(rf"^ *{re.escape(path)}\b", text, re.MULTILINE), path
        assert description in text


# --- what a method has --------------------------------------------------------------------------


def test_all_that_the_loss_takes_is_set_in_a_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "stage:\n  dft:\n    loss: {joint: true, shift: false, workspace_mb: 7, vocab_size: 30,\n"
        "      temperature: 2, divergence: {name: skew_reverse_kl, lam: 0.2}, visual: 0}\n"
    )
    objective = load(file).objective("dft")
    terms: Any = objective.terms
    assert objective.settings.workspace_mb == 7 and objective.settings.vocab_size == 30
    assert list(objective.terms) == ["ce", "response_kl", "relation"], "0 leaves a term out"
    response, relation = terms["response_kl"], terms["relation"]
    assert (response.rows, response.over) == ("response:unshifted", "response")
    assert response.divergence == mk.Divergence("skew_reverse_kl", lam=0.2)
    assert response.temperature == 2.0 and relation.joint is True


def widen(model, factor: int = 2):
    """A student of another size.

    Args:
        factor: how many times wider.
    """


def loss(hardness: float = 0.25, **settings) -> mk.Objective:
    """Another loss.

    Args:
        hardness: weight of the reverse KL.
    """
    term = mk.RowTerm("reverse", hardness, "response", "reverse_kl")
    return mk.Objective(mk.RowTerm("ce", 1.0, "response"), term, **settings)


OWN = (
    Stage("warm", ("projector",), "captions", "pretrain", llava_kd.supervised, usual=False),
    Stage("press", ("language",), "conversations", "chat", loss, widen, defaults={"lr": 3e-4}),
)


def test_a_method_of_ones_own_has_its_sections():
    config = load(
        None, ["stage.press.loss.hardness=0.5", "stage.press.student.factor=3"], None, OWN
    )
    assert config.stages == ("press",), "those of the usual run"
    assert config.of_stage("press").lr == 3e-4 and config.of_stage("warm").lr == 2e-5
    assert config.objective("press").terms["reverse"].weight == 0.5
    assert settings.arguments(config.of_stage("press").student) == {"factor": 3}
    assert config.compares("press") and not config.compares("warm")
    for override, expected in {
        "stage.press.student.facter=3": "nearest is 'factor'",
        "stage.press.student.model=3": "no such field",
        "stage.press.loss.hardness=-1": r"^stage.press.loss: \w+\(\): reverse: expected a weight",
        "stages=sft": r"stages\[0\]: got 'sft', expected 'warm' or 'press'",
        "method=llava-kd": "method: got 'llava-kd', expected 'own'",
    }.items():
        with pytest.raises(ConfigError, match=expected):
            load(None, [override], None, OWN)


def test_a_file_of_ones_own_has_the_commands(capsys):
    for arguments, status, told in (
        (["show", "--set", "stage.press.loss.hardness=0.5"], 0, "hardness: 0.5"),
        (["show", "--set", "stage.press.lrr=1"], 2, "stage.press.lrr: no such field"),
        (["run", "--help"], 0, "weight of the reverse KL"),
        (["run", "--help"], 0, "stage.press.student.factor"),
        (["run", "--recipe", "llava-kd-1b"], 2, "--recipe llava-kd-1b: got a recipe of llava-kd"),
    ):
        with pytest.raises(SystemExit) as caught:
            training.main(OWN, arguments)
        said = capsys.readouterr()
        assert caught.value.code == status and told in said.out + said.err
        assert "ecipe" not in said.out, "those are of shipped methods"


def test_a_method_of_an_installed_package(monkeypatch, capsys):
    module = SimpleNamespace(STAGES=OWN, __doc__="Press: harder.\n\n    L = L_ce + h L_rev\n")
    point = SimpleNamespace(name="press", load=lambda: module)
    groups = {"mllmkd_kernels.methods": [point]}
    monkeypatch.setattr(configuration, "entry_points", lambda group: groups[group])
    config = load(overrides=["method=press"])
    assert type(config) is config_class(OWN, "press") and config.stages == ("press",)
    with pytest.raises(ConfigError, match=r"'other', expected one of press, llava-kd"):
        load(overrides=["method=other"])
    assert main(["methods"]) == 0
    assert re.search(r"^ +press +Press: harder\.$", capsys.readouterr().out, re.MULTILINE)
    assert main(["methods", "press"]) == 0
    said = capsys.readouterr().out
    assert "L = L_ce + h L_rev" in said and re.search(r"stage.press.loss.hardness +float", said)


def test_the_methods_command(capsys):
    assert main(["methods"]) == 0
    assert re.search(r"^ +llava-kd +LLaVA-KD \(arXiv", capsys.readouterr().out, re.MULTILINE)
    assert main(["methods", "llava-kd"]) == 0
    said = capsys.readouterr().out
    assert llava_kd.__doc__ in said, "its equations"
    assert re.search(r"stage.dft.loss.relation +float; default 0.5\n", said)
    assert "see `Relation`" in said, "what its docstring says of an argument"
    assert main(["methods", "llava"]) == 2
    assert "method: got 'llava', expected one of llava-kd" in capsys.readouterr().err


def test_command_line_reports_a_fault_in_one_line(capsys):
    assert main(["show", "--set", "stage.sft.lrr=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ConfigError: stage.sft.lrr: no such field") and error.count("\n") == 1


def test_command_line_show_and_help(capsys):
    shown = subprocess.run(
        [sys.executable, "-m", "training", "show", "--recipe", "llava-kd-1b"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert yaml.safe_load(shown.stdout)["stage"]["dft"]["loss"]["relation"] == 0.5
    with pytest.raises(SystemExit):
        main(["--help"])
    helped = capsys.readouterr().out
    assert "stage.dft.loss.temperature" in helped
    assert re.search(r"qwen2.5-vl-7b-3b +Qwen2.5-VL-3B from Qwen2.5-VL-7B", helped)


def test_the_class_of_a_method_is_one():
    """Configurations of one method compare equal, however they came about."""
    assert type(load()) is type(recipe("llava-kd-1b")) and issubclass(type(load()), Config)
