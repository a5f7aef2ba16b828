"""How does a test run on several processes? `on_ranks` starts them once, each calls a function of a
module by name, and what they return comes back in the order of the ranks.

Starting a process costs seconds (it imports torch), so a test file starts one pair and runs all its
cases inside. The ranks meet through a file, never a port, and talk over gloo.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.multiprocessing.spawn import spawn

#: A rank that waits longer for the others has lost them: it fails instead of hanging.
PATIENCE = timedelta(seconds=120)


def on_ranks(ranks: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`work(*arguments)` on every rank, a module's function with a process group around it."""
    spawn(_rank, (ranks, work, str(folder), arguments), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def pretend_fsdp() -> None:
    """accelerate offers FSDP on accelerators alone; what it then does, gloo can do."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ["ACCELERATE_USE_FSDP"] = "true"


def _rank(
    rank: int, ranks: int, work: Callable[..., Any], folder: str, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, PATIENCE, world_size=ranks, rank=rank)
    try:
        torch.save(work(*arguments), f"{folder}/{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
