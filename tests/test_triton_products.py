"""Is a tile of logits the product of its operands, and no less so where the hidden size is large?

Under Triton's interpreter, with tiny blocks, a matrix product is given a tensor core's accumulator:
16 columns are added at a time, and what fp32 cannot hold is cut off. On a GPU it has its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import interpreter

from mllmkd_kernels.backends.calls import Head
from mllmkd_kernels.backends.triton import heads, tables
from mllmkd_kernels.backends.triton.heads import product_tile
from tests.tolerances import relative_error


@triton.jit
def product_kernel(h, w, out, n, vocab, D: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """out (BLOCK_N, BLOCK_V): the first tile."""
    z = product_tile(h, w, 0, 0, n, vocab, D, TMA, BLOCK_N, BLOCK_V, BLOCK_D)
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    tl.store(out + rows[:, None] * BLOCK_V + columns[None, :], z)


def product(h: Tensor, w: Tensor, by_descriptors: bool = False) -> Tensor:
    """h Wᵀ of as many rows and tokens as the tile that the tables have for `gradient`."""
    use = tables.launch("gradient", h.device, h.dtype, by_descriptors)
    out = torch.empty(use["BLOCK_N"], use["BLOCK_V"], dtype=torch.float32, device=h.device)
    arguments: list[Any] = [*heads.operands(Head(h, w), by_descriptors, use), out, len(h), len(w)]
    constants = {"D": h.shape[1], "TMA": by_descriptors}
    product_kernel[(1,)](*arguments, **(constants | use))
    return out[: len(h), : len(w)]


def operands(
    n: int, v: int, d: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Rows and tokens whose products have a standard deviation of 2."""
    rng = torch.Generator().manual_seed(d)
    h, w = (torch.randn(rows, d, generator=rng) * (4 / d) ** 0.25 for rows in (n, v))
    return h.to(dtype).to(device), w.to(dtype).to(device)


@pytest.mark.parametrize("by_descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("d", [8, 512, 520, 896, 1088, 1544])
def test_a_tile_is_the_product(
    d: int, dtype: torch.dtype, by_descriptors: bool, device: torch.device
) -> None:
    """Of one block or many, of one segment or many; the last of either may be part of one."""
    if by_descriptors and device.type == "cuda" and dtype == torch.float32:
        pytest.skip("not loaded so on a GPU")
    h, w = operands(5, 7, d, dtype, device)
    assert relative_error(product(h, w, by_descriptors), h.double() @ w.double().T) <= 1e-6


@pytest.mark.parametrize("d", [1024, 2560, 4096])
def test_logits_are_not_too_small_by_what_grows_with_the_hidden_size(
    d: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one sum they would be, by 0.9, 2.4 and 4.3 millionths."""
    if device.type == "cpu":
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _truncated)
    use = tables.launch("gradient", device, torch.bfloat16)
    h, w = operands(use["BLOCK_N"], use["BLOCK_V"], d, torch.bfloat16, device)
    exact = h.double() @ w.double().T
    assert -6e-7 <= float((product(h, w) / exact - 1).median()) <= 0


def _truncated(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    """a @ b + d as a tensor core adds: exactly, then cut off to fp32."""
    import numpy as np

    assert a.data.shape[1] == 16
    exact = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
    near = exact.astype(np.float32)
    cut = np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    return type(d)(cut.astype(np.float32), d.dtype.scalar)


@pytest.mark.parametrize(
    ("d", "block", "length"),
    [
        (512, 64, 512), (513, 64, 320), (896, 64, 448), (1024, 64, 512), (1152, 64, 384),
        (2304, 64, 384), (2560, 32, 512), (3584, 64, 512), (2049, 64, 448), (4096, 1024, 1024),
    ],
)  # fmt: skip
def test_segments_are_whole_blocks_and_leave_little_over(d: int, block: int, length: int) -> None:
    found = heads.segment_of(d, block, heads.SEGMENT.value)
    assert found == length
    assert found == d or (found % block == 0 and found >= 256)


#: Compiles the kernel above for Hopper at two hidden sizes and prints its intermediate code.
_COMPILED = """
import torch
from tests.gpu import pretended
from tests.test_triton_products import product

with pretended.gpu("sm_90", lambda compiled, constants: print(compiled.asm["ttgir"], "=====")):
    for d in (512, 2560):
        h, w = (torch.empty(128, d, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        product(h, w, True)
"""


def test_segments_are_added_within_one_loop_that_loads_ahead() -> None:
    """Not by a loop for each, which would empty the pipeline at its end; and few columns take no
    second accumulator.
    """
    command = [sys.executable, "-W", "ignore", "-c", _COMPILED]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    short, long = done.stdout.split("=====")[:2]
    additions = [
        len(re.findall(r"arith\.addf .*tensor<128x128xf32", code)) for code in (short, long)
    ]
    assert additions == [0, 1]
    for code in (short, long):
        assert code.count("scf.for") == 1 and "pendings = 1" in code
