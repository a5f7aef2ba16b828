"""How does a run train from stored rows? They come with the batch, and the teacher hands them on.

The collator that makes a batch also reads its samples' rows, in the data-loader's workers:
`teacher_hidden` (M + K, D), the M response rows of the batch and then its K visual rows.
`CachedTeacher` answers with them and the stored head, the only part of the teacher in memory. What
does not fit is an error: before the first step where it can be seen there (`open_rows`, `probe`),
else at the sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mllmkd_kernels as mk
from training.config import Config, require
from training.data.records import DataError
from training.fingerprint import differences
from training.models import CheckpointError
from training.settings import ConfigError
from training.teacher_cache import identity
from training.teacher_cache.store import TeacherRows, read_head

PROBES = 8  # samples looked up before the first step


class CachedTeacher:
    """A teacher that is not run: its rows come with the batch."""

    def __init__(self, rows: TeacherRows) -> None:
        self.name = f"{rows.manifest.teacher['name']}, stored in {rows.folder}"
        self._head = read_head(rows.folder, rows.manifest.softcap)

    @property
    def hidden_size(self) -> int:
        """D of its rows."""
        return self._head.weight.shape[1]

    def __call__(self, batch: Mapping[str, Any]) -> mk.HeadInputs:
        """The batch's `teacher_hidden` (M + K, D), and the head on the same device."""
        hidden = batch["teacher_hidden"]
        head = self._head
        if head.weight.device != hidden.device:  # once: the loss knows its Gram by the tensor
            bias = None if head.bias is None else head.bias.to(hidden.device)
            weight = head.weight.to(hidden.device)
            self._head = head = dataclasses.replace(head, weight=weight, bias=bias)
        return dataclasses.replace(head, hidden=hidden)


class CachedCollator:
    """A collator's batches with `teacher_hidden` (M + K, D) of their samples.

    Args:
        collator: makes the batch; without the teacher's own view, which nothing reads.
        rows: the stage's stored rows.
        visual: whether to bring the visual rows; False where the loss has no visual terms.
    """

    def __init__(
        self, collator: Callable[[Any], Any], rows: TeacherRows, *, visual: bool = True
    ) -> None:
        self.collator, self.rows, self.visual = collator, rows, visual

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these items, in their order.

        Raises:
            DataError: a sample is not stored, or is another one than was stored.
        """
        found = [self._rows(identity.mark_of(item)) for item in items]
        response, visual = zip(*found, strict=True)
        return dict(self.collator(items)) | {"teacher_hidden": torch.cat([*response, *visual])}

    def _rows(self, mark: identity.SampleMark) -> tuple[Tensor, Tensor]:
        response, visual = self.rows.rows(mark)
        expected = (mark.response, mark.visual if self.visual else 0)
        got = (len(response), len(visual) if self.visual else 0)
        if got != expected:
            raise DataError(
                f"{self.rows.folder}: sample {mark.id!r} has {got[0]} response and {got[1]} visual "
                f"rows stored, expected {expected[0]} and {expected[1]}"
            )
        return response, visual if self.visual else visual[:0]


def use_stored(
    config: Config, stage: str, processor: Any, dataset: Any, collator: Any
) -> tuple[CachedTeacher, CachedCollator]:
    """What `training.loop` trains a stage with instead of a teacher: `open_rows`, `probe`, and
    the collator that brings the rows."""
    rows = open_rows(config, stage, processor)
    probe(rows, dataset)
    visual = config.objective(stage).needs.visual
    return CachedTeacher(rows), CachedCollator(collator, rows, visual=visual)


def open_rows(config: Config, stage: str, processor: Any) -> TeacherRows:
    """A stage's stored rows, checked against how it is about to be trained.

    Args:
        config: its `teacher_cache.path` has a folder of the stage; its `teacher`, where given,
            must be the one that was run.
        stage: its name; its objective says which rows are read.
        processor: the student's, which encodes the data.

    Raises:
        CheckpointError: no whole cache is there, or it was made with another processor.
        ConfigError: the loss needs rows that are not stored; another teacher is named.
    """
    path = require(config.teacher_cache.path, "teacher_cache.path", "the stored rows")
    rows = TeacherRows(Path(path) / stage)
    manifest = rows.manifest
    if config.teacher is not None and identity.place(config.teacher) != manifest.teacher["name"]:
        raise ConfigError(
            f"teacher: got {config.teacher}, but {rows.folder} is of {manifest.teacher['name']}; "
            "name that one, or none (teacher=null)"
        )
    if manifest.stage != stage:
        raise CheckpointError(f"{rows.folder}: was made for stage {manifest.stage}, not {stage}")
    check_needs(config, stage, manifest.visual, f"but {rows.folder} holds")
    changed = differences(manifest.processor, identity.of_processor(processor))
    if changed:
        raise CheckpointError(
            f"{rows.folder}: was made with another processor ({'; '.join(changed)}); make it again"
        )
    return rows


def probe(rows: TeacherRows, dataset: Any) -> None:
    """Look a few samples of the stage's data up; `DataError` if one is not as it was stored. Of a
    stream each sample is looked up as it comes, and none before."""
    samples = len(dataset) if hasattr(dataset, "__len__") else 0
    for index in spread(samples, PROBES):
        rows.rows(identity.mark_of(dataset[index]))


def stored_stages(config: Config) -> list[str]:
    """The distilled stages of a run that are trained from stored rows, each once."""
    if config.teacher_cache.path is None:
        return []
    asked = config.teacher_cache.stages or config.stages
    distilled = [name for name in config.stages if config.compares(name) and name in asked]
    return list(dict.fromkeys(distilled))


def check_needs(config: Config, stage: str, visual: bool, holds: str) -> None:
    """Raise `ConfigError` unless what is stored, visual rows if `visual`, is all that a stage's
    objective reads of a teacher, of the batches that the data gives; `holds` says where that is."""
    if config.view(stage) is not None:
        raise ConfigError(
            f"stage.{stage}.view: makes other batches in each step, {holds} rows of those that the "
            "data gives; run the teacher online (teacher_cache.path=null)"
        )
    objective, stored = config.objective(stage), {"response", "visual"} if visual else {"response"}
    for name, term in objective.terms.items():
        if lacking := term.needs.rows - stored:
            raise ConfigError(
                f"stage.{stage}.loss: {name} reads {', '.join(sorted(lacking))} rows of the "
                f"teacher, {holds} {' and '.join(sorted(stored))} rows alone; weigh that term with "
                "0, store visual rows (teacher_cache.visual=true), or run the teacher online "
                "(teacher_cache.path=null)"
            )
        if term.needs.layers or term.needs.attention:
            raise ConfigError(
                f"stage.{stage}.loss: {name} reads layers of the teacher besides its last, {holds} "
                "the last alone; run the teacher online (teacher_cache.path=null)"
            )


def spread(total: int, most: int) -> list[int]:
    """At most `most` indices below `total`, evenly spread, the first and the last among them."""
    count = min(total, most)
    return sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})
