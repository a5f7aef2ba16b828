"""What every test of the core may ask for: a backend, and the same random numbers each time."""

from __future__ import annotations

import hypothesis
import pytest
import torch

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
