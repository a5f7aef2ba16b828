"""How does a run train from stored rows? They come with the batch, and the teacher hands them on.

The collator that makes a batch also reads its samples' rows, in the data-loader's workers:
`teacher_hidden` (M + K, D), the M response rows of the batch and then its K visual rows.
`CachedTeacher` answers with them and the stored head, the only part of the teacher in memory. What
does not fit is an error: before the first step where it can be seen there (`use_stored`), else at
the sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import mllmkd_kernels as mk
from mllmkd_kernels.rows import kind_of
from training.config import Config, require
from training.data.check import spread
from training.data.item import apart
from training.models import marks_of
from training.settings import ConfigError
from training.teacher_cache.store import TeacherRows, mark_of, read_head

PROBES = 8  # samples looked up before the first step


class CachedTeacher:
    """A teacher that is not run: its rows come with the batch."""

    def __init__(self, rows: TeacherRows) -> None:
        self.name = f"{rows.manifest.name}, stored in {rows.folder}"
        self._head = read_head(rows.folder, rows.manifest.softcap)

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
        found = [self.rows.rows(mark_of(item)) for item in apart(items)]
        response, visual = zip(*found, strict=True)
        hidden = torch.cat([*response, *(visual if self.visual else ())])
        return dict(self.collator(items)) | {"teacher_hidden": hidden}


def use_stored(
    config: Config, stage: str, dataset: Any, collator: Any
) -> tuple[CachedTeacher, CachedCollator]:
    """What `training.loop` trains a stage with instead of a teacher, and the collator that brings
    the rows.

    Raises:
        DataError: one of a few samples that are looked up is not as it was stored. Of a stream
            each is looked up as it comes, and none before.
    """
    rows = open_rows(config, stage)
    for index in spread(len(dataset) if hasattr(dataset, "__len__") else 0, PROBES):
        for item in apart([dataset[index]]):
            rows.rows(mark_of(item))
    visual = config.objective(stage).needs.visual
    return CachedTeacher(rows), CachedCollator(collator, rows, visual=visual)


def open_rows(config: Config, stage: str) -> TeacherRows:
    """A stage's stored rows, checked against how it is about to be trained.

    Args:
        config: its `teacher_cache.path` has a folder of the stage; its `teacher`, where given,
            must be the one that was run.
        stage: its name; its objective says which rows are read.

    Raises:
        CheckpointError: no whole cache is there.
        ConfigError: the loss needs rows that are not stored; another teacher is named.
    """
    path = require(config.teacher_cache.path, "teacher_cache.path", "the stored rows")
    rows = TeacherRows(Path(path) / stage)
    named, known = config.teacher, rows.manifest
    if named is not None and (
        marks_of(named) != known.teacher if Path(named).is_dir() else named != known.name
    ):
        raise ConfigError(
            f"teacher: got {named}, but {rows.folder} is of {known.name} as it was then; name that "
            "one, or none (teacher=null)"
        )
    check_needs(config, stage, rows.manifest.visual, f"but {rows.folder} holds")
    return rows


def place(name: str) -> str:
    """A folder by its full path, a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


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
        lacking = sorted(rows for rows in term.needs.rows if kind_of(rows)[0] not in stored)
        if term.needs.layers or term.needs.attention:
            lacking.append("inner layers'")
        if lacking:
            raise ConfigError(
                f"stage.{stage}.loss: {name} reads {', '.join(lacking)} rows of the teacher, "
                f"{holds} {' and '.join(sorted(stored))} rows of its last layer alone; weigh that "
                "term with 0, store visual rows (teacher_cache.visual=true), or run the teacher "
                "online (teacher_cache.path=null, or teacher_cache.stages without this one)"
            )
