"""How is a streamed kernel dealt out: to programs, and within one to parts of a tile?

A program takes a block of rows and a range of vocabulary tiles, a *split*. Few blocks of rows leave
a GPU idle unless the vocabulary is split too; what splits find is added in their order.
"""

from __future__ import annotations

import torch
import triton

from mllmkd_kernels.backends.calls import Head
from mllmkd_kernels.backends.triton import tables
from mllmkd_kernels.backends.triton.heads import INTERPRETED

#: Columns of a part of a tile, see `heads.parts_of`: few enough for no divergence to spill. In
#: `gradient` a part is also written, a row of it being a sector of 32 bytes of bf16; with votes
#: half of that, or it spills.
PART_COLUMNS = {"statistics": 16, "values": 8, "gradient": 16, "gradient with votes": 8}

#: Streaming multiprocessors of an H100, assumed where there is no GPU to ask.
PROCESSORS = 132

#: More splits than this balance nothing, and each costs a row of partial sums.
MOST_SPLITS = 64


def launch_of(
    kernel: str, heads: tuple[Head, ...], tma: bool, override: dict[str, int] | None
) -> dict[str, int]:
    """The table's parameters; operands of unequal dtypes are fp32 when they are multiplied."""
    dtypes = {x.dtype for head in heads for x in (head.h, head.w)}
    plain = dtypes.pop() if len(dtypes) == 1 else torch.float32
    device = heads[0].h.device
    use = tables.launch(kernel, device, plain, tma) | (override or {})
    return tables.bounded(use, device, plain)


def parts(kernel: str, launch: dict[str, int]) -> int:
    """How many parts a tile is dealt with in. The interpreter spills nothing, and likes few."""
    return 1 if INTERPRETED.value else max(1, launch["BLOCK_V"] // PART_COLUMNS[kernel])


def processors(device: torch.device) -> int:
    """How many programs run side by side."""
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_count(blocks: int, tiles: int, processors: int) -> int:
    """How many splits of `tiles` vocabulary tiles finish first, when `blocks` row blocks times
    that many programs run in waves; starting a program counts as a quarter of a tile.
    """

    def cost(splits: int) -> float:
        return triton.cdiv(blocks * splits, processors) * (triton.cdiv(tiles, splits) + 0.25)

    return min(range(1, max(1, min(tiles, MOST_SPLITS)) + 1), key=cost)


def splits_of(n: int, vocab: int, device: torch.device, launch: dict[str, int]) -> tuple[int, int]:
    """(splits, tiles of each)."""
    tiles = triton.cdiv(vocab, launch["BLOCK_V"])
    wanted = split_count(triton.cdiv(n, launch["BLOCK_N"]), tiles, processors(device))
    each = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, each), each
