"""On which batches, and in which forms, must `LlavaKDLoss` give what it always gave?

Every number of the inputs is a multiple of 1/32 between −2 and 2, made by integer arithmetic: the
same on any machine, and exact in bf16, so that all dtypes see the same problem.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllmkd_kernels import Divergence, HeadInputs, RowCounts, response_rows, visual_rows

# 3 samples of 14 tokens: one image; text alone; two images, of other sizes.
B, T, V, D_S, D_T = 3, 14, 50, 6, 9
IMAGES = [(0, 1, 6), (2, 0, 3), (2, 4, 8)]
IGNORE = -100
RECORD = Path(__file__).with_name("golden_llava_kd.json")
OUTPUTS = (
    "loss", "ce", "response_kl", "visual_kl", "relation",
    "student_entropy", "teacher_entropy", "agreement",
)  # fmt: skip
GRADIENTS = ("dh", "dw", "db")


@dataclass(frozen=True)
class Case:
    """Arguments of the loss, and what is particular about its batch."""

    loss: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    teacher: str = "same"  # positions as the student; "none", "own", "stored", "stored answers"
    images: bool = True
    bias: bool = False
    softcap: float | None = None
    frozen: bool = False  # the student's head
    vocab_t: int = V + 3


SEEN: dict[str, Any] = {"diagnostics": True}
COUNTS = RowCounts(31, torch.tensor(29), 7)
CASES: dict[str, Case] = {
    "paper": Case(),
    "weights": Case(loss=dict(ce=0.3, response=2.0, visual=0.7, relation=1.5) | SEEN),
    "released code": Case(loss={"relation": 1.0, "relation_batch": True} | SEEN),
    "frozen head": Case(frozen=True, loss=SEEN),
    "bias": Case(bias=True, loss=SEEN),
    "bias, frozen head": Case(bias=True, frozen=True),
    "soft-cap": Case(softcap=2.0, loss=SEEN),
    "soft-cap and bias": Case(softcap=3.0, bias=True, loss={"temperature": 2.0}),
    "unshifted": Case(loss={"response_shift": False} | SEEN),
    "unshifted without cross-entropy": Case(loss={"ce": 0.0, "response_shift": False} | SEEN),
    "unshifted, own": Case(teacher="own", loss={"response_shift": False} | SEEN),
    "own": Case(teacher="own", loss=SEEN, call={"num_items_in_batch": COUNTS}),
    "stored": Case(teacher="stored", loss=SEEN, call={"image_lens": [5, 3, 4]}),
    "stored, counts": Case(teacher="stored", bias=True, call={"num_items_in_batch": COUNTS}),
    "stored answers": Case(teacher="stored answers", loss={"visual": 0.0, "relation": 0.0} | SEEN),
    "images by length": Case(call={"image_lens": [2, 3, 1, 2, 4]}, loss=SEEN),
    "an image without rows": Case(call={"image_lens": torch.tensor([5, 0, 3, 4])}),
    "counts of the step": Case(call={"num_items_in_batch": COUNTS}, loss=SEEN),
    "a number": Case(call={"num_items_in_batch": 40}, loss=SEEN),
    "a tensor": Case(call={"num_items_in_batch": torch.tensor(23)}, loss=SEEN),
    "text": Case(images=False, loss=SEEN),
    "text, counts": Case(images=False, call={"num_items_in_batch": COUNTS}),
    "supervised": Case(teacher="none", loss=SEEN),
    "supervised, jsd at 2": Case(teacher="none", loss={"divergence": "jsd", "temperature": 2.0}),
    "nothing": Case(loss=dict.fromkeys(("ce", "response", "visual", "relation"), 0.0) | SEEN),
    "supervised nothing": Case(teacher="none", loss={"ce": 0.0} | SEEN),
    "ignore_index": Case(loss={"ignore_index": -1} | SEEN),
    "vocab_size": Case(loss={"vocab_size": 41} | SEEN),
    "a smaller teacher": Case(vocab_t=V - 4, loss=SEEN),
    "a small workspace": Case(loss={"workspace_mb": 0.01} | SEEN),
    **{f"{term} alone": Case(
        loss={name: float(name == term) for name in ("ce", "response", "visual", "relation")} | SEEN
    ) for term in ("ce", "response", "visual", "relation")},
    **{f"no {term}": Case(loss={term: 0.0} | SEEN) for term in ("ce", "response", "visual")},
    **{f"{d.name} {d.param} at {temperature}": Case(
        loss={"divergence": d, "temperature": temperature} | SEEN
    ) for d, temperature in (
        (Divergence("reverse_kl"), 1.0), (Divergence("jsd"), 2.0), (Divergence("jsd", 0.3), 0.7),
        (Divergence("skew_forward_kl"), 1.0), (Divergence("skew_reverse_kl", lam=0.4), 1.5),
        (Divergence("total_variation"), 1.0), (Divergence("soft_cross_entropy"), 2.0),
    )},
}  # fmt: skip


def numbers(seed: int, *shape: int, span: int = 129) -> Tensor:
    """Multiples of 1/32, −2 to 2 by default, in fp64."""
    x = torch.arange(1, 1 + torch.Size(shape).numel()) + 1000003 * seed
    x = x * 2654435761 % 2**32
    x = (x ^ (x >> 15)) * 2246822519 % 2**32
    x = (x ^ (x >> 13)) % span
    return ((x - span // 2) / 32).double().reshape(shape)


def batch(case: Case) -> tuple[Tensor, Tensor | None]:
    """Labels and image mask (B, T)."""
    ignore = case.loss.get("ignore_index", IGNORE)
    least = min(V, case.vocab_t, case.loss.get("vocab_size") or V)
    labels = torch.full((B, T), ignore)
    labels[:, 9:] = (numbers(1, B, T - 9) * 32).long() % least
    labels[0, 12:] = ignore  # padding
    labels[1, :4] = torch.tensor([7, 3, 11, 5])  # a label at the first position has no row
    if case.teacher in ("own", "stored", "stored answers"):
        labels[1, 0] = ignore
    if not case.images:
        return labels, None
    mask = torch.zeros(B, T, dtype=torch.bool)
    for sample, start, end in IMAGES:
        mask[sample, start:end] = True
    return labels, mask


def heads(case: Case, dtype: torch.dtype) -> tuple[HeadInputs, HeadInputs]:
    """Student, whose leaves require gradients, and teacher, both at the student's positions."""

    def bias(seed: int, vocab: int) -> Tensor | None:
        return numbers(seed, vocab).to(dtype) if case.bias else None

    hidden, weight = numbers(10, B, T, D_S), numbers(11, V, D_S, span=65)
    student = HeadInputs(hidden.to(dtype), weight.to(dtype), bias(12, V), case.softcap)
    # The teacher knows more, so that the two agree on some tokens.
    hidden = torch.cat((hidden, numbers(20, B, T, D_T - D_S)), -1)
    more = numbers(21, case.vocab_t, D_T, span=33)
    more[:V, :D_S] += weight[: case.vocab_t]
    teacher = HeadInputs(hidden.to(dtype), more.to(dtype), bias(22, case.vocab_t), case.softcap)
    for leaf in (student.hidden, *(() if case.frozen else (student.weight, student.bias))):
        if leaf is not None:
            leaf.requires_grad_()
    return student, teacher


