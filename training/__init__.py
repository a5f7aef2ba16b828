"""A thin trainer for LLaVA-style models: any method's stages, on any pair of models, and the demo.

Read in the order of the flow: `config` (what can be set) → `data` (what is read) → `models` (what
is trained) → `trainer` (steps, logs, checkpoints) → `loop` (stage after stage) → `evaluation` (what
was learned). What is minimised says a method, `mllmkd_kernels.methods`. `python -m training --help`
is the one entry point.
"""

from __future__ import annotations

from collections.abc import Sequence

from mllmkd_kernels.methods import Stage


def main(stages: Sequence[Stage], arguments: Sequence[str] | None = None) -> None:
    """`python -m training` for a method of one's own: the last line of the file that has it.

    Args:
        stages: the method's table.
        arguments: of the command line, default those of the process.

    Raises:
        SystemExit: always, with the exit status.
    """
    from training import cli

    raise SystemExit(cli.main(arguments, tuple(stages)))
