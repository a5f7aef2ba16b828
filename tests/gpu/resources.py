"""What does a compiled kernel take of the machine? Registers, stack, shared memory, instructions.

Registers and stack are ``cuobjdump``'s, which Triton brings along; the matrix instruction is looked
for in the PTX. A stack alone is no spill (arrays that are indexed live there), so stores to it are
counted in the machine code. For AMD's GPUs the compiler's assembly says all of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Targets, and the shared memory that one block may ask for there, bytes.
SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024,
    "gfx942": 64 * 1024, "gfx950": 160 * 1024,
}  # fmt: skip

#: What stands in PTX, or AMD's assembly → what it is called in the table, the newest first.
MATRIX_INSTRUCTIONS = {
    "v_mfma": "mfma",
    "tcgen05.mma": "tcgen05",
    "wgmma.mma_async": "wgmma",
    "mma.sync": "mma.sync",
}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        kernel, call, config: function, the call that needs it, constants and options.
        target: as in `SHARED_LIMIT`.
        compiler: "triton 3.9.0" or "nvcc 13.0".
        instructions: of the machine, in the code: what is in a loop counts once.
        registers, stack, shared: per thread, bytes per thread, bytes per block.
        spills: stores of registers to the stack, in instructions (Triton) or bytes (nvcc).
        matrix: "tcgen05", "wgmma", "mma.sync" or "-".
        tma: whether the tensor memory accelerator loads.
        needs: which of "wgmma" and "tma" it must have on sm_90.
    """

    kernel: str
    call: str
    config: str
    target: str
    compiler: str
    instructions: int
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
        if self.spills:
            found.append(f"spills ({self.spills})")
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared} B of shared memory of {SHARED_LIMIT[self.target]}")
        if self.target == "sm_90" and "wgmma" in self.needs and self.matrix != "wgmma":
            found.append(f"no wgmma ({self.matrix})")
        if self.target == "sm_90" and "tma" in self.needs and not self.tma:
            found.append("no TMA")
        return found


@dataclass(frozen=True)
class Code:
    """Of the machine code of a function: instructions but padding, and stores of spilled ones."""

    instructions: int
    spills: int


def of_triton(compiled: Any) -> dict[str, Any]:
    """Figures of a `triton.compiler.CompiledKernel`, as fields of a `Row`; kept beside Triton's
    cache, where there is one, because reading machine code takes as long as looking it up.
    """
    folder = os.environ.get("TRITON_CACHE_DIR")
    kept = Path(folder) / f"{compiled.hash}.figures.json" if folder else None
    if kept is not None and kept.exists():
        return json.loads(kept.read_text())
    figures = _of_amd(compiled) if "amdgcn" in compiled.asm else _of_nvidia(compiled)
    if kept is not None:
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(figures))
        part.replace(kept)
    return figures


def _of_nvidia(compiled: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = of_usage(_run(cuobjdump(), "-res-usage", file.name))
        (code,) = machine_code(Path(file.name)).values()
    return {
        "instructions": code.instructions,
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": compiled.metadata.shared + usage["SHARED"],
        "spills": code.spills,
        "matrix": _matrix(ptx),
        "tma": "cp.async.bulk.tensor" in ptx,
    }


def _of_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    notes = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)\n", text)}
    return {
        "instructions": len(re.findall(r"^\t[a-z]+_\w+", text, re.MULTILINE)),
        "registers": notes["vgpr_count"],
        "stack": notes["private_segment_fixed_size"],
        "shared": compiled.metadata.shared,
        "spills": notes["vgpr_spill_count"],
        "matrix": _matrix(text),
    }


def _matrix(text: str) -> str:
    return next((name for word, name in MATRIX_INSTRUCTIONS.items() if word in text), "-")


def machine_code(path: Path) -> dict[str, Code]:
    """Function → what its code is made of, of a cubin or an object file."""
    found = {}
    for part in re.split(r"^\s*Function : ", _run(cuobjdump(), "-sass", str(path)), flags=re.M)[1:]:
        words = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?(\w+)", part, re.M)
        words = [word for word in words if word != "NOP"]
        found[part.split()[0]] = Code(len(words), words.count("STL"))
    return found


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
        rows.append({"kernel": name, "target": f"sm_{arch}", **figures})
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
