"""How is the C++ extension built? Metadata is in pyproject.toml; this adds `mllmkd_kernels._C`.

Each instruction set is compiled from its own file with its own flags, and chosen when the program
runs. CUDA kernels are added where torch is built for CUDA and nvcc is there; if they do not
compile, the extension is built without them. Environment: ``MLLMKD_NO_EXT=1`` leaves the extension
out, ``MLLMKD_NO_CUDA=1`` only the CUDA kernels, ``MLLMKD_REQUIRE_EXT=1`` makes a failed build an
error, ``DEBUG=1`` builds without optimisation.
"""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).parent
COMMON = [
    "-std=c++20",
    "-DAT_PER_OPERATOR_HEADERS",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wno-unknown-pragmas",
]
#: at::vec's intrinsics leave lanes undefined on purpose, and GCC 12 takes that for a mistake.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
#: file → (CPU_CAPABILITY of at::vec, flags)
PER_FILE = {
    "kernels_default.cpp": ("DEFAULT", []),
    "kernels_avx2.cpp": ("AVX2", AVX2),
    "kernels_avx512.cpp": ("AVX512", AVX512),
    "product_avx512_bf16.cpp": ("AVX512", [*AVX512, "-mavx512bf16"]),
}


#: `nvcc_flags` and what it is for; run as a file, since the package cannot be imported yet.
NVCC = runpy.run_path(str(ROOT / "mllmkd_kernels" / "backends" / "nvcc.py"))


def on_x86() -> bool:
    """Is the target x86-64? Elsewhere only the portable kernels are built."""
    return platform.machine().lower() in {"x86_64", "amd64"}


def flags_of(source: str) -> list[str]:
    """The flags that one instruction set's file adds to the common ones."""
    capability, flags = PER_FILE[Path(source).name]
    defines = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    if capability != "DEFAULT":
        defines.append(f"-DHAVE_{capability}_CPU_DEFINITION")
    return [*defines, *flags, *QUIET]


def extension_arguments() -> dict:
    """`ext_modules` and `cmdclass` for setup(); nothing where the extension is not wanted, or not
    possible.
    """
    if os.environ.get("MLLMKD_NO_EXT") == "1":
        print(
            "mllmkd_kernels: MLLMKD_NO_EXT=1, installing without C++ kernels (eager backend only)"
        )
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        return unavailable(
            f"torch cannot be imported while building ({error}); use --no-build-isolation"
        )
    reason = why_no_cuda(cpp_extension)
    if reason:
        print(f"mllmkd_kernels: building without CUDA kernels: {reason}")
    extension = make_extension(cpp_extension, cuda=not reason)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build_command(cpp_extension)}}


def make_extension(cpp_extension: ModuleType, cuda: bool) -> Extension:
    """`mllmkd_kernels._C`, with or without the CUDA kernels."""
    optimise = ["-O0", "-g"] if os.environ.get("DEBUG") == "1" else ["-O3", "-g0"]
    flags = [*COMMON, *optimise, "-fopenmp"]
    sources = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    if not on_x86():
        sources = [s for s in sources if s.name not in PER_FILE or s.name == "kernels_default.cpp"]
    cxx = [*flags, f'-DMLLMKD_CXX_FLAGS="{" ".join(flags)}"']
    headers = [h for kind in ("*.h", "*.cuh") for h in (ROOT / "csrc").rglob(kind)]
    common = {
        "extra_link_args": ["-fopenmp"],
        "depends": [str(h.relative_to(ROOT)) for h in headers],
    }
    if not cuda:
        paths = [str(s.relative_to(ROOT)) for s in sources]
        return cpp_extension.CppExtension(
            "mllmkd_kernels._C", paths, extra_compile_args=cxx, **common
        )
    sources += [s for kind in ("*.cpp", "*.cu") for s in sorted((ROOT / "csrc/cuda").glob(kind))]
    nvcc = NVCC["nvcc_flags"](*known_architectures(cpp_extension.CUDA_HOME))
    return cpp_extension.CUDAExtension(
        "mllmkd_kernels._C",
        [str(s.relative_to(ROOT)) for s in sources],
        define_macros=[("MLLMKD_CUDA", None)],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        **common,
    )


def why_no_cuda(cpp_extension: ModuleType) -> str:
    """Why the CUDA kernels are not built; empty if they are."""
    import torch

    if os.environ.get("MLLMKD_NO_CUDA") == "1":
        return "MLLMKD_NO_CUDA=1"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    home = cpp_extension.CUDA_HOME
    if home is None or not Path(home, "bin", "nvcc").exists():
        return "no nvcc was found; set CUDA_HOME to a CUDA toolkit"
    if not known_architectures(home):
        return f"the nvcc of {home} is too old for sm_90a"
    return ""


def known_architectures(cuda_home: str) -> list[str]:
    """Which of the architectures that the kernels are for does this nvcc know?"""
    command = [str(Path(cuda_home, "bin", "nvcc")), "--list-gpu-code"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout.split()
    # "90a" is 90 with what only that GPU has: not listed on its own
    return [a for a in NVCC["ARCHITECTURES"] if f"sm_{a.rstrip('a')}" in listed]


def build_command(cpp_extension: ModuleType) -> type:
    """A build_ext with flags per file, for which a missing compiler is not the end."""

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if isinstance(self.extensions[0].extra_compile_args, dict):
                    self.build_without_cuda(error)
                else:
                    unavailable(last_line(error))
                    self.extensions = []

        def build_without_cuda(self, error: Exception) -> None:
            """The CPU kernels do not pay for a CUDA toolkit that does not fit. The extension keeps
            what setuptools has noted on it.
            """
            print(f"mllmkd_kernels: CUDA kernels not built: {last_line(error)}", file=sys.stderr)
            vars(self.extensions[0]).update(vars(make_extension(cpp_extension, cuda=False)))
            self.build_extensions()

        def build_extension(self, ext: Extension) -> None:
            """Files with flags of their own first; setuptools compiles the rest and links."""
            flags: Any = ext.extra_compile_args
            cxx = flags["cxx"] if isinstance(flags, dict) else flags
            for source in [s for s in ext.sources if Path(s).name in PER_FILE]:
                ext.sources.remove(source)
                ext.extra_objects += self.compiler.compile(
                    [source],
                    output_dir=str(Path(self.build_temp, Path(source).stem)),
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*cxx, *flags_of(source)],
                    depends=ext.depends,
                )
            super().build_extension(ext)

    return Build


def last_line(error: Exception) -> str:
    """What an error says at its end, which is where compilers and ninja say it."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def unavailable(reason: str) -> dict:
    """Say once why there are no C++ kernels; an error where they are required."""
    if os.environ.get("MLLMKD_REQUIRE_EXT") == "1":
        raise SystemExit(f"mllmkd_kernels: the C++ kernels were not built: {reason}")
    print(
        f"mllmkd_kernels: C++ kernels not built, the eager backend will be used: {reason}",
        file=sys.stderr,
    )
    return {}


if __name__ == "__main__":
    setup(**extension_arguments())
