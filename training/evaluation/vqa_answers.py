"""When are two short answers to a visual question the same?

The rules of the VQA evaluation (visualqa.org/evaluation), applied to what a model wrote and to the
ten human answers alike: lower case; number words up to ten become digits; articles go; a missing
apostrophe is put back ("dont" is "don't"); punctuation goes, except apostrophes, colons and the
point or comma inside a number.

An answer is as right as it is agreed on: full marks where three people gave it. So that a person is
not compared with himself, the score is averaged over the ten ways to leave one of them out.

TextVQA's evaluation also splits "'s" from its word, on both sides; nothing is gained by it here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

AGREED = 3  # people who gave an answer, for full marks

_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(_NUMBERS.split())}
_ARTICLES = frozenset(("a", "an", "the"))
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_POINT = re.compile(r"\.(?!\d)")  # any but a decimal point
_COMMA = re.compile(r"\d,\d")

# Those that the evaluation knows: "we'll" and "he'll" without apostrophe would be other words.
_CONTRACTIONS = """
ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't
needn't oughtn't shan't shouldn't wasn't weren't won't wouldn't
could've might've must've not've should've would've we've what've where've who've they've you've
couldn't've hadn't've mightn't've shouldn't've wouldn't've
he'd it'd how'd somebody'd someone'd something'd there'd they'd where'd who'd you'd
he'd've it'd've she'd've somebody'd've someone'd've something'd've there'd've they'd've we'd've
who'd've you'd've y'all'd've
how'll it'll somebody'll someone'll something'll they'll what'll who'll why'll you'll y'all'll
he's how's somebody's someone's that's there's what's when's where's who's why's
there're they're what're why're you're
ma'am o'clock y'all 'twas 'ow's'at
"""
_RESTORED = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTIONS.split()
    for i, letter in enumerate(word)
    if letter == "'"
}


def normalise(answer: str) -> str:
    """An answer as the VQA evaluation compares it."""
    answer = " ".join(answer.split())
    inside_number = _COMMA.search(answer) is not None
    text = answer
    for mark in _MARKS:
        alone = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if alone or inside_number else " ")
    words = (_DIGITS.get(word, word) for word in _POINT.sub("", text).lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """How right an answer is, from 0 to 1, given what people answered (ten, in the benchmarks).

    Mean over the people left out of min(1, others who said the same / 3).

    Raises:
        ValueError: fewer than two people.
    """
    if len(people) < 2:
        raise ValueError(f"people: got {len(people)} answers, expected two or more")
    said = normalise(answer)
    same = [normalise(person) == said for person in people]
    agreed = sum(same)
    return sum(min(1.0, (agreed - mine) / AGREED) for mine in same) / len(people)
