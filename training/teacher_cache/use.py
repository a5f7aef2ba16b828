"""How does a run train from stored rows? They come with the batch, and the teacher hands them on.

The collator that makes a batch also reads its samples' rows, in the data-loader's workers:
`teacher_hidden` (M + K, D), the M response rows of the batch and then its K visual rows, as
`LlavaKDLoss` takes them. `CachedTeacher` answers with them and the stored head, the only part of
the teacher in memory. What does not fit is an error: before the first step where it can be seen
there (`open_rows`, `probe`), else at the sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mllmkd_kernels as mk
from training.config import Config, require
from training.data.records import DataError
from training.fingerprint import differences
from training.models import CheckpointError
from training.settings import ConfigError
from training.stages import STAGES
from training.teacher_cache import identity
from training.teacher_cache.store import TeacherRows, read_head

PROBES = 8  # samples looked up before the first step


class CachedTeacher:
    """A `training.teacher.Teacher` that is not run: its rows come with the batch."""

    processor: Any = None  # makes no batches

    def __init__(self, rows: TeacherRows) -> None:
        self.name = f"{rows.manifest.teacher['name']}, stored in {rows.folder}"
        self.image_token_id = rows.manifest.image_token_id
        self.processor = None  # what is stored was made of the student's own batches
        self._head = read_head(rows.folder, rows.manifest.softcap)

    def share(self, student: nn.Module) -> bool:
        """False: there is no tower here to share."""
        return False

    def __call__(self, batch: Mapping[str, Any], shared_features: Tensor | None) -> mk.HeadInputs:
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
    config: Config, stage: str, loss: mk.LlavaKDLoss, processor: Any, dataset: Any, collator: Any
) -> tuple[CachedTeacher, CachedCollator]:
    """What `training.loop` trains a stage with instead of a teacher: `open_rows`, `probe`, and
    the collator that brings the rows."""
    rows = open_rows(config, stage, loss, processor)
    probe(rows, dataset)
    return CachedTeacher(rows), CachedCollator(collator, rows, visual=needs_visual(loss))


def open_rows(config: Config, stage: str, loss: mk.LlavaKDLoss, processor: Any) -> TeacherRows:
    """A stage's stored rows, checked against how it is about to be trained.

    Args:
        config: its `teacher_cache.path` has a folder of the stage; its `teacher`, where given,
            must be the one that was run.
        stage: its name.
        loss: the stage's loss, whose terms say which rows are read.
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
    if not manifest.visual and needs_visual(loss):
        raise ConfigError(
            f"{stage}.loss: got visual {loss.visual} and relation {loss.relation}, but "
            f"{rows.folder} holds response rows alone; set both to 0, or make the cache again with "
            "teacher_cache.visual=true"
        )
    if not loss.response_shift:
        raise ConfigError(
            f"{stage}.loss: distils unshifted response rows, but {rows.folder} holds the shifted "
            "ones; run the teacher online (teacher_cache.path=null)"
        )
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
    distilled = [name for name in config.stages if STAGES[name].needs_teacher and name in asked]
    return list(dict.fromkeys(distilled))


def needs_visual(loss: mk.LlavaKDLoss) -> bool:
    """Whether any term of the loss reads the teacher's visual rows."""
    return bool(loss.visual or loss.relation)


def spread(total: int, most: int) -> list[int]:
    """At most `most` indices below `total`, evenly spread, the first and the last among them."""
    count = min(total, most)
    return sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})
