"""How far is a stage, and what was its loss? A `Bar` of its steps, and ``log.jsonl``, one line per
entry of the loss curve, written as training goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from training.bar import Bar
from training.journal import Journal

LOG = "log.jsonl"


class Progress(TrainerCallback):
    """Bar or lines, and ``log.jsonl``.

    Args:
        title: of the stage.
        terms: of the loss, by their names in the log.
        folder: where ``log.jsonl`` goes.
    """

    def __init__(self, title: str, terms: Sequence[str], folder: Path) -> None:
        self.title, self.terms, self.journal = title, terms, Journal(folder / LOG)
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start where the run does, which after a resume is not step 0."""
        first, done = state.is_world_process_zero, state.global_step
        self.bar = Bar(self.title, state.max_steps, "steps", done=done, show=first, leave=True)
        if first:
            self.journal.write(entry for entry in state.log_history if "loss" in entry)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance; the last step is always logged, whatever log_steps."""
        control.should_log |= state.global_step >= state.max_steps
        self.bar.advance(state.global_step - self.bar.done)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest entry of the loss curve, and write it down."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        self.journal.append(state.log_history[-1])
        words = [f"{name} {logs[name]:.3f}" for name in ("loss", *self.terms)]
        rate, peak = logs["tokens_per_second"], logs["peak_gib"]
        self.bar.note = " ".join([*words, f"{rate:,.0f} tok/s", f"{peak:.1f} GiB"])
        if state.global_step >= state.max_steps:
            self.bar.tell()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.__exit__()
