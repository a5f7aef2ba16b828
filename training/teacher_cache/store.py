"""How do a teacher's rows lie on disk, and how are they found again?

    FOLDER/manifest.json               what was stored, and of whom
    FOLDER/head.safetensors            weight (V, D), bias (V,) where the head has one
    FOLDER/shard-00007.safetensors     samples 7n ... 7n + n - 1 of the data, in their order

A shard has `hidden` (R, D), of each sample its response rows and then its visual rows, and its own
index: `keys` (n,) int64 and `counts` (n, 2) int64. A sample is known by its key, a hash of id,
tokens, labels, rows per image and all that came of images: stored rows are only right for what the
teacher saw.

No other file lists the shards, so that several processes can write at the same time, and a kill at
any moment leaves whole shards and nothing to repair: a file is written under another name, synced,
then renamed. Reading maps the files into memory; a sample's rows are one slice, read by whichever
data-loader worker asks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import mllmkd_kernels as mk
from training.data.collate import NOT_VISUAL
from training.data.item import IGNORE
from training.data.records import DataError
from training.journal import whole, write_whole
from training.models import CheckpointError

VERSION = 2
MANIFEST, HEAD = "manifest.json", "head.safetensors"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INDEX = 24  # bytes a sample has in its shard besides its rows


class Mark(NamedTuple):
    """What a sample is known by, and how many rows the student selects of it."""

    id: str
    key: int
    response: int
    visual: int


def mark_of(item: Mapping[str, Any]) -> Mark:
    """The mark of one item: input_ids (T,), labels (T,), image_lens (images,), sample_id, and
    whatever came of images, pixels and the shapes that they are laid out in."""
    found = blake2b(str(item["sample_id"]).encode(), digest_size=8)
    for name in ("input_ids", "labels", "image_lens", *sorted(item.keys() - NOT_VISUAL)):
        part = item[name].contiguous()
        found.update(f"{name} {tuple(part.shape)}".encode())
        found.update(part.flatten().view(torch.uint8).numpy())
    return Mark(
        id=str(item["sample_id"]),
        key=int.from_bytes(found.digest(), "little", signed=True),
        response=int((item["labels"][1:] != IGNORE).sum()),
        visual=int(item["image_lens"].sum()),
    )


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
    data: str  # hash of the keys of some samples
    name: str  # of the teacher
    teacher: dict[str, str]  # fingerprints of its files
    softcap: float | None = None
    version: int = VERSION

    @property
    def shards(self) -> int:
        """How many shards a finished cache has."""
        return -(-self.samples // self.samples_per_shard)

    def block(self, shard: int) -> range:
        """The samples of one shard, by their place in the data."""
        return range(self.samples)[shard * self.samples_per_shard :][: self.samples_per_shard]

    def write(self, folder: Path) -> None:
        """Into `folder`, whole or not at all."""
        write_whole(folder / MANIFEST, json.dumps(asdict(self), indent=1))

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
            if values["version"] != VERSION:
                raise ValueError(f"version {values['version']!r}, expected {VERSION}")
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{file}: cannot be used ({error}); make it anew") from None


def shard_file(folder: Path, shard: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{shard:05d}.safetensors"


def write_shard(
    target: Path,
    hidden: Tensor,  # (R, D)
    marks: Sequence[Mark],
    visual: bool,
) -> None:
    """One shard, whole or not at all; `WriteError` if the disk is full."""
    counts = [[mark.response, mark.visual * visual] for mark in marks]
    keys = torch.tensor([mark.key for mark in marks])
    tensors = {"hidden": hidden, "keys": keys, "counts": torch.tensor(counts)}
    with whole(target) as staged:
        save_file(tensors, staged)


def write_head(folder: Path, head: mk.HeadInputs) -> None:
    """The teacher's head, in the dtype it has."""
    parts = {"weight": head.weight, "bias": head.bias}
    tensors = {n: t.detach().cpu().contiguous() for n, t in parts.items() if t is not None}
    with whole(folder / HEAD) as staged:
        save_file(tensors, staged)


def read_head(folder: Path, softcap: float | None) -> mk.HeadInputs:
    """The teacher's head, with no hidden states (0, D) yet."""
    file = _opened(folder / HEAD)
    weight = file.get_tensor("weight")
    bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118
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
        keys, places = zip(*(_index(file, i) for i, file in enumerate(files)), strict=True)
        self._keys, order = torch.cat(keys).sort(stable=True)
        self._places = torch.cat(places)[order]  # (samples, 4): shard, start, response, visual

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked: without the open files."""
        return self.__dict__ | {"_files": {}}

    def __len__(self) -> int:
        """How many samples are stored."""
        return self._keys.numel()

    def rows(self, mark: Mark) -> tuple[Tensor, Tensor]:
        """Response rows (M, D) and visual rows (K, D) of a sample; K = 0 where none are stored.

        Raises:
            DataError: the sample is not stored, or was stored with other tokens, labels or images.
        """
        entry = int(torch.searchsorted(self._keys, mark.key))
        if entry == len(self) or int(self._keys[entry]) != mark.key:
            raise DataError(
                f"{self.folder}: sample {mark.id!r} is not among the {len(self)} stored ones, or "
                "was stored with other tokens, labels or images: data, template, tokenizer or "
                "image processor have changed since; make the cache anew"
            )
        shard, start, response, visual = self._places[entry].tolist()
        if shard not in self._files:
            self._files[shard] = _opened(shard_file(self.folder, shard))
        hidden = self._files[shard].get_slice("hidden")
        middle = start + response
        return hidden[start:middle], hidden[middle : middle + visual]


def _index(file: Path, shard: int) -> tuple[Tensor, Tensor]:
    """A shard's keys (n,), and (n, 4) of each: shard, start in `hidden`, rows of both kinds."""
    opened = _opened(file)
    counts = opened.get_tensor("counts")
    sizes = counts.sum(1)
    start = sizes.cumsum(0) - sizes
    return opened.get_tensor("keys"), torch.column_stack(
        (torch.full_like(sizes, shard), start, counts)
    )


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); remove it, and `python -m training cache` makes it "
            "again"
        ) from None
