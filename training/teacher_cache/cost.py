"""What will a teacher cache cost on disk? Asked before the teacher runs, or is even loaded.

Bytes are rows × hidden size × bytes a number. Rows are counted by encoding samples as training
does: all of a small data set, else a few hundred spread over it, and then the figure carries two
standard errors of their mean.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig

from training.bar import track
from training.settings import ConfigError
from training.teacher_cache import identity
from training.teacher_cache.store import DTYPES, HEAD
from training.teacher_cache.use import spread

COUNTED = 512  # samples
INDEX = 48  # bytes a sample has in its shard besides its rows


@dataclass(frozen=True)
class Cost:
    """Rows and bytes of one stage's cache."""

    folder: Path
    samples: int
    counted: int
    response: float  # rows a sample
    visual: float  # rows a sample; 0 where they are not stored
    spread: float  # two standard errors of response + visual, relative
    hidden: int
    dtype: str
    head: int  # bytes
    shard: int  # bytes
    stored: int  # bytes that are there already
    free: int

    @property
    def row(self) -> int:
        """Bytes of one row."""
        return self.hidden * DTYPES[self.dtype].itemsize

    @property
    def total(self) -> int:
        """Bytes of the whole cache."""
        rows = self.samples * (self.response + self.visual)
        return round(rows * self.row) + self.samples * INDEX + self.head

    @property
    def samples_per_shard(self) -> int:
        """So many that a shard has about the size asked for."""
        return max(1, int(self.shard // max(1.0, (self.response + self.visual) * self.row)))

    def __str__(self) -> str:
        how = "counted" if self.counted == self.samples else f"from {self.counted} samples"
        about = f" ± {100 * self.spread:.1f}%" if self.counted < self.samples else ""
        shards = -(-self.samples // self.samples_per_shard)
        already = f", {size(self.stored)} of it stored already" if self.stored else ""
        return (
            f"{self.folder}: {self.samples} samples\n"
            f"  rows a sample  {self.response:.1f} response + {self.visual:.1f} visual ({how})\n"
            f"  a row          {self.hidden} x {self.dtype} = {self.row} bytes\n"
            f"  on disk        {size(self.total)}{about}, {size(self.head)} of it the head; "
            f"{shards} shard{'s' * (shards > 1)}{already}\n"
            f"  free there     {size(self.free)}"
        )


def check(costs: Sequence[Cost]) -> None:
    """Raise `ConfigError` unless all of them fit on the disk, beside what is stored already."""
    need = sum(cost.total - cost.stored for cost in costs)
    free = min(cost.free for cost in costs)
    if need > free:
        fewer = "without visual rows (teacher_cache.visual=false), "
        raise ConfigError(
            f"teacher_cache.path: {size(need)} are needed, {size(free)} are free there; take "
            f"another disk, or store less: {fewer if any(c.visual for c in costs) else ''}in a "
            "narrower teacher_cache.dtype, or one stage at a time (teacher_cache.stages)"
        )


def cost_of(
    folder: Path,
    dataset: Any,
    teacher: str,
    *,
    visual: bool,
    dtype: str,
    shard_mb: int,
    workers: int,
) -> Cost:
    """Count rows of `dataset`, and look at the teacher's configuration and at the disk."""
    chosen = spread(len(dataset), COUNTED)
    marks = marks_of(dataset, chosen, workers)
    rows = [mark.response + mark.visual * visual for mark in marks]
    mean = fmean(rows)
    error = 2 * stdev(rows) / len(rows) ** 0.5 / max(mean, 1e-9) if len(rows) > 1 else 0.0
    hidden, head = _sizes(teacher)
    return Cost(
        folder=folder,
        samples=len(dataset),
        counted=len(chosen),
        response=fmean(mark.response for mark in marks),
        visual=fmean(mark.visual * visual for mark in marks),
        spread=error,
        hidden=hidden,
        dtype=dtype,
        head=head,
        shard=shard_mb << 20,
        stored=sum(f.stat().st_size for f in folder.glob("*.safetensors") if f.name != HEAD)
        + (head if (folder / HEAD).is_file() else 0),
        free=shutil.disk_usage(_existing(folder)).free,
    )


def marks_of(dataset: Any, chosen: Sequence[int], workers: int) -> list[identity.SampleMark]:
    """Marks of some samples, encoded in `workers` processes."""
    loader = DataLoader(
        Subset(dataset, chosen), batch_size=1, num_workers=workers, collate_fn=_mark_of_one
    )
    return list(track(loader, "reading samples", "samples"))


def size(count: float) -> str:
    """Bytes as a reader takes them: 512 B, 3.9 MB, 2.17 TB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _mark_of_one(items: Sequence[Any]) -> identity.SampleMark:
    return identity.mark_of(items[0])


def _sizes(teacher: str) -> tuple[int, int]:
    """Hidden size, and bytes of the head, by the teacher's configuration alone."""
    config: Any = AutoConfig.from_pretrained(teacher)
    text = config.get_text_config()
    stored = getattr(config, "dtype", None)
    return text.hidden_size, text.hidden_size * text.vocab_size * (stored.itemsize if stored else 4)


def _existing(folder: Path) -> Path:
    """The folder, or the part of its path that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
