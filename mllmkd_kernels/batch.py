"""How does a batch made for a transformers trainer become a distillation loss?

    batch ── head_inputs ──► student's hidden states and head ─┐
      └──── head_inputs ──► teacher's, no gradient ────────────┼─► LlavaKDLoss
    labels, input_ids == image token: which rows ──────────────┘

A batch is what `model(**batch)` takes, with `labels`, and may hold what no model takes: `teacher`,
a batch of the teacher's own where its processor makes other tokens; `image_lens`, the rows of each
image; `sample_ids`. What it leaves out: loops and everything around them (`hf_trainer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mllmkd_kernels.llava_kd import HeadInputs, LlavaKDLoss, LlavaKDOutput
from mllmkd_kernels.models import head_inputs
from mllmkd_kernels.rows import RowCounts

BESIDES = ("teacher", "image_lens", "sample_ids")  # entries of a batch that are no model's


class Prepared(NamedTuple):
    """One model's side of a batch, as `LlavaKDLoss` wants it."""

    head: HeadInputs
    labels: Tensor  # (B, T)
    image_mask: Tensor | None  # (B, T) bool; None for a model without an image token


def image_token_id(model: nn.Module) -> int | None:
    """The id that marks image positions in `input_ids`, or None for a model of text."""
    config: Any = getattr(model, "config", None)
    for name in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    return None


def prepare(model: nn.Module, batch: Mapping[str, Any]) -> Prepared:
    """Run one model up to its head and say which of its positions are labelled and which are image.

    Raises:
        ValueError: `input_ids` or `labels` are missing; and what `head_inputs` raises.
    """
    for key in ("input_ids", "labels"):
        if batch.get(key) is None:
            raise ValueError(f"{key}: missing; the batch has {', '.join(sorted(batch))}")
    inputs = {key: value for key, value in batch.items() if key not in BESIDES}
    mask = image_mask(batch["input_ids"], image_token_id(model))
    return Prepared(head_inputs(model, **inputs), batch["labels"], mask)


def image_mask(input_ids: Tensor, token: int | None) -> Tensor | None:
    """(B, T) bool, True at image positions; None where there is no image token."""
    return None if token is None else input_ids == token


def distill_batch(
    loss: LlavaKDLoss,
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Mapping[str, Any],
    counts: RowCounts | None = None,
) -> LlavaKDOutput:
    """Both models up to their heads, and the loss of the batch. Neither `lm_head` is called.

    Args:
        loss: the four terms and their weights.
        student: a transformers model; under DDP and the like, call this inside the wrapper's
            forward (`forward_through`, or a module of your own that is wrapped).
        teacher: frozen, in eval mode, on the batch's device; None leaves cross-entropy alone.
        batch: see above; tensors on the student's device.
        counts: rows of the whole optimiser step (`count_rows`); None: of this batch.

    Raises:
        ValueError: missing entries, rows that do not correspond, a teacher with another image token
            and no batch of its own.
    """
    ours, theirs = prepare(student, batch), None
    own = batch.get("teacher")
    if teacher is not None:
        if own is None:
            _check_same_token(student, teacher, ours.image_mask)
        with torch.no_grad():
            theirs = prepare(teacher, batch if own is None else own)
    return loss(
        ours.head,
        None if theirs is None else theirs.head,
        ours.labels,
        ours.image_mask,
        num_items_in_batch=counts,
        image_lens=batch.get("image_lens"),
        # a shared batch has one set of rows: not given, so not compared with itself
        teacher_labels=None if theirs is None or own is None else theirs.labels,
        teacher_image_mask=None if theirs is None or own is None else theirs.image_mask,
    )


def _check_same_token(student: nn.Module, teacher: nn.Module, mask: Tensor | None) -> None:
    ours, theirs = image_token_id(student), image_token_id(teacher)
    if mask is not None and theirs is not None and ours != theirs:
        raise ValueError(
            f"teacher: its image token is {theirs}, the student's {ours}; expected a 'teacher' "
            "entry in the batch, made by the teacher's own processor"
        )


def count_rows(batches: Iterable[Mapping[str, Any]], token: int | None) -> RowCounts:
    """The rows that the means of the loss are over, in all these micro-batches together.

    The counts are int64 tensors on the batches' device: nothing waits for it.

    Args:
        batches: `labels` (B, T); `input_ids` (B, T) where `token` is given; `image_lens` or else
            each run of image positions is an image, as in `LlavaKDLoss`.
        token: the image token, None for text alone.
    """
    totals = RowCounts(0, 0, 0)
    for batch in batches:
        labels = batch["labels"]
        visual: int | Tensor = 0
        images: int | Tensor = 0
        mask = None if token is None else image_mask(batch["input_ids"], token)
        if mask is not None:
            visual = mask.sum()
            starts = mask[:, 1:] & ~mask[:, :-1]
            lens = batch.get("image_lens")
            images = starts.sum() + mask[:, 0].sum() if lens is None else len(lens)
        found = RowCounts((labels[:, 1:] != -100).sum(), visual, images)
        totals = RowCounts(*(a + b for a, b in zip(totals, found, strict=True)))
    return totals


def forward_through(
    wrapper: nn.Module, model: nn.Module, function: Callable[..., Any], *args: Any
) -> Any:
    """`function(*args)`, run as the forward of `wrapper`.

    DDP prepares its all-reduce and FSDP gathers its weights in their own forward, which calls the
    forward of the model inside; for the time of the call that is `function`. Where nothing is
    wrapped, `wrapper` is `model`.

    Args:
        wrapper: what the trainer made of the model.
        model: the model inside it.
        function: may use `model` as if it were not wrapped.

    Raises:
        TypeError: the wrapper did not call the forward of `model`, or is a compiled graph of it.
    """
    if "_orig_mod" in getattr(wrapper, "_modules", {}):
        raise TypeError(
            "wrapper: got a torch.compile'd model, whose graph has the lm_head in it; expected one "
            "that is not: model.model.compile() compiles all but the head"
        )
    called = []

    def forward(*given: Any) -> Any:
        called.append(True)
        return function(*given)

    with _forward_of(model, forward):
        result = wrapper(*args)
    if not called:
        raise TypeError(
            f"wrapper: {type(wrapper).__name__} did not call the forward of the "
            f"{type(model).__name__} inside it"
        )
    return result


@contextmanager
def _forward_of(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`model.forward` replaced on the instance; what stood there comes back."""
    mine = vars(model)
    before = mine.get("forward")
    mine["forward"] = forward
    try:
        yield
    finally:
        del mine["forward"]
        if before is not None:
            mine["forward"] = before
