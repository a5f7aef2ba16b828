"""Which positions are distilled? Indices written out by hand."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mllmkd_kernels import image_seqlens, response_rows, visual_rows

IGNORE = -100


def test_a_position_predicts_the_next_token() -> None:
    labels = torch.tensor([[IGNORE, IGNORE, 5, 6], [7, IGNORE, IGNORE, 8]])
    index, following = response_rows(labels)
    # Row 0: positions 1 and 2 predict 5 and 6. Row 1: position 2 (flat 6) predicts 8; the label at
    # position 0 has no position before it, and is not predicted by the end of the row above.
    assert index.tolist() == [1, 2, 6] and following.tolist() == [5, 6, 8]
    assert index.dtype == following.dtype == torch.int64


def test_another_ignore_index() -> None:
    index, following = response_rows(torch.tensor([[0, 0, 3, IGNORE]]), ignore_index=0)
    assert index.tolist() == [1, 2] and following.tolist() == [3, IGNORE]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 1), (2, 4)])
def test_no_labels_no_rows(shape: tuple[int, int]) -> None:
    index, following = response_rows(torch.full(shape, IGNORE))
    assert index.shape == following.shape == (0,)
    if shape == (2, 1):  # a single token has nothing before it
        assert response_rows(torch.zeros(shape, dtype=torch.int64))[0].numel() == 0


def test_labels_are_left_as_they_were() -> None:
    labels = torch.tensor([[1, 2, 3]])
    response_rows(labels)
    assert labels.tolist() == [[1, 2, 3]]


def test_image_positions_are_not_shifted() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]]).bool()
    assert visual_rows(mask).tolist() == [1, 2, 4, 7]


@pytest.mark.parametrize(
    ("mask", "ends"),
    [
        ([[0, 0, 0]], [0]),  # text alone: no image
        ([[1, 1, 1]], [0, 3]),
        ([[0, 1, 1, 0, 1, 0]], [0, 2, 3]),  # two images in one sample
        ([[0, 0, 1], [1, 1, 0]], [0, 1, 3]),  # a run never crosses the end of a sequence
        ([[0, 1, 0], [0, 0, 0], [1, 0, 1]], [0, 1, 2, 3]),
    ],
)
def test_each_run_is_an_image(mask: list[list[int]], ends: list[int]) -> None:
    got = image_seqlens(torch.tensor(mask).bool())
    assert got.tolist() == ends and got.dtype == torch.int32


@pytest.mark.parametrize("lens", [[2, 2], torch.tensor([2, 2])])
def test_adjacent_images_are_told_apart_by_their_lengths(lens: list[int] | torch.Tensor) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    assert image_seqlens(mask).tolist() == [0, 4]
    assert image_seqlens(mask, lens).tolist() == [0, 2, 4]
    assert image_seqlens(mask, [1, 0, 3]).tolist() == [0, 1, 1, 4]  # an image may have no rows


def test_lengths_that_do_not_fit() -> None:
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    message = r"image_lens: sums to 4 rows over 2 images, but image_mask marks 3 positions"
    with pytest.raises(ValueError, match=message):
        image_seqlens(mask, [2, 2])


@pytest.mark.parametrize("lens", [[1.5, 2.0], [[1], [2]]])
def test_lengths_that_are_no_whole_numbers(lens: list[int]) -> None:
    """1.5 and 2 would have been 1 and 2."""
    with pytest.raises(ValueError, match="image_lens: expected whole numbers"):
        image_seqlens(torch.tensor([[1, 1, 1, 0]]).bool(), lens)


def test_a_negative_length() -> None:
    with pytest.raises(ValueError, match=r"image_lens: .*-1"):
        image_seqlens(torch.tensor([[1, 1, 1, 0]]).bool(), [4, -1])


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_runs_cover_the_mask(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    ends = image_seqlens(mask)
    assert ends[-1] == mask.sum() == visual_rows(mask).numel()
    assert (ends.diff() > 0).all()
    position = visual_rows(mask)
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        run = position[a:b]  # consecutive positions of one sequence
        assert run.diff().eq(1).all() and run[0] // 6 == run[-1] // 6
