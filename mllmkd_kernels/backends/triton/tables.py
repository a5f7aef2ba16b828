"""With which block sizes is a kernel launched? Small tables, one per architecture; no autotuning at
a user's first step.

An entry belongs to a kernel and a class of operands, "half" (bf16, fp16) or "single" (fp32):
matrix-product kernels need other tiles for other element sizes, and a row kernel's operands are
fp32 logits whatever the model's dtype. "half-tma" is "half" loaded through tensor descriptors,
where another tile is better then. Architectures are 10 · major + minor of the compute
capability; an unknown newer one takes the nearest lower table. "hip" stands for AMD's.

``python -m mllmkd_kernels.tune`` writes a file with measured entries for the GPU it ran on, and
entries of that file win over those below. The file is ``tables.json`` in the user's cache folder
(``~/.cache/mllmkd_kernels``), or what the environment variable ``MLLMKD_TABLES`` names; an empty
``MLLMKD_TABLES`` means no file. It is read once per process.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

#: Kernel → class of operands → launch parameters.
Table = dict[str, dict[str, dict[str, int]]]

#: Parameters that may be any positive number; the others are sides of blocks, powers of two.
COUNTS = ("num_stages", "splits")

#: 32-bit registers of a multiprocessor, on every architecture of the tables.
REGISTERS = 65536

#: Architectures with one block of a 16-bit kernel on a multiprocessor, not two: there is too little
#: shared memory (120), or the sums of segments take the registers that accumulators do not (100).
ONE_BLOCK = (100, 120)

#: Changes when a reader of older files would misread newer ones.
SCHEMA = 1


def _matrix(n: int, v: int, d: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d, "num_warps": warps, "num_stages": stages}


def _relation(block: int, k: int, splits: int, warps: int, stages: int) -> dict[str, int]:
    launch = {"block": block, "block_k": k, "splits": splits}
    return launch | {"num_warps": warps, "num_stages": stages}


def _row(block: int, warps: int) -> dict[str, int]:
    return {"BLOCK": block, "num_warps": warps, "num_stages": 1}


# Compiled, not timed: no spills for sm_90 (`make gpu-offline` prints the registers). A thread has
# 255 registers. `values` and `gradient` hold a tile of both models and the terms of a divergence on
# top, and all a second sum in the loop (`heads.SEGMENT`), for which `statistics` takes 165 where 96
# would do: one block has a multiprocessor to itself, as with `gradient`. Loaded by pointers,
# operands may pass through registers (rows of an odd size do): tiles are smaller.
# `rows` takes 2,048 columns: 64 registers for forward KL, so that four blocks share a
# multiprocessor, and two where a divergence needs 87.
_HOPPER: Table = {
    "rows": {"single": _row(2048, 8)},
    "statistics": {
        "half-tma": _matrix(128, 128, 64, 8, 3),
        "half": _matrix(128, 64, 32, 8, 3),
        "single": _matrix(64, 64, 32, 8, 2),
    },
    "values": {
        "half-tma": _matrix(128, 64, 64, 8, 3),
        "half": _matrix(64, 64, 32, 8, 3),
        "single": _matrix(64, 64, 32, 8, 2),
    },
    "gradient": {
        "half-tma": _matrix(128, 128, 64, 8, 3),
        "half": _matrix(128, 64, 32, 8, 3),
        "single": _matrix(64, 64, 32, 8, 2),
    },
    "relation_stats": {"single": _relation(64, 32, 4, 8, 3)},
    "relation_grad": {"single": _relation(64, 16, 4, 8, 3) | {"block_d": 64}},
}

# Compiled, not timed. What comes through pointers goes past registers here, unless the size is odd.
# `values` with JSD and votes, `gradient` of an odd size, and the relation spill unless less of an
# operand is held at once.
_AMPERE: Table = _HOPPER | {
    "statistics": _HOPPER["statistics"] | {"half": _matrix(128, 64, 64, 8, 3)},
    "values": _HOPPER["values"] | {"half": _matrix(128, 64, 32, 8, 4)},
    "gradient": _HOPPER["gradient"] | {"half": _matrix(128, 64, 32, 8, 4)},
    "relation_stats": {"single": _relation(64, 16, 4, 8, 3)},
    "relation_grad": {"single": _relation(64, 16, 4, 8, 3) | {"block_d": 32}},
}

# Compiled, not timed. The accumulator is in tensor memory, the sum of segments is not. What comes
# through pointers passes through more registers.
_BLACKWELL: Table = _HOPPER | {
    "statistics": _HOPPER["statistics"] | {"half": _matrix(64, 64, 32, 8, 3)},
    "gradient": _HOPPER["gradient"] | {"half": _matrix(64, 64, 32, 8, 3)},
}

# Compiled, not timed, for sm_120: 99 KB of shared memory, and no fp64 units to speak of, whose
# emulation takes registers that the relation's tiles then do without.
_CONSUMER: Table = _HOPPER | {
    "relation_stats": {"single": _relation(32, 32, 4, 4, 2)},
    "relation_grad": {"single": _relation(32, 16, 4, 4, 2) | {"block_d": 64}},
}

# Compiled, not timed, for gfx942 and gfx950: wavefronts of 64 lanes, 64 KiB of local memory, no
# descriptors. On gfx950 `gradient` spills with 8 warps, `values` with 128 × 64 as well.
_CDNA: Table = {
    "rows": {"single": _row(2048, 8)},
    "statistics": {"half": _matrix(128, 64, 64, 8, 2), "single": _matrix(64, 64, 32, 8, 2)},
    "values": {"half": _matrix(64, 64, 64, 4, 2), "single": _matrix(64, 64, 32, 8, 2)},
    "gradient": {"half": _matrix(128, 64, 64, 4, 2), "single": _matrix(64, 64, 32, 8, 2)},
    "relation_stats": {"single": _relation(64, 32, 4, 8, 2)},
    "relation_grad": {"single": _relation(64, 16, 4, 8, 2) | {"block_d": 64}},
}

HIP = "hip"
TABLES: dict[int | str, Table] = {
    80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL, 120: _CONSUMER, HIP: _CDNA,
}  # fmt: skip

#: Under Triton's interpreter a block is an array of NumPy and a test has a few dozen rows: blocks
#: this small make every loop run more than once.
INTERPRETER: Table = {
    "rows": {"single": _row(64, 1)},
    "statistics": {kind: _matrix(16, 32, 16, 1, 1) for kind in ("half", "single")},
    "values": {kind: _matrix(16, 32, 16, 1, 1) for kind in ("half", "single")},
    "gradient": {kind: _matrix(16, 32, 16, 1, 1) for kind in ("half", "single")},
    "relation_stats": {"single": _relation(16, 16, 2, 1, 1)},
    "relation_grad": {"single": _relation(16, 16, 2, 1, 1) | {"block_d": 16}},
}


_overrides: dict[str, dict[str, int]] = {}


def launch(
    kernel: str, device: torch.device, dtype: torch.dtype = torch.float32, tma: bool = False
) -> dict[str, int]:
    """Launch parameters of `kernel` on `device` for operands of `dtype`, loaded through tensor
    descriptors or not; the caller's to change.

    Raises:
        ValueError: no such kernel, or a user's table that cannot be read.
    """
    if kernel in _overrides:
        return dict(_overrides[kernel])
    if device.type == "cpu":
        return dict(_entry(INTERPRETER, kernel, dtype, tma))
    return dict(_for_gpu(kernel, dtype, tma, *_gpu(device)))


def bounded(
    parameters: dict[str, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, int]:
    """Launch parameters with a bound on registers that no kernel reaches, for kernels without
    tensor cores (operands of `dtype` fp32) and for all on `ONE_BLOCK`. Left free, ptxas would
    rather spill a few of theirs than miss the number that lets two blocks share a multiprocessor:
    128, with 4 or 5 spilled, where 140 hold everything.
    """
    if device.type != "cuda" or torch.version.hip:
        return dict(parameters)
    if dtype.itemsize == 2 and architecture(_gpu(device)[1]) not in ONE_BLOCK:
        return dict(parameters)
    return {**parameters, "maxnreg": min(255, REGISTERS // (32 * parameters["num_warps"]))}


@contextmanager
def overridden(kernel: str, parameters: dict[str, int]) -> Iterator[None]:
    """Inside, `kernel` is launched with `parameters`, whatever the tables say."""
    before = _overrides.get(kernel)
    _overrides[kernel] = parameters
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


def built_in(
    kernel: str, device: torch.device, dtype: torch.dtype = torch.float32, tma: bool = False
) -> dict[str, int]:
    """As `launch`, whatever a user's table says."""
    if device.type == "cpu":
        return dict(_entry(INTERPRETER, kernel, dtype, tma))
    return dict(_entry(TABLES[architecture(_gpu(device)[1])], kernel, dtype, tma))


