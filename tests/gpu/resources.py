"""What does a compiled kernel take of the machine? Registers, stack, shared memory, instructions.

Registers and stack are ``cuobjdump``'s, which Triton brings along; the instructions are looked for
in the PTX. A stack alone is no spill (arrays that are indexed live there), so stores to it are
counted in the machine code.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Shared memory that one block may ask for, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

#: What stands in PTX → what it is called in the table, the newest first.
MATRIX_INSTRUCTIONS = {
    "tcgen05.mma": "tcgen05",
    "wgmma.mma_async": "wgmma",
    "mma.sync": "mma.sync",
}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        kernel, call, config: function, the call that needs it, constants and options.
        arch: 10 · major + minor.
        compiler: "triton 3.9.0" or "nvcc 13.0".
        registers, stack, shared: per thread, bytes per thread, bytes per block.
        spills: stores of registers to the stack, in instructions (Triton) or bytes (nvcc).
        matrix: "tcgen05", "wgmma", "mma.sync" or "-".
        tma: whether the tensor memory accelerator loads.
        needs: which of "wgmma" and "tma" it must have on sm_90.
    """

    kernel: str
    call: str
    config: str
    arch: int
    compiler: str
    registers: int
    stack: int
    shared: int
    spills: int
    matrix: str = "-"
    tma: bool = False
    needs: tuple[str, ...] = ()

    def faults(self) -> list[str]:
        """Why this row fails the check; nothing where it passes."""
        found = []
        if self.spills and self.arch >= 90:
            found.append(f"spills ({self.spills})")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} B of shared memory of {SHARED_LIMIT[self.arch]}")
        if self.arch == 90 and "wgmma" in self.needs and self.matrix != "wgmma":
            found.append(f"no wgmma ({self.matrix})")
        if self.arch == 90 and "tma" in self.needs and not self.tma:
            found.append("no TMA")
        return found


def of_triton(compiled: Any, arch: int) -> dict[str, Any]:
    """Figures of a `triton.compiler.CompiledKernel`, as fields of a `Row`."""
    ptx = compiled.asm["ptx"]
    usage, spills = _of_cubin(compiled.asm["cubin"])
    matrix = next((name for text, name in MATRIX_INSTRUCTIONS.items() if text in ptx), "-")
    return {
        "arch": arch,
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": compiled.metadata.shared + usage["SHARED"],
        "spills": spills,
        "matrix": matrix,
        "tma": "cp.async.bulk.tensor" in ptx,
    }


def _of_cubin(cubin: bytes) -> tuple[dict[str, int], int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = of_usage(_run(cuobjdump(), "-res-usage", file.name))
        spills = 0
        if usage["STACK"] or usage["LOCAL"]:
            spills = len(re.findall(r"\bSTL\b", _run(cuobjdump(), "-sass", file.name)))
    return usage, spills


def of_usage(text: str) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of ``cuobjdump -res-usage``."""
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    missing = {"REG", "STACK", "SHARED", "LOCAL"} - set(found)
    if missing:
        raise RuntimeError(f"cuobjdump -res-usage: no {', '.join(sorted(missing))} in: {text!r}")
    return found


def of_ptxas(text: str) -> list[dict[str, Any]]:
    """Kernel, architecture and figures of every entry function in ``-Xptxas -v`` output."""
    rows = []
    for part in text.split("Compiling entry function")[1:]:
        name, arch = re.search(r"'([^']+)' for 'sm_(\d+)", part).groups()  # type: ignore
        numbers = {
            "stack": r"(\d+) bytes stack frame",
            "spills": r"(\d+) bytes spill stores",
            "registers": r"Used (\d+) registers",
            "shared": r"(\d+) bytes smem",
        }
        figures = {
            field: int(found.group(1)) if (found := re.search(pattern, part)) else 0
            for field, pattern in numbers.items()
        }
        rows.append({"kernel": name, "arch": int(arch), **figures})
    return rows


def cuobjdump() -> str:
    """The tool in the installed Triton, or the one on PATH."""
    import triton

    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(inside) if inside.exists() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError(f"cuobjdump: neither {inside} nor on PATH")
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr.strip()}")
    return done.stdout
