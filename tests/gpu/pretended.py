"""How can a launcher run without a GPU? On tensors that say they are on one and hold nothing.

A `PretendedTensor` is a meta tensor (shape, strides, dtype, no memory) whose ``device`` is
``cuda:0``, and `GpuMode` makes factory functions give such tensors too. So the very code a user's
call runs through builds the arguments of every kernel. At ``kernel[grid](...)`` the kernel is not
launched but handed to the JIT's own ``warmup`` for the pretended architecture: signature,
alignment, constants and options are what a launch would give. A launcher that asked for a value
on the host would fail here, because there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._C import DisableTorchFunctionSubclass
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CUDA = torch.device("cuda", 0)

#: A kernel that was compiled, and the constants it was compiled for, by parameter name.
Seen = Callable[[Any, dict[str, Any]], None]


class PretendedTensor(torch.Tensor):
    """A meta tensor that says it is on a GPU, at an address that is a multiple of 256 bytes."""

    device = property(lambda self: CUDA)  # pyright: ignore
    is_cuda = property(lambda self: True)  # pyright: ignore

    def data_ptr(self) -> int:
        return 256 + int(self.storage_offset()) * self.element_size()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _on_meta(func, args, kwargs)


class GpuMode(TorchFunctionMode):
    """Everything that is made on "cuda" inside is made of pretended tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _on_meta(func, args, kwargs)


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    with DisableTorchFunctionSubclass():
        return tree_map(
            _raised, func(*tree_map(_lowered, args), **tree_map(_lowered, kwargs or {}))
        )


def _lowered(x: Any) -> Any:
    if isinstance(x, PretendedTensor):
        return x.as_subclass(torch.Tensor)
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("meta")
    return "meta" if isinstance(x, str) and x.split(":")[0] == "cuda" else x


def _raised(x: Any) -> Any:
    return x.as_subclass(PretendedTensor) if type(x) is torch.Tensor else x


class _Driver:
    """What Triton asks about the machine before it compiles."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        if self.target.startswith("gfx"):
            return GPUTarget("hip", self.target, 64)
        return GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return self.target  # compiled kernels are remembered per device: one device a target

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def gpu(target: str, seen: Seen) -> Iterator[None]:
    """Inside, tensors on "cuda" are pretended ones of a GPU of `target` ("sm_90", "gfx942"); every
    kernel is given to `seen`.
    """

    def getitem(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            constants = compiled.src.constants
            named = {kernel.arg_names[k[0]]: v for k, v in constants.items() if len(k) == 1}
            seen(compiled, named)

        return launch

    amd = target.startswith("gfx")
    digits = target.removeprefix("gfx" if amd else "sm_")  # gfx942 is 9.4 with a step of 2
    capability = (int(digits[0]), int(digits[1])) if amd else divmod(int(digits), 10)
    properties = SimpleNamespace(
        name=f"pretended {target}", major=capability[0], minor=capability[1],
        multi_processor_count=132, total_memory=80 * 2**30, warp_size=32,
        shared_memory_per_block_optin=227 * 1024, L2_cache_size=50 * 2**20,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "current_device": lambda: 0,
        "device": lambda *_: nullcontext(),
    }
    triton.runtime.driver.set_active(_Driver(target))  # pyright: ignore
    with (
        mock.patch.object(torch.version, "hip", "pretended" if amd else None),
        mock.patch.multiple(torch.cuda, **answers),
        mock.patch.object(JITFunction, "__getitem__", getitem),
        GpuMode(),
    ):
        yield
