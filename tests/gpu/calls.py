"""Which calls must compile? Every kind of call that a user can make, by name.

A call runs a function of the Triton backend on tensors of a GPU (pretended ones, or real), at the
headline shapes. Each kernel that it launches is one configuration. `every` names all calls;
`KERNELS` says which of them a machine with little time compiles first: one for every kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mllmkd_kernels.backends.calls import Head, Options, Targets
from mllmkd_kernels.divergence import PARAMETERS, Divergence


@dataclass(frozen=True)
class Shape:
    """Sizes and dtype of a call; defaults are those that the project's promises are about."""

    n: int = 8192
    vocab: int = 151936
    d_s: int = 1024
    d_t: int = 2560
    dtype: torch.dtype = torch.bfloat16
    head_dtype: torch.dtype | None = None  # of the student's head, where it differs


@dataclass(frozen=True)
class Call:
    """A function of the backend with its options.

    Attributes:
        name: for the table and ``--kernel``.
        run: makes the tensors and calls.
        needs: by kernel function, "wgmma" and "tma" where the kernel must have them on sm_90.
        quick: belongs to the selection that `make test` compiles.
    """

    name: str
    run: Callable[[], Any]
    needs: dict[str, tuple[str, ...]]
    quick: bool = False


#: Kernels that multiply 16-bit operands must do it on Hopper's tensor cores, fed by TMA.
HOPPER = {
    name: ("wgmma", "tma") for name in ("statistics_kernel", "values_kernel", "gradient_kernel")
}
NOTHING: dict[str, tuple[str, ...]] = {}


def every() -> list[Call]:
    """All calls, the quick ones first."""
    calls = [*_distill("chunk"), *_distill("stream"), *_logprob(), *_relation()]
    return sorted(calls, key=lambda call: not call.quick)


def _distill(algorithm: str) -> list[Call]:
    hopper = HOPPER if algorithm == "stream" else NOTHING

    def call(name: str, needs: dict[str, tuple[str, ...]] = hopper, **options: Any) -> Call:
        quick = name in ("jsd", "forward_kl")
        shape = options.pop("shape", Shape())
        return Call(
            f"{algorithm} {name}", lambda: distill(algorithm, shape, **options), needs, quick
        )

    odd = Shape(1001, 50257, 897, 2049)
    calls = [call(name, divergence=name) for name in PARAMETERS]
    if algorithm == "chunk":  # σ is of a whole row
        calls += [
            call("z-scored", standardize=True),
            call("z-scored jsd", standardize=True, divergence="jsd"),
            call("z-scored, tiny vocabulary", standardize=True, shape=Shape(vocab=2048)),
        ]
    else:  # `values` loaded by pointers
        calls += [call("odd sizes, jsd", NOTHING, divergence="jsd", diagnostics=True, shape=odd)]
    calls += [
        call("without labels", labels=False),
        call("without teacher", teacher=False),
        call("temperature", temperature=2.0),
        call("soft-cap and bias", cap=30.0, bias=True),
        call("jsd, no gradient", divergence="jsd", gradient=False),
        call("no gradient", gradient=False),
        call("diagnostics", diagnostics=True),
        call("diagnostics, jsd, temperature", diagnostics=True, divergence="jsd", temperature=2.0),
        call(
            "diagnostics, soft-cap, bias, temperature",
            diagnostics=True,
            cap=30.0,
            bias=True,
            temperature=2.0,
        ),
        call("diagnostics, no gradient", diagnostics=True, gradient=False),
        call("fp16", shape=Shape(dtype=torch.float16)),
        call("fp32", NOTHING, shape=Shape(dtype=torch.float32)),
        call("fp32 jsd", NOTHING, divergence="jsd", shape=Shape(dtype=torch.float32)),
        call("mixed dtypes", NOTHING, shape=Shape(head_dtype=torch.float32)),
        call("odd sizes", NOTHING, shape=odd),
        call("small vocabulary", shape=Shape(vocab=4096)),
        # Rows that the row kernel keeps in registers: the longest, by either table.
        call("small vocabulary, skewed", divergence="skew_reverse_kl", shape=Shape(vocab=4096)),
        call("diagnostics, small vocabulary", diagnostics=True, shape=Shape(vocab=4096)),
        call("tiny vocabulary, skewed", divergence="skew_reverse_kl", shape=Shape(vocab=2048)),
    ]
    return calls


