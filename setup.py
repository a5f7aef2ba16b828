"""How is the C++ extension built? Metadata is in pyproject.toml; this adds `mllmkd_kernels._C`.

Each instruction set is compiled from its own file with its own flags, and chosen when the program
runs. CUDA kernels are added where torch is built for CUDA and nvcc is there; if they do not
compile, the extension is built without them. Where there is no compiler, or no torch to compile
against, the package is built without the extension; where there is, a build that fails is an error.
What was left out and why is noted beside the modules (`NOTE`), for the first call to say.

Environment: ``MLLMKD_NO_EXT=1`` leaves the extension out, ``MLLMKD_NO_CUDA=1`` only the CUDA
kernels, ``MLLMKD_REQUIRE_EXT=1`` makes leaving it out for any other reason an error, ``CXX`` names
the compiler, ``DEBUG=1`` builds without optimisation.
"""

from __future__ import annotations

import json
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
#: What was left out and why, in the package's folder: read by `mllmkd_kernels.backends.cpu`.
NOTE = "_left_out.json"
CXX_KERNELS, CUDA_KERNELS = "C++ kernels", "CUDA kernels"
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


def arguments() -> dict[str, Any]:
    """`ext_modules` and `cmdclass` for setup()."""
    reason = why_no_compiler()
    if not reason:
        try:
            from torch.utils import cpp_extension
        except ImportError as error:
            reason = f"torch could not be imported while building: {error}"
        else:
            return with_extension(cpp_extension)
    command = noting(build_ext, {CXX_KERNELS: reason})
    return {"cmdclass": {"build": Build, "build_ext": command}}


def why_no_compiler() -> str:
    """Why nothing is to be compiled, or nothing can be; empty if it can."""
    if os.environ.get("MLLMKD_NO_EXT") == "1":
        return "MLLMKD_NO_EXT=1 was set while building"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]  # as torch looks for it
    return "" if shutil.which(compiler) else f"no C++ compiler: `{compiler}` was not found"


def required() -> bool:
    """Is it an error to leave the extension out without having been told to?"""
    return os.environ.get("MLLMKD_REQUIRE_EXT") == "1" != os.environ.get("MLLMKD_NO_EXT")


def with_extension(cpp_extension: ModuleType) -> dict[str, Any]:
    """What setup() is told where there is a compiler, and torch."""
    reason = why_no_cuda(cpp_extension)
    extension = make_extension(cpp_extension, cuda=not reason)
    left_out = {CUDA_KERNELS: reason} if reason else {}
    command = noting(compile_command(cpp_extension, left_out), left_out)
    return {"ext_modules": [extension], "cmdclass": {"build": Build, "build_ext": command}}


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


class Build(build):
    """A build from nothing but the sources. What an earlier one left in build/ is not the result of
    this one, and a wheel takes all that lies there; objects in build/temp.* are kept.
    """

    sub_commands: ClassVar = [  # build_ext without an extension too: it notes why there is none
        (name, None if name == "build_ext" else wanted) for name, wanted in build.sub_commands
    ]

    def run(self) -> None:
        if Path(self.build_base) in Path(self.build_lib).parents:  # not what --build-lib names
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def noting(command: type[build_ext], left_out: dict[str, str]) -> type[build_ext]:
    """`command`, that writes down what is left out. An extension that an earlier build left goes
    first: a failed build leaves none rather than one that is out of date, and one that is newer
    than the sources may be of another torch or other flags.
    """

    class Noting(command):
        def run(self) -> None:
            target = Path(ROOT if self.inplace else self.build_lib)
            for place in {target, Path(self.build_lib)}:
                (place / self.get_ext_filename("mllmkd_kernels._C")).unlink(missing_ok=True)
            if CXX_KERNELS in left_out and required():
                raise SystemExit(f"mllmkd_kernels: no {CXX_KERNELS}: {left_out[CXX_KERNELS]}")
            super().run()
            note = target / "mllmkd_kernels" / NOTE
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(left_out) + "\n", encoding="utf-8")
            for part, reason in left_out.items():
                print(f"mllmkd_kernels: built without {part}: {reason}", file=sys.stderr)

    return Noting


def compile_command(cpp_extension: ModuleType, left_out: dict[str, str]) -> type[build_ext]:
    """A build_ext with flags per file. CUDA kernels that do not compile are added to `left_out`."""

    class Compile(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if not isinstance(self.extensions[0].extra_compile_args, dict):
                    raise
                self.build_without_cuda(error)

        def build_without_cuda(self, error: Exception) -> None:
            """The CPU kernels do not pay for a CUDA toolkit that does not fit. The extension keeps
            what setuptools has noted on it.
            """
            left_out[CUDA_KERNELS] = f"they did not compile: {last_line(error)}"
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

    return Compile


def last_line(error: Exception) -> str:
    """What an error says at its end, which is where compilers and ninja say it."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


if __name__ == "__main__":
    if int(setuptools.__version__.split(".")[0]) < 77:  # they fail on the licence, by pages
        raise SystemExit(f"setuptools {setuptools.__version__}: pip install 'setuptools>=77.0.3'")
    setup(**arguments())
