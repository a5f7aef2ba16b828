"""Does the README print what the package prints?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import mllmkd_kernels as mk

README = Path(__file__).parents[1] / "README.md"


def test_explained_plans_are_those_of_the_package() -> None:
    pytest.importorskip("triton")
    text = README.read_text(encoding="utf-8")
    block = text.split("<!-- explain:begin -->")[1].split("<!-- explain:end -->")[0]
    shown = re.findall(r">>> print\((.*)\)\n((?:(?!>>>|```).*\n)+)", block)
    assert len(shown) == 3
    for call, output in shown:
        assert output.strip() == str(eval(call, {"mk": mk, "torch": torch})).strip()
