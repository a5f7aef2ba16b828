"""How does a benchmark go? Questions → prompts → answers on disk → scores, in a folder of its own.

    OUT/settings.json       what was asked of which model: it is only continued with the same
    OUT/predictions.jsonl   one answer a line, in the benchmark's order
    OUT/scores.json         the figures, with the numbers of questions behind them

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
from training.data.records import DataError, Place, fault
from training.evaluation.benchmarks import BENCHMARKS, Benchmark, ask
from training.evaluation.captions import TokenizerName, caption_scores
from training.evaluation.chair import Objects, chair
from training.evaluation.generate import Answer, Prompt, Writer
from training.evaluation.predictions import Line, Predictions
from training.evaluation.questions import Files, Question, checked
from training.fingerprint import MODEL_FILES, digest, of_files, of_folder
from training.journal import write_whole
from training.settings import ConfigError

PREDICTIONS, SETTINGS, SCORES = "predictions.jsonl", "settings.json", "scores.json"


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
        if self.benchmark not in BENCHMARKS:
            names = ", ".join(BENCHMARKS)
            raise ConfigError(f"benchmark: got {self.benchmark!r}, expected one of {names}")
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
    prompts = [
        Prompt(ask(benchmark, question, options.instruction), question.images, place)
        for question in questions
        for place in [Place(options.files.questions, id=str(question.id))]
    ]
    most = options.max_new_tokens or benchmark.max_new_tokens
    _claim(options, questions, prompts, most)
    questions = questions[: options.limit]
    kept = Predictions(options.out / PREDICTIONS)
    if kept.check(questions) < len(questions):
        writer = Writer(*load(options.model), most)
        _write_answers(writer, kept, questions, prompts, options)
    found = _scored(benchmark, options, questions, kept.lines[: len(questions)])
    write_whole(options.out / SCORES, json.dumps(found, indent=1))
    (console or Console()).print(_table(found))
    return found


def _write_answers(
    writer: Writer,
    kept: Predictions,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    options: Options,
) -> None:
    """Answer the questions that have none yet, a batch at a time."""
    done, size = len(kept.lines), options.batch_size
    with Bar(options.benchmark, len(questions), "questions", done=done) as bar:
        for start in range(done, len(questions), size):
            part = slice(start, min(start + size, len(questions)))
            answers = _answers(writer, prompts[part])
            kept.append(
                {
                    "question_id": question.id,
                    "question": question.text,
                    "prompt": prompt.text,
                    "answer": answer.text,
                    "ended": answer.ended,
                    **({"fault": answer.fault} if answer.fault else {}),
                }
                for question, prompt, answer in zip(
                    questions[part], prompts[part], answers, strict=True
                )
            )
            bar.advance(len(answers))


def _answers(writer: Writer, prompts: Sequence[Prompt]) -> list[Answer]:
    """Answers, or faults of the prompts that cannot be asked: each alone, where a batch fails."""
    try:
        return writer.write(prompts)
    except DataError as error:
        if len(prompts) == 1:
            return [Answer("", True, str(error))]
    return [answer for prompt in prompts for answer in _answers(writer, [prompt])]


def _claim(
    options: Options, questions: Sequence[Question], prompts: Sequence[Prompt], limit: int
) -> None:
    """Note what this folder's answers are answers to, or make sure that it is the same."""
    asked = [
        [question.id, prompt.text, *(image.name for image in prompt.images)]
        for question, prompt in zip(questions, prompts, strict=True)
    ]
    model = Path(options.model)
    images = dict.fromkeys(image for prompt in prompts for image in prompt.images)
    now = {
        "benchmark": options.benchmark,
        "model": options.model,
        "weights": digest(of_folder(model, MODEL_FILES)) if model.is_dir() else None,
        "questions": str(options.files.questions),
        "asked": digest(asked),
        "images": digest(of_files({str(image): image for image in images})),
        "max_new_tokens": limit,
    }
    file = options.out / SETTINGS
    if file.is_file() and (options.out / PREDICTIONS).is_file():
        before = json.loads(file.read_text())
        changed = [
            f"{key}: {before.get(key)!r} -> {value!r}"
            for key, value in now.items()
            if before.get(key) != value
        ]
        if changed:
            raise ConfigError(
                f"--out: {options.out} holds answers to something else ({'; '.join(changed)}); "
                "remove the folder or name another"
            )
    write_whole(file, json.dumps(now, indent=1))


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
    found["scores"] = score(questions, answers)
    kinds = sorted({question.kind for question in questions})
    found["kinds"] = {}
    for kind in kinds if len(kinds) > 1 else ():
        rows = [i for i, question in enumerate(questions) if question.kind == kind]
        values = score([questions[i] for i in rows], [answers[i] for i in rows])
        found["kinds"][kind] = {"questions": len(rows), **values}
    return found


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _table(found: dict[str, Any]) -> Table:
    title = f"{found['benchmark']}: {found['questions']} questions"
    notes = [f"{found['cut']} answers cut at max_new_tokens"] if found["cut"] else []
    if "faulty" in found:
        notes.append(
            f"{found['faulty']} questions could not be asked, left out; the first: "
            f"{escape(found['first_fault'])}"
        )
    table = Table(title=title, caption="\n".join(notes) or None)
    if "scores" not in found:
        table.add_column("no answers to compare with: written only")
        return table
    rows = {"all": {"questions": found["questions"], **found["scores"]}, **found["kinds"]}
    table.add_column("")
    for name in rows["all"]:
        table.add_column(name.replace("_", " "), justify="right")
    for kind, values in rows.items():
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in values.values()]
        table.add_row(kind, *cells)
    return table
