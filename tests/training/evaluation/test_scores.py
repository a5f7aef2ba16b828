"""Scorers against figures worked out by hand."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from training.evaluation import captions, scores
from training.evaluation.intervals import reported
from training.evaluation.questions import Question


def asked(*references: str) -> list[Question]:
    return [Question(i, "?", (), (reference,)) for i, reference in enumerate(references)]


def of(scorer: Any, *given: Any) -> dict[str, Any]:
    return reported(scorer(*given), ())["scores"]


def test_exact_and_short_match():
    questions = asked("a red coat", "yes", "no")
    answers = ["a red coat", "Yes.", "nope"]
    assert of(scores.exact_match, questions, answers) == {"exact_match": pytest.approx(1 / 3)}
    assert of(scores.short_match, questions, answers) == {"exact_match": pytest.approx(2 / 3)}


def test_vqa_accuracy_is_the_mean_over_questions():
    people = Question(0, "?", (), ("dog",) * 3 + ("cat",) * 7)
    found = of(scores.people_agree, [people, people], ["the dog", "cat"])
    assert found == {"vqa_accuracy": pytest.approx((0.9 + 1.0) / 2)}


def test_yes_no_by_hand():
    """Truth y y y n n n; said y y n y n (undecided, so yes): 2 hits of 4 said, of 3 true."""
    questions = asked("yes", "yes", "yes", "no", "no", "no")
    answers = [
        "Yes, there is. No doubt.",  # only the first sentence counts
        "yes",
        "There is not, a dog",
        "Yes",
        "No, there is none.",
        "A cat",
    ]
    assert of(scores.yes_no, questions, answers) == {
        "accuracy": pytest.approx(3 / 6),
        "precision": pytest.approx(2 / 4),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(4 / 7),
        "yes_ratio": pytest.approx(4 / 6),
        "undecided": 1,
    }


def test_yes_no_without_a_single_yes():
    found = of(scores.yes_no, asked("yes", "no"), ["no", "no"])
    assert (found["accuracy"], found["precision"], found["recall"], found["f1"]) == (0.5, 0, 0, 0)


def test_letters():
    answers = ["B", "b", "B. steam", "(B)", "The answer is B.", "Because", "A or B", "It is ice"]
    questions = asked(*"B" * len(answers))
    found = of(scores.letter_choice, questions, answers)
    assert found == {"accuracy": pytest.approx(5 / 8), "unreadable": 2}


def test_caption_words():
    """What Stanford's tokenizer makes of these, with COCO's list of punctuation left out."""
    assert captions.caption_words(
        "Two T-shirts (one red); a man's dog isn't 3.5 m, it's U.S.-made!"
    )
    for caption, words in {
        "A man's dog isn't happy.": "a man 's dog is n't happy",
        "two T-shirts, one red; one blue!": "two t-shirts one red one blue",
        "A 3-year-old, 1,000 pizzas at 2:50 p.m.": "a 3-year-old 1,000 pizzas at 2:50 p.m.",
        "A woman (smiling) on a bench...": "a woman -lrb- smiling -rrb- on a bench",
        'The sign says "STOP" - don\'t go!': "the sign says stop do n't go",
        "Mr. Smith's U.S. flags cannot fly": "mr. smith 's u.s. flags can not fly",
        "food/drink $5 50%": "food/drink $ 5 50 %",
        "the boys' team , it’s  #1": "the boys team it 's # 1",
    }.items():
        assert captions.caption_words(caption) == words.split(), caption


REFERENCES = (
    ("A dog runs on the green grass.", "the brown dog is running in a park"),
    ("Two people sit at a table.", "a man and a woman at a table with food"),
    ("A red bus on a city street.", "the bus drives down the road"),
)


def test_captions():
    pytest.importorskip("pycocoevalcap")
    questions = [Question(i, "", (), one) for i, one in enumerate(REFERENCES)]
    same = of(captions.caption_scores, questions, [one[0] for one in REFERENCES])
    assert same["bleu_4"] == pytest.approx(1.0, abs=1e-6)
    assert same["rouge_l"] == pytest.approx(1.0)
    other = of(captions.caption_scores, questions, ["a cat", "a table", "a red bus on a street"])
    assert all(0 < other[name] < same[name] for name in ("cider", "rouge_l")), (other, same)
    scorer = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    split = [[" ".join(captions.caption_words(x)) for x in one] for one in REFERENCES]
    for said in (["a dog runs on the grass today", "a table", "a red bus on a street"], ["a"] * 3):
        want, _ = scorer.compute_score(dict(enumerate(split)), {i: [x] for i, x in enumerate(said)})
        got = of(captions.caption_scores, questions, said)["bleu_4"]
        assert got == pytest.approx(want[3], rel=1e-9)
    # an LCS of "a table": 2 of 2 words, and 2 of 6; F with beta 1.2
    one = of(captions.caption_scores, questions[1:2], ["a table"])
    precision, recall = 1.0, 2 / 6
    beta2 = 1.2**2
    assert one["rouge_l"] == pytest.approx(
        (1 + beta2) * precision * recall / (recall + beta2 * precision)
    )


@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokenizer needs Java")
def test_both_tokenizers_agree_on_plain_captions():
    pytest.importorskip("pycocoevalcap")
    questions = [Question(i, "", (), one) for i, one in enumerate(REFERENCES)]
    answers = ["a dog isn't here.", "A table", "The bus's on a road"]
    words = of(captions.caption_scores, questions, answers)
    assert of(captions.caption_scores, questions, answers, "ptb") == words