def architecture(capability: int | str) -> int | str:
    """The table for a GPU of compute capability 10 · major + minor: the nearest that is not newer;
    `HIP` is its own.

    Raises:
        ValueError: older than every table.
    """
    if isinstance(capability, str):
        return capability
    numbers = [arch for arch in TABLES if isinstance(arch, int)]
    if capability < min(numbers):
        raise ValueError(
            f"device: compute capability {capability / 10:.1f}, the Triton kernels need "
            f"{min(numbers) / 10:.1f} or newer; backend='eager' runs anywhere"
        )
    return max(arch for arch in numbers if arch <= capability)


def every(kernel: str, arch: int | str) -> Iterator[tuple[str, dict[str, int]]]:
    """(class of operands, launch parameters) of every built-in entry: what must compile."""
    for kind, entry in TABLES[architecture(arch)][kernel].items():
        yield kind, dict(entry)


# --- a user's own table ---------------------------------------------------------------------------


def path_of_user_table() -> Path | None:
    """Where the tuner writes and `launch` reads; None where ``MLLMKD_TABLES`` is empty."""
    named = os.environ.get("MLLMKD_TABLES")
    if named is not None:
        return Path(named) if named else None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mllmkd_kernels" / "tables.json"


def read(path: Path) -> dict[str, Table]:
    """GPU name → table of a file that the tuner wrote; nothing where there is no file.

    Raises:
        ValueError: names the file and the field that is wrong.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a table of launch parameters: {error}") from error
    gpus = _mapping(path, "the file", content).get("gpus")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema: expected {SCHEMA}, got {content.get('schema')!r}")
    found: dict[str, Table] = {}
    for gpu, table in _mapping(path, "gpus", gpus).items():
        found[gpu] = {}
        for kernel, kinds in _mapping(path, f"gpus.{gpu}", table).items():
            where = f"gpus.{gpu}.{kernel}"
            found[gpu][kernel] = {
                kind: _checked(path, f"{where}.{kind}", kernel, kind, entry)
                for kind, entry in _mapping(path, where, kinds).items()
            }
    return found


def write(path: Path, gpu: str, table: Table) -> None:
    """Put the entries of `table` for `gpu` into the file, beside those that are there."""
    gpus = read(path)
    for kernel, kinds in table.items():
        gpus.setdefault(gpu, {}).setdefault(kernel, {}).update(kinds)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": SCHEMA, "gpus": gpus}, indent=1) + "\n"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)  # whoever reads meanwhile sees the old file or the new one
    forget()


def forget() -> None:
    """Read the user's table again at the next launch."""
    _for_gpu.cache_clear()


