"""Where are a model's answers kept? One json line each, appended as they come, in order.

    {"question_id": 7, "question": "Is there a dog?", "prompt": "Is there a dog?\\nAnswer ...",
     "answer": "yes", "ended": true}

`ended` is false where the answer was cut at the longest length. The file is complete up to its last
line break whenever the process dies; what comes after that is taken away on the next start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from training.data.records import Place, fault
from training.evaluation.questions import Question
from training.journal import writing

Line = dict[str, Any]
FIELDS = {"question_id": (int, str), "question": str, "answer": str, "ended": bool}


class Predictions:
    """A predictions.jsonl, read if it is there.

    Raises:
        DataError: a whole line of the file is not an answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        if not path.is_file():
            return
        whole, newline, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            with path.open("r+b") as file:
                file.truncate(len(whole) + len(newline))
        for number, text in enumerate(whole.decode("utf-8").splitlines(), 1):
            self.lines.append(_checked(text, Place(path, f"line {number}")))

    def append(self, lines: Iterable[Line]) -> None:
        """Add answers, and see them onto the disk."""
        new = list(lines)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in new)
            file.flush()
            os.fsync(file.fileno())
        self.lines += new

    def check(self, questions: Sequence[Question]) -> int:
        """How many answers there are; a `DataError` if one is to another question."""
        for number, (line, question) in enumerate(zip(self.lines, questions, strict=False), 1):
            if line["question_id"] != question.id:
                place = Place(self.path, f"line {number}")
                raise fault(place, "question_id", repr(line["question_id"]), repr(question.id))
        return len(self.lines)


def _checked(text: str, place: Place) -> Line:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise fault(place, "json", error.msg, "one answer a line") from None
    for name, kind in FIELDS.items():
        if not isinstance(line, dict) or not isinstance(line.get(name), kind):
            raise fault(place, name, f"{text:.80}", f"a line with {', '.join(FIELDS)}")
    return line
