"""How does a benchmark go? Questions → prompts → answers on disk → scores, in a folder of its own.

    OUT/settings.json       what was asked of which model: it is only continued with the same
    OUT/predictions.jsonl   one answer a line, in the benchmark's order: {"question_id": 7,
                            "question": "Is there a dog?", "prompt": "Is there a dog?\\nAnswer ...",
                            "answer": "yes", "ended": true}; false: cut at the longest length
    OUT/scores.json         the figures, their confidence intervals, the numbers of questions

Killed and started again, a run goes on after the last whole line. A question that cannot be asked
(a damaged image, words that the processor refuses) has its `fault` in place of an answer; such are
counted as `faulty` and left out of the scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from training.bar import Bar
from training.data.images import open_image
from training.data.records import Place, fault
from training.data.sample import IMAGE_MARK, Sample
from training.evaluation.benchmarks import BENCHMARKS, Benchmark, ask
from training.evaluation.captions import TokenizerName, caption_scores
from training.evaluation.chair import Objects, chair
from training.evaluation.intervals import reported
from training.evaluation.questions import Files, Question, checked
from training.fingerprint import digest, of_files, same_request
from training.generate import Asked, Writer
from training.journal import Journal, write_whole
from training.models import marks_of
from training.settings import ConfigError

PREDICTIONS, SETTINGS, SCORES = "predictions.jsonl", "settings.json", "scores.json"
Line = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What `python -m training eval --benchmark` is told; null fields are the benchmark's own."""

    model: str
    benchmark: str
    files: Files
    out: Path
    batch_size: int = 16
    max_new_tokens: int | None = None
    instruction: str | None = None
    limit: int | None = None  # only the first questions
    tokenizer: TokenizerName = "words"  # of captions

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, expected 1 or more")


def run_benchmark(
    options: Options, load: Callable[[str], tuple[Any, Any]], console: Console | None = None
) -> dict[str, Any]:
    """Ask, answer and score; returns what scores.json holds.

    `load` gives a model on its device and its processor; it is called only if answers are missing.
    """
    benchmark = BENCHMARKS[options.benchmark]
    questions = checked(benchmark.read(options.files), options.files)
    prompts = [ask(benchmark, question, options.instruction) for question in questions]
    most = options.max_new_tokens or benchmark.max_new_tokens
    _claim(options, questions, prompts, most)
    questions = questions[: options.limit]
    lines = Journal(options.out / PREDICTIONS).read()
    if len(lines) < len(questions):
        writer = Writer(*load(options.model), most)
        lines += _write_answers(writer, lines, questions, prompts, options)
    found = _scored(benchmark, options, questions, lines[: len(questions)])
    write_whole(options.out / SCORES, json.dumps(found, indent=1))
    (console or Console()).print(_table(found))
    return found


def _write_answers(
    writer: Writer,
    kept: Sequence[Line],
    questions: Sequence[Question],
    prompts: Sequence[str],
    options: Options,
) -> list[Line]:
    """Answer the questions that have none yet, a batch at a time; what is written of them."""
    done, size, new = len(kept), options.batch_size, []
    journal = Journal(options.out / PREDICTIONS)
    journal.write(kept)  # without a line that was cut short
    with Bar(options.benchmark, len(questions), "questions", done=done) as bar:
        for start in range(done, len(questions), size):
            part = slice(start, min(start + size, len(questions)))
            asked = zip(questions[part], prompts[part], strict=True)
            answers = writer.write([_asked(*pair, options.files.questions) for pair in asked])
            lines = [
                {
                    "question_id": question.id,
                    "question": question.text,
                    "prompt": prompt,
                    "answer": answer.text,
                    "ended": answer.ended,
                    **({"fault": answer.fault} if answer.fault else {}),
                }
                for question, prompt, answer in zip(
                    questions[part], prompts[part], answers, strict=True
                )
            ]
            journal.append(*lines)
            new += lines
            bar.advance(len(answers))
    return new


