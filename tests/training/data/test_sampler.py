"""Does an epoch hold every sample as often as it should, grouped, and the same on every process?"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from training.data.sampler import ModalitySampler

N, STEP, MICRO = 103, 8, 4
LENGTHS = torch.randint(5, 500, (N,), generator=torch.Generator().manual_seed(0)).tolist()
IMAGES = [i % 3 != 0 for i in range(N)]  # 68 with, 35 without: neither a multiple of the step


def sampler(**options: Any) -> ModalitySampler:
    return ModalitySampler(LENGTHS, IMAGES, STEP, 0, **options)


def chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


@pytest.mark.parametrize("group", [True, False])
def test_every_sample_once_and_other_orders_by_epoch_and_seed(group: bool) -> None:
    one = sampler(group=group)
    first = list(one)
    assert sorted(first) == list(range(N)) and len(one) == N
    assert first == list(one) == list(sampler(group=group))
    one.set_epoch(1)
    assert list(one) != first and sorted(one) == list(range(N))
    assert list(ModalitySampler(LENGTHS, IMAGES, STEP, 1, group=group)) != first


def test_steps_are_of_one_modality_and_sorted() -> None:
    steps = chunks(list(sampler()), STEP)
    whole = [step for step in steps if len({IMAGES[i] for i in step}) == 1]
    assert len(steps) - len(whole) <= 1
    for step in whole:
        lengths = [LENGTHS[i] for i in step]
        assert lengths == sorted(lengths, reverse=True)
    mixed = [c for c in chunks(list(sampler()), MICRO) if len({IMAGES[i] for i in c}) > 1]
    assert len(mixed) <= 1


def test_grouping_saves_padding() -> None:
    def padded(order: list[int]) -> int:
        return sum(len(c) * max(LENGTHS[i] for i in c) for c in chunks(order, MICRO))

    assert padded(list(sampler())) < 0.9 * padded(list(sampler(group=False)))


@pytest.mark.parametrize("images", [True, False])
def test_one_modality_may_be_absent(images: bool) -> None:
    order = list(ModalitySampler(LENGTHS, [images] * N, STEP, 0))
    assert sorted(order) == list(range(N))


def test_weights_are_repeats_and_fractions_change_by_epoch() -> None:
    weights = [2.0 if i < 40 else 0.5 if i < 80 else 1.0 for i in range(N)]
    one = sampler(weights=weights)
    counts = Counter(one)
    assert len(one) == 80 + 20 + 23 == sum(counts.values())
    assert all(counts[i] == 2 for i in range(40)) and all(counts[i] == 1 for i in range(80, N))
    part = {i for i in range(40, 80) if counts[i]}
    one.set_epoch(1)
    assert len(part) == 20 and {i for i in one if 40 <= i < 80} != part


def test_two_processes_share_an_epoch() -> None:
    """Each takes every other micro-batch; a step's are of one modality on both."""
    batches = BatchSampler(sampler(), MICRO, drop_last=False)
    shards: list[Any] = [BatchSamplerShard(batches, 2, rank, even_batches=False) for rank in (0, 1)]
    ranks = [list(shard) for shard in shards]
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(N))
    together = list(zip(*ranks, strict=False))[:-2]
    assert all(len({IMAGES[i] for batch in pair for i in batch}) == 1 for pair in together)
