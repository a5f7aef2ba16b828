"""How far would a benchmark's figure be from itself with other images? 95% confidence intervals.

A figure is made of what the questions add up to, and those of one image stand or fall together. So
images are drawn again, with replacement, as many as there are, and the figure is made anew of their
questions: the interval has the middle 95% of `DRAWS` such figures (the percentile bootstrap), from
a fixed seed. A share of answers, no two of one image, has Wilson's interval, which knows that all
of ten right is not all of ever so many. CIDEr's weights of phrases stay those of the whole set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from training.evaluation.questions import Question

DRAWS, SEED = 1000, 0
LEVEL = 0.95


def ratio(sums: np.ndarray) -> np.ndarray:  # (..., 2) -> (...)
    """The first of two sums over the second; 0 where there is nothing."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


@dataclass(frozen=True)
class Figure:
    """A figure and what it is made of.

    Attributes:
        parts: (questions, k), what each question adds.
        of: makes figures (...) of sums (..., k).
    """

    parts: np.ndarray
    of: Callable[[np.ndarray], np.ndarray] = ratio

    @property
    def value(self) -> float:
        """The figure of all questions."""
        return float(self.of(self.parts.sum(0)))

    def interval(self, units: Sequence[int]) -> tuple[float, float]:
        """Its confidence interval.

        Args:
            units: which of the images, counted from 0, each question is about.
        """
        if self._is_share() and len(set(units)) == len(units):
            return wilson(*map(int, self.parts.sum(0)))
        sums = np.zeros((max(units) + 1, self.parts.shape[1]))
        np.add.at(sums, np.asarray(units), self.parts)
        rng, size = np.random.default_rng(SEED), len(sums)
        drawn = np.stack([sums[rng.integers(size, size=size)].sum(0) for _ in range(DRAWS)])
        low, high = np.quantile(self.of(drawn), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return float(low), float(high)

    def _is_share(self) -> bool:
        """Whether each question is one of those counted or not, and right or not."""
        return self.of is ratio and bool(
            np.isin(self.parts, (0, 1)).all() and (self.parts[:, 0] <= self.parts[:, 1]).all()
        )


#: What a scorer gives by name: figures, and numbers of answers.
Figures = Mapping[str, Figure | int]


def share(tops: Iterable[Any], bottoms: Iterable[Any] | None = None) -> Figure:
    """Of the sum of `bottoms`, one number a question, that of `tops`; by default the mean."""
    above = np.array([float(x) for x in tops])
    below = np.ones_like(above) if bottoms is None else np.array([float(x) for x in bottoms])
    return Figure(np.stack((above, below), 1))


def reported(figures: Figures, questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """`scores`, the numbers of a scorer's by name, and `intervals`, low and high of its figures."""
    places: dict[Any, int] = {}
    units = [places.setdefault(q.images or i, len(places)) for i, q in enumerate(questions)]
    made = {name: x for name, x in figures.items() if isinstance(x, Figure)}
    return {
        "scores": {n: x.value if isinstance(x, Figure) else x for n, x in figures.items()},
        "intervals": {name: figure.interval(units) for name, figure in made.items() if units},
    }


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% confidence interval of a share, `right` of `n`; all there is where n is 0."""
    if not n:
        return 0.0, 1.0
    found = binomtest(right, n).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)
