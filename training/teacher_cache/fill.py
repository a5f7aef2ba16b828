"""How is a teacher run once over a stage's data? Cost first, then shard by shard.

A shard is a block of consecutive samples. Each process takes every n-th block whose shard is not
there yet, so the pass goes on where it was killed, with as many processes as it is given then, and
recomputes nothing but the shards that were not finished. What was stored before must be of the same
teacher, processor and data, or the pass stops before it starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader

import mllmkd_kernels as mk
from training.bar import Bar
from training.data.records import DataError
from training.fingerprint import differences
from training.settings import ConfigError
from training.teacher import OnlineTeacher
from training.teacher_cache import identity
from training.teacher_cache.cost import size
from training.teacher_cache.store import (
    DTYPES,
    MANIFEST,
    Manifest,
    shard_file,
    write_head,
    write_shard,
)


@dataclass(frozen=True)
class Pass:
    """One stage's pass.

    Attributes:
        teacher: a model in memory.
        dataset: the stage's data, map-style.
        collator: makes its batches, with a view of the teacher's own where it needs one.
        manifest: what the cache will hold.
        batch_size: samples in a forward pass of the teacher.
        workers: data-loading processes.
    """

    folder: Path
    teacher: OnlineTeacher
    dataset: Any
    collator: Any
    manifest: Manifest
    batch_size: int
    workers: int

    def claim(self) -> None:
        """Head and manifest into the folder, or `ConfigError` if it has rows of something else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*.incomplete"):
            left.unlink()
        if (self.folder / MANIFEST).is_file():
            changed = _changed(Manifest.read(self.folder), self.manifest)
            if changed:
                raise ConfigError(
                    f"teacher_cache.path: {self.folder} was begun with something else "
                    f"({'; '.join(changed)}); go back to it, remove the folder or name another"
                )
            return
        _, batch = _Marked(self.collator)([self.dataset[0]])
        head = self._run(batch)
        write_head(self.folder, head)
        dataclasses.replace(self.manifest, softcap=head.softcap).write(self.folder)

    def fill(self, state: PartialState) -> None:
        """Write this process's share of the shards that are not there yet."""
        manifest = Manifest.read(self.folder)
        shards = range(state.process_index, manifest.shards, state.num_processes)
        left = [s for s in shards if not shard_file(self.folder, s).is_file()]
        plan = [(shard, batch) for shard in left for batch in self._batches(manifest.block(shard))]
        loader = DataLoader(
            self.dataset,
            batch_sampler=[batch for _, batch in plan],
            num_workers=self.workers,
            collate_fn=_Marked(self.collator),
        )
        total = sum(len(manifest.block(s)) for s in shards)
        done = total - sum(len(batch) for _, batch in plan)
        show = state.is_local_main_process
        with Bar(f"teacher {manifest.stage}", total, "samples", done=done, show=show) as bar:
            loaded = zip(plan, loader, strict=True)
            for shard, group in groupby(loaded, key=lambda pair: pair[0][0]):
                self._write(manifest, shard, self._rows(manifest, (b for _, b in group), bar))

    def _batches(self, block: range) -> Iterator[list[int]]:
        for start in range(0, len(block), self.batch_size):
            yield list(block[start : start + self.batch_size])

    def _rows(
        self, manifest: Manifest, batches: Iterator[Any], bar: Bar
    ) -> tuple[Tensor, list[identity.SampleMark]]:
        """Selected rows (R, D) of one shard's samples, and their marks."""
        hidden, marks = [], []
        for found, batch in batches:
            own = batch.get("teacher") or batch
            heads = self._run(batch)
            rows, counts = selected(
                heads.hidden, own["labels"], self._mask(own), visual=manifest.visual
            )
            if manifest.visual and own is not batch:
                _check_images(found, batch, own)
            for mark, (response, visual) in zip(found, counts, strict=True):
                _check_counts(mark, response, visual if manifest.visual else mark.visual)
                marks.append(mark if manifest.visual else dataclasses.replace(mark, visual=0))
            hidden.append(_stored(rows, DTYPES[manifest.dtype], found, counts))
            bar.advance(len(found))
        return torch.cat(hidden), marks

    @torch.no_grad()
    def _run(self, batch: Mapping[str, Any]) -> mk.HeadInputs:
        device: Any = PartialState().device
        autocast = contextlib.nullcontext()
        if self.manifest.precision == "bf16":
            autocast = torch.autocast(device.type, torch.bfloat16)
        with autocast:
            return self.teacher(send_to_device(batch, device))

    def _mask(self, own: Mapping[str, Any]) -> Tensor:
        return own["input_ids"] == self.teacher.image_token_id

    def _write(
        self, manifest: Manifest, shard: int, rows: tuple[Tensor, list[identity.SampleMark]]
    ) -> None:
        hidden, marks = rows
        free = shutil.disk_usage(self.folder).free
        try:
            if free > hidden.nbytes:
                write_shard(shard_file(self.folder, shard), hidden, marks)
                return
            why = f"a shard needs {size(hidden.nbytes)}, {size(free)} are free"
        except (OSError, SafetensorError) as error:
            why = str(error)
        raise ConfigError(
            f"teacher_cache.path: {self.folder}: cannot write shard {shard} ({why}); the finished "
            "ones stay, and the same command goes on from there"
        )


