"""How fast is a GPU? The few rates from which `plan` predicts a time before anything has run.

They are rates that large products and copies reach, not data-sheet peaks. The H100's were measured
(8192³ bf16 product, device-to-device copy); the others scale it by the ratio of the data sheets. A
prediction compares algorithms with each other and with the floor: it is no promise of seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU.

    Attributes:
        name: as `explain` takes it.
        arch: compute capability, 10·major + minor.
        half_flops: FLOP/s of a large bf16 or fp16 product.
        single_flops: FLOP/s of a large fp32 product (no TF32).
        bandwidth: bytes/s of a large copy, read and written bytes both counted.
        multiprocessors: how many blocks run side by side, at least.
        clock: Hz, under load.
    """

    name: str
    arch: int
    half_flops: float
    single_flops: float
    bandwidth: float
    multiprocessors: int
    clock: float

    @property
    def instructions(self) -> float:
        """Of single lanes, a second: four warps of 32 in each multiprocessor, of which kernels that
        compute exponentials start four in five.
        """
        return 0.8 * 128 * self.multiprocessors * self.clock


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80, 250e12, 17e12, 1.7e12, 108, 1.35e9),
        Gpu("h100", 90, 700e12, 50e12, 3.0e12, 132, 1.6e9),
        Gpu("h200", 90, 700e12, 50e12, 4.3e12, 132, 1.6e9),
        Gpu("b200", 100, 1600e12, 60e12, 6.8e12, 148, 1.7e9),
    )
}
#: Where there is no GPU to ask: what a prediction is made for.
DEFAULT = GPUS["h100"]


def named(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        ValueError: unknown name.
    """
    if name not in GPUS:
        raise ValueError(f"gpu: got {name!r}, expected one of {', '.join(GPUS)}")
    return GPUS[name]


def of_device(device: torch.device) -> Gpu:
    """The entry nearest to the GPU of `device`; `DEFAULT` where there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return DEFAULT
    return _present(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=32)
def _present(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    title, arch = properties.name.lower(), 10 * properties.major + properties.minor
    for gpu in GPUS.values():
        if gpu.name in title:
            return gpu
    older = [gpu for gpu in GPUS.values() if gpu.arch <= arch]
    return older[-1] if older else GPUS["a100"]
