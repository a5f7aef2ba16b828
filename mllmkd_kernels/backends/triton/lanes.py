"""What runs beside what? Products in one lane, row passes in another, and which waits for which.

A lane is a stream of a GPU, or nothing where all is done in turn. What is launched says which
blocks of memory it touches: it waits for what the other lane last did with them, so that blocks
pass between the lanes in the order of the launches, none read before it is written nor written
again before it is read. Two of each let one lane work while the other has the first.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PRODUCTS, ROWS = 0, 1


class Lanes:
    """Two lanes of a device, of which row passes have `beside` multiprocessors to themselves;
    0: one lane, the caller's stream. Used as a context, at whose end the caller's stream waits for
    both.
    """

    def __init__(self, device: torch.device, beside: int) -> None:
        self.streams = streams(device, beside) if beside and on_streams(device) else None
        self.last: dict[tuple[Hashable, int], Any] = {}

    def __enter__(self) -> Lanes:
        if self.streams is not None:
            self.caller = torch.cuda.current_stream()
            for stream in self.streams:
                stream.wait_stream(self.caller)
        return self

    def __exit__(self, *error: object) -> None:
        if self.streams is not None:
            for stream in self.streams:
                self.caller.wait_stream(stream)

    @contextmanager
    def launching(self, lane: int, *blocks: Hashable) -> Iterator[None]:
        """Around launches in a lane that read or write `blocks`."""
        if self.streams is None:
            yield
            return
        stream = self.streams[lane]
        for block in blocks:
            if (other := self.last.get((block, 1 - lane))) is not None:
                stream.wait_event(other)
        with torch.cuda.stream(stream):
            yield
            done = stream.record_event()
        self.last |= {(block, lane): done for block in blocks}


def on_streams(device: torch.device) -> bool:
    """Has this device streams? Triton's interpreter has none."""
    return device.type == "cuda"


@functools.cache
def streams(device: torch.device, beside: int) -> tuple[Any, Any]:
    """Of the products, of the row passes. A vendor's product takes all multiprocessors and keeps
    them, so where PyTorch has green contexts its stream is one of all but `beside` of them. Kept
    for the process: making one takes milliseconds.
    """
    from torch.cuda import green_contexts as green

    with torch.cuda.device(device):
        rows = torch.cuda.Stream(priority=-1)
        if not green.SUPPORTED or not hasattr(green.GreenContext, "Stream"):
            return torch.cuda.Stream(), rows
        rest = torch.cuda.get_device_properties(device).multi_processor_count - beside
        context = green.GreenContext.create(num_sms=rest, device_id=torch.cuda.current_device())
        _contexts.append(context)
        return context.Stream(), rows


_contexts: list[Any] = []  # a stream does not keep its context