def selected(
    hidden: Tensor,  # (B, T, D)
    labels: Tensor,  # (B, T)
    image_mask: Tensor,  # (B, T) bool
    *,
    visual: bool,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Rows (R, D) of each sample in turn, its response rows and then its visual rows; and how many
    of both each sample has."""
    batch, length = labels.shape
    response, _ = mk.response_rows(labels)
    images = mk.visual_rows(image_mask & visual)
    rows = torch.cat((response, images))
    sample = rows // length
    rows = rows[sample.argsort(stable=True)]
    counts = [
        torch.bincount(part // length, minlength=batch).tolist() for part in (response, images)
    ]
    return hidden.flatten(0, 1)[rows], list(zip(*counts, strict=True))


class _Marked:
    """A collator that also gives the marks of its items, made where the items are made."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[Any]) -> tuple[list[identity.SampleMark], Any]:
        return [identity.mark_of(item) for item in items], self.collator(items)


def _check_counts(mark: identity.SampleMark, response: int, visual: int) -> None:
    if (response, visual) != (mark.response, mark.visual):
        raise DataError(
            f"sample {mark.id!r}: the teacher selects {response} response and {visual} visual "
            f"rows, the student {mark.response} and {mark.visual}; tokenizers, templates or image "
            "processors of the two differ"
        )


def _check_images(
    marks: Sequence[identity.SampleMark], batch: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    """Rows of each image on both sides, because totals may agree where images do not."""
    ours, theirs = batch["image_lens"].tolist(), own["image_lens"].tolist()
    if ours != theirs:
        names = ", ".join(repr(mark.id) for mark in marks)
        raise DataError(
            f"samples {names}: the teacher's images have {theirs} rows, the student's {ours}; take "
            "another teacher, or set teacher_cache.visual=false"
        )


def _stored(
    rows: Tensor,  # (R, D)
    dtype: torch.dtype,
    marks: Sequence[identity.SampleMark],
    counts: Sequence[tuple[int, int]],
) -> Tensor:
    """The rows on the CPU in the dtype of the cache; `DataError` where that gives no number."""
    cast = rows.to(dtype)
    whole = cast.isfinite().all(1)
    if not bool(whole.all()):
        first = int((~whole).nonzero()[0])
        ends = torch.tensor(counts).sum(1).cumsum(0)
        mark = marks[int(torch.searchsorted(ends, first, right=True))]
        finite = bool(rows[first].isfinite().all())
        why = f"too large for {dtype}: take bf16 or fp32" if finite else "NaN or inf"
        raise DataError(f"sample {mark.id!r}: the teacher's hidden states are {why}")
    return cast.cpu()


def _changed(stored: Manifest, found: Manifest) -> list[str]:
    """Differences of two manifests by field. What follows from the rest is left out, and so are
    the size of a shard and the teacher's folder: neither changes what is stored."""
    free = {"samples_per_shard": 0, "softcap": None, "teacher": {}, "processor": {}}
    a, b = (dataclasses.asdict(dataclasses.replace(m, **free)) for m in (stored, found))
    lines = differences(a, b)
    for part in ("teacher", "processor"):
        theirs = differences(getattr(stored, part), getattr(found, part))
        lines += [f"{part}.{line}" for line in theirs if not line.startswith("name:")]
    return lines
