"""Which promises hold? Pass or fail, from the figures of a record.

They are stated for the headline shape (N 1024, V 65,536, Ds 896, Dt 2048; CE + forward KL, forward
and backward, student head trained) and for what ``backend="auto"`` chooses on the machine; on a CPU
also for the eager backend, which a machine without a compiler gets, at `shapes.fallback`. A GPU has
targets of its own, at the shapes of LLaVA-KD's main pair (`shapes.gpu_headline`), for which other
backends are judged too where they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.methods import EAGER, MAIN_GRAD
from benchmarks.shapes import PROMISED, Case, fallback, gpu_headline, headline

#: Time over the matrix products alone, at most.
OVER_FLOOR = 1.15
#: Times faster than eager PyTorch, at least.
TIMES_EAGER = {"fp32": 1.35, "bf16": 1.8}
#: Extra memory as a share of eager PyTorch's, at most.
MEMORY_SHARE = 1 / 3
#: The eager backend's speed as a share of eager PyTorch's, at least; its extra memory, at most.
FALLBACK = 0.9
FALLBACK_MEMORY = 2 / 3

#: On a GPU: time over the matrix products alone, at most, with forward KL and with JSD; extra
#: memory, at most; both where the head's gradient goes straight into a `main_grad`; the relation
#: loss, times faster than eager PyTorch through the logits, at least.
GPU_OVER_FLOOR = 1.3
GPU_OVER_FLOOR_JSD = 1.5
GPU_MEMORY_GIB = 1.75
GPU_OVER_FLOOR_ADDED = 1.5
GPU_MEMORY_GIB_ADDED = 0.6
GPU_RELATION = 20.0

Target = dict[str, Any]
Find = Callable[[str, str, Case], float | None]  # a figure, by its name, of a method, of a case

#: The sections that figures are in.
_SECTION = {"over_floor": "speed", "times_eager": "speed", "extra_bytes": "memory"}


def judge(record: dict[str, Any], method: str) -> list[Target]:
    """Every promise, judged for the method key `method`: the promise in words, the figure in words,
    and whether it holds, None where this run did not measure it.
    """
    gpu = record["machine"].get("gpu")
    judged = partial(_judged, record, _gpu if gpu else _cpu)
    others = [key for key in ("mk-triton", "mk-cuda") if gpu and key != method]
    return judged(method) + [
        target | {"promise": f"{key[3:]} backend, {target['promise']}"}
        for key in others for target in judged(key) if target["holds"] is not None
    ]  # fmt: skip


def _judged(record: dict[str, Any], by: Callable[[Find, str], Any], method: str) -> list[Target]:
    accuracy = (_accuracy(record.get("accuracy", []), method, dtype) for dtype in PROMISED)
    return [*by(partial(figure, record), method), *accuracy]


def figure(record: dict[str, Any], name: str, method: str, case: Case) -> float | None:
    """What the record has of a case, or of what there was time for of it."""
    rows = (row for row in record.get(_SECTION[name], []) if row["method"] == method)
    return next((row.get(name) for row in rows if Case(**row["case"]).made_of(case)), None)


def _cpu(find: Find, method: str) -> Iterator[Target]:
    def share(method: str, case: Case) -> float | None:
        mine, eager = (find("extra_bytes", key, case) for key in (method, EAGER.key))
        return mine / eager if mine is not None and eager else None

    for dtype in PROMISED:
        case, without = headline(dtype), fallback(dtype)
        yield _target(
            f"{dtype}: at most {OVER_FLOOR:.2f}x the time of the matrix products alone",
            find("over_floor", method, case), "{:.2f}x", most=OVER_FLOOR,
        )  # fmt: skip
        yield _target(
            f"{dtype}: at least {TIMES_EAGER[dtype]:.2f}x faster than eager PyTorch",
            find("times_eager", method, case), "{:.2f}x", least=TIMES_EAGER[dtype],
        )  # fmt: skip
        yield _target(
            f"{dtype}: extra memory at most 1/3 of eager PyTorch's",
            share(method, case), "{:.0%} of it", most=MEMORY_SHARE,
        )  # fmt: skip
        yield _target(
            f"{dtype}: without a compiler at least {FALLBACK:.1f}x of eager PyTorch's speed",
            find("times_eager", "mk-eager", without), "{:.2f}x", least=FALLBACK,
        )  # fmt: skip
        yield _target(
            f"{dtype}: without a compiler extra memory at most 2/3 of eager PyTorch's",
            share("mk-eager", without), "{:.0%} of it", most=FALLBACK_MEMORY,
        )  # fmt: skip


def _gpu(find: Find, method: str) -> Iterator[Target]:
    trained, frozen, jsd, relation = gpu_headline()
    added = MAIN_GRAD[method].key
    for name, key, case, most in (
        ("trained head", method, trained, GPU_OVER_FLOOR),
        ("frozen head", method, frozen, GPU_OVER_FLOOR),
        ("trained head, JSD", method, jsd, GPU_OVER_FLOOR_JSD),
        ("trained head into main_grad", added, trained, GPU_OVER_FLOOR_ADDED),
    ):
        promise = f"{name}: at most {most:.2f}x the time of the matrix products alone"
        yield _target(promise, find("over_floor", key, case), "{:.2f}x", most=most)
    for name, key, most in (
        ("trained head", method, GPU_MEMORY_GIB),
        ("trained head into main_grad", added, GPU_MEMORY_GIB_ADDED),
    ):
        promise, extra = f"{name}: at most {most} GiB beyond", find("extra_bytes", key, trained)
        yield _target(
            f"{promise} inputs and gradients", extra and extra / 2**30, "{:.2f} GiB", most=most
        )
    yield _target(
        f"relation of 8 images: at least {GPU_RELATION:.0f}x faster than eager PyTorch",
        find("times_eager", method, relation), "{:.1f}x", least=GPU_RELATION,
    )  # fmt: skip


def _accuracy(rows: list[dict[str, Any]], method: str, dtype: str) -> Target:
    """The largest share of the limit, NaN if any is: a rung without a figure fails."""
    limit = "0.3%" if dtype == "bf16" else "3e-6/ε"
    mine = [r for r in rows if r["method"] == method and r["case"]["dtype"] == dtype]
    shares = [r["gradient"] / r["contract"] if "gradient" in r else math.nan for r in mine]
    return _target(
        f"{dtype}: gradient error at most {limit} on every rung of the ladder",
        max(shares, key=lambda x: (x != x, x)) if shares else None,
        "worst rung at {:.0%} of the limit", most=1,
    )  # fmt: skip


def _target(
    promise: str, value: float | None, words: str, least: float = -math.inf, most: float = math.inf
) -> Target:
    if value is None:
        return {"promise": promise, "found": "not measured", "holds": None}
    return {"promise": promise, "found": words.format(value), "holds": least <= value <= most}
