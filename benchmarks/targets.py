"""Which promises hold? Pass or fail, from the figures of a record.

They are stated for the headline shape (N 1024, V 65,536, Ds 896, Dt 2048; CE + forward KL, forward
and backward, student head trained) and for what ``backend="auto"`` chooses on the machine; on a CPU
also for the eager backend, which a machine without a compiler gets, at `shapes.fallback`. A GPU has
targets of its own, at the shapes of LLaVA-KD's main pair (`shapes.gpu_headline`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.methods import EAGER
from benchmarks.shapes import PROMISED, Case, fallback, gpu_headline, headline

#: Time over the matrix products alone, at most.
OVER_FLOOR = 1.15
#: Times faster than eager PyTorch, at least.
TIMES_EAGER = {"fp32": 1.35, "bf16": 1.8}
#: The eager backend's speed as a share of eager PyTorch's, at least.
FALLBACK = 0.9
#: Its extra memory as a share of eager PyTorch's, at most.
FALLBACK_MEMORY = 2 / 3
#: Extra memory as a share of eager PyTorch's, at most.
MEMORY_SHARE = 1 / 3

#: On a GPU: time over the matrix products alone, at most, with forward KL and with JSD; extra
#: memory, at most; the relation loss, times faster than eager PyTorch through the logits, at least.
GPU_OVER_FLOOR = 1.3
GPU_OVER_FLOOR_JSD = 1.5
GPU_MEMORY_GIB = 1.75
GPU_RELATION = 20.0


Target = dict[str, Any]


def judge(record: dict[str, Any], method: str) -> list[Target]:
    """Every promise, judged for the method key `method`: the promise in words, the figure in words,
    and whether it holds, None where this run did not measure it.
    """
    if record["machine"].get("gpu"):
        return _gpu(record, method)
    found = []
    for dtype in PROMISED:
        found += _speed(record.get("speed", []), method, dtype)
        found.append(_memory(record.get("memory", []), method, dtype))
        found.append(_fallback(record.get("speed", []), dtype))
        found.append(_fallback_memory(record.get("memory", []), dtype))
    for dtype in PROMISED:
        found.append(_accuracy(record.get("accuracy", []), method, dtype))
    return found


def _speed(rows: list[dict[str, Any]], method: str, dtype: str) -> list[Target]:
    row = _row(rows, method, headline(dtype))
    least = TIMES_EAGER[dtype]
    return [
        _target(
            f"{dtype}: at most {OVER_FLOOR:.2f}x the time of the matrix products alone",
            row.get("over_floor"), "{:.2f}x", lambda x: x <= OVER_FLOOR,
        ),
        _target(
            f"{dtype}: at least {least:.2f}x faster than eager PyTorch",
            row.get("times_eager"), "{:.2f}x", lambda x: x >= least,
        ),
    ]  # fmt: skip


def _gpu(record: dict[str, Any], method: str) -> list[Target]:
    trained, frozen, jsd, relation = gpu_headline()
    speed, memory = record.get("speed", []), record.get("memory", [])
    extra = _row(memory, method, trained).get("extra_bytes")
    floors = [
        _target(
            f"{name}: at most {most:.2f}x the time of the matrix products alone",
            _row(speed, method, case).get("over_floor"), "{:.2f}x",
            lambda x, most=most: x <= most,
        )
        for name, case, most in (
            ("trained head", trained, GPU_OVER_FLOOR), ("frozen head", frozen, GPU_OVER_FLOOR),
            ("trained head, JSD", jsd, GPU_OVER_FLOOR_JSD),
        )
    ]  # fmt: skip
    return [
        *floors,
        _target(
            f"trained head: at most {GPU_MEMORY_GIB} GiB beyond inputs and gradients",
            None if extra is None else extra / 2**30, "{:.2f} GiB", lambda x: x <= GPU_MEMORY_GIB,
        ),
        _target(
            f"relation of 8 images: at least {GPU_RELATION:.0f}x faster than eager PyTorch",
            _row(speed, method, relation).get("times_eager"), "{:.1f}x",
            lambda x: x >= GPU_RELATION,
        ),
        *(_accuracy(record.get("accuracy", []), method, dtype) for dtype in PROMISED),
    ]  # fmt: skip


def _fallback(rows: list[dict[str, Any]], dtype: str) -> Target:
    return _target(
        f"{dtype}: without a compiler at least {FALLBACK:.1f}x of eager PyTorch's speed",
        _row(rows, "mk-eager", fallback(dtype)).get("times_eager"),
        "{:.2f}x", lambda x: x >= FALLBACK,
    )  # fmt: skip


def _memory(rows: list[dict[str, Any]], method: str, dtype: str) -> Target:
    return _target(
        f"{dtype}: extra memory at most 1/3 of eager PyTorch's",
        _memory_share(rows, method, headline(dtype)),
        "{:.0%} of it", lambda x: x <= MEMORY_SHARE,
    )  # fmt: skip


def _fallback_memory(rows: list[dict[str, Any]], dtype: str) -> Target:
    return _target(
        f"{dtype}: without a compiler extra memory at most 2/3 of eager PyTorch's",
        _memory_share(rows, "mk-eager", fallback(dtype)),
        "{:.0%} of it", lambda x: x <= FALLBACK_MEMORY,
    )  # fmt: skip


def _memory_share(rows: list[dict[str, Any]], method: str, case: Case) -> float | None:
    """Extra memory over eager PyTorch's."""
    mine, eager = (_row(rows, key, case).get("extra_bytes") for key in (method, EAGER.key))
    return mine / eager if mine is not None and eager else None


def _accuracy(rows: list[dict[str, Any]], method: str, dtype: str) -> Target:
    limit = "0.3%" if dtype == "bf16" else "3e-6/ε"
    mine = [r for r in rows if r["method"] == method and r["case"]["dtype"] == dtype]
    shares = [r["gradient"] / r["contract"] if "gradient" in r else float("nan") for r in mine]
    return _target(
        f"{dtype}: gradient error at most {limit} on every rung of the ladder",
        _worst(shares), "worst rung at {:.0%} of the limit", lambda x: x <= 1,
    )  # fmt: skip


def _worst(shares: list[float]) -> float | None:
    """The largest, NaN if any is (a rung without a figure fails), None of nothing."""
    return max(shares, key=lambda x: (x != x, x)) if shares else None


def _row(rows: list[dict[str, Any]], method: str, case: Case) -> dict[str, Any]:
    return next((r for r in rows if r["method"] == method and r["case"] == asdict(case)), {})


def _target(
    promise: str, value: float | None, words: str, holds: Callable[[float], bool]
) -> Target:
    if value is None:
        return {"promise": promise, "found": "not measured", "holds": None}
    return {"promise": promise, "found": words.format(value), "holds": holds(value)}
