"""How is a row kernel run, and what must come out? Triton's, and the CUDA cluster kernel: on a GPU
where there is one that it runs on, and on the CPU by emulation (tests/cuda_emulation), one fiber
per CUDA thread, a few small CTAs.

The emulation proves the logic: which thread does what, what is exchanged when, the formulas. It
proves nothing of the GPU's memory model, of PTX, or of speed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import reference
from mllmkd_kernels.backends import cuda
from tests.problems import DIVERGENCES
from tests.tolerances import check

EMULATION = Path(__file__).parent / "cuda_emulation"

#: The numbers of csrc/cuda/rows.h.
BIAS_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Rows(NamedTuple):
    """What a row kernel is asked, before it overwrites `zs`."""

    zs: Tensor  # (C, V) fp32
    zt: Tensor | None  # (C, V) fp32
    labels: Tensor | None
    ce_weight: Tensor | None
    kd_weight: Tensor | None
    divergence: str = "forward_kl"
    bs: Tensor | None = None  # (≥V,)
    bt: Tensor | None = None
    temperature: float = 1.0
    cap_s: float = 0.0
    cap_t: float = 0.0
    ignore_index: int = -100
    want_dz: bool = True
    dz_bf16: bool = False
    standardize: bool = False

    @property
    def param(self) -> float:
        """Of the divergence."""
        return mk.Divergence(self.divergence).param


class Terms(NamedTuple):
    ce: Tensor  # (C,)
    kd: Tensor  # (C,)
    dz: Tensor  # (C, V); the logits as they were where it was not wanted


Kernel = Callable[..., Terms]


def expected(r: Rows, dtype: torch.dtype = torch.float64) -> Terms:
    """The same by the definitions; in fp32 it is the yardstick of a fair error."""
    leaf = r.zs.to(dtype).clone().requires_grad_()

    def final(z: Tensor, b: Tensor | None, cap: float) -> Tensor:
        eye = torch.eye(z.shape[1], dtype=dtype)  # the identity as a head: z are its logits
        return reference.logits(z, eye, None if b is None else b[: z.shape[1]].to(dtype), cap)

    z_s = final(leaf, r.bs, r.cap_s)
    z_t = None if r.zt is None or r.kd_weight is None else final(r.zt.to(dtype), r.bt, r.cap_t)
    hard, ce, _ = reference.linear_distill(
        z_s, None, None if r.ce_weight is None else r.labels,
        ce_weight=0.0 if r.ce_weight is None else r.ce_weight.to(dtype),
        ignore_index=r.ignore_index,
    )  # fmt: skip
    if r.standardize and z_t is not None:
        z_s, z_t = reference.standardize(z_s), reference.standardize(z_t)
    soft, _, kd = reference.linear_distill(
        z_s, z_t, kd_weight=0.0 if r.kd_weight is None else r.kd_weight.to(dtype),
        divergence=mk.Divergence(r.divergence), temperature=r.temperature,
    )  # fmt: skip
    loss = hard + soft
    (dz,) = torch.autograd.grad(loss, leaf, allow_unused=True) if loss.requires_grad else (None,)
    return Terms(ce.detach(), kd.detach(), torch.zeros_like(leaf) if dz is None else dz)


def compare(kernel: Kernel, r: Rows, **launch: int) -> Terms:
    """Run and check all that comes out."""
    got, want, naive = kernel(r, **launch), expected(r), expected(r, torch.float32)
    check(got.ce, want.ce, "value", naive.ce, cancels=1.0, what="ce")
    check(got.kd, want.kd, "value", naive.kd, cancels=1.0, what="kd")
    row = "16-bit gradient" if r.dz_bf16 else "gradient"
    check(got.dz, want.dz, row, naive.dz, cancels=1.0, what="dz")
    return got


def triton(r: Rows, block: int) -> Terms:
    """A row as one block or several, on copies whose rows lie farther apart than they are long,
    with NaN between.
    """
    from mllmkd_kernels.backends.triton import rows

    device = "cuda" if torch.cuda.is_available() else "cpu"
    r = r._replace(**{k: x.to(device) for k, x in r._asdict().items() if isinstance(x, Tensor)})

    def apart(z: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        if z is None:
            return None
        stride = rows.row_stride(z.shape[1]) + 16
        return z.new_full((z.shape[0], stride), torch.nan, dtype=dtype)[:, : z.shape[1]].copy_(z)

    z_s = apart(r.zs)
    assert z_s is not None
    dz = apart(torch.full_like(z_s, torch.nan), torch.bfloat16) if r.dz_bf16 else z_s
    ce, kd = (torch.zeros(z_s.shape[0], device=device) for _ in range(2))
    rows.row_losses(
        z_s, apart(r.zt), r.bs, r.bt, r.labels, r.ce_weight, r.kd_weight, ce, kd, r.divergence,
        r.param, r.temperature, r.cap_s, r.cap_t, r.ignore_index, dz if r.want_dz else None,
        {"BLOCK": block, "num_warps": 1}, standardize=r.standardize,
    )  # fmt: skip
    if r.dz_bf16:  # nobody asked for it to be overwritten; bits, for NaN is equal to nothing
        assert torch.equal(z_s.view(torch.int32), r.zs.view(torch.int32))
    return Terms(ce.cpu(), kd.cpu(), (dz if r.want_dz and dz is not None else z_s).cpu())


@functools.cache
def library() -> ctypes.CDLL:
    """The CUDA kernel's source compiled for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulation with")
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.so"
        command = ["g++", *flags, f"-I{include}", str(EMULATION / "rows.cpp"), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(target))


