"""Does any operator read a value that only the device has? Then a step would wait for the GPU, and
no CUDA graph could hold it.

On pretended tensors (`tests.gpu.pretended`), which have no values, the operators run as they would
on a GPU: a read raises. Kernels are not compiled.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


def test_no_operator_reads_a_value_of_the_device() -> None:
    """In a process of its own: Triton is imported once, and here it is no interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_host_waits"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# --- the process ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _pretending() -> Iterator[None]:
    """A GPU whose kernels do nothing."""
    from unittest import mock

    from triton.runtime.jit import JITFunction

    from tests.gpu import pretended

    with (
        pretended.gpu("sm_90", lambda *_: None),
        mock.patch.object(JITFunction, "__getitem__", lambda *_: lambda *a, **k: None),
    ):
        yield


def _distill(algorithm: str) -> None:
    import functools

    from mllmkd_kernels import ops, plan

    plan.distill_plan = functools.partial(plan.distill_plan, algorithm=algorithm)
    _raw(ops.linear_distill)(
        *_heads(), _row("int64"), _row(), _row(), "jsd", 0.5, 2.0, 30.0, 0.0, 4096, -100, True,
        True, True, "triton", 0.0, True,
    )  # fmt: skip
    _raw(ops.linear_distill_)(
        *_heads(), _row("int64"), _row(), _row(), "jsd", 0.5, 2.0, 30.0, 0.0, 4096, -100, True,
        True, True, "triton", 0.0, False, False, False, _empty(4096, 64), False, 0.5,
    )  # fmt: skip


def _cuda() -> None:
    import torch

    from mllmkd_kernels import ops
    from mllmkd_kernels.backends import cuda

    cuda.why_not = lambda device=None: ""
    cuda.rows_ = lambda zs, *_, **__: (torch.empty_like(zs[:, 0]), torch.empty_like(zs[:, 0]))
    _raw(ops.linear_distill)(
        *_heads(), _row("int64"), _row(), _row(), "jsd", 0.5, 2.0, 30.0, 0.0, 4096, -100, True,
        True, True, "cuda", 0.0,
    )  # fmt: skip


def _logprob() -> None:
    from mllmkd_kernels import ops

    h, w, b, *_ = _heads()
    rest = (2.0, 0.0, 4096, -100, True, True, True, "triton", 0.0)
    _, lse = _raw(ops.linear_logprob)(h, w, b, _row("int64"), *rest)
    _raw(ops.linear_logprob_backward)(_row(), h, w, b, _row("int64"), lse, *rest)


def _relation() -> None:
    from mllmkd_kernels import relation_ops

    h, _, _, t, *_ = _heads()
    gram_s, gram_t = _empty(64, 64), _empty(96, 96)
    arguments = (h, gram_s, t, gram_t, _empty(5, dtype="int32"), True, True, "triton", False)
    _raw(relation_ops.relation)(*arguments)


def _softcapped() -> None:
    from mllmkd_kernels import relation_ops

    rest = (30.0, 0.0, 4096, True, True, True, False)
    for equal in (0, 100):
        _raw(relation_ops.relation_softcapped)(*_heads(), _empty(5, dtype="int32"), *rest, equal)


def _affinity() -> None:
    from mllmkd_kernels import contrast, relation_ops

    rows = [_empty(300, d) for d in (64, 64, 96, 96)]
    cu = [_empty(5, dtype="int32") for _ in range(2)]
    for joint in (False, True):
        _raw(relation_ops.affinity)(*rows, *cu, joint, True, True)
    contrast.contrast(*rows, *cu)


def _gram() -> None:
    from mllmkd_kernels import relation_ops

    _, w, b, *_ = _heads()
    g = _raw(relation_ops.head_gram)(w, b, 4096)
    _raw(relation_ops.head_gram_backward)(g, w, b, 4096)


def _empty(*shape: int, dtype: str = "float32") -> Any:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")


def _row(dtype: str = "float32") -> Any:
    return _empty(300, dtype=dtype)


def _heads() -> tuple[Any, ...]:
    half = "bfloat16"
    student = _empty(300, 64, dtype=half), _empty(4096, 64, dtype=half), _empty(4096, dtype=half)
    return (*student, _empty(300, 96, dtype=half), _empty(4096, 96, dtype=half), None)


def _raw(operator: Any) -> Callable[..., Any]:
    """The function behind an operator: PyTorch would take its fake form for tensors like these."""
    return operator._init_fn


def main() -> None:
    """Run every operator; a read must be seen."""
    with _pretending():
        for algorithm in ("chunk", "stream"):
            _distill(algorithm)
        for case in (_cuda, _logprob, _relation, _softcapped, _affinity, _gram):
            case()
        try:
            _row().sum().item()
        except RuntimeError:
            return
        raise AssertionError("a value was read and nothing was said")


if __name__ == "__main__":
    main()