def _logprob() -> list[Call]:
    return [
        Call("logprob", lambda: logprob(Shape()), HOPPER),
        Call("logprob fp32", lambda: logprob(Shape(dtype=torch.float32)), NOTHING),
        Call("logprob temperature", lambda: logprob(Shape(), temperature=2.0), HOPPER),
    ]


def _relation() -> list[Call]:
    return [
        Call("relation", lambda: relation(Shape(8 * 729)), NOTHING, quick=True),
        Call("relation odd sizes", lambda: relation(Shape(8 * 729, 1, 897, 2049)), NOTHING),
    ]


# --- the functions of the backend, called --------------------------------------------------------


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def distill(
    algorithm: str,
    s: Shape,
    divergence: str = "forward_kl",
    labels: bool = True,
    teacher: bool = True,
    gradient: bool = True,
    bias: bool = False,
    cap: float = 0.0,
    temperature: float = 1.0,
    diagnostics: bool = False,
    standardize: bool = False,
) -> Any:
    """`distill_rows` ("chunk") or `distill_stream` ("stream")."""
    from mllmkd_kernels.backends import triton

    head = s.head_dtype or s.dtype
    f, at_a_time = {
        "chunk": (triton.distill_rows, 512),
        "stream": (triton.distill_stream, 8192),
    }[algorithm]
    weight = _empty(s.n, dtype=torch.float32)
    student = Head(
        _empty(s.n, s.d_s, dtype=s.dtype), _empty(s.vocab, s.d_s, dtype=head),
        _empty(s.vocab, dtype=head) if bias else None, cap,
    )  # fmt: skip
    other = Head(
        _empty(s.n, s.d_t, dtype=s.dtype), _empty(s.vocab, s.d_t, dtype=s.dtype),
        _empty(s.vocab, dtype=s.dtype) if bias else None, cap,
    )  # fmt: skip
    targets = Targets(
        _empty(s.n, dtype=torch.int64) if labels else None,
        weight if labels else None, weight if teacher else None,
        Divergence(divergence), temperature, standardize=standardize,
    )  # fmt: skip
    seen = _empty(3, s.n, dtype=torch.float32) if diagnostics else None
    options = Options(s.vocab, at_a_time, gradient, gradient, gradient and bias, seen)
    return f(student, other if teacher else None, targets, options)


def logprob(s: Shape, temperature: float = 1.0) -> Any:
    """`logprob_rows` and `logprob_grad`."""
    from mllmkd_kernels.backends import triton

    head = Head(_empty(s.n, s.d_s, dtype=s.dtype), _empty(s.vocab, s.d_s, dtype=s.dtype))
    labels, row = _empty(s.n, dtype=torch.int64), _empty(s.n, dtype=torch.float32)
    targets = Targets(labels, temperature=temperature)
    options = Options(s.vocab, 512, want_dh=True, want_dw=True)
    triton.logprob_rows(head, targets, options)
    return triton.logprob_grad(row, row, head, targets, options)


def relation(s: Shape, images: int = 8) -> Any:
    """`relation_stats` and `relation_grad`."""
    from mllmkd_kernels.backends import triton

    hs, ht = (_empty(s.n, d, dtype=torch.float32) for d in (s.d_s, s.d_t))
    ends = torch.empty(images + 1, dtype=torch.int32, device="cuda")
    triton.relation_stats(hs, hs, ht, ht, ends)
    coef = _empty(images, 2, dtype=torch.float64)
    return triton.relation_grad(hs, hs, ht, ht, ends, coef)


def selected(calls: list[Call], pattern: str) -> list[Call]:
    """Calls whose name contains `pattern`.

    Raises:
        ValueError: none does.
    """
    found = [replace(call) for call in calls if pattern in call.name]
    if not found:
        names = ", ".join(call.name for call in calls)
        raise ValueError(f"call: nothing contains {pattern!r}; there are {names}")
    return found
