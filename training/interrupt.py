"""What does Ctrl-C, or a scheduler's SIGTERM, do to a run? It saves at the end of the step, then
leaves.

While a `StopRequest` is open the first SIGINT or SIGTERM is only noted; the trainer asks after each
optimiser step, and all ranks agree before any of them acts. A second signal does what it always
did. Data-loading processes, which are forked and get Ctrl-C too, ignore SIGINT and leave it to the
run to end them.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop and did; `status` is the exit status a shell expects."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.status = 128 + number


class StopRequest(AbstractContextManager[Any]):
    """Context manager; `number` is the signal that came, or 0."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked data-loading process
            if number != signal.SIGINT:
                os._exit(128 + number)
            return
        self.number = number
        self._restore()
        name = signal.Signals(number).name
        # not print: the signal may have come in the middle of one
        os.write(2, f"\n{name}: saving after this step; again to stop at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
