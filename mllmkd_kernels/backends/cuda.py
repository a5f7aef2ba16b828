"""How does Python reach the CUDA kernels? The row kernel of the chunk algorithm as a thread-block
cluster.

One operator, ``torch.ops.mllmkd_cuda.rows_``, in the same extension as the CPU kernels, where it
was built with CUDA. It is the row kernel only: the matrix products around it are the chunk
driver's. A cluster of up to 16 CTAs keeps a pair of rows (z_s, z_t) in its shared memory, so that
with a bf16 gradient 10 bytes move per token of the vocabulary, where a kernel that reads the pair
once for the log-sum-exps and again for the loss moves 18.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllmkd_kernels.backends import cpu
from mllmkd_kernels.backends.nvcc import CAPABILITIES, nvcc_flags

__all__ = ["available", "bytes_moved", "max_vocab", "nvcc_flags", "rows_", "why_not"]

#: Shared memory of a CTA, and of that what reductions take (csrc/cuda/rows.h).
_SHARED_BYTES = 227 * 1024
_REDUCTION_BYTES = 1792
_MAX_CLUSTER = 16


def available(device: torch.device | None = None) -> bool:
    """Does the kernel run on `device` (default: the current GPU)?"""
    return not why_not(device)


def why_not(device: torch.device | None = None) -> str:
    """Why the kernel does not run on `device`, and what to do; empty if it does."""
    if not cpu.available():
        return cpu.why_not()
    if not _built():
        return cpu.left_out("CUDA kernels")
    if not torch.cuda.is_available():
        return "no GPU is there"
    if torch.version.hip:
        return "this is a ROCm build of PyTorch; the kernel needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) not in CAPABILITIES and (major, None) not in CAPABILITIES:
        return f"compiled for compute capability 9.0 and 10.x, and the GPU has {major}.{minor}"
    return ""


def max_vocab(has_teacher: bool) -> int:
    """The longest row that the shared memory of a cluster holds: 461k logits, 922k with no
    teacher.
    """
    columns = (_SHARED_BYTES - _REDUCTION_BYTES) // (8 if has_teacher else 4)
    return _MAX_CLUSTER * (columns // 4 * 4)


def bytes_moved(rows: int, vocab: int, has_teacher: bool, dz_bytes: int) -> int:
    """Bytes of logits read and gradients written, for any divergence; 0 `dz_bytes`: no gradient."""
    return rows * vocab * ((8 if has_teacher else 4) + dz_bytes)


def rows_(
    zs: Tensor,  # (C, V) fp32, unit column stride: products without bias and soft-cap
    zt: Tensor | None,  # (C, V) fp32, strides of zs; None: no divergence
    bs: Tensor | None,  # (≥V,) fp32, bf16 or fp16
    bt: Tensor | None,  # (≥V,)
    labels: Tensor | None,  # (C,) int64; None: no cross-entropy
    ce_weight: Tensor | None,  # (C,) fp32
    kd_weight: Tensor | None,  # (C,) fp32
    broken_s: Tensor | None,  # (C,) bool: the hidden state was not finite, needed with a soft-cap
    broken_t: Tensor | None,  # (C,) bool
    divergence: str,
    param: float,
    temperature: float,
    cap_s: float,
    cap_t: float,
    ignore_index: int,
    dz: Tensor | None,  # (C, V) fp32 or bf16, unit column stride; written; its rows may lie in zs's
    cluster: int = 0,
    standardize: bool = False,
) -> tuple[Tensor, Tensor]:
    """CE and D of every row, both (C,) fp32; their gradient in `dz` where it is wanted, exactly 0
    in a row of zero weight. Columns between V and a stride may be written too. Strides that are
    multiples of 4 move 16 bytes at a time. `cluster` is the number of CTAs for a row, 1 to 16; 0
    chooses. `standardize`: the divergence sees z-scored logits.
    """
    return torch.ops.mllmkd_cuda.rows_(
        zs, zt, bs, bt, labels, ce_weight, kd_weight, broken_s, broken_t, divergence, param,
        temperature, cap_s, cap_t, ignore_index, dz, cluster, standardize,
    )  # fmt: skip


def _built() -> bool:
    return cpu.available() and hasattr(torch.ops.mllmkd_cuda, "rows_")


if _built():

    @torch.library.register_fake("mllmkd_cuda::rows_")
    def _(
        zs, zt, bs, bt, labels, ce_weight, kd_weight, broken_s, broken_t, divergence, param,
        temperature, cap_s, cap_t, ignore_index, dz, cluster=0, standardize=False,
    ):  # fmt: skip
        return zs.new_empty(zs.shape[:1]), zs.new_empty(zs.shape[:1])
