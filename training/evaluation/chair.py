"""Does a description name what is not in the picture? CHAIR (Rohrbach et al., 2018), with COCO.

    CHAIRi   mentions of objects that are not there / mentions of objects
    CHAIRs   descriptions with such a mention / descriptions

There is what the image's annotations name, and what people mention in their captions of it. A
mention is the name of a category, or another word for it by the user's file of synonyms, in the
singular or the plural; of names within each other the longest, so that a hot dog is no dog. Every
mention counts. The published figures are with both captions and synonyms.

A file of synonyms has a line for a category: its name first, then other words, between commas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.data.faults import Place, fault
from training.data.records import read_text
from training.evaluation.intervals import Figures, share
from training.evaluation.questions import Files, Question, read_categories

Name = tuple[str, ...]  # of words
_TOKEN = re.compile(r"[^\W_]+|[.,;:!?]")
_PLURALS = {
    "person": "people", "child": "children", "human": "humans", "mouse": "mice", "ox": "oxen",
    "goose": "geese", "sheep": "sheep",
}  # fmt: skip
_ENDINGS = (
    (r"man$", "men"), (r"(s|x|z|ch|sh)$", r"\1es"), (r"([^aeiou])y$", r"\1ies"),
    (r"(i|l)fe?$", r"\1ves"), (r"$", "s"),
)  # fmt: skip


@dataclass(frozen=True)
class Objects:
    """Words by which categories are mentioned.

    Attributes:
        names: lower case, the plurals among them -> the category.
    """

    names: dict[Name, str]

    @classmethod
    def of(cls, files: Files) -> Objects:
        """Those of a benchmark's files.

        Raises:
            DataError: a line of synonyms that begins with no category, or a word for two of them.
        """
        categories = dict.fromkeys(read_categories(files).values())
        names: dict[Name, str] = {}
        for category in categories:
            _add(names, category, category, Place(files.questions))
        if files.synonyms is not None:
            for place, (category, *words) in _lines(files.synonyms):
                if category not in categories:
                    known = ", ".join(categories)
                    raise fault(place, "category", repr(category), f"one of {known}")
                for word in words:
                    _add(names, word, category, place)
        return cls(names)

    def mentions(self, text: str) -> list[str]:
        """The categories that a text mentions, in order, each as often as it does."""
        words, found, at = _words(text), [], 0
        longest = max(map(len, self.names))
        while at < len(words):
            sizes = range(min(longest, len(words) - at), 0, -1)
            parts = (words[at : at + size] for size in sizes)
            name = next((part for part in parts if part in self.names), None)
            if name is not None:
                found.append(self.names[name])
            at += len(name or (None,))
        return found


def chair(questions: Sequence[Question], answers: Sequence[str], objects: Objects) -> Figures:
    """CHAIRi and CHAIRs of descriptions; the share of what is there that they mention; and their
    mentions on average.

    Args:
        questions: their `answers` are names and captions of what is there.
        answers: the descriptions.
        objects: what is looked for.
    """
    counted = []  # of each: mentions, wrong ones, what is there, and what is seen of it
    for question, answer in zip(questions, answers, strict=True):
        truth = {name for text in question.answers for name in objects.mentions(text)}
        said = objects.mentions(answer)
        wrong = sum(name not in truth for name in said)
        counted.append((len(said), wrong, len(truth), len(truth & set(said))))
    mentions, wrong, there, seen = zip(*counted, strict=True) if counted else ((),) * 4
    return {
        "chair_i": share(wrong, mentions),
        "chair_s": share(map(bool, wrong)),
        "recall": share(seen, there),
        "mentions": share(mentions),
    }


def _words(text: str) -> Name:
    return tuple(_TOKEN.findall(text.lower()))


def _add(names: dict[Name, str], word: str, category: str, place: Place) -> None:
    """A word and its plural."""
    *before, last = _words(word)
    for form in (last, plural(last)):
        if names.setdefault((*before, form), category) != category:
            got = f"{word!r} for {category!r} and for {names[*before, form]!r}"
            raise fault(place, "word", got, "a word for one of them")


def plural(word: str) -> str:
    """Of a word that is an English noun."""
    if word in _PLURALS:
        return _PLURALS[word]
    return next(re.sub(end, new, word, count=1) for end, new in _ENDINGS if re.search(end, word))


def _lines(path: Path) -> Iterable[tuple[Place, list[str]]]:
    for number, line in enumerate(read_text(path, "a file of synonyms").splitlines(), 1):
        if words := [word.strip() for word in line.split(",") if _words(word)]:
            yield Place(path, f"line {number}"), words
