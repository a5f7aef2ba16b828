"""Is this still the teacher, the processor and the sample that the rows were stored for?

Stored rows are only right for the very tokens, labels and images that the teacher saw. A sample is
known by a key (a hash of its id, tokens, labels and rows per image) and by four projections of
its pixels, compared with a tolerance: image libraries differ in the last bit from version to
version, and a wrong image differs in the first. Teacher and processor are known by hashes that the
manifest keeps apart by part, so that an error can say which part is another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.data.item import IGNORE
from training.fingerprint import digest

PROJECTIONS, PIXELS = 4, 4096
# Projections of unrelated images differ by about 1 (pixels are normalised to about -2 ... 2); one
# grey level of rounding at random pixels moves them by 0.01.
SAME_IMAGE = 0.05
# What a loaded configuration says of the loading, not of the model.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class SampleMark:
    """What a sample is known by, and how many rows the student selects of it."""

    id: str
    key: int
    name: int
    image: Tensor  # (PROJECTIONS,) float32
    response: int
    visual: int


def mark_of(item: Mapping[str, Any]) -> SampleMark:
    """The mark of one item: input_ids (T,), labels (T,), image_lens (images,), sample_id."""
    labels, lens = item["labels"], item["image_lens"]
    content = (item["input_ids"], labels, lens)
    name = str(item["sample_id"])
    return SampleMark(
        id=name,
        key=_number(name.encode(), *(_bytes(part) for part in content)),
        name=_number(name.encode()),
        image=_projected(item.get("pixel_values")),
        response=int((labels[1:] != IGNORE).sum()),
        visual=int(lens.sum()),
    )


def of_model(model: nn.Module, name: str) -> dict[str, str]:
    """Name, configuration, head and weights of a teacher; the weights by 1024 entries of each."""
    config: Any = getattr(model, "config", None)
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    weights = blake2b(digest_size=8)
    for key, parameter in model.named_parameters():
        entries = parameter.detach().flatten()
        weights.update(f"{key} {tuple(parameter.shape)} {parameter.dtype}".encode())
        weights.update(_bytes(entries[:: max(1, entries.numel() // 1024)]))
    return {
        "name": place(name),
        "class": type(model).__name__,
        "config": digest(_stable(config.to_dict())),
        "head": blake2b(_bytes(head.weight.detach()), digest_size=8).hexdigest(),
        "weights": weights.hexdigest(),
    }


def place(name: str) -> str:
    """A folder by its full path, a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def of_processor(processor: Any) -> dict[str, str]:
    """Tokenizer, chat template and image processor, each by a hash."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokens = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if isinstance(tokens, dict):  # set by each call, to what that call asks for
        tokens = {k: v for k, v in tokens.items() if k not in ("padding", "truncation")}
    return {
        "tokenizer": digest(tokens),
        "chat_template": digest(getattr(processor, "chat_template", None)),
        "image_processor": digest(_stable(processor.image_processor.to_dict())),
    }


@cache
def _directions(pixels: int) -> Tensor:
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(PROJECTIONS, pixels, generator=numbers) / pixels**0.5


def _projected(pixels: Tensor | None) -> Tensor:
    """(PROJECTIONS,) of about PIXELS entries spread over all images; zeros for none."""
    if pixels is None or not pixels.numel():
        return torch.zeros(PROJECTIONS)
    flat = pixels.flatten()[:: max(1, pixels.numel() // PIXELS)].float()
    return _directions(flat.numel()) @ flat


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return f"{tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()


def _number(*parts: bytes) -> int:
    """64 bits, signed: among a million samples two agree by chance once in 3e7 sets."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _stable(value: Any) -> Any:
    """A configuration without what loading writes into it."""
    if isinstance(value, Mapping):
        return {key: _stable(v) for key, v in value.items() if key not in _VOLATILE}
    return [_stable(v) for v in value] if isinstance(value, list | tuple) else value
