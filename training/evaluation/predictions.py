"""Where are a model's answers kept? One json line each, appended as they come, in order.

    {"question_id": 7, "question": "Is there a dog?", "prompt": "Is there a dog?\\nAnswer ...",
     "answer": "yes", "ended": true}

`ended` is false where the answer was cut at the longest length. The file is complete up to its last
line break whenever the process dies; what comes after that is taken away on the next start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.data.records import Place, fault, parse_json, shown

Line = dict[str, Any]
FIELDS = ("question_id", "question", "answer", "ended")


def read_answers(path: Path) -> list[Line]:
    """The whole lines of a predictions.jsonl, if it is there; `DataError` at one that is no
    answer."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    found = []
    for number, text in enumerate(lines, 1):
        place = Place(path, f"line {number}")
        found.append(parse_json(text, place))
        for name in FIELDS:
            if not isinstance(found[-1], dict) or name not in found[-1]:
                raise fault(place, name, shown(text), f"a line with {', '.join(FIELDS)}")
    return found
