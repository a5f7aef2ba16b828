"""What does a term see of a micro-batch? Two heads, rows by name, and what means divide by.

Row sets are selected once, however many terms are over them. The teacher's rows may stand elsewhere
than the student's: where its tokenizer made other positions (the batch's `teacher` entry), or
where they were selected and stored before (`HeadInputs.rows`). They correspond one to one, or it is
an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mllmkd_kernels import checks, rows
from mllmkd_kernels.backends.products import accumulation_dtype
from mllmkd_kernels.choose import check_name
from mllmkd_kernels.head_functions import HeadFunctions
from mllmkd_kernels.heads import HeadInputs, check_batch, check_images, take_rows
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.rows import IGNORE_INDEX, Batch, Counts, RowCounts


class Rows(NamedTuple):
    """A row set of both models: rows that correspond, on the device of the hidden states."""

    student: Tensor  # (N,) flat indices of its hidden states
    teacher: Tensor  # (N,) of the teacher's; the student's where there is no teacher
    labels: Tensor  # (N,) next tokens, ignore_index where none is to be learnt


@dataclass(frozen=True)
class Settings:
    """How an objective is computed, whatever its terms are.

    Attributes:
        vocab_size: shared vocabulary, default the smaller head.
        ignore_index: label of positions without one.
        diagnostics: also entropies and agreement of the answers, at next to no cost.
        backend, workspace_mb, overlap: as in `fused_linear_distill`.
        functions: with which heads are computed.

    Raises:
        TypeError, ValueError: a backend of another name, no columns, or no workspace.
    """

    vocab_size: int | None = None
    ignore_index: int = IGNORE_INDEX
    diagnostics: bool = False
    backend: str = "auto"
    workspace_mb: float | None = None
    overlap: bool = False
    functions: HeadFunctions = field(default_factory=HeadFunctions)

    def __post_init__(self) -> None:
        check_name(self.backend)
        checks.workspace(self.workspace_mb)
        if self.vocab_size is not None and checks.integer("vocab_size", self.vocab_size) < 1:
            raise ValueError(f"vocab_size: got {self.vocab_size}, expected 1 or more")


class View:
    """One micro-batch.

    Args:
        student, teacher: heads and hidden states; those of the teacher may be selected rows.
        batch: `labels` (B, T); `image_mask` (B, T) bool, none for text; optionally `image_lens`,
            `attention_mask`, `kind`; and `teacher`, a mapping with what is other there.
        counts: what means divide by, by name, over the whole optimiser step; `RowCounts`; a single
            number of response rows, with which other means are those of this micro-batch, weighted
            by its share of response rows; None for this micro-batch's.
        settings: of the objective.
        needs: of the objective.

    Raises:
        ValueError: shapes that do not fit; later, rows that do not correspond.
    """

    def __init__(
        self,
        student: HeadInputs,
        teacher: HeadInputs | None,
        batch: Batch,
        counts: Counts | RowCounts | float | Tensor | None,
        settings: Settings,
        needs: Needs,
    ) -> None:
        labels = rows.entry(batch, "labels")
        check_batch(student, labels, batch.get("image_mask"))
        if batch.get("image_mask") is None:
            batch = {**batch, "image_mask": torch.zeros_like(labels, dtype=torch.bool)}
        own = (batch.get("teacher") if teacher is not None else None) or {}
        self.own = {key: value for key, value in own.items() if value is not None}
        self.batch, self.teacher_batch = batch, {**batch, **self.own}
        self.stored = teacher is not None and teacher.hidden.ndim == 2
        if teacher is not None and not self.stored:
            labels_t, mask_t = (self.teacher_batch[key] for key in ("labels", "image_mask"))
            check_batch(teacher, labels_t, mask_t, "teacher_")
        if self.stored and self.own:
            raise ValueError(
                "teacher.hidden: its rows are selected already, so the teacher's own labels and "
                "image mask (teacher_labels, teacher_image_mask) cannot select others"
            )
        self.student, self.teacher, self.settings, self.needs = student, teacher, settings, needs
        self.counts = counts._asdict() if isinstance(counts, RowCounts) else counts
        _check_recorded("student", student, needs)
        if teacher is not None:
            _check_recorded("teacher", teacher, replace(needs, router=False))
        self._selected: dict[str, tuple[Tensor, Tensor]] = {}
        self._rows: dict[str, Rows] = {}

    def rows(self, name: str) -> Rows:
        """A row set of both models."""
        if name not in self._rows:
            index, labels = self._select(name)
            found = Rows(index, self._of_teacher(name, index), labels)
            self._rows[name] = Rows(*(x.to(self.student.hidden.device) for x in found))
        return self._rows[name]

    def compare(self, *names: str) -> None:
        """Raise where teacher and student differ in row sets or images, if no term looks."""
        for name in names:
            if name == "images":
                _ = self.images
            else:
                self.rows(name)

    def hidden(self, name: str) -> tuple[Tensor, Tensor]:
        """Hidden states (N, D_s) and (N, D_t) of a row set; the teacher's have no gradient.

        Raises:
            ValueError: no term says in its `needs` that it reads these rows of the teacher.
        """
        if self.teacher is None or name not in self.needs.rows:
            raise ValueError(
                f"needs: a term reads the teacher's {name!r} rows, expected them among its own "
                f"`needs` (Needs(rows=frozenset({{{name!r}}})))"
            )
        chosen = self.rows(name)
        return (
            take_rows(self.student.hidden, chosen.student),
            take_rows(self.teacher.hidden, chosen.teacher),
        )

    @cached_property
    def images(self) -> Tensor:
        """(I + 1,) int32 prefix sum of the visual rows of each image."""
        lens = self.batch.get("image_lens")
        found = rows.image_seqlens(self.batch["image_mask"], lens)
        if lens is None and "image_mask" in self.own:
            check_images(found, rows.image_seqlens(self.own["image_mask"]))
        return found

    @cached_property
    def vocab(self) -> int:
        """The shared vocabulary."""
        heads = [self.student] if self.teacher is None else [self.student, self.teacher]
        return checks.vocabulary(self.settings.vocab_size, *(h.weight.shape[0] for h in heads))

    @property
    def zero(self) -> Tensor:
        """What a term without rows gives."""
        head = self.student
        dtype = accumulation_dtype(head.hidden, head.weight, head.bias)
        return torch.zeros((), dtype=dtype, device=head.hidden.device)

    def count(self, name: str) -> Tensor:
        """What a mean over a row set or unit divides by, never zero: fp32, without dimensions.

        A term's share of the step's mean is a sum over its rows, divided by this.
        """
        total: Any = self._total(name)
        total = torch.as_tensor(total, dtype=torch.float32, device=self.student.hidden.device)
        if total.ndim:
            raise ValueError(f"counts: got shape {tuple(total.shape)} for {name!r}, expected ()")
        return total.clamp(min=torch.finfo(torch.float32).tiny)

    def share(self, name: str) -> Tensor:
        """What a mean over this micro-batch's rows or units is multiplied by, to be its share of
        the step's mean.
        """
        return self._local(name) / self.count(name)

    def _total(self, name: str) -> int | float | Tensor:
        if self.counts is None:
            return self._local(name)
        if not isinstance(self.counts, Mapping):
            if name == "response":
                return self.counts
            answered = max(self._local("response"), 1)
            return self._local(name) / (answered / torch.as_tensor(self.counts).float())
        if name not in self.counts:
            raise ValueError(f"counts: have no {name!r}, only {', '.join(map(repr, self.counts))}")
        return self.counts[name]

    def _local(self, name: str) -> int:
        if name == "images":
            return self.images.numel() - 1
        return rows.UNITS[name](self.batch) if name in rows.UNITS else len(self._select(name)[0])

    def _select(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._selected:
            ignore = self.settings.ignore_index
            self._selected[name] = rows.select(name, self.batch, ignore)
        return self._selected[name]

    def _of_teacher(self, name: str, index: Tensor) -> Tensor:
        """Where the rows stand in the teacher's hidden states."""
        if self.stored:
            return self._in_store(name)
        if self.teacher is None or not self.own:
            return index
        other = rows.select(name, self.teacher_batch, self.settings.ignore_index)[0]
        if len(index) != len(other):
            raise ValueError(
                f"{name} rows: the student selects {len(index)}, the teacher {len(other)}; "
                "tokenizers, templates or image processors of the two differ"
            )
        return other

    def _in_store(self, name: str) -> Tensor:
        """Where a row set stands in hidden states that hold selected rows, set after set."""
        assert self.teacher is not None
        names, total = self.teacher.rows, self.teacher.hidden.shape[0]
        sizes = {each: len(self._select(each)[0]) for each in names}
        most, read = sum(sizes.values()), self.needs.rows
        read = read | {rows.kind_of(each)[0] for each in read}
        for missing in reversed(names):  # what no term reads need not be there
            if total == most or missing in read:
                break
            most -= sizes[missing]
        if total != most:
            each = " and then ".join(f"{size} {name} rows" for name, size in sizes.items())
            raise ValueError(
                f"teacher.hidden: has {total} selected rows, expected {each}, as labels and "
                "image_mask select"
            )
        held = [each for each in names if each in (name, rows.kind_of(name)[0])]
        if not held:
            raise ValueError(f"{name} rows: not among the selected ones, {', '.join(names)}")
        start = sum(sizes[each] for each in names[: names.index(held[0])])
        within = torch.searchsorted(*(self._select(each)[0] for each in (held[0], name)))
        return start + within.to(self.teacher.hidden.device)


def _check_recorded(who: str, head: HeadInputs, needs: Needs) -> None:
    """What terms read of the inside of a model was recorded."""
    found = head.recorded
    missing = {
        "layers": sorted(needs.layers - found.layers.keys()),
        "attention": sorted(needs.attention - found.attention.keys()),
        "router": needs.router and not found.router,
    }
    if any(missing.values()):
        lacks = ", ".join(f"{key} {value}" for key, value in missing.items() if value)
        raise ValueError(
            f"{who}.recorded: lacks {lacks}, which a term reads; head_inputs(..., "
            "record=objective.needs) records it"
        )
