"""Which methods are there? One file each: its equations, its objectives, its stages."""

from mllmkd_kernels.methods import llava_kd, llava_mod, llavadi, moe_llava, on_policy
from mllmkd_kernels.methods.stage import Stage

__all__ = ["Stage", "llava_kd", "llava_mod", "llavadi", "moe_llava", "on_policy"]
