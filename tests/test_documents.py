"""Do the commands and the code that the documents show run as they are printed?

Commands are given to the parsers of their programs, and their fields to the configuration; Python
blocks are executed, on a tiny pair of models.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import mllmkd_kernels as mk
from benchmarks.cli import parser as benchmarks
from examples import own_method
from examples.chat_data import ChatCollator, read_chats
from mllmkd_kernels.tune import parser as tune
from tests import pair
from tests.gpu.__main__ import parser as gpu
from tests.gpu.offline import parser as offline
from tests.training import tiny
from training import cli, config, settings
from training.demo import tower
from training.recipes import configured

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
SECTIONS = r"(?:stage|loss|view|data|model|\w+_cache)"
PARSERS = {
    "training": lambda: cli._parser(None),
    "examples.own_method": lambda: cli._parser(own_method.STAGES),
    "benchmarks": benchmarks,
    "mllmkd_kernels.tune": tune,
    "tests.gpu": gpu,
    "tests.gpu.offline": offline,
}


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str, language: str) -> list[str]:
    return [block for its, block in FENCED.findall(TEXTS[name]) if its == language]


def spans(name: str) -> list[str]:
    """What a document has between single backticks."""
    return re.findall(r"`([^`]+)`", FENCED.sub("", TEXTS[name]))


def lines(name: str) -> Iterator[str]:
    """All that may be a command."""
    for block in blocks(name, ""):
        yield from block.replace("\\\n", " ").splitlines()
    yield from spans(name)
    yield from re.findall(r"^    (make .*)", TEXTS[name], re.MULTILINE)


def programs(name: str) -> Iterator[tuple[str, list[str]]]:
    """Each `-m MODULE` of a document with its arguments."""
    for line in lines(name):
        for part in line.split("&&"):
            if found := re.search(r"(?:^|\s)-m ([\w.]+)(?=\s|$)(.*)", part):
                arguments = shlex.split(found[2], comments=True)
                yield found[1], [word for word in arguments if word not in ("NAME", "COMMAND")]


@pytest.mark.parametrize("name", TEXTS)
def test_commands_are_what_their_programs_take(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, arguments in programs(name):
        if module not in PARSERS or not arguments:
            assert find_spec(module) is not None, module
            continue
        text = " ".join(arguments).replace("--set ...", "")
        try:
            options = PARSERS[module]().parse_args(shlex.split(text))
        except SystemExit as stop:
            assert stop.code == 0, (module, text, capsys.readouterr().err)  # --help
            continue
        if hasattr(options, "recipe"):
            options.config, options.stages = None, None
            if module == "examples.own_method":
                options.stages = own_method.STAGES
            configured(options)


@pytest.mark.parametrize("name", TEXTS)
def test_targets_variables_and_extras_exist(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in lines(name):
        if found := re.match(r"make ([a-z-]+)((?: [A-Z]+=\S+)*)", line):
            assert f"\n{found[1]}: " in makefile, line
            for variable in re.findall(r"([A-Z]+)=", found[2]):
                assert f"\n{variable} ?=" in makefile, line
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for named in re.findall(r'"?\.\[([\w,-]+)\]', TEXTS[name]):
        assert set(named.split(",")) <= set(extras), named


def test_fields_that_are_named_with_a_value_exist() -> None:
    known = set()
    for method in config.method_names():
        described = settings.describe(type(config.load(overrides=[f"method={method}"])))
        known |= {line.split()[0] for line in described if re.match(r"  \w", line)}
    known |= {re.sub(r"^stage\.[\w-]+\.", "", field) for field in known}
    named = {
        field
        for name in TEXTS
        for code in spans(name)
        for field in re.findall(rf"(?:^|--set |, )({SECTIONS}\.[\w.]+)=", code)
    }
    assert len(named) > 20
    assert named <= known, sorted(named - known)


@pytest.mark.parametrize("block", blocks("training.md", "yaml"))
def test_yaml_is_a_configuration(block: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(block)
    config.load(tmp_path / "run.yaml")


# --- Python ------------------------------------------------------------------------------------


CLOSE: Any = {"rtol": 1e-4, "atol": 0.0}  # fp32 sums in another order


class DistillTrainer(mk.DistillMixin, Trainer):
    """As the documents have it."""


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the documents' blocks take as given."""
    student, teacher, chats = pair.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    load = AutoModelForImageTextToText.from_pretrained
    processor = AutoProcessor.from_pretrained(student)
    collate = ChatCollator(processor)
    args = TrainingArguments(
        "out", remove_unused_columns=False, use_cpu=True, max_steps=1, report_to=[],
        dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    data = read_chats(chats)
    as_before = {"args": args, "train_dataset": data, "data_collator": collate}
    return {
        "mk": mk, "torch": torch, "F": torch.nn.functional, "Trainer": Trainer,
        "DistillTrainer": DistillTrainer, "student": load(student), "model": load(student),
        "teacher": load(teacher), "processor": processor, "as_before": as_before, **as_before,
        "batch": collate(data[:4]), "image_token_id": processor.image_token_id,
    }  # fmt: skip


def test_the_readmes_before_and_after_are_one_loss(names: dict[str, Any]) -> None:
    before, after, rows, *trainer = blocks("README.md", "python")
    labels = names["batch"]["labels"][:, 1:]
    names |= {"rows": labels != -100, "next_tokens": labels[labels != -100]}
    exec(before, names)
    exec(after, names)
    torch.testing.assert_close(names["out"].ce, names["ce"], **CLOSE)
    torch.testing.assert_close(names["out"].response_kl, names["kl"], **CLOSE)
    whole = pair.naive_loss(names["student"], names["teacher"], names["batch"])
    torch.testing.assert_close(names["out"].loss, whole, **CLOSE)
    hidden = {f"h_{x}": names[x].hidden[:, :-1][names["rows"]] for x in ("s", "t")}
    names |= hidden | {"num_tokens": len(names["next_tokens"])}
    exec(rows, names)
    torch.testing.assert_close(names["out"].loss, names["ce"] + names["kl"], **CLOSE)
    for block in trainer:
        exec(block, names)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        pytest.param(name, block, id=f"{name}-{number}")
        for name in ("integrating.md", "methods.md")
        for number, block in enumerate(blocks(name, "python"))
    ],
)
def test_blocks_run(name: str, block: str, names: dict[str, Any]) -> None:
    if "LoraConfig" in block:
        names["LoraConfig"] = pytest.importorskip("peft").LoraConfig
    exec(block, names)


def test_a_tower_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained here."""
    tiny.write_data(tmp_path)
    for name in ("data", "teacher", "held_out"):
        text = (tmp_path / "data.json").read_text().replace("images/", "")
        (tmp_path / f"{name}.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tower, "_fit", lambda *_: None)
    (block,) = blocks("training.md", "python")
    exec(block, {})
    AutoProcessor.from_pretrained("tower")
