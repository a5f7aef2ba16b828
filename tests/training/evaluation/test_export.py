"""What lmms-eval is handed."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.training import tiny
from training.cli import main
from training.evaluation import export
from training.models import load_vlm
from training.settings import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model, exported."""
    root = tmp_path_factory.mktemp("export")
    source = tiny.write_teacher(root / "model", tiny.write_tower(root / "tower"))
    assert main(["export", str(source), str(root / "out")]) == 0
    return root


def test_transformers_alone_loads_the_folder(folder):
    ours = AutoModelForImageTextToText.from_pretrained(folder / "model").state_dict()
    model = AutoModelForImageTextToText.from_pretrained(folder / "out" / "model")
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())
    processor: Any = AutoProcessor.from_pretrained(folder / "out" / "model")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "say"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert text == "USER: <image>\nsay ASSISTANT:"


def test_the_command_is_a_shell_script_with_the_tasks(folder, tmp_path):
    """Run with a stand-in for accelerate that prints what it is given."""
    stand_in = tmp_path / "accelerate"
    stand_in.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    tasks = ",".join((folder / "out" / "tasks.txt").read_text().split())
    one = "pretrained=model,device=cuda,device_map=cuda"
    for env, arguments in (
        ({"GPUS": "2"}, f"2 pretrained=model {tasks}"),
        ({}, f"1 {one} {tasks}"),
        ({"DEVICE": "cpu", "TASKS": "pope"}, f"1 {one.replace('cuda', 'cpu')} pope"),
    ):
        shown = subprocess.run(
            ["sh", "out/run.sh", "--limit", "8"],
            cwd=folder,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", **env},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        processes, model, names = arguments.split()
        assert shown == shlex.split(
            f"{folder / 'out'} launch --num_processes {processes} -m lmms_eval --model llava_hf "
            f"--model_args {model} --tasks {names} --batch_size 1 --output_path logs --log_samples "
            "--limit 8"
        )


def test_image_sizes_are_passed_on():
    qwen = SimpleNamespace(size={"shortest_edge": 3136, "longest_edge": 65536})
    sizes = export._image_sizes("qwen2_5_vl", qwen)
    assert sizes == {"min_pixels": 3136, "max_pixels": 65536}
    internvl = SimpleNamespace(min_patches=1, max_patches=6)
    assert export._image_sizes("internvl", internvl) == {"min_patches": 1, "max_patches": 6}
    assert export._image_sizes("llava", None) == {}


def test_wrong_things_to_export(folder, tmp_path, capsys):
    for arguments, message in (
        ([str(folder / "model"), str(folder / "out")], "is not empty, expected a new folder"),
        ([str(tmp_path), "x"], "CheckpointError"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_processor_without_a_chat_template_is_not_exported(folder, tmp_path):
    model, processor = load_vlm(folder / "model")
    processor.chat_template = None
    with pytest.raises(ConfigError, match="got a LlavaProcessor without chat_template"):
        export.export_model(model, processor, tmp_path / "out")
