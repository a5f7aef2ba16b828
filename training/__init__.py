"""A thin trainer for LLaVA-style models: any method's stages, on any pair of models, and the demo.

Read in the order of the flow: `config` (what can be set) → `data` (what is read) → `models` (what
is trained) → `trainer` (steps, logs, checkpoints) → `loop` (stage after stage) → `evaluation` (what
was learned). What is minimised says a method, `mllmkd_kernels.methods`. `python -m training --help`
is the one entry point.
"""

from __future__ import annotations

from collections.abc import Sequence

from mllmkd_kernels.methods import Stage


def main(stages: Sequence[Stage] | None = None, arguments: Sequence[str] | None = None) -> None:
    """`python -m training`, or for a method of one's own: the last line of the file that has it.

    Args:
        stages: the method's table; None: the shipped methods.
        arguments: of the command line, default those of the process.

    Raises:
        SystemExit: always, with the exit status, or with what has to be installed.
    """
    try:
        from training import cli
    except ModuleNotFoundError as error:
        needs = 'the trainer needs `pip install --no-build-isolation -e ".[train]"`'
        raise SystemExit(f"{error}: {needs}") from None
    raise SystemExit(cli.main(arguments, None if stages is None else tuple(stages)))
