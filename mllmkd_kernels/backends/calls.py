"""What is a backend asked? Three things, the same for every backend: heads with the rows that enter
them, what the rows are compared with, and what is wanted back.

Tensors are contiguous and on one device; weights have the dtype that is accumulated in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mllmkd_kernels.backends import products
from mllmkd_kernels.divergence import Divergence

_FORWARD = Divergence()


@dataclass(frozen=True)
class Head:
    """A head and the hidden states that enter it: logits are ``softcap(h wᵀ + b)``."""

    h: Tensor  # (N, D)
    w: Tensor  # (≥V, D)
    b: Tensor | None = None  # (≥V,)
    cap: float = 0.0  # of c·tanh(z/c); 0.0 for none


@dataclass(frozen=True)
class Targets:
    """What the rows of a student are compared with, besides a teacher's head."""

    labels: Tensor | None = None  # (N,) int64; None: no cross-entropy
    ce_weight: Tensor | None = None  # (N,)
    kd_weight: Tensor | None = None  # (N,); None: no divergence
    divergence: Divergence = _FORWARD
    temperature: float = 1.0
    ignore_index: int = -100
    standardize: bool = False  # the divergence sees z-scored logits


@dataclass(frozen=True)
class Options:
    """What is wanted, over how many columns, and how much of it exists at one time."""

    vocab: int  # columns that take part
    chunk: int  # rows at a time, or columns where those are streamed
    want_dh: bool = False
    want_dw: bool = False
    want_db: bool = False
    diagnostics: Tensor | None = None  # (3, N) in the dtype of the loss, written
    factored: bool = False  # dz of all rows in the place of dw, in the shape of `dz_shape`
    fold: int = 0  # rows whose 16-bit dz is folded into dh and dw at a time; 0: those of a chunk
    beside: int = 0  # multiprocessors for row passes beside products, on two streams; 0: on one
    into: products.Into | None = None  # what dw is added to, if it is wanted: none is returned

    @property
    def wants(self) -> tuple[bool, bool, bool]:
        """Which gradients: of h, w, b."""
        return self.want_dh, self.want_dw, self.want_db


def dtype_of(*heads: Head | None) -> torch.dtype:
    """What is accumulated in: fp64 if anything of the heads is fp64, else fp32."""
    tensors = (x for head in heads if head is not None for x in (head.h, head.w, head.b))
    return products.accumulation_dtype(*tensors)
