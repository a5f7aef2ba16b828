"""Do the CUDA sources compile, and into what? Each file for each architecture, with the flags that
setup.py uses, against the headers of the installed torch (the CPU wheel has them too). Nothing is
linked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from tests.gpu.resources import Row, machine_code, of_ptxas

ROOT = Path(__file__).parents[2]


def compile_all(folder: Path) -> tuple[list[Row], list[str], list[str]]:
    """(rows, notes, errors) of ``csrc/cuda/*.cu``; objects go to `folder`."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    nvcc = _nvcc()
    if not sources:
        return [], ["there are no CUDA sources"], []
    if nvcc is None:
        return [], ["nvcc is not here: the CUDA sources were not compiled"], []
    from mllmkd_kernels.backends.nvcc import ARCHITECTURES, nvcc_flags

    folder.mkdir(parents=True, exist_ok=True)
    rows, errors = [], []
    for source in sources:
        for arch in ARCHITECTURES:
            target = folder / f"{source.stem}-{arch}.o"
            command = [nvcc, "-c", str(source), "-o", str(target), *nvcc_flags(arch), *_headers()]
            done = subprocess.run(
                [*command, "-Xptxas", "-v"], capture_output=True, text=True, cwd=ROOT
            )
            if done.returncode:
                errors.append(f"{source.name} for sm_{arch}: {done.stderr.strip()[-2000:]}")
                continue
            found = of_ptxas(done.stderr)
            if not found:
                errors.append(f"{source.name} for sm_{arch}: ptxas reported no kernel")
            names = _plain([str(row["kernel"]) for row in found])
            code = machine_code(target)
            for row, name in zip(found, names, strict=True):
                kernel, _, constants = name.partition("<")
                config = constants.rsplit(">", 1)[0].replace("(anonymous namespace)::", "")
                fields = {**row, "kernel": kernel.split("::")[-1].split("(")[0]}
                fields["instructions"] = code[str(row["kernel"])].instructions
                rows.append(
                    Row(
                        call=source.name, config=config, compiler=f"nvcc {_version(nvcc)}", **fields
                    )
                )
    return rows, [], errors


def _headers() -> list[str]:
    """Where torch's headers and Python's are."""
    from torch.utils import cpp_extension

    places = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    return [word for place in places for word in ("-isystem", place)]


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    inside = Path(home) / "bin" / "nvcc" if home else None
    return str(inside) if inside is not None and inside.exists() else shutil.which("nvcc")


def _version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return text.split("release ")[1].split(",")[0] if "release " in text else "of unknown version"


def _plain(names: list[str]) -> list[str]:
    """C++ names as written; mangled ones where there is no c++filt."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool, *names], capture_output=True, text=True)
    plain = done.stdout.splitlines()
    return plain if len(plain) == len(names) else names