def _mapping(path: Path, field: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {field}: expected an object, got {value!r}")
    return value


def _checked(path: Path, field: str, kernel: str, kind: str, entry: Any) -> dict[str, int]:
    """The entry, if it has exactly the parameters of the built-in one and sane values."""
    like = next((t[kernel][kind] for t in TABLES.values() if kind in t.get(kernel, {})), None)
    if like is None:
        raise ValueError(f"{path}: {field}: no such kernel or class of operands in this version")
    if set(_mapping(path, field, entry)) != set(like):
        raise ValueError(f"{path}: {field}: expected {sorted(like)}, got {sorted(entry)}")
    for name, value in entry.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        power = name in COUNTS or (whole and value & (value - 1) == 0)
        if not whole or not power:
            wanted = "a positive number" if name in COUNTS else "a power of two"
            raise ValueError(f"{path}: {field}.{name}: expected {wanted}, got {value!r}")
    return entry


# --- look-up --------------------------------------------------------------------------------------


def kinds_of(dtype: torch.dtype, tma: bool) -> tuple[str, ...]:
    """The classes of operands that an entry may stand under, the best first."""
    if dtype.itemsize != 2:
        return ("single",)
    return (*(("half-tma",) if tma else ()), "half", "single")


def _find(kinds: dict[str, dict[str, int]], dtype: torch.dtype, tma: bool) -> dict[str, int] | None:
    return next((kinds[kind] for kind in kinds_of(dtype, tma) if kind in kinds), None)


def _entry(table: Table, kernel: str, dtype: torch.dtype, tma: bool) -> dict[str, int]:
    if kernel not in table:
        raise ValueError(f"kernel: got {kernel!r}, expected one of {', '.join(table)}")
    found = _find(table[kernel], dtype, tma)
    assert found is not None, f"{kernel} has no entry for fp32"
    return found


def _gpu(device: torch.device) -> tuple[str, int | str]:
    """Name and compute capability."""
    major, minor = torch.cuda.get_device_capability(device)
    capability = HIP if torch.version.hip else 10 * major + minor
    return torch.cuda.get_device_name(device), capability


@functools.cache
def _for_gpu(
    kernel: str, dtype: torch.dtype, tma: bool, name: str, capability: int | str
) -> dict[str, int]:
    built_in = _entry(TABLES[architecture(capability)], kernel, dtype, tma)
    path = path_of_user_table()
    if path is None:
        return built_in
    table = read(path).get(name, {}).get(kernel, {})
    # What was measured for fp32 says nothing of 16 bits where the built-in table knows both.
    if "half" in TABLES[90][kernel] and dtype.itemsize == 2:
        table = {kind: entry for kind, entry in table.items() if kind != "single"}
    return _find(table, dtype, tma) or built_in
