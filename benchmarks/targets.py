"""Which promises hold? Pass or fail, from the figures of a record.

They are stated for the headline shape (N 1024, V 65,536, Ds 896, Dt 2048; CE + forward KL, forward
and backward, student head trained) and for what ``backend="auto"`` chooses on the machine; on a CPU
also for the eager backend, which a machine without a compiler gets, at `shapes.fallback`. A GPU has
targets of its own, at the shapes of LLaVA-KD's main pair (`shapes.gpu_headline`), of which other
backends are judged too where they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
Rows = list[dict[str, Any]]


def judge(record: dict[str, Any], method: str) -> list[Target]:
    """Every promise, judged for the method key `method`: the promise in words, the figure in words,
    and whether it holds, None where this run did not measure it.
    """
    speed, memory, rungs = (record.get(name, []) for name in ("speed", "memory", "accuracy"))

    def judged(by: Callable[[Rows, Rows, str], list[Target]], method: str) -> list[Target]:
        accuracy = [_accuracy(rungs, method, dtype) for dtype in PROMISED]
        return [*by(speed, memory, method), *accuracy]

    if not record["machine"].get("gpu"):
        return judged(_cpu, method)
    others = [
        target | {"promise": f"{key[3:]} backend, {target['promise']}"}
        for key in ("mk-triton", "mk-cuda") if key != method
        for target in judged(_gpu, key) if target["holds"] is not None
    ]  # fmt: skip
    return [*judged(_gpu, method), *others]


def _cpu(speed: Rows, memory: Rows, method: str) -> list[Target]:
    found = []
    for dtype in PROMISED:
        ours, without = (
            _row(speed, *of) for of in ((method, headline(dtype)), ("mk-eager", fallback(dtype)))
        )
        share = _memory_share(memory, method, headline(dtype))
        share_without = _memory_share(memory, "mk-eager", fallback(dtype))
        found += [
            _target(
                f"{dtype}: at most {OVER_FLOOR:.2f}x the time of the matrix products alone",
                ours.get("over_floor"), "{:.2f}x", most=OVER_FLOOR,
            ),
            _target(
                f"{dtype}: at least {TIMES_EAGER[dtype]:.2f}x faster than eager PyTorch",
                ours.get("times_eager"), "{:.2f}x", least=TIMES_EAGER[dtype],
            ),
            _target(
                f"{dtype}: extra memory at most 1/3 of eager PyTorch's",
                share, "{:.0%} of it", most=MEMORY_SHARE,
            ),
            _target(
                f"{dtype}: without a compiler at least {FALLBACK:.1f}x of eager PyTorch's speed",
                without.get("times_eager"), "{:.2f}x", least=FALLBACK,
            ),
            _target(
                f"{dtype}: without a compiler extra memory at most 2/3 of eager PyTorch's",
                share_without, "{:.0%} of it", most=FALLBACK_MEMORY,
            ),
        ]  # fmt: skip
    return found


def _gpu(speed: Rows, memory: Rows, method: str) -> list[Target]:
    trained, frozen, jsd, relation = gpu_headline()
    added = MAIN_GRAD[method].key
    floors = [
        _target(
            f"{name}: at most {most:.2f}x the time of the matrix products alone",
            _row(speed, key, case).get("over_floor"), "{:.2f}x", most=most,
        )
        for name, key, case, most in (
            ("trained head", method, trained, GPU_OVER_FLOOR),
            ("frozen head", method, frozen, GPU_OVER_FLOOR),
            ("trained head, JSD", method, jsd, GPU_OVER_FLOOR_JSD),
            ("trained head into main_grad", added, trained, GPU_OVER_FLOOR_ADDED),
        )
    ]  # fmt: skip
    sizes = [
        _target(
            f"{name}: at most {most} GiB beyond inputs and gradients",
            (extra := _row(memory, key, trained).get("extra_bytes")) and extra / 2**30,
            "{:.2f} GiB", most=most,
        )
        for name, key, most in (
            ("trained head", method, GPU_MEMORY_GIB),
            ("trained head into main_grad", added, GPU_MEMORY_GIB_ADDED),
        )
    ]  # fmt: skip
    return [
        *floors,
        *sizes,
        _target(
            f"relation of 8 images: at least {GPU_RELATION:.0f}x faster than eager PyTorch",
            _row(speed, method, relation).get("times_eager"), "{:.1f}x", least=GPU_RELATION,
        ),
    ]  # fmt: skip


def _memory_share(rows: Rows, method: str, case: Case) -> float | None:
    """Extra memory over eager PyTorch's."""
    mine, eager = (_row(rows, key, case).get("extra_bytes") for key in (method, EAGER.key))
    return mine / eager if mine is not None and eager else None


def _accuracy(rows: Rows, method: str, dtype: str) -> Target:
    """The largest share of the limit, NaN if any is: a rung without a figure fails."""
    limit = "0.3%" if dtype == "bf16" else "3e-6/ε"
    mine = [r for r in rows if r["method"] == method and r["case"]["dtype"] == dtype]
    shares = [r["gradient"] / r["contract"] if "gradient" in r else math.nan for r in mine]
    return _target(
        f"{dtype}: gradient error at most {limit} on every rung of the ladder",
        max(shares, key=lambda x: (x != x, x)) if shares else None,
        "worst rung at {:.0%} of the limit", most=1,
    )  # fmt: skip


def _row(rows: Rows, method: str, case: Case) -> dict[str, Any]:
    mine = (r for r in rows if r["method"] == method and Case(**r["case"]).made_of(case))
    return next(mine, {})


def _target(
    promise: str, value: float | None, words: str, least: float = -math.inf, most: float = math.inf
) -> Target:
    if value is None:
        return {"promise": promise, "found": "not measured", "holds": None}
    return {"promise": promise, "found": words.format(value), "holds": least <= value <= most}