def _asked(question: Question, prompt: str, file: Path) -> Asked:
    """A question as one user says it: the images, then the words."""
    place, paths = Place(file, id=str(question.id)), question.images
    words = f"{IMAGE_MARK}\n" * len(paths) + prompt
    sample = Sample(place, tuple(map(str, paths)), ((words, ""),), field="question")
    return Asked(
        sample, lambda: [open_image(place, f"image[{i}]", path) for i, path in enumerate(paths)]
    )


def _claim(
    options: Options, questions: Sequence[Question], prompts: Sequence[str], limit: int
) -> None:
    """Note what this folder's answers are answers to, or make sure that it is the same."""
    asked = [
        [question.id, prompt, *(image.name for image in question.images)]
        for question, prompt in zip(questions, prompts, strict=True)
    ]
    images = dict.fromkeys(image for question in questions for image in question.images)
    now = {
        "benchmark": options.benchmark,
        "model": options.model,
        "weights": digest(marks_of(options.model)),
        "questions": str(options.files.questions),
        "asked": digest(asked),
        "images": digest(of_files({str(image): image for image in images})),
        "max_new_tokens": limit,
    }
    same_request(options.out / SETTINGS, now, (options.out / PREDICTIONS).is_file())


def _scored(
    benchmark: Benchmark, options: Options, questions: Sequence[Question], lines: Sequence[Line]
) -> dict[str, Any]:
    """The figures of all questions that could be asked; `DataError` if none could."""
    faults = [line["fault"] for line in lines if "fault" in line]
    pairs = [pair for pair in zip(questions, lines, strict=True) if "fault" not in pair[1]]
    if not pairs:
        got = f"none of {len(faults)} questions that can be asked; the first: {faults[0]}"
        raise fault(Place(options.files.questions), "questions", got, "at least one")
    questions, lines = zip(*pairs, strict=True)
    found: dict[str, Any] = {
        "benchmark": options.benchmark,
        "model": options.model,
        "questions": len(questions),
        "cut": sum(not line["ended"] for line in lines),
    }
    if faults:
        found |= {"faulty": len(faults), "first_fault": faults[0]}
    if not all(question.answers for question in questions):
        return found  # a split whose answers are not published
    score = benchmark.score
    if score is caption_scores:
        score = partial(caption_scores, tokenizer=options.tokenizer)
        found["tokenizer"] = options.tokenizer
    elif score is chair:
        score = partial(chair, objects=Objects.of(options.files))
        found |= {key: _name(getattr(options.files, key)) for key in ("annotations", "synonyms")}
    answers = [line["answer"] for line in lines]
    found |= reported(score(questions, answers), questions)
    kinds = sorted({question.kind for question in questions})
    found["kinds"] = {}
    for kind in kinds if len(kinds) > 1 else ():
        rows = [i for i, question in enumerate(questions) if question.kind == kind]
        some, theirs = [questions[i] for i in rows], [answers[i] for i in rows]
        found["kinds"][kind] = {"questions": len(rows), **reported(score(some, theirs), some)}
    return found


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _table(found: dict[str, Any]) -> Table:
    title = f"{found['benchmark']}: {found['questions']} questions"
    notes = ["below each figure its 95% confidence interval"] if "intervals" in found else []
    notes += [f"{found['cut']} answers cut at max_new_tokens"] if found["cut"] else []
    if "faulty" in found:
        notes.append(
            f"{found['faulty']} questions could not be asked, left out; the first: "
            f"{escape(found['first_fault'])}"
        )
    table = Table(title=title, caption="\n".join(notes) or None)
    if "scores" not in found:
        table.add_column("no answers to compare with: written only")
        return table
    table.add_column("")
    for name in ("questions", *found["scores"]):
        table.add_column(name.replace("_", " "), justify="right")
    for kind, part in {"all": found, **found["kinds"]}.items():
        cells = [_cell(x, part["intervals"].get(name)) for name, x in part["scores"].items()]
        table.add_row(kind, str(part["questions"]), *cells)
    return table


def _cell(value: float, interval: tuple[float, float] | None) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}\n{'-' if interval is None else '{:.3f}-{:.3f}'.format(*interval)}"
