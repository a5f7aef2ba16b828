"""Is a benchmark's figure inside its interval, and does the interval know how sure it is?"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from training.evaluation import scores
from training.evaluation.captions import caption_scores
from training.evaluation.chair import Objects, chair
from training.evaluation.intervals import reported, share
from training.evaluation.questions import Question

WORDS = ["yes", "no", "B", "a dog", "a cat on a mat", "two dogs run on the grass", "a red bus"]
OBJECTS = Objects({("dog",): "dog", ("dogs",): "dog", ("cat",): "cat", ("bus",): "bus"})
SCORERS: dict[str, Any] = {
    "exact": scores.exact_match,
    "short": scores.short_match,
    "people": scores.people_agree,
    "yes-no": scores.yes_no,
    "letters": scores.letter_choice,
    "chair": lambda questions, answers: chair(questions, answers, OBJECTS),
    "captions": caption_scores,
}


def told(n: int, seed: int = 0, images: int | None = None) -> tuple[list[Question], list[str]]:
    """Questions, and answers of which about half are right."""
    rng = random.Random(seed)
    questions, answers = [], []
    for i in range(n):
        right = rng.choice(WORDS)
        image: Any = (f"{i % (images or n)}.png",)
        questions.append(Question(i, "?", image, (right, rng.choice((right, *WORDS)))))
        answers.append(right if rng.random() < 0.5 else rng.choice(WORDS))
    return questions, answers


@pytest.mark.parametrize("images", [None, 0.5], ids=["one question", "two questions"])
@pytest.mark.parametrize("name", SCORERS)
def test_a_figure_is_inside_an_interval_that_more_questions_make_narrow(
    name: str, images: float | None
) -> None:
    if name == "captions":
        pytest.importorskip("pycocoevalcap")
    widths = []
    for n in (60, 960):
        questions, answers = told(n, images=None if images is None else int(images * n))
        found = reported(SCORERS[name](questions, answers), questions)
        assert found == reported(SCORERS[name](questions, answers), questions)
        values = {k: v for k, v in found["scores"].items() if isinstance(v, float)}
        assert values.keys() == found["intervals"].keys() and values
        for figure, (low, high) in found["intervals"].items():
            assert low < values[figure] < high, figure
        widths.append({k: high - low for k, (low, high) in found["intervals"].items()})
    for figure, width in widths[0].items():
        assert widths[1][figure] < width / 2, figure  # about a quarter, of 16 times as many


def test_questions_of_one_image_are_no_more_sure_than_one() -> None:
    questions, answers = told(40)
    once = reported(scores.people_agree(questions, answers), questions)["intervals"]
    six = [question for question in questions for _ in range(6)]
    said = [answer for answer in answers for _ in range(6)]
    found = reported(scores.people_agree(six, said), six)["intervals"]
    assert found["vqa_accuracy"] == pytest.approx(once["vqa_accuracy"], rel=1e-9)


@pytest.mark.parametrize("images", [3, 6, 50])
def test_the_interval_holds_the_truth_as_often_as_it_says(images: int) -> None:
    """F1 of many benchmarks, four questions an image with one answer to all of them."""
    rng = np.random.default_rng(1)
    held, tries = 0, 400
    for _ in range(tries):
        truth, said = (np.repeat(rng.random(images) < p, 4) for p in (0.5, 0.4))
        figure = share(2 * (truth & said), truth.astype(int) + said)
        found = figure.interval([i // 4 for i in range(4 * images)])
        assert found is not None
        held += found[0] <= 2 * 0.2 / 0.9 <= found[1]
    assert held / tries >= 0.93
    assert held / tries <= 0.98 or images < 50


def test_all_right_is_not_all_of_ever_so_many() -> None:
    """Wilson's interval of 10 of 10; by images drawn again it would be a point."""
    found = share([True] * 10).interval(range(10))
    assert found == pytest.approx((10 / (10 + 1.959964**2), 1.0))


def test_of_few_images_little_is_known() -> None:
    """Images drawn again vary too little, and not at all where there is one or all are alike."""
    one = share([True, True, False]).interval([0, 0, 0])
    assert one == (0.0, 1.0)
    alike = share([True, False] * 3).interval([0, 0, 1, 1, 2, 2])
    assert alike is not None and alike[0] < 0.1 and alike[1] > 0.9
    right = share([True] * 6).interval([0, 0, 1, 1, 2, 2])
    assert right is not None and right[0] < 0.4 and right[1] == 1.0
    assert share([2.5]).interval([0]) is None and share([2.5, 2.5]).interval([0, 1]) is None
    few = share([1.0, 2.0, 3.0]).interval(range(3))
    assert few is not None and few == pytest.approx((1.0, 3.0))
