"""How does a batch made for a transformers trainer become a distillation loss?

    batch ──── student ─► hidden (B, T, Ds), head (Vs, Ds) ──┐
      └─────── teacher ─► hidden (B, T', Dt), head (Vt, Dt) ─┼─► Objective or LlavaKDLoss
    labels, image positions, rows of each image ─────────────┘

A batch is what `model(**batch)` takes, with `labels`, and may hold what no model takes: `teacher`,
a batch of the teacher's own where its processor makes other tokens; `image_lens`, the rows of each
image; `kind`, a word for each sample; `sample_ids`; `teacher_hidden`, rows of a teacher's that were
stored; `on_policy` (B,) bool, samples whose answer the student wrote. What it leaves out: loops and
everything around them (`hf_trainer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mllmkd_kernels import rows
from mllmkd_kernels.heads import HeadInputs
from mllmkd_kernels.llava_kd import LlavaKDLoss
from mllmkd_kernels.models import head_inputs
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.objective import Objective
from mllmkd_kernels.rows import IGNORE_INDEX, Batch, Counts, RowCounts, entry

#: Entries of a batch that are no model's.
BESIDES = ("teacher", "teacher_hidden", "image_lens", "kind", "sample_ids", "on_policy")
#: Whatever says what enters a teacher's head for a batch.
Teacher = nn.Module | Callable[[Batch], HeadInputs]


def image_token_id(model: Teacher) -> int | None:
    """The id that stands where a row of an image goes in `input_ids`, by the name that the model's
    config has for it, or None for a model of text. A teacher that is no model says it itself.
    """
    config: Any = getattr(model, "config", model)
    for name in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    return None


def distill_batch(
    loss: Objective | LlavaKDLoss,
    student: nn.Module,
    teacher: Teacher | None,
    batch: Batch,
    counts: RowCounts | Counts | None = None,
) -> Any:
    """Both models up to their heads, and the loss of the batch. Neither `lm_head` is called, and
    the teacher only runs where a term needs it.

    Args:
        loss: an objective, or the four terms and their weights.
        student: a transformers model; under DDP and the like, call this inside the wrapper's
            forward (`forward_through`, or a module of your own that is wrapped).
        teacher: a model on the batch's device; run in eval mode, whatever its mode, and without
            gradients. Or what answers a batch with `HeadInputs`, of stored rows for instance. None
            leaves cross-entropy alone of a `LlavaKDLoss`; an objective that compares with a teacher
            refuses it.
        batch: see above; tensors on the student's device.
        counts: of the whole optimiser step (`counts_of`, `count_rows`); None: of this batch.

    Returns:
        `Losses` of an objective, `LlavaKDOutput` of a `LlavaKDLoss`.

    Raises:
        ValueError: missing entries, rows that do not correspond, a teacher with another image token
            and no batch of its own.
    """
    needs = loss.needs
    teacher = teacher if needs.teacher else None
    ours, theirs = image_token_id(student), None if teacher is None else image_token_id(teacher)
    shared = teacher is not None and not batch.get("teacher")
    if shared and None not in (ours, theirs) and ours != theirs:
        raise ValueError(
            f"teacher: its image token is {theirs}, the student's {ours}; expected a 'teacher' "
            "entry in the batch, made by the teacher's own processor"
        )
    s = run_to_head(student, batch, needs)
    t = None if teacher is None else ask(teacher, batch, replace(needs, router=False))
    return _loss(loss, needs.visual, s, t, batch, (ours, theirs), counts)


def run_to_head(model: nn.Module, batch: Batch, record: Needs | None = None) -> HeadInputs:
    """`head_inputs` of a batch, without what is no model's."""
    return head_inputs(model, record, **{k: v for k, v in batch.items() if k not in BESIDES})


