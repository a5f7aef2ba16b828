"""Where was it measured? A figure without its machine is worth nothing, and one without its commit
cannot be repeated. Names of people, hosts and folders are left out.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mllmkd_kernels as mk


def facts(device: str = "cpu") -> dict[str, Any]:
    """Processor, memory, versions and commit of this run; the GPU where one is measured."""
    here = hasattr(os, "sched_getaffinity")  # cores that this process may use
    return (_gpu() if device == "cuda" else {}) | {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mllmkd_kernels": mk.__version__,
        "commit": _commit(),
    }


def version(package: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "triton": version("triton"),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Short hash, "+changes" where tracked files differ from it; None outside a checkout."""

    def git(*args: str) -> str:
        call = ("git", "-C", str(Path(__file__).parent), *args)
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
