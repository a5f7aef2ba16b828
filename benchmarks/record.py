"""What was measured, where, with which versions? One JSON file a run.

A figure without its machine is worth nothing and one without its commit cannot be repeated, so both
are in the file. Names of people, hosts and folders are not.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mllmkd_kernels as mk
from benchmarks import peers
from benchmarks.shapes import Suite

#: Changes when a reader of older files would misread newer ones.
SCHEMA = 1

RESULTS = Path(__file__).parent / "results"
#: What `all` measures.
SECTIONS = ("speed", "memory", "accuracy", "step")
#: What a published run has at least: `step` is younger than some of them.
REQUIRED = ("speed", "memory", "accuracy")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, memory, versions and commit of this run; the GPU where one is measured."""
    gpu = _gpu() if device == "cuda" else {}
    return gpu | {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mllmkd_kernels": mk.__version__,
        "peers": peers.versions(),
        "commit": _commit(),
    }


def new(suite: Suite, rounds: int, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """A record without figures yet."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "suite": suite.name,
        "rounds": rounds,
        "only": list(only),
        "machine": machine(suite.device),
    }


def file_name(record: dict[str, Any]) -> str:
    """<machine>-<date>.json; a run that is not for publication says what it is."""
    machine = record["machine"]
    slug = re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", machine["cpu"]).lower()).strip("-")
    cores = [] if "gpu" in machine else [f"{machine['cores']}-cores"]
    parts = [slug, *cores, record["date"][:10]]
    if not publishable(record):
        measured = [name for name in SECTIONS if name in record]
        parts += [record["suite"], *(measured if len(measured) < len(SECTIONS) else ())]
        parts += record["only"]
    return "-".join(parts) + ".json"


def publishable(record: dict[str, Any]) -> bool:
    """Every required section and all methods of the full suite, medians of at least five rounds."""
    whole = all(name in record for name in REQUIRED) and not record["only"]
    return whole and record["suite"] in ("cpu", "gpu") and record["rounds"] >= 5


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write the record and return its path; a run of the same day is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(record)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: not a record, or of another schema.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise ValueError(f"{path.name}: expected schema {SCHEMA}, got {found}")
    return record


def newest(folder: Path) -> Path | None:
    """The newest publishable record of a CPU, by the date inside the file; None if there is none.
    That of a GPU has other shapes than the README's table.
    """
    found = [(load(path), path) for path in sorted(folder.glob("*.json"))]
    fit = [(r["date"], path) for r, path in found if publishable(r) and r["suite"] == "cpu"]
    return max(fit)[1] if fit else None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores this process may use, where the system can say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short hash, "+changes" where tracked files differ from it; None outside a checkout."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", *args), cwd=Path(__file__).parent, capture_output=True, text=True
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=10", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
