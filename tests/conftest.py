"""What every test of the core may ask for: a backend, and the same random numbers each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it once, when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mllmkd_kernels.backends import cpu
from tests.problems import BACKENDS

# The same examples on every run and no database: a failure reproduces anywhere. No deadline: the
# machine may be shared.
hypothesis.settings.register_profile(
    "repository", deadline=None, derandomize=True, database=None, max_examples=40
)
hypothesis.settings.load_profile("repository")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; one that is not available skips with its reason."""
    if request.param == "cpu" and not cpu.available():
        pytest.skip(f"backend 'cpu': {cpu.why_not()}")
    return request.param


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """The core's tests are thousands of calls of microseconds. Two threads wait for each other at
    the end of each: on a busy machine that made the suite ten times slower. Tests that are about
    threads ask for `threads`; those of training, which do compute, keep what torch has (one too
    under `make test`, which runs a process a core).
    """
    before = torch.get_num_threads()
    if request.path.parent == Path(__file__).parent:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device() -> torch.device:
    """Where Triton's kernels run: a GPU, or the CPU under Triton's interpreter."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def threads(_one_thread: None) -> None:
    """Several threads, so that the order in which they finish may differ from run to run."""
    torch.set_num_threads(4)
