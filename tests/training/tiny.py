"""A data folder and models small enough that a stage of a few steps takes a second.

Images are squares of one colour on a 16x16 canvas; the question is their colour. Some samples are
text alone, one has two images and two turns, so that every batch is uneven.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from transformers import LlavaProcessor, SiglipVisionConfig, SiglipVisionModel

from training import settings
from training.config import Config, ModelConfig, class_for, load
from training.demo.words import build_processor
from training.loop import run
from training.models import build_model, save_model
from training.trainer import DistillTrainer

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "grey": (90, 90, 90)}
WORDS = [*COLOURS, "what", "colour", "and", "this", "is", "say"]


def write_data(root: Path, samples: int = 14) -> Path:
    """A LLaVA folder: data.json (captions.json the same images) and images/."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    for name, rgb in COLOURS.items():
        Image.new("RGB", (16, 16), rgb).save(root / "images" / f"{name}.png")
    chat, captions = [], []
    for i in range(samples):
        name, other = names[i % 4], names[(i + 1) % 4]
        caption = {"id": f"c{i}", "image": f"images/{name}.png"}
        captions.append(caption | {"conversations": turns("<image>\nsay", f"this is {name}")})
        if i % 5 == 4:
            chat.append(
                {"id": f"t{i}", "kind": "text", "conversations": turns(f"say {name}", name)}
            )
        elif i % 5 == 3:
            images = [f"images/{name}.png", f"images/{other}.png"]
            both = turns("<image>\n<image>\nwhat colour", f"{name} and {other}")
            both += turns("what is this", other)
            chat.append({"id": f"m{i}", "kind": "pair", "image": images, "conversations": both})
        else:
            one = turns("<image>\nwhat colour is this", name)
            entry = {"id": f"s{i}", "kind": "colour", "image": f"images/{name}.png"}
            chat.append(entry | {"conversations": one})
    (root / "data.json").write_text(json.dumps(chat))
    (root / "captions.json").write_text(json.dumps(captions))
    return root


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def processor() -> LlavaProcessor:
    return build_processor(WORDS, image_size=16, patch_size=8)


def write_tower(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        vision_use_head=False,
    )
    SiglipVisionModel(config).save_pretrained(path)
    processor().save_pretrained(path)
    return path


def model_config(tower: Path, hidden: int = 16, layers: int = 1) -> ModelConfig:
    return ModelConfig(
        vision=str(tower), processor=str(tower), hidden=hidden, layers=layers, heads=2
    )


def write_teacher(path: Path, tower: Path) -> Path:
    model, its_processor = build_model(model_config(tower, hidden=24), seed=7)
    save_model(model, its_processor, path)
    return path


def write_talker(path: Path, tower: Path) -> Path:
    """A model that says different things to different prompts, and mostly stops by itself."""
    model, its_processor = build_model(model_config(tower, 32), 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "vision_tower" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    save_model(model, its_processor, path)
    return path


def run_config(
    root: Path, out: Path, *, stages: tuple[str, ...] = ("dpt", "sft", "dft"), samples: int = 14
) -> Config:
    """A run over the data, tower and teacher below `root` (written if they are not there)."""
    write_parts(root, samples)
    stage = {"steps": 6, "batch_size": 4, "lr": 1e-2, "loss": {"backend": "eager"}}
    values = {
        "out": str(out),
        "stages": stages,
        "stage": dict.fromkeys(("pt", "dpt", "sft", "dft"), stage),
        "teacher": str(root / "teacher"),
        "model": model_config(root / "tower"),
        "data": {
            "captions": str(root / "captions.json"),
            "conversations": str(root / "data.json"),
            "held_out": str(root / "data.json"),
            "image_root": str(root),
        },
        "log_steps": 1,
        "save_steps": 2,
        "threads": 1,
    }
    return settings.build(type(load()), values)


def write_parts(root: Path, samples: int = 14) -> Path:
    """Data, tower and teacher, as far as they are not there."""
    if not (root / "data.json").is_file():
        write_data(root, samples)
    if not (root / "teacher").is_dir():
        write_teacher(root / "teacher", write_tower(root / "tower"))
    return root


def method_config(
    root: Path, out: Path, method: str, stages: Mapping[str, Any], *, layers: int = 1, **more: Any
) -> Config:
    """A run of any method over them: two steps of four samples in each of the stages, which are
    given with what they have of their own."""
    write_parts(root)
    plan = {"steps": 2, "batch_size": 4, "micro_batch": 2, "lr": 1e-2}
    values = {
        "method": method,
        "stages": list(stages),
        "out": str(out),
        "teacher": str(root / "teacher"),
        "stage": {name: {**plan, **own} for name, own in stages.items()},
        "model": model_config(root / "tower", layers=layers).model_dump(),
        "data": {
            "captions": str(root / "captions.json"),
            "conversations": str(root / "data.json"),
            "preferences": str(root / "data.json"),  # which has no pairs
            "image_root": str(root),
        },
        "log_steps": 1,
        "save_steps": 1,
        "threads": 1,
    }
    return settings.build(class_for(values), values | more)


def write_run(root: Path, out: Path, *args: Any, **kwargs: Any) -> Path:
    """The file of a `method_config`."""
    file = out.with_suffix(".yaml")
    file.write_text(settings.dump(method_config(root, out, *args, **kwargs)))
    return file


def on_a_rank(file: Path, *options: str) -> list[dict[str, float]]:
    """The loss curve of one of two processes of a run of one stage."""
    rank = str(dist.get_rank())
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost"
    )
    return run(load(file, options), say=quiet)[0].history


class Killed(BaseException):
    """As SIGKILL: nothing happens after it."""


def quiet(message: str) -> None:
    """What nobody reads."""


def killed(config: Config, step: int) -> None:
    """Run until so many steps are made."""
    original = DistillTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillTrainer, "compute_loss", compute_loss)
        with pytest.raises(Killed):
            run(config, say=quiet)
