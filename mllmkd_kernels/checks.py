"""Is the input what it must be? Every public function asks here; an error names argument, value and
expectation.

Nothing that a public function asks looks at the data of a tensor on a GPU or while it is traced
(that would synchronise, and break the trace): shapes, dtypes and devices only. Values of labels and
prefix sums are checked where they are read.
"""

from __future__ import annotations

import math
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(name: str, x: Tensor, ndim: int) -> None:
    """`x` is a floating tensor of `ndim` dimensions, dense and whole."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name}: expected a whole tensor, got a {type(x).__name__}, of which each rank has a "
            "part; pass its `full_tensor()`, or heads cut by rows to `vocab_parallel_distill`"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {x.layout}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(x.shape)}")


def head(who: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden (N, D), weight (V, D), bias (V,), on one device."""
    floating(f"{who}hidden", hidden, 2)
    floating(f"{who}weight", weight, 2)
    if not hidden.shape[1]:
        raise ValueError(f"{who}hidden: expected at least one feature, got {tuple(hidden.shape)}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{who}weight: its rows have {weight.shape[1]} entries, "
            f"but {who}hidden has size {hidden.shape[1]}"
        )
    same_device(f"{who}weight", weight, f"{who}hidden", hidden)
    head_bias(f"{who}bias", bias, f"{who}weight", weight)


def pair(
    hs: Tensor,
    ws: Tensor,
    bs: Tensor | None,
    ht: Tensor | None,
    wt: Tensor | None,
    bt: Tensor | None,
) -> int:
    """Both heads are well formed and their rows correspond; the number of rows."""
    head("student_", hs, ws, bs)
    if (ht is None) != (wt is None):
        missing, given = ("hidden", "weight") if ht is None else ("weight", "hidden")
        raise ValueError(
            f"teacher_{missing}: got None, but teacher_{given} was given; pass both or neither"
        )
    if ht is not None and wt is not None:
        head("teacher_", ht, wt, bt)
        same_rows("teacher_hidden", ht.shape[0], "student_hidden", hs.shape[0])
        same_device("teacher_hidden", ht, "student_hidden", hs)
    in_memory("student_hidden", hs)
    return hs.shape[0]


def head_bias(name: str, bias: Tensor | None, weight_name: str, weight: Tensor) -> None:
    """None, or (V,) beside a weight (V, D)."""
    if bias is None:
        return
    floating(name, bias, 1)
    if bias.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{name}: got {bias.shape[0]} entries for a head of {weight.shape[0]} tokens"
        )
    same_device(name, bias, weight_name, weight)


