"""With which flags are the CUDA sources compiled? Read by setup.py and by checks without a GPU.

Nothing is imported here: setup.py runs this file before the package can be imported.
"""

#: What the cluster kernel is compiled for, as nvcc names it.
ARCHITECTURES = ("90a", "100")

#: The compute capabilities of the GPUs on which that code runs: (major, None) stands for any minor.
CAPABILITIES = ((9, 0), (10, None))


def nvcc_flags(*architectures: str) -> list[str]:
    """Flags of nvcc for csrc/cuda/*.cu, with native code for each architecture, such as "90a"."""
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo"]
    for arch in architectures:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    return flags
