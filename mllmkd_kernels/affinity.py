"""Do answer tokens attend to the image as they do in the teacher? By the cosines between the hidden
states of visual and response tokens. (LLAVADI's affinity)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mllmkd_kernels import checks, relation_ops
from mllmkd_kernels.backends.products import accumulation_dtype
from mllmkd_kernels.casting import wants
from mllmkd_kernels.contrast import contrast
from mllmkd_kernels.registration import computing

KINDS = ("squared", "contrastive")


def affinity_loss(
    student: Tensor,  # (N, D_s)
    teacher: Tensor,  # (N, D_t)
    visual: Tensor,  # (P,)
    response: Tensor,  # (M,)
    cu_visual: Tensor,  # (samples + 1,)
    cu_response: Tensor,  # (samples + 1,)
    *,
    joint: bool = False,
    kind: str = "squared",
) -> Tensor:
    """Mean over samples of the mean over their cells of ``(cos_s(i, j) − cos_t(i, j))²``, i a
    visual and j a response row of the sample: a scalar.

    The cosines are seen a tile of 4 MiB at a time, between products that a library makes: plain
    PyTorch on every device, 1.6 times as long as the products alone on a processor (4 samples of
    576 × 256 rows, D 896 and 2,048). Nothing waits for the device. Prefix sums that lie on the CPU
    save work on another device: without them the rows of all samples are multiplied with each
    other.

    Args:
        student, teacher: last hidden states of corresponding rows, floating; the sizes D may
            differ. Only the student receives a gradient. A row of zeros has cosine 0.
        visual, response: int64 indices of rows, sample after sample.
        cu_visual, cu_response: int32 prefix sums of how many each sample has, on the CPU or the
            device of the rows.
        joint: one mean over the cells of all samples together, as LLAVADI's released code has it.
        kind: "squared", the above; or "contrastive", another loss of that code, between all samples
            (`contrast.py` has the formula): a softmax over the rows of each other sample is to give
            the teacher's cosines. It holds all cosines at once, and has no `joint`.

    Returns:
        fp32 scalar (fp64 for fp64 inputs). A sample without cells counts as 0, in the joint mean
        not at all.

    Raises:
        TypeError, ValueError: arguments that do not fit, named with what was expected.
        IndexError: an index of no row.
    """
    checks.floating("student", student, 2)
    checks.floating("teacher", teacher, 2)
    checks.same_rows("teacher", teacher.shape[0], "student", student.shape[0])
    checks.same_device("teacher", teacher, "student", student)
    checks.in_memory("student", student)
    for name, index, cu in (("visual", visual, cu_visual), ("response", response, cu_response)):
        checks.indices(name, index, "student", student)
        checks.cu_seqlens(f"cu_{name}", cu, index.shape[0])
    if cu_visual.shape != cu_response.shape:
        raise ValueError(
            f"cu_response: is of {cu_response.numel() - 1} samples, cu_visual of "
            f"{cu_visual.numel() - 1}; expected the same"
        )
    check_kind(kind, joint)
    acc = accumulation_dtype(student, teacher)
    heads = student, teacher.detach()
    v, r, v_t, r_t = (_units(x, i, acc) for x in heads for i in (visual, response))
    if kind == "contrastive":
        with computing(v.device):
            return contrast(v, r, v_t, r_t, *(cu.to(v.device) for cu in (cu_visual, cu_response)))
    return relation_ops.affinity(v, r, v_t, r_t, cu_visual, cu_response, joint, *wants(v, r))[0]


def check_kind(kind: str, joint: bool) -> None:
    """`ValueError` where there is no such loss."""
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if joint and kind != "squared":
        raise ValueError(f"joint: kind {kind!r} has no other mean, expected False")


def _units(x: Tensor, index: Tensor, acc: torch.dtype) -> Tensor:
    """Rows of x by index, of length 1; torch would forget the sign of a lazily negated index."""
    return F.normalize(x[index.resolve_neg()].to(acc), dim=-1)
