"""How good are the answers? One function a metric: questions and answers in, named figures out.

Shares are from 0 to 1, and know how sure they are (`training.evaluation.intervals`). Each function
scores all it is given; a breakdown by kind of question is the same function on fewer of them. What
the metric's own rule cannot read is counted, not guessed: `unreadable` and `undecided` are numbers
of answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from training.evaluation.intervals import Figures, share
from training.evaluation.questions import Question
from training.evaluation.vqa_answers import vqa_accuracy

Scorer = Callable[[Sequence[Question], Sequence[str]], Figures]
_WORDS = re.compile(r"[^\s,]+")
_LETTER = re.compile(r"\(?([A-Z])(?:[).:\s]|$)")
_NAMED = re.compile(r"[Tt]he (?:correct )?answer is:? \(?([A-Z])\b")


def exact_match(questions: Sequence[Question], answers: Sequence[str]) -> Figures:
    """Answers that are a reference, word for word."""
    return {"exact_match": share(a in q.answers for q, a in _pairs(questions, answers))}


def short_match(questions: Sequence[Question], answers: Sequence[str]) -> Figures:
    """Answers that are a reference, but for case and a full stop at the end (GQA in LLaVA)."""
    right = (
        short(answer) in [short(reference) for reference in question.answers]
        for question, answer in _pairs(questions, answers)
    )
    return {"exact_match": share(right)}


def people_agree(questions: Sequence[Question], answers: Sequence[str]) -> Figures:
    """VQA accuracy: `training.evaluation.vqa_answers`."""
    pairs = _pairs(questions, answers)
    return {"vqa_accuracy": share(vqa_accuracy(answer, q.answers) for q, answer in pairs)}


def yes_no(questions: Sequence[Question], answers: Sequence[str]) -> Figures:
    """POPE's figures, "yes" being the positive class.

    Its rule: an answer whose first sentence says "no" or "not" is a no, any other a yes. Those that
    say neither yes nor no are `undecided`, and count as the rule has them.
    """
    truth = [question.answers[0] == "yes" for question in questions]
    said = [not {"no", "not"} & _first_words(answer) for answer in answers]
    both = list(zip(truth, said, strict=True))
    hits = [a and b for a, b in both]
    return {
        "accuracy": share(a == b for a, b in both),
        "precision": share(hits, said),
        "recall": share(hits, truth),
        "f1": share((2 * hit for hit in hits), (a + b for a, b in both)),
        "yes_ratio": share(said),
        "undecided": sum(not {"yes", "no", "not"} & _first_words(answer) for answer in answers),
    }


def letter_choice(questions: Sequence[Question], answers: Sequence[str]) -> Figures:
    """Multiple choice: the letter that an answer starts with, or that it says is the answer.

    An answer with no such letter is wrong, and counted as `unreadable`.
    """
    letters = [_letter(answer) for answer in answers]
    right = [letter in q.answers for q, letter in zip(questions, letters, strict=True)]
    return {"accuracy": share(right), "unreadable": letters.count(None)}


def short(answer: str) -> str:
    """An answer without regard to case and a full stop at the end."""
    return answer.strip().removesuffix(".").lower()


def _pairs(questions: Sequence[Question], answers: Sequence[str]) -> Sequence[tuple[Question, str]]:
    return list(zip(questions, answers, strict=True))


def _first_words(answer: str) -> set[str]:
    return {word.lower() for word in _WORDS.findall(answer.split(".")[0])}


def _letter(answer: str) -> str | None:
    answer = answer.strip()
    if len(answer) == 1:
        answer = answer.upper()
    found = _LETTER.match(answer) or _NAMED.search(answer)
    return found.group(1) if found else None