def main_grad(x: Tensor | None, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """None, or what the gradient of a trained head can be added to: its shape, in `dtype`."""
    if x is None:
        return None
    floating("main_grad", x, 2)
    if not weight.requires_grad:
        raise ValueError("main_grad: expected None for a frozen head, student_weight needs no grad")
    if x.shape != weight.shape:
        raise ValueError(
            f"main_grad: expected the shape {tuple(weight.shape)} of student_weight, "
            f"got {tuple(x.shape)}"
        )
    if x.dtype != dtype:
        raise TypeError(
            f"main_grad: expected {dtype}, in which gradients are summed, got {x.dtype}"
        )
    same_device("main_grad", x, "student_weight", weight)
    if x.requires_grad or not x.is_contiguous():
        raise ValueError("main_grad: expected a contiguous buffer that requires no gradient")
    return x


def loss_gradient(value: float | None, main_grad: Tensor | None, wanted: bool) -> float | None:
    """None, or a positive number beside a `main_grad`; None where it is not `wanted`."""
    if value is None:
        return None
    if main_grad is None:
        raise ValueError(f"loss_gradient: expected None without a main_grad, got {value}")
    known = positive("loss_gradient", value, "None or a positive number")
    return known if wanted else None


def in_memory(name: str, x: Tensor) -> None:
    """`x` has numbers, and so what lies on its device."""
    if x.is_meta:
        raise ValueError(
            f"{name}: is on meta, where tensors have a shape and no numbers; load the model, or "
            "keep it out of offloading"
        )


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """`x` lies where `other` does."""
    if x.device != other.device:
        raise ValueError(f"{name}: is on {x.device}, but {other_name} is on {other.device}")


def same_rows(name: str, rows: int, other_name: str, other_rows: int) -> None:
    """Teacher and student select the same number of rows."""
    if rows != other_rows:
        raise ValueError(
            f"{name}: has {rows} rows, but {other_name} has {other_rows}; rows must correspond"
        )


def labels(name: str, x: Tensor, rows: int, hidden: Tensor) -> None:
    """int64 (N,) on the device of the hidden states."""
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {got}")
    if x.ndim != 1 or x.shape[0] != rows:
        raise ValueError(f"{name}: expected shape ({rows},), got {tuple(x.shape)}")
    same_device(name, x, "hidden", hidden)


def vocabulary(vocab_size: int | None, *sizes: int) -> int:
    """The shared vocabulary: `vocab_size`, by default the smallest head."""
    least = min(sizes)
    if vocab_size is None:
        vocab_size = least
    integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= least:
        raise ValueError(
            f"vocab_size: got {vocab_size}, expected 1 to {least} (heads of {sizes} tokens)"
        )
    return vocab_size


def integer(name: str, value: Any) -> int:
    """A whole number, of Python or NumPy."""
    if not isinstance(value, Integral | torch.SymInt):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    return value  # pyright: ignore[reportReturnType]


def positive(name: str, value: Any, expected: str = "a positive number") -> float:
    """A number, of Python or NumPy, between 0 and infinity, both excluded."""
    if not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not 0 < value < math.inf:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return float(value)


def temperature(value: float) -> float:
    """A positive number."""
    return positive("temperature", value)


def backend(value: str) -> str:
    """A name; whether there is such a backend, and it can be had, `choose` knows."""
    if not isinstance(value, str):
        raise TypeError(f"backend: expected a name, got {type(value).__name__}")
    return value


def softcap(name: str, value: float | None) -> float:
    """None (no soft-cap, encoded 0.0) or a positive number."""
    return 0.0 if value is None else positive(name, value, "None or a positive number")


def workspace(value: float | None) -> float:
    """A positive budget in MiB, or None for the default (encoded -1.0)."""
    if value is None:
        return -1.0
    return positive("workspace_mb", value, "None or a positive number of MiB")


def row_weight(name: str, value: float | Tensor, rows: int, like: Tensor) -> Tensor | None:
    """A weight per row (N,), on the device of `like`; a float stands for all rows, 0.0 for none.
    The caller narrows it to the accumulation dtype, which depends on the teacher too.
    """
    if isinstance(value, Tensor):
        if value.ndim != 1 or value.shape[0] != rows:
            raise ValueError(
                f"{name}: expected a number or shape ({rows},), got {tuple(value.shape)}"
            )
        if value.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
        same_device(name, value, "hidden", like)
        return value
    if not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(
            f"{name}: expected a number or a tensor of shape ({rows},), got {type(value).__name__}"
        )
    if not -math.inf < value < math.inf:  # in a form that traces
        raise ValueError(f"{name}: expected a finite number or one a row, got {value}")
    return (
        None
        if value == 0
        else torch.full((rows,), float(value), dtype=torch.float64, device=like.device)
    )


def cu_seqlens(name: str, x: Tensor, rows: int) -> None:
    """int32 prefix sum of rows per image; its values are checked where they are read."""
    if not isinstance(x, Tensor) or x.dtype != torch.int32 or x.ndim != 1 or x.shape[0] < 1:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected int32 of shape (images + 1,), got {got}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        ends(name, x, rows)


def ends(name: str, x: Tensor, rows: int) -> list[int]:
    """The values of a `cu_seqlens`, read on the host and checked: waits for another device."""
    found = x.tolist()
    if found[0] != 0 or found[-1] != rows or any(b < a for a, b in pairwise(found)):
        raise ValueError(
            f"{name}: expected a non-decreasing prefix sum from 0 to {rows}, got {found}"
        )
    return found


def rises(name: str, x: Tensor, rows: int) -> None:
    """The same asserted on the device, which nobody waits for."""
    right = (x[0] == 0) & (x[-1] == rows) & (x.diff() >= 0).all()
    torch.ops.aten._assert_async.msg(right, f"{name}: must rise from 0 to {rows}, the rows")


def indices(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """int64 (N,) of rows of `like`; torch looks at the values."""
    if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.ndim != 1:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected int64 of shape (rows,), got {got}")
    same_device(name, x, like_name, like)


def weight(name: str, value: float | Tensor) -> None:
    """What a term of a loss is multiplied by: a finite number of at least 0."""
    if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.ndim == 0):
        raise TypeError(f"{name}: expected a weight >= 0, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a weight >= 0, got {value}")