def guarded(z: Tensor, pad: bool) -> tuple[Tensor, Tensor]:
    """A copy of z (C, V), if `pad` with rows that start 16 bytes apart or a multiple, and what it
    lies in: a row more before and after it.
    """
    stride = -(-z.shape[1] // 8) * 8 if pad else z.shape[1]
    around = z.new_full((z.shape[0] + 2, stride), 77.0)
    around[1:-1, : z.shape[1]] = z
    return around[1:-1, : z.shape[1]], around


def _place_of_dz(z: Tensor, bf16: bool, pad: bool) -> Tensor:
    """The logits', in both dtypes; without `pad`, where bf16 has a block of its own."""
    if not bf16:
        return z
    inside = z.view(torch.bfloat16)[:, : z.shape[1]]
    return inside if pad else inside.clone(memory_format=torch.contiguous_format)


def broken(z: Tensor | None, cap: float) -> Tensor | None:
    """Whose hidden state was not finite: so is every product of it."""
    return ~z[:, 0].isfinite() if z is not None and cap else None


def emulated(r: Rows, size: int = 2, threads: int = 32, seed: int = 0, pad: bool = True) -> Terms:
    """The cluster kernel on the CPU. Two CTAs of one warp by default: 300 columns are then several
    steps of every loop, and no test waits long for its fibers.
    """
    count, vocab = r.zs.shape
    z, around = guarded(r.zs, pad)
    zt = None if r.zt is None else guarded(r.zt, pad)[0]
    dz = None
    if r.want_dz:
        dz = _place_of_dz(z, r.dz_bf16, pad)
    ce, kd = torch.full((count,), 55.0), torch.full((count,), 55.0)
    teacher = r.zt is not None and r.kd_weight is not None
    token = r.labels is not None and r.ce_weight is not None
    broken_s, broken_t = broken(r.zs, r.cap_s), broken(r.zt, r.cap_t)

    def pointer(x: Tensor | None, used: bool = True) -> ctypes.c_void_p:
        assert x is None or x.stride(-1) == 1
        return ctypes.c_void_p(None if x is None or not used else x.data_ptr())

    def bias_type(b: Tensor | None) -> int:
        return 0 if b is None else BIAS_TYPES[b.dtype]

    function, real = library().emulate_rows, ctypes.c_float
    function.restype = ctypes.c_char_p
    message = function(
        pointer(z), pointer(zt, teacher), pointer(dz), ctypes.c_int64(z.stride(0)),
        ctypes.c_int64(0 if dz is None else dz.stride(0)), pointer(r.bs), pointer(r.bt, teacher),
        bias_type(r.bs), bias_type(r.bt), pointer(r.labels, token), pointer(r.ce_weight, token),
        pointer(r.kd_weight, teacher), pointer(broken_s), pointer(broken_t), pointer(ce),
        pointer(kd), ctypes.c_int64(count), ctypes.c_int64(r.ignore_index), vocab, real(r.param),
        real(1 / r.temperature), real(r.cap_s), real(r.cap_t), ctypes.c_bool(r.dz_bf16),
        ctypes.c_bool(r.standardize and teacher),
        DIVERGENCES.index(r.divergence) if teacher else len(DIVERGENCES),
        size, threads, seed,
    )  # fmt: skip
    assert message is None, message.decode()
    assert (around[0] == 77).all() and (around[-1] == 77).all(), "write beside the rows"
    return Terms(ce, kd, (z if dz is None else dz).clone())


def on_gpu(r: Rows, size: int = 0, threads: int = 0, seed: int = 0, pad: bool = True) -> Terms:
    """The cluster kernel as it is."""
    tensors = {name: x for name, x in r._asdict().items() if isinstance(x, Tensor)}
    tensors |= {name: guarded(tensors[name], pad)[0] for name in ("zs", "zt") if name in tensors}
    r = r._replace(**{name: x.cuda() for name, x in tensors.items()})
    dz = None
    if r.want_dz:
        dz = _place_of_dz(r.zs, r.dz_bf16, pad)
    ce, kd = cuda.rows_(
        r.zs, r.zt, r.bs, r.bt, r.labels, r.ce_weight, r.kd_weight, broken(r.zs, r.cap_s),
        broken(r.zt, r.cap_t), r.divergence, r.param, r.temperature, r.cap_s, r.cap_t,
        r.ignore_index, dz, cluster=size, standardize=r.standardize,
    )  # fmt: skip
    return Terms(ce.cpu(), kd.cpu(), (r.zs if dz is None else dz).cpu())


#: The cluster kernel emulated, and on a GPU where there is one that it runs on.
CLUSTER: dict[str, Kernel] = {"emulated": emulated} | ({"gpu": on_gpu} if cuda.available() else {})

#: And Triton's: 100 columns are 4 blocks of 32, the last one with 4, or one of 128.
ALL: dict[str, Kernel] = CLUSTER | (
    {
        "triton-many-blocks": functools.partial(triton, block=32),
        "triton-one-block": functools.partial(triton, block=128),
    }
    if importlib.util.find_spec("triton") is not None
    else {}
)
