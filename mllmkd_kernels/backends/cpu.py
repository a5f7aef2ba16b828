"""How does Python reach the C++ kernels? Imports the extension and gives its operators fake forms.

The functions are the interface of every backend (`backends.eager` defines their meaning), here thin
names over ``torch.ops.mllmkd_cpu``. The kernels keep tiles of logits in cache: a chunk costs 2·C·V
numbers of workspace and nothing else of that size. Autograd is not here (`registration.py`);
neither is the choice of instruction set, which C++ makes at the first call and
``MLLMKD_CPU_ISA=default|avx2|avx512|amx`` overrides.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllmkd_kernels.backends import products
from mllmkd_kernels.backends.calls import Head, Options, Targets

#: Written by setup.py: what was left out while building, and why.
_NOTE = Path(__file__).parents[1] / "_left_out.json"
_BUILD = "build them with `pip install --no-build-isolation -e .`"


def left_out(part: str) -> str:
    """Why there are no `part` ("C++ kernels", "CUDA kernels"), and what to do."""
    reasons = json.loads(_NOTE.read_text(encoding="utf-8")) if _NOTE.exists() else {}
    where = f"not built in {_NOTE.parent}"  # a checkout may lie before what is installed
    why = f"left out while building: {reasons[part]}" if part in reasons else where
    return f"the {part} were {why}; {_BUILD}"


def _why_not_imported(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError):
        return left_out("C++ kernels")
    return f"the C++ kernels cannot be imported ({error}); {_BUILD}"


try:
    _C: Any = importlib.import_module("mllmkd_kernels._C")
    _WHY_NOT = ""
except ImportError as error:
    _C = None
    _WHY_NOT = _why_not_imported(error)


def available() -> bool:
    """Is the extension there?"""
    return _C is not None


def why_not() -> str:
    """Why the extension is not there, and what to do; empty if it is."""
    return _WHY_NOT


def build_info() -> dict[str, str]:
    """Compiler, flags and torch version the extension was built with; empty without it."""
    return _C.build_info() if available() else {}


def cpu_features() -> dict[str, bool | int | str]:
    """What the processor offers and which kernels run on it; empty without the extension."""
    return _C.cpu_features() if available() else {}


def release_workspace() -> None:
    """Free what the C++ kernels keep of a call for the next one: logits of a chunk and the head's
    gradient, 200 to 350 MiB for a vocabulary of 151,936 and never more than 768 MiB. The next
    call allocates it again. Other backends keep nothing.
    """
    if available():
        _C.release_workspace()


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor (0-dim) in `dtype`, in memory kept from the last step where there is some."""
    return torch.ops.mllmkd_cpu.scaled(x, factor, dtype)


