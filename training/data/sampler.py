"""In which order are samples trained on? Mixed by weight, grouped by modality and length.

LLaVA's order, per optimiser step: the samples of a step are all with images or all without, and
those of similar length share a micro-batch, so little is spent on padding and no rank waits for
another one's images. An epoch is made like this, from the seed and the epoch's number alone (so it
is the same after a resume, and on every process):

1. each source's samples `weight` times: whole copies, and a random part of one for the fraction;
2. both modalities shuffled, cut into steps of `step_size`, each step sorted longest first (the step
   that would run out of memory is met early);
3. the steps shuffled. What is left of both modalities comes last: one or two steps sorted by
   modality, so at most one micro-batch of an epoch is mixed.

Processes take whole micro-batches in turn (accelerate's `BatchSamplerShard`), which are of
neighbouring lengths. Without grouping only step 1 is done, and shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ModalitySampler(Sampler[int]):
    """Indices of one epoch.

    Args:
        lengths: tokens of each sample; an estimate will do, only their order counts.
        with_images: whether each sample has images.
        step_size: samples per optimiser step, over all processes and micro-batches.
        seed: with the epoch it decides everything.
        weights: how often each sample occurs in an epoch on average; None: once.
        group: False: a plain shuffle.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        with_images: Sequence[bool],
        step_size: int,
        seed: int,
        *,
        weights: Sequence[float] | None = None,
        group: bool = True,
    ) -> None:
        weights = [1.0] * len(lengths) if weights is None else weights
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.lengths = torch.tensor(lengths)
        self.with_images = torch.tensor(with_images, dtype=torch.bool)
        self.step_size, self.seed, self.group = step_size, seed, group
        self.epoch = 0
        self._groups = [(self.weights == w).nonzero().flatten() for w in self.weights.unique()]

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is; accelerate and `Trainer` call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self._count(group) for group in self._groups)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        drawn = torch.cat([self._drawn(group, generator) for group in self._groups])
        drawn = drawn[torch.randperm(len(drawn), generator=generator)]
        yield from (self._grouped(drawn, generator) if self.group else drawn).tolist()

    def _count(self, group: torch.Tensor) -> int:
        return max(1, round(float(self.weights[group[0]]) * len(group)))

    def _drawn(self, group: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The samples of one weight, each as often as it says."""
        copies, rest = divmod(self._count(group), len(group))
        part = torch.randperm(len(group), generator=generator)[:rest]
        return torch.cat([*[group] * copies, group[part]])

    def _grouped(self, drawn: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        steps, left = [], []
        for wanted in (True, False):
            own = drawn[self.with_images[drawn] == wanted]
            whole = len(own) // self.step_size * self.step_size
            steps += [self._sorted(step) for step in own[:whole].split(self.step_size) if len(step)]
            left.append(self._sorted(own[whole:]))
        order = torch.randperm(len(steps), generator=generator).tolist()
        return torch.cat([*[steps[i] for i in order], *left])

    def _sorted(self, indices: torch.Tensor) -> torch.Tensor:
        return indices[self.lengths[indices].argsort(descending=True, stable=True)]
