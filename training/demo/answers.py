"""What do models answer to the students' questions? The teacher, for students to learn from; and a
student, whose wrong answers are the worse ones of pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.data.answer import Request, answer
from training.demo.config import DemoConfig
from training.demo.tell import say
from training.journal import write_whole


def answer_questions(
    demo: DemoConfig, model: Path, out: Path, *, keep_cut: bool = False
) -> list[dict[str, Any]]:
    """A model's answers to the students' questions, in `out`, written or reused: the entries."""
    request = Request(
        str(model),
        str(demo.split("student_questions")),
        out,
        image_root=str(demo.images),
        batch_size=256,
        max_new_tokens=16,
        keep_cut=keep_cut,
    )
    path, found = answer(request)
    say(f"{path}: {found.written} of {found.entries} questions answered")
    return json.loads(path.read_text(encoding="utf-8"))


def write_pairs(demo: DemoConfig, model: Path, out: Path) -> Path:
    """Pairs to learn a preference from, in `out`: the teacher's answers, and those of `model` where
    they differ. Who does not end an answer is to learn that too.
    """
    own = {entry["id"]: said(entry) for entry in answer_questions(demo, model, out, keep_cut=True)}
    pairs = [
        {**entry, "rejected": own[entry["id"]]}
        for entry in json.loads(demo.answered.read_text(encoding="utf-8"))
        if own.get(entry["id"]) not in (None, said(entry))
    ]
    write_whole(out / "pairs.json", json.dumps(pairs))
    return out / "pairs.json"


def said(entry: dict[str, Any]) -> str:
    """The last answer of an entry."""
    return entry["conversations"][-1]["value"]
