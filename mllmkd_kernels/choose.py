"""Which backend? By name, or the one made for the device."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

from mllmkd_kernels.backends import cpu, cuda

BACKENDS = ("eager", "cpu", "triton", "cuda")


def interpreted() -> bool:
    """Do Triton's kernels run in its interpreter, on CPU tensors?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_name(backend: str) -> None:
    """`ValueError` where no backend is called so."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend: got {backend!r}, expected one of 'auto', {', '.join(map(repr, BACKENDS))}"
        )


def choose_backend(
    backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...] = ()
) -> tuple[str, str]:
    """The backend that `backend` ("auto" or a name) means on `device` for operands of `dtypes`, and
    why.

    Raises:
        ValueError: unknown name, or a backend that cannot serve this device or dtype.
        RuntimeError: the backend was asked for by name and is not built or installed.
    """
    check_name(backend)
    if backend == "auto":
        return _default_backend(device, dtypes)
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend: 'cpu' was asked for, but the tensors are on {device}")
        if not cpu.available():
            raise RuntimeError(f"backend: 'cpu' was asked for, but {cpu.why_not()}")
    if backend in ("triton", "cuda"):
        _require_gpu(backend, device, dtypes)
    return backend, "asked for by name"


def _default_backend(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> tuple[str, str]:
    if device.type == "cuda":
        if torch.float64 in dtypes:
            return "eager", "fp64, which the GPU kernels do not have"
        if not _triton_installed():
            return "eager", "Triton is not installed"
        return "triton", f"Triton kernels for {device.type} tensors"
    if device.type != "cpu":
        return "eager", f"the only backend for {device.type} tensors"
    if not cpu.available():
        _say_once(cpu.why_not())
        return "eager", cpu.why_not()
    return "cpu", "C++ kernels for CPU tensors"


@functools.cache
def _say_once(why_not: str) -> None:
    """In a process: pip shows nothing of what a build that succeeds has to say."""
    warnings.warn(
        f"mllmkd_kernels: the eager backend is used for CPU tensors: {why_not} "
        '(backend="eager" chooses it without a word)',
        stacklevel=2,
    )


def _require_gpu(backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    if torch.float64 in dtypes:
        raise ValueError(
            f"backend: {backend!r} has no fp64; 'eager' computes fp64 on {device.type} tensors"
        )
    if not _triton_installed():
        raise RuntimeError(f"backend: {backend!r} was asked for, but Triton is not installed")
    if backend == "cuda" and device.type != "cuda":
        raise ValueError(f"backend: 'cuda' was asked for, but the tensors are on {device}")
    if backend == "cuda" and torch.cuda.is_available() and not cuda.available(device):
        raise RuntimeError(f"backend: 'cuda' was asked for, but {cuda.why_not(device)}")
    if device.type == "cuda":
        return
    if not interpreted():
        raise ValueError(
            f"backend: 'triton' was asked for, but the tensors are on {device}; there Triton has "
            "only its interpreter (TRITON_INTERPRET=1, for tests)"
        )


def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
