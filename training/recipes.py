"""Complete configurations, as functions: LLaVA-KD at its published sizes.

They give what the papers and scripts state (arXiv 2410.16236; stages, rates and batch sizes from
the LLaVA-KD scripts) and leave the paths to the caller: `python -m training run --recipe
llava_kd_student --set ...`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from training.config import Config, StageConfig


def llava_kd_teacher() -> Config:
    """The teacher's two stages, LLaVA's own: captions at 1e-3, then instructions at 2e-5."""
    return Config(out="runs/llava_kd_teacher", stages=("pt", "sft"), precision="bf16")


def llava_kd_student() -> Config:
    """The student's three stages, DPT → SFT → DFT, with the paper's weights 1, 1, 0.5."""
    stage = partial(StageConfig, micro_batch=1)
    return Config(
        out="runs/llava_kd_student",
        stages=("dpt", "sft", "dft"),
        precision="bf16",
        grad_checkpointing=True,
        dpt=stage(batch_size=256, lr=1e-3),
        sft=stage(batch_size=128, lr=2e-5),
        dft=stage(batch_size=128, lr=2e-5),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "llava_kd_teacher": llava_kd_teacher,
    "llava_kd_student": llava_kd_student,
}
