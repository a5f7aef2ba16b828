"""A pytest plugin: says which test failed, and why, at once, where pytest waits for the end."""

from __future__ import annotations

import os
import sys

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:  # the controller says it
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = str(crash.message if crash is not None else report.longrepr).splitlines()
        print(f"\nFAILED {report.nodeid}: {' '.join(lines[:3])[:400]}", file=sys.__stdout__)
        sys.__stdout__.flush()  # pyright: ignore