def distill_rows(
    student: Head, teacher: Head | None, targets: Targets, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `eager.distill_rows`."""
    s, t, d = student, teacher, targets.divergence
    ht, wt, bt, cap_t = (None, None, None, 0.0) if t is None else (t.h, t.w, t.b, t.cap)
    return torch.ops.mllmkd_cpu.distill_rows(
        s.h, s.w, s.b, ht, wt, bt, targets.labels, targets.ce_weight, targets.kd_weight,
        d.name, d.param, targets.temperature, s.cap, cap_t, options.vocab, targets.ignore_index,
        *options.wants, options.chunk, options.diagnostics, targets.standardize, options.factored,
        *(options.into or ()),
    )  # fmt: skip


def dz_shape(rows: int, vocab: int, dtype: torch.dtype) -> tuple[int, ...]:
    """As `eager.dz_shape`: tiles of the vocabulary, panels of tokens, the sides of each."""
    tile, panel = _C.tile(dtype == torch.float64)
    return -(-vocab // tile), -(-rows // panel), tile, panel


def head_gradient(
    dz: Tensor, h: Tensor, grad: Tensor, rows: int, vocab: int, dtype: torch.dtype
) -> Tensor:
    """grad · dzᵀ h, (rows, D), of the tiles that `distill_rows` left."""
    return torch.ops.mllmkd_cpu.head_gradient(dz, h, grad, rows, vocab, dtype)


def add_head_gradient_(main_grad: Tensor, dz: Tensor, h: Tensor, grad: Tensor, vocab: int) -> None:
    """main_grad += grad · dzᵀ h, a slice of the vocabulary at a time: never a second dw."""
    tile = dz.shape[2]
    for tiles in products.chunks(dz.shape[0], max(1, products.VOCAB_SLICE // tile)):
        first, rows = tiles.start * tile, min(vocab, tiles.stop * tile) - tiles.start * tile
        part = head_gradient(dz[tiles], h, grad, rows, rows, dz.dtype)
        main_grad[first : first + rows] += part


def logprob_rows(head: Head, targets: Targets, options: Options) -> tuple[Tensor, Tensor]:
    """As `eager.logprob_rows`."""
    return torch.ops.mllmkd_cpu.logprob_rows(
        head.h, head.w, head.b, targets.labels, targets.temperature, head.cap, options.vocab,
        targets.ignore_index, options.chunk,
    )  # fmt: skip


def logprob_grad(
    grad: Tensor,  # (N,)
    lse: Tensor,  # (N,) as logprob_rows returned it
    head: Head,
    targets: Targets,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager.logprob_grad`."""
    return torch.ops.mllmkd_cpu.logprob_grad(
        grad, head.h, head.w, head.b, targets.labels, lse, targets.temperature, head.cap,
        options.vocab, targets.ignore_index, *options.wants, options.chunk,
    )  # fmt: skip


def relation_stats(
    hs: Tensor,  # (N, D_s) fp32 or fp64
    ks: Tensor,  # (N, D_s) = hs G_s
    ht: Tensor,  # (N, D_t)
    kt: Tensor,  # (N, D_t)
    cu_seqlens: Tensor,  # (images + 1,) int32
) -> Tensor:
    """<R_s,R_s>, <R_t,R_t>, <R_s,R_t> of every image, R = K Hᵀ: (images, 3) fp64."""
    return torch.ops.mllmkd_cpu.relation_stats(hs, ks, ht, kt, cu_seqlens)


def relation_grad(
    hs: Tensor,  # (N, D_s) fp32 or fp64
    ks: Tensor,  # (N, D_s)
    ht: Tensor,  # (N, D_t)
    kt: Tensor,  # (N, D_t)
    cu_seqlens: Tensor,  # (images + 1,) int32
    coef: Tensor,  # (images, 2) fp64
) -> Tensor:
    """M = dR hs per image, dR = coef[i, 0]·R_t + coef[i, 1]·R_s: (N, D_s)."""
    return torch.ops.mllmkd_cpu.relation_grad(hs, ks, ht, kt, cu_seqlens, coef)


def _fake_gradients(
    h: Tensor, w: Tensor, dtype: torch.dtype, dw_dtype: torch.dtype, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    want_dh, want_dw, want_db = wanted
    return (
        h.new_empty(h.shape if want_dh else (0,), dtype=dtype),
        w.new_empty(w.shape if want_dw else (0,), dtype=dw_dtype),
        w.new_empty((w.shape[0],) if want_db else (0,), dtype=dtype),
    )


if available():

    @torch.library.register_fake("mllmkd_cpu::distill_rows")
    def _(
        hs, ws, bs, ht, wt, bt, labels, ce_weight, kd_weight, divergence, param, temperature,
        cap_s, cap_t, vocab, ignore_index, want_dh, want_dw, want_db, chunk_rows, diagnostics=None,
        standardize=False, factored=False, main_grad=None, factor=1.0,
    ):  # fmt: skip
        dtype = products.accumulation_dtype(hs, ws, bs, ht, wt, bt)
        rows = hs.new_empty(hs.shape[:1], dtype=dtype)
        dh, dw, db = _fake_gradients(hs, ws, dtype, dtype, want_dh, want_dw, want_db)
        if main_grad is not None:
            dw = dw.new_empty(0)
        if factored:
            dw = hs.new_empty(dz_shape(hs.shape[0], vocab, dtype), dtype=dtype)
        return hs.new_empty((), dtype=dtype), rows, torch.empty_like(rows), dh, dw, db

    @torch.library.register_fake("mllmkd_cpu::head_gradient")
    def _(dz, h, factor, rows, vocab, dtype):
        return h.new_empty(rows, h.shape[1], dtype=dtype)

    @torch.library.register_fake("mllmkd_cpu::logprob_rows")
    def _(h, w, b, labels, temperature, cap, vocab, ignore_index, chunk_rows):
        rows = h.new_empty(h.shape[:1], dtype=products.accumulation_dtype(h, w, b))
        return rows, torch.empty_like(rows)

    @torch.library.register_fake("mllmkd_cpu::logprob_grad")
    def _(
        grad, h, w, b, labels, lse, temperature, cap, vocab, ignore_index, want_dh, want_dw,
        want_db, chunk_rows,
    ):  # fmt: skip
        dtype = products.accumulation_dtype(h, w, b)
        return _fake_gradients(h, w, dtype, w.dtype, want_dh, want_dw, want_db)

    @torch.library.register_fake("mllmkd_cpu::relation_stats")
    def _(hs, ks, ht, kt, cu_seqlens):
        return hs.new_empty((cu_seqlens.shape[0] - 1, 3), dtype=torch.float64)

    @torch.library.register_fake("mllmkd_cpu::relation_grad")
    def _(hs, ks, ht, kt, cu_seqlens, coef):
        return torch.empty_like(hs, memory_format=torch.contiguous_format)
