"""How far may a result be from the truth? One table, one reason a row; nothing else holds a number.

The error is relative and of the whole tensor, ``‖got − want‖ / ‖want‖`` with `want` in fp64 from
the very same inputs, so a wrong small entry beside a large one is judged by what it does to a step.
The truth of a row of logits of 1e4 is out of reach of any fp32 arithmetic, so a bound is

    error ≤ k · (error of plain PyTorch in fp32 on the same inputs) + floor

and the ε-ladder below, which knows no naive method, is absolute.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    k: float  # multiples of the naive error that are granted
    floor: float  # relative error that is granted in any case
    why: str


TOLERANCES: dict[str, Tolerance] = {
    "fp64": Tolerance(
        4, 1e-11, "the definition's plain sums cancel: 1e-16 of terms of 1 over a value of 1e-5"
    ),
    "value": Tolerance(
        4, 2e-6, "a row term is a sum of V fp32 terms of one sign; DESIGN 6 measures 2e-6"
    ),
    "gradient": Tolerance(
        4, 3e-6, "fp32 logits carry 1e-7 · √D, through exp and a product over V columns"
    ),
    "16-bit gradient": Tolerance(
        4,
        5e-3,
        "two roundings to bf16, of dz and of the result, are 0.24% where many entries "
        "average and up to 0.39% each where few do, as in one row; the ladder grants 0.3%",
    ),
    "relation": Tolerance(
        4, 1e-5, "1 − cos of fp32 entries of R: 1e-7 · √2·loss / loss for a loss of 1e-3 and above"
    ),
    "fp32 weights": Tolerance(
        4, 1e-7, "row weights 1/count are fp32 even beside fp64 rows: half an ulp, 6e-8, each"
    ),
    "vanishing": Tolerance(
        0, 1e-6, "what is 0 but for cancellation comes out as fp32 rounding of what cancels"
    ),
    "vanishing 16-bit": Tolerance(
        0, 5e-3, "and as 16-bit rounding of it where dz is 16-bit: its columns then sum to that"
    ),
}

#: Rungs of the ladder: how far the teacher is from the student (standard deviation of its logits).
LADDER = (0.3, 0.1, 0.03, 0.01, 0.003)


def ladder_bound(dtype: torch.dtype, eps: float) -> float:
    """DESIGN 6: the gradient shrinks with ε, the rounding of fp32 logits does not; one rounding of
    the result to 16 bits does not depend on ε.
    """
    return 3e-6 / eps if dtype == torch.float32 else 3e-3


def ladder_value_bound(divergence: str, eps: float) -> float:
    """Values near convergence. The sum itself is exact to 2e-6 (test_divergence), but each of its
    u = log q − log p = O(ε) carries the fp32 rounding of two logits, about 3e-7. The soft
    cross-entropy is no small difference: it is the entropy plus one.
    """
    return TOLERANCES["value"].floor if divergence == "soft_cross_entropy" else 1e-6 / eps


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in fp64; infinite where NaN or infinities do not stand in the same
    places; the absolute error where `want` vanishes.
    """
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        return float("inf")
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(
        got[~finite].nan_to_num(7.0), want[~finite].nan_to_num(7.0)
    ):
        return float("inf")
    error, size = (got - want)[finite].norm().item(), want[finite].norm().item()
    return error / size if size else error


def check(
    got: Tensor,
    want: Tensor,
    row: str,
    naive: Tensor | None = None,
    *,
    cancels: float = 0.0,
    what: str = "",
) -> None:
    """Assert the bound of a row of the table.

    `cancels` is the size of the terms that `want` is a sum of. Where they cancel altogether (equal
    models) there is no relative error, and row "vanishing" holds instead, relative to them.
    """
    k, floor, why = TOLERANCES[row]
    error = relative_error(got, want)
    granted = floor + (0.0 if naive is None else k * _finite(relative_error(naive, want)))
    if want.isfinite().all() and want.double().norm() < 1e-9 * cancels:
        _, floor, why = TOLERANCES["vanishing 16-bit" if "16-bit" in row else "vanishing"]
        granted = floor * cancels
        error = (got.double() - want.double()).norm().item()
    assert error <= granted, f"{what}: error {error:.3g} > {granted:.3g} ({row}: {why})"


def _finite(error: float) -> float:
    """A naive method that breaks down (an overflow) grants nothing."""
    return error if error < 1 else 0.0
