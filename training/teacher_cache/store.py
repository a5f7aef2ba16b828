"""How do a teacher's rows lie on disk, and how are they found again?

    FOLDER/manifest.json               what was stored, and of whom
    FOLDER/head.safetensors            weight (V, D), bias (V,) where the head has one
    FOLDER/shard-00007.safetensors     samples 7n ... 7n + n - 1 of the data, in their order

A shard has `hidden` (R, D), of each sample its response rows and then its visual rows, and its own
index: `keys` and `names` (n,) int64, `counts` (n, 2) int64, `images` (n, 4) float32
(`identity.SampleMark`). No other file lists the shards, so that several processes can write at the
same time, and a kill at any moment leaves whole shards and nothing to repair: a file is written
under another name, synced, then renamed.

Reading maps the files into memory; a sample's rows are one slice, read by whichever data-loader
worker asks. The index of all shards is in memory: 72 bytes a sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import mllmkd_kernels as mk
from training import checkpoint
from training.data.records import DataError
from training.models import CheckpointError
from training.teacher_cache.identity import SAME_IMAGE, SampleMark

VERSION = 1
MANIFEST, HEAD = "manifest.json", "head.safetensors"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Manifest:
    """What a cache holds; two caches with equal manifests hold the same rows."""

    stage: str
    template: str
    visual: bool  # visual rows as well as response rows
    dtype: str
    precision: str  # the pass ran in: the teacher's own, or bf16 autocast
    samples: int
    samples_per_shard: int
    data: str  # hash of a few samples
    teacher: dict[str, str]  # identity.of_model
    processor: dict[str, str]  # identity.of_processor
    softcap: float | None
    image_token_id: int  # the teacher's
    version: int = VERSION

    @property
    def shards(self) -> int:
        """How many shards a finished cache has."""
        return -(-self.samples // self.samples_per_shard)

    def block(self, shard: int) -> range:
        """The samples of one shard, by their place in the data."""
        start = shard * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.samples))

    def write(self, folder: Path) -> None:
        """Into `folder`, whole or not at all."""
        staged = staging(folder / MANIFEST)
        staged.write_text(json.dumps(asdict(self), indent=1))
        checkpoint.publish_file(staged, folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """From `folder`; `CheckpointError` if there is none, or one of another version."""
        file = folder / MANIFEST
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: no {MANIFEST} there, expected a teacher cache; make it with "
                "`python -m training cache`"
            )
        try:
            values = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{file}: not valid json: {error}") from None
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.get("version") != VERSION:
            got = values.get("version") if isinstance(values, dict) else values
            raise CheckpointError(f"{file}: version {got!r}, expected {VERSION}; make it anew")
        if values.keys() != names:
            odd = sorted(values.keys() ^ names)
            raise CheckpointError(f"{file}: fields {odd} are missing or unknown; make it anew")
        return cls(**values)


def shard_file(folder: Path, shard: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{shard:05d}.safetensors"


def staging(target: Path) -> Path:
    """The name a file has until it is whole."""
    return target.with_name(f".{target.name}.incomplete")


def write_shard(
    target: Path,
    hidden: Tensor,  # (R, D)
    marks: list[SampleMark],
) -> None:
    """One shard, whole or not at all."""
    tensors = {
        "hidden": hidden,
        "keys": torch.tensor([mark.key for mark in marks]),
        "names": torch.tensor([mark.name for mark in marks]),
        "counts": torch.tensor([[mark.response, mark.visual] for mark in marks]),
        "images": torch.stack([mark.image for mark in marks]),
    }
    _write(target, tensors)


def write_head(folder: Path, head: mk.HeadInputs) -> None:
    """The teacher's head, in the dtype it has."""
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    _write(folder / HEAD, tensors)


def read_head(folder: Path, softcap: float | None) -> mk.HeadInputs:
    """The teacher's head, with no hidden states (0, D) yet."""
    file = _opened(folder / HEAD)
    names = file.keys()
    weight = file.get_tensor("weight")
    bias = file.get_tensor("bias") if "bias" in names else None
    return mk.HeadInputs(weight.new_zeros(0, weight.shape[1]), weight, bias, softcap)


class TeacherRows:
    """The stored rows of one stage, found by sample.

    Args:
        folder: one stage's folder of a teacher cache.

    Raises:
        CheckpointError: there is no cache, it is not finished, or a shard is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        files = [shard_file(self.folder, shard) for shard in range(self.manifest.shards)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} of {len(files)} shards are not there (the first: "
                f"{missing[0]}); `python -m training cache`, given again, goes on with it"
            )
        self._files: dict[int, Any] = {}
        found = [_index(file, shard) for shard, file in enumerate(files)]
        columns = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        order = columns["keys"].argsort(stable=True)
        self._index = {name: column[order] for name, column in columns.items()}
        self._names = columns["names"].sort().values

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked: without the open files."""
        return self.__dict__ | {"_files": {}}

    def __len__(self) -> int:
        """How many samples are stored."""
        return self._index["keys"].numel()

    def rows(self, mark: SampleMark) -> tuple[Tensor, Tensor]:
        """Response rows (M, D) and visual rows (K, D) of a sample; K = 0 where none are stored.

        Raises:
            DataError: the sample is not stored, or was stored with other tokens, labels or images.
        """
        entry = self._find(mark)
        shard, start, response, visual = (
            int(self._index[name][entry]) for name in ("shard", "start", "response", "visual")
        )
        if shard not in self._files:
            self._files[shard] = _opened(shard_file(self.folder, shard))
        hidden = self._files[shard].get_slice("hidden")
        middle = start + response
        return hidden[start:middle], hidden[middle : middle + visual]

    def _find(self, mark: SampleMark) -> int:
        keys = self._index["keys"]
        first = int(torch.searchsorted(keys, mark.key))
        entry = first
        while entry < keys.numel() and int(keys[entry]) == mark.key:
            distance = (self._index["images"][entry] - mark.image).abs().max()
            if float(distance) <= SAME_IMAGE:
                return entry
            entry += 1
        raise DataError(f"{self.folder}: sample {mark.id!r} {self._why(mark, entry > first)}")

    def _why(self, mark: SampleMark, known: bool) -> str:
        if known:
            return "was stored with other images: make the cache anew from this data"
        place = int(torch.searchsorted(self._names, mark.name))
        if place < self._names.numel() and int(self._names[place]) == mark.name:
            return (
                "was stored with other tokens, labels or rows per image: template, tokenizer, "
                "image processor or text have changed since; make the cache anew"
            )
        return f"is not among the {len(self)} stored ones: the cache was made from other data"


def _index(file: Path, shard: int) -> dict[str, Tensor]:
    """A shard's index, and where in `hidden` each sample starts."""
    opened = _opened(file)
    counts = opened.get_tensor("counts")
    sizes = counts.sum(1)
    rows = opened.get_slice("hidden").get_shape()[0]
    if int(sizes.sum()) != rows:
        raise CheckpointError(f"{file}: holds {rows} rows, its index names {int(sizes.sum())}")
    return {
        "keys": opened.get_tensor("keys"),
        "names": opened.get_tensor("names"),
        "images": opened.get_tensor("images"),
        "shard": torch.full_like(sizes, shard),
        "start": sizes.cumsum(0) - sizes,
        "response": counts[:, 0],
        "visual": counts[:, 1],
    }


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); remove it, and `python -m training cache` makes it "
            "again"
        ) from None


def _write(target: Path, tensors: Mapping[str, Tensor]) -> None:
    staged = staging(target)
    save_file(dict(tensors), staged)
    checkpoint.publish_file(staged, target)
