"""How far would a benchmark's figure be from itself with other images? 95% confidence intervals.

A figure is made of what the questions add up to, and those of one image stand or fall together: it
is images of which there are many or few. What lies between 0 and 1, as a share, a recall or F1, has
Wilson's interval, which knows that all of ten right is not all of ever so many: by the number of
answers where no two are of one image, else by as many as would vary like this among images (Kish's
effective size), with Student's quantile for few of them (Dean & Pagano, 2015). Of one image alone
nothing is known, and that is the interval.

For the rest (BLEU, CIDEr) images are drawn again, with replacement, as many as there are, and the
figure is made anew of their questions, `DRAWS` times from a fixed seed. The interval has the middle
of these figures, 95% of very many and more of few, which vary too little among themselves
(Hesterberg's expanded percentiles, 2015); there is none where all are alike, as of one image.
CIDEr's weights of phrases stay those of the whole set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, t

from training.evaluation.questions import Question

DRAWS, SEED = 1000, 0
UPPER = 0.975  # of 95% in the middle


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

    def interval(self, units: Sequence[int]) -> tuple[float, float] | None:
        """Its confidence interval; None where images that were drawn again are all alike.

        Args:
            units: which of the images, counted from 0, each question is about.
        """
        sums = np.zeros((max(units) + 1, self.parts.shape[1]))
        np.add.at(sums, np.asarray(units), self.parts)
        if self.of is not ratio or (self.parts[:, 0] > self.parts[:, 1]).any():
            return _drawn(sums, self.of)
        if len(sums) == len(units) and np.isin(self.parts, (0, 1)).all():
            return wilson(*map(int, sums.sum(0)))
        return _among_images(sums[sums[:, 1] > 0])


#: What a scorer gives by name: figures, and numbers of answers.
Figures = Mapping[str, Figure | int]


def share(tops: Iterable[Any], bottoms: Iterable[Any] | None = None) -> Figure:
    """Of the sum of `bottoms`, one number a question, that of `tops`; by default the mean."""
    above = np.array([float(x) for x in tops])
    below = np.ones_like(above) if bottoms is None else np.array([float(x) for x in bottoms])
    return Figure(np.stack((above, below), 1))


def reported(figures: Figures, questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """`scores`, the numbers of a scorer's by name, and `intervals`, low and high of its figures."""
    units = numbered(q.images for q in questions)
    made = {name: x for name, x in figures.items() if isinstance(x, Figure)}
    return {
        "scores": {n: x.value if isinstance(x, Figure) else x for n, x in figures.items()},
        "intervals": {name: figure.interval(units) for name, figure in made.items() if units},
    }


def numbered(images: Iterable[Any]) -> list[int]:
    """Which of the images, counted from 0, each question is about; one without any stands alone."""
    places: dict[Any, int] = {}
    return [places.setdefault(image or i, len(places)) for i, image in enumerate(images)]


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% confidence interval of a share, `right` of `n`; all there is where n is 0."""
    return _wilson(right / n, n, float(norm.ppf(UPPER))) if n else (0.0, 1.0)


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return float(max(low, 0.0)), float(min(high, 1.0))


def _among_images(sums: np.ndarray) -> tuple[float, float]:  # (n, 2)
    """Of a ratio between 0 and 1, what each image adds to it above and below."""
    n, (top, bottom) = len(sums), sums.sum(0)
    if n < 2:
        return 0.0, 1.0
    p = top / bottom
    spread = n / (n - 1) * ((sums[:, 0] - p * sums[:, 1]) ** 2).sum() / bottom**2
    alike = spread <= 1e-12 * p * (1 - p)  # one answer an image is what it comes to then
    return _wilson(p, n if alike else p * (1 - p) / spread, float(t.ppf(UPPER, n - 1)))


def _drawn(sums: np.ndarray, of: Callable[..., np.ndarray]) -> tuple[float, float] | None:
    """Of any figure, by images drawn again."""
    rng, n = np.random.default_rng(SEED), len(sums)
    drawn = of(np.stack([sums[rng.integers(n, size=n)].sum(0) for _ in range(DRAWS)]))
    if np.ptp(drawn) <= 1e-12 * np.abs(drawn).max():
        return None
    below = norm.cdf(-np.sqrt(n / (n - 1)) * float(t.ppf(UPPER, n - 1)))
    low, high = np.quantile(drawn, (below, 1 - below))
    return float(low), float(high)