def arguments(case: Case, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    """What the loss is called with."""
    (labels, mask), (student, teacher) = batch(case), heads(case, dtype)
    options = dict(case.call)
    ignore = case.loss.get("ignore_index", IGNORE)
    at_images = torch.zeros(B, T, dtype=torch.bool) if mask is None else mask
    if case.teacher == "own":  # two tokens more in front
        front = numbers(30, B, 2, D_T).to(dtype)
        teacher = replace(teacher, hidden=torch.cat((front, teacher.hidden), 1))
        pad = torch.nn.functional.pad
        options["teacher_labels"] = pad(labels, (2, 0), value=ignore)
        options["teacher_image_mask"] = pad(at_images, (2, 0))
    elif case.teacher.startswith("stored"):
        parts = [response_rows(labels, ignore)[0], visual_rows(at_images)]
        rows = torch.cat(parts[:1] if case.teacher == "stored answers" else parts)
        teacher = replace(teacher, hidden=teacher.hidden.flatten(0, 1)[rows])
    return [student, None if case.teacher == "none" else teacher, labels, mask], options


def outcome(loss: Any, case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The eight outputs and the gradients of the loss."""
    given, options = arguments(case, dtype)
    out = loss(*given, **options)
    found: dict[str, Tensor | None] = dict(zip(OUTPUTS, out, strict=True))
    out.loss.backward()
    student = given[0]
    leaves = (student.hidden, student.weight, student.bias)
    return found | {
        name: None if x is None else x.grad for name, x in zip(GRADIENTS, leaves, strict=True)
    }


def digest(found: dict[str, Tensor | None]) -> dict[str, list[float] | None]:
    """A few numbers that stand for the outcome: of a gradient its norm and two projections."""
    return {name: None if x is None else _digest(x.double()) for name, x in found.items()}


def _digest(x: Tensor) -> list[float]:
    if x.ndim == 0:
        return [x.item()]
    probes = [numbers(seed, *x.shape) for seed in (40, 41)]
    return [x.norm().item(), *((x * p).sum().item() / p.norm().item() for p in probes)]


def recorded() -> dict[str, dict[str, list[float] | None]]:
    """What every case gave when it was recorded: `digest` of fp64 on the eager backend."""
    return json.loads(RECORD.read_text())


def record(loss: type) -> None:
    """Write the record anew, from a `loss` that is known to be right."""
    found = {}
    for name, case in CASES.items():
        module = loss(backend="eager", **case.loss)
        found[name] = digest(outcome(module, case, torch.float64))
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