def ask(teacher: Teacher, batch: Batch, record: Needs | None = None) -> HeadInputs:
    """What enters a teacher's head for a batch, by the teacher's own batch where there is one."""
    with torch.no_grad():
        if not isinstance(teacher, nn.Module):
            return teacher(batch)
        with in_eval(teacher):
            return run_to_head(teacher, batch.get("teacher") or batch, record)


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """No dropout; each module gets its mode back, for it may be a part of something that trains."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _loss(
    loss: Objective | LlavaKDLoss,
    visual: bool,  # a term needs it: without one the rows of the images need not correspond
    student: HeadInputs,
    teacher: HeadInputs | None,
    batch: Batch,
    tokens: tuple[int | None, int | None],  # of images, None for a model of text
    counts: RowCounts | Counts | None,
) -> Any:
    """The loss of hidden states: finds labels, image positions and images."""
    image_token, teacher_image_token = tokens
    given = (batch.get("teacher") if teacher is not None else None) or None
    if isinstance(loss, LlavaKDLoss) and not visual:  # it compares all rows that it is shown
        image_token = teacher_image_token = None
    ours = with_images(batch, image_token)
    own = None if given is None else with_images(given, teacher_image_token)
    if visual and own is not None:
        _same_images(ours["image_lens"], own["image_lens"])
    if isinstance(loss, Objective):
        return loss(student, teacher, {**ours, "teacher": own}, counts)
    if batch.get("on_policy") is not None:
        raise ValueError(
            "on_policy: got answers of the student's, which a LlavaKDLoss would train as if they "
            "were given; expected an objective (methods.llava_kd.objective())"
        )
    return loss(
        student,
        teacher,
        entry(batch, "labels"),
        ours["image_mask"],
        num_items_in_batch=cast(Any, counts),
        image_lens=ours["image_lens"],
        teacher_labels=None if own is None else entry(own, "labels"),
        teacher_image_mask=None if own is None else own["image_mask"],
    )


def with_images(batch: Batch, image_token: int | None) -> dict[str, Any]:
    """A batch with what rows are selected by: `image_mask` and `image_lens`."""
    mask = image_mask(batch, image_token)
    lens = None if image_token is None else lens_of(batch, mask)
    return {**batch, "image_mask": mask, "image_lens": lens}


def image_mask(batch: Batch, token: int | None) -> Tensor:
    """(B, T) bool, True at image positions; nowhere without an image token."""
    input_ids = entry(batch, "input_ids")
    return torch.zeros_like(input_ids, dtype=torch.bool) if token is None else input_ids == token


def lens_of(
    batch: Batch,
    mask: Tensor,  # (B, T) bool, True at image positions
) -> Tensor | None:  # (I,)
    """Rows of each image of a batch, in order, or None where each run of image positions is one.

    A batch that does not say (`image_lens`) but has its images stacked, (I, 3, H, W), has equal
    rows for each of them.
    """
    if batch.get("image_lens") is not None:
        return batch["image_lens"]
    pixels = batch.get("pixel_values")
    if pixels is None or pixels.dim() != 4:
        return None
    return (mask.sum() // len(pixels)).expand(len(pixels))


def count_rows(
    batches: Iterable[Batch], image_token: int | None, ignore_index: int = IGNORE_INDEX
) -> RowCounts:
    """The rows that each mean of a `LlavaKDLoss` is over, counted over every micro-batch of an
    optimiser step (of this rank: add up the ranks').

    Args:
        batches: as `distill_batch` takes them.
        image_token: the id of image positions in `input_ids`, None for a model of text.
        ignore_index: the loss's.

    Returns:
        int64 tensors on the device of the batches, the number of images may be an int.
    """
    return RowCounts(**_counted(RowCounts._fields, batches, image_token, ignore_index))


def counts_of(
    objective: Objective, batches: Iterable[Batch], image_token: int | None
) -> dict[str, int | Tensor]:
    """What each mean of an objective is over, by name: otherwise as `count_rows`."""
    names = dict.fromkeys(objective.over.values())
    return _counted(names, batches, image_token, objective.settings.ignore_index)


def _counted(
    names: Iterable[str], batches: Iterable[Batch], image_token: int | None, ignore_index: int
) -> dict[str, Any]:
    totals: dict[str, Any] = dict.fromkeys(names, 0)
    for batch in batches:
        batch = with_images(batch, image_token)
        for name in totals:
            totals[name] = rows.count(name, batch, ignore_index) + totals[name]
    return totals


def _same_images(student: Tensor | None, teacher: Tensor | None) -> None:
    """The totals are compared by the loss; here each image, so that none moves into another."""
    if student is None or teacher is None:
        return
    ours, theirs = student.tolist(), teacher.tolist()
    if ours != theirs:
        raise ValueError(
            f"teacher.image_lens: the teacher's images have {theirs} rows, the student's {ours}; "
            "weigh visual terms with 0, or take a teacher whose images have as many"
        )


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
