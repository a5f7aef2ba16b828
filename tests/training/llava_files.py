"""Small LLaVA files and images for the data tests: every image one colour, so it can be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from training.data.collate import Batch
from training.data.item import Item
from training.demo.words import build_processor

TALK = "a bag ? a coat . how many there is it this what yes no two"
WORDS = sorted(set(TALK.split()))
SIZE, PATCH, TOKENS = 16, 8, 4  # a 16×16 image is 2×2 patches


def processor() -> LlavaProcessor:
    """The processor the data tests share."""
    return build_processor(WORDS, image_size=SIZE, patch_size=PATCH)


def entry(*messages: str, image: Any = None, **extra: Any) -> dict[str, Any]:
    """An entry of alternating human and gpt messages."""
    roles = ("human", "gpt")
    talk = [{"from": roles[i % 2], "value": value} for i, value in enumerate(messages)]
    return {
        "id": "e1",
        **({} if image is None else {"image": image}),
        "conversations": talk,
        **extra,
    }


def write(path: Path, entries: list[Any]) -> Path:
    """Write entries as .json or .jsonl, by the path's suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(one)}\n" for one in entries))
    else:
        path.write_text(json.dumps(entries))
    return path


def paint(path: Path, grey: int, size: int = SIZE) -> Path:
    """Save a grey image; after processing every value is grey / 127.5 - 1."""
    Image.new("RGB", (size, size), (grey, grey, grey)).save(path)
    return path


def pixels(item: Item | Batch) -> Tensor:
    """The images of an item or batch that has some."""
    assert "pixel_values" in item
    return item["pixel_values"]
