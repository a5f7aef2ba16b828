"""Does `LlavaKDLoss` still give what it gave, in every form, on every backend, in every dtype?

The record is of its first engine, in fp64. fp64 gives the same numbers on any machine but for the
order of sums, so it is compared far below what any change of meaning would do; the other dtypes
see the very same inputs, and are compared with the same numbers.
"""

from __future__ import annotations

import pytest
import torch

from mllmkd_kernels import LlavaKDLoss
from tests.golden_llava_kd import CASES, GRADIENTS, digest, outcome, recorded
from tests.tolerances import check

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
WANT = recorded()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_loss_outputs_and_gradients(name: str, dtype: str, backend: str) -> None:
    case = CASES[name]
    got = digest(outcome(LlavaKDLoss(backend=backend, **case.loss), case, DTYPES[dtype]))
    assert got.keys() == WANT[name].keys()
    for key, want in WANT[name].items():
        value = got[key]
        if want is None or value is None:
            assert want is value, key
            continue
        row = {"fp64": "fp64", "fp32": "value", "bf16": "value"}[dtype]
        if key in GRADIENTS and dtype != "fp64":
            row = "gradient" if dtype == "fp32" else "16-bit gradient"
        if key == "relation" and dtype != "fp64":
            row = "relation"
        check(torch.tensor(value), torch.tensor(want).double(), row, what=f"{name}: {key}")


def test_the_record_is_of_these_cases() -> None:
    assert WANT.keys() == CASES.keys()
