"""How is a figure kept from what ran before it? Each in a process of its own.

Children are forked from a server that has imported everything and done nothing: importing PyTorch
anew for each would be half of a run. No thread pool exists yet when they are forked.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any


def in_child(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `function` returns in a fresh process; a status and a reason where it could not."""
    pool = ProcessPoolExecutor(1, mp_context=_context())
    try:
        return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        return {"status": "failed", "reason": "the child process was killed: out of memory?"}
    except Exception as error:  # other people's code: whatever it raises becomes a row
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    finally:
        pool.shutdown()


@lru_cache(maxsize=1)
def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory", "benchmarks.step"])
    return context
