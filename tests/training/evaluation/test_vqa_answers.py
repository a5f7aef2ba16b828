"""The VQA evaluation's rules, by hand-worked answers."""

from __future__ import annotations

import pytest

from training.evaluation.vqa_answers import normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        ("The Red Car", "red car"),
        ("yes.", "yes"),
        ("two  dogs\n", "2 dogs"),
        ("None", "0"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("u.s.", "us"),
        ("2:50 pm", "2:50 pm"),
        ("girl's", "girl's"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),  # one apostrophe is put back, not two
        ("well", "well"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("half-past, 10", "half past 10"),
        ("1,000-2,000", "10002000"),  # a comma in a number makes every mark go without a space
        ("somebodyd", "somebody'd"),
        ("a", ""),
        ("", ""),
    ],
)
def test_normalised(written, compared):
    assert normalise(written) == compared


@pytest.mark.parametrize(
    ("agreed", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_accuracy_of_ten_people(agreed, accuracy):
    """With 3 of 10: leaving one of the three out leaves 2/3, any other full marks: 0.9."""
    people = ["Dog."] * agreed + [f"cat {i}" for i in range(10 - agreed)]
    assert vqa_accuracy("the dog", people) == pytest.approx(accuracy)


def test_one_answer_cannot_be_left_out():
    with pytest.raises(ValueError, match="people: got 1 answers, expected two or more"):
        vqa_accuracy("dog", ["dog"])
