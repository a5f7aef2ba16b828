"""How far is a run, and when will it be done? A bar in a terminal, a line now and then elsewhere.

`Progress` also keeps the stage's ``log.jsonl``, one line per entry of the loss curve, written as
training goes. The time left of the stage comes from the steps made since this process started; that
of the later stages from the same seconds a sample, so it is only about right: they train other
parameters on other data.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from training.bar import SECONDS_BETWEEN_LINES, clock
from training.journal import Journal
from training.step import TERMS

LOG = "log.jsonl"


@dataclass(frozen=True)
class Place:
    """Where a stage stands in its run; `later` are the stages after it with the samples they
    train on, None where that is not known yet."""

    number: int = 1
    of: int = 1
    later: tuple[tuple[str, int | None], ...] = ()

    def total_left(self, seconds: float, seconds_a_sample: float) -> str:
        """Time left of the run, given that of the stage; stages of unknown length by name."""
        known = sum(samples for _, samples in self.later if samples is not None)
        unknown = [name for name, samples in self.later if samples is None]
        left = f"~{clock(seconds + known * seconds_a_sample)}"
        return " + ".join([left, *unknown])


class Progress(TrainerCallback):
    """Bar or lines, and ``log.jsonl``.

    Args:
        title: of the stage.
        place: where the stage stands.
        folder: where ``log.jsonl`` goes; None: nowhere.
        say: how a line is told where there is no terminal.
        terminal: whether to draw a bar; default: whether stderr is a terminal.
    """

    def __init__(
        self,
        title: str,
        place: Place = Place(),
        folder: Path | None = None,
        say: Callable[[str], None] = print,
        terminal: bool | None = None,
    ) -> None:
        self.title, self.place, self.say = title, place, say
        self.journal = None if folder is None else Journal(folder / LOG)
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.bar: Any = None
        self._start, self._first, self._said = 0.0, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start where the run does, which after a resume is not step 0."""
        self._start, self._first = time.perf_counter(), state.global_step
        if not state.is_world_process_zero:
            return
        if self.journal is not None:
            self.journal.write(entry for entry in state.log_history if "loss" in entry)
        if self.terminal:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.title, unit="step"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance; the last step is always logged, whatever log_steps."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        elif state.is_world_process_zero and not control.should_log and self._due():
            self._tell(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest entry of the loss curve, and write it down."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if self.journal is not None:
            self.journal.append(state.log_history[-1])
        if self.bar is not None:  # which shows the stage's own time
            self.bar.set_postfix_str(", ".join([shown(logs), *self._left(args, state)[1]]))
        elif state.global_step >= state.max_steps or self._due():
            self._tell(args, state, shown(logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar, leaving its last line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _due(self) -> bool:
        return time.perf_counter() - self._said >= SECONDS_BETWEEN_LINES

    def _tell(self, args: Any, state: Any, *losses: str) -> None:
        """One line; without the losses between two entries of the curve."""
        self._said = time.perf_counter()
        left, run = self._left(args, state)
        where = f"{self.title}: step {state.global_step:,} of {state.max_steps:,}"
        self.say(", ".join([where, f"{left} left", *run, *losses]))

    def _left(self, args: Any, state: Any) -> tuple[str, list[str]]:
        """Time left of the stage; and of the run, if there are other stages."""
        done = max(state.global_step - self._first, 1)
        a_step = (time.perf_counter() - self._start) / done
        left = (state.max_steps - state.global_step) * a_step
        if self.place.of == 1:
            return clock(left), []
        samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        total = self.place.total_left(left, a_step / samples)
        return clock(left), [f"stage {self.place.number} of {self.place.of}, run {total}"]


def shown(logs: dict[str, float]) -> str:
    """An entry of the loss curve in a few words; terms that are 0 are not in the stage."""
    words = [f"loss {logs['loss']:.3f}"]
    words += [f"{term} {logs[term]:.3f}" for term in TERMS if logs.get(term)]
    words.append(f"{logs['tokens_per_second']:,.0f} tok/s")
    words.append(f"{logs['peak_gib']:.1f} GiB")
    return " ".join(words)
