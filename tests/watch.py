"""What does a call cost, counted instead of timed? Operators, products, bytes, launches.

`Watch` sees every operator that PyTorch dispatches while it is active; one of this package counts
as one. `inside_operators` watches what their implementations dispatch in turn; a C++ kernel is one
call there. `launches` counts Triton's kernels, interpreted or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mllmkd_kernels.backends import products

PACKAGE = ("mllmkd_kernels", "mllmkd_cpu")

#: No kernel runs for these.
VIEWS = frozenset(
    (
        "alias", "detach", "empty", "empty_like", "expand", "new_empty", "permute", "reshape",
        "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
        "_unsafe_view",
    )
)  # fmt: skip


@dataclass
class Tally:
    """What was counted.

    Attributes:
        calls: of every operator that runs a kernel, by its name without namespace and overload.
        ours: of the operators of this package, among them.
        largest: entries of the largest tensor that was made; views of earlier ones are not.
        made: bytes of all of them.
        ours_made: those that operators of this package returned.
        flops: of matrix products, 2·m·n·k each.
    """

    calls: Counter[str] = field(default_factory=Counter)
    ours: Counter[str] = field(default_factory=Counter)
    largest: int = 0
    made: int = 0
    ours_made: int = 0
    flops: int = 0

    @property
    def products(self) -> int:
        """Matrix products."""
        return sum(n for name, n in self.calls.items() if name in _PRODUCTS)


_PRODUCTS = ("mm", "matmul", "addmm", "addmm_")


class Watch(TorchDispatchMode):
    """Counts into `tally` while it is active."""

    def __init__(self, tally: Tally | None = None) -> None:
        super().__init__()
        self.tally = Tally() if tally is None else tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tally, name = self.tally, func.overloadpacket.__name__
        ours = func.namespace in PACKAGE
        if name not in VIEWS:
            tally.calls[name] += 1
        if ours:
            tally.ours[name] += 1
        there = _storages((args, kwargs))
        for address, (size, width) in _storages(out).items():
            if address not in there:
                tally.largest = max(tally.largest, size // width)
                tally.made += size
                tally.ours_made += size if ours else 0
        if name in _PRODUCTS:
            a, b = args[-2:]
            tally.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return out


def _storages(values: Any) -> dict[int, tuple[int, int]]:
    """address → (bytes, bytes an entry) of the memory behind the tensors in nested `values`."""
    found: dict[int, tuple[int, int]] = {}
    if isinstance(values, Tensor):
        storage = values.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes(), values.itemsize
    elif isinstance(values, dict):
        found |= _storages(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            found |= _storages(value)
    return found


@contextmanager
def inside_operators() -> Iterator[Tally]:
    """What the implementations of this package's operators dispatch: all of them enter
    `products.full_fp32`, and so a watch.
    """
    tally, original = Tally(), products.full_fp32

    @contextmanager
    def watched() -> Iterator[None]:
        with original(), Watch(tally):
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "full_fp32", watched)
        yield tally


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Launches of Triton's kernels by name."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        from triton.runtime.interpreter import InterpretedFunction as Kernel
    else:
        from triton.runtime.jit import JITFunction as Kernel
    found: Counter[str] = Counter()
    original = Kernel.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        found[self.fn.__name__] += 1
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "run", run)
        yield found
