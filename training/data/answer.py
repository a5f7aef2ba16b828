"""What would the teacher say? It answers a data set's questions, and a student learns from that.

Data-driven distillation (LLAVADI): the answers of a data set, or of questions that have none yet,
are written by the teacher, and the same form comes out (`training.data.rewrite`), to train on. In a
conversation of several turns the teacher answers one question after the other, after its own
earlier answers, as LLAVADI's code does and as the student will read them; `history="data"` gives it
the data's own answers instead.

    OUT/request.json    what was asked of which teacher: it is only continued with the same
    OUT/answers.jsonl   a line for each batch, appended when it is answered
    OUT/data.json       the result, named by its form; OUT/report.json how it went

Killed and started again it goes on after the last whole batch, and ends in the same files. Left out
of the result, and counted in the report: entries that cannot be asked, and conversations in which
an answer was empty, spelt out a control token, or was cut at `max_new_tokens` (those stay with
`keep_cut`: who learns from them stops in the middle of a sentence).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from training.bar import Bar
from training.data.check import reason_of
from training.data.controls import Controls
from training.data.dataset import present
from training.data.records import DataError, Place, fault, shown
from training.data.rewrite import open_entries
from training.data.sample import IMAGE_MARK, Sample
from training.fingerprint import digest, of_file, of_files, of_folder, same_request
from training.generate import Answer, Asked, Writer, load
from training.journal import Journal, write_whole
from training.lock import held
from training.models import marks_of
from training.settings import ConfigError

REQUEST, ANSWERS, REPORT = "request.json", "answers.jsonl", "report.json"
Load = Callable[[str], tuple[Any, Any]]


@dataclass(frozen=True)
class Request:
    """What `python -m training data answer` is told; `ConfigError` at a value out of range."""

    teacher: str  # folder or hub name of any image-text-to-text model
    data: str  # as data.sources.path; the last question of an entry may be open
    out: Path
    image_root: str = "."
    batch_size: int = 16
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    history: Literal["own", "data"] = "own"
    keep_cut: bool = False
    limit: int | None = None  # only the first entries

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("limit", self.limit is None or self.limit >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("history", self.history in ("own", "data"), "'own' or 'data'"),
        ):
            if not fits:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected {expected}")


@dataclass
class Report:
    """How it went: numbers of entries, and of the questions that were answered."""

    teacher: str
    data: str
    entries: int = 0
    written: int = 0  # entries of the result
    questions: int = 0
    unchanged: int = 0  # answers that are the data's own
    cut: int = 0  # answers that were cut at max_new_tokens
    empty: int = 0
    faulty: int = 0  # entries that cannot be asked, or whose answer cannot be learned
    reasons: dict[str, int] = field(default_factory=dict)  # of those
    examples: dict[str, str] = field(default_factory=dict)

    def add_fault(self, message: str) -> None:
        """Count an entry that is left out for its fault."""
        reason = reason_of(message)
        self.faulty += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.examples.setdefault(reason, message)


def answer(request: Request, load: Load = load) -> tuple[Path, Report]:
    """Have the teacher answer a data set; returns where the result is, and how it went.

    Args:
        request: what is asked.
        load: gives a model on its device and its processor; called only if answers are missing.

    Raises:
        ConfigError: `out` holds answers to something else or is in use, or the teacher cannot be
            asked (`training.generate.Writer`).
        CheckpointError: there is no such teacher.
        DataError: the data cannot be read, or nothing is left of it.
    """
    with held(request.out, "--out"):
        return _Answering(request, load).run()


class _Answering:
    """A data set on its way; `said` has the answers so far of the entries that are still in."""

    def __init__(self, request: Request, load: Load) -> None:
        self.request, self.load = request, load
        self.entries = open_entries(request.data, request.image_root)
        self.report = Report(request.teacher, request.data)
        self.samples: dict[int, Sample] = {}
        looked: dict[str, str | None] = {}
        for i, entry in enumerate(self.entries.samples()[: request.limit]):
            self.report.entries += 1
            try:
                self.samples[i] = present(self.entries.source, entry, looked)
            except DataError as error:
                self.report.add_fault(str(error))
        self.said: dict[int, list[str]] = {i: [] for i in self.samples}
        self.writer: Writer | None = None

    def run(self) -> tuple[Path, Report]:
        """Ask, write, report."""
        out, report = self.request.out, self.report
        self._check_left("entries that can be asked")
        journal = Journal(out / ANSWERS)
        kept = journal.read()
        same_request(out / REQUEST, self._identity(), bool(kept))
        journal.write(kept)  # without a line that was cut short
        total = sum(len(sample.turns) for sample in self.samples.values())
        done = sum(len(line["entries"]) for line in kept)
        with Bar("answers", total, "questions", done=done) as bar:
            for number, batch in enumerate(self._batches()):
                if number >= len(kept):
                    answers = self._written(batch, number)
                    journal.append({"entries": batch, "answers": answers})
                    bar.advance(len(batch))
                else:
                    answers = [Answer(*one) for one in kept[number]["answers"]]
                for i, one in zip(batch, answers, strict=True):
                    self._take(i, one)
        report.written = len(self.said)
        write_whole(out / REPORT, json.dumps(asdict(report), indent=1))
        self._check_left("entries whose answers can be learned")
        self.entries.write(out, {i: _with(self.samples[i], said) for i, said in self.said.items()})
        return out / self.entries.name, report

    def _batches(self) -> Iterator[list[int]]:
        """Entries to be asked together: all for their first answers, the rest for their second."""
        size = self.request.batch_size
        for turn in range(max(len(sample.turns) for sample in self.samples.values())):
            asked = [i for i in self.said if len(self.samples[i].turns) > turn]
            yield from (asked[at : at + size] for at in range(0, len(asked), size))

    def _written(self, batch: Sequence[int], number: int) -> list[Answer]:
        """The teacher's next answers to some entries."""
        request = self.request
        if self.writer is None:
            self.writer = Writer(
                *self.load(request.teacher),
                request.max_new_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
            )
            self.controls = Controls(self.writer.processor)
        asked = [self._asked(i) for i in batch]
        answers = self.writer.write(asked, seed=request.seed * 1_000_003 + number)
        return [_learnable(*pair, self.controls) for pair in zip(answers, asked, strict=True)]

    def _asked(self, i: int) -> Asked:
        sample, said, source = self.samples[i], self.said[i], self.entries.source
        if self.request.history == "data":
            said = [answer for _, answer in sample.turns[: len(said)]]
        asked = sample.asked(said)

        def images() -> list[Image.Image]:
            return source.images(sample)[: len(asked.images)]

        return Asked(asked, images, source.identity)

    def _take(self, i: int, answer: Answer) -> None:
        """Keep an answer, or leave its entry out."""
        report, said = self.report, self.said[i]
        if answer.fault:
            report.add_fault(answer.fault)
            del self.said[i]
            return
        report.questions += 1
        report.cut += not answer.ended
        report.empty += not answer.text
        report.unchanged += answer.text == self.samples[i].turns[len(said)][1].strip()
        if answer.text and (answer.ended or self.request.keep_cut):
            said.append(answer.text)
        else:
            del self.said[i]

    def _check_left(self, expected: str) -> None:
        if not self.said:
            report = self.report
            got = f"none of {report.entries} ({report.cut} cut, {report.empty} empty answers)"
            first = next(iter(report.examples.values()), "")
            why = f"; the first fault: {first}" if first else ""
            raise fault(Place(Path(report.data)), "entries", f"{got}{why}", expected)

    def _identity(self) -> dict[str, Any]:
        """All that decides the answers."""
        request, data = self.request, Path(self.request.data)
        root = Path(request.image_root)
        names = dict.fromkeys(name for one in self.samples.values() for name in one.images)
        images = {name: root / name for name in names if not name.startswith("data:")}
        marks = of_folder(data) if data.is_dir() else of_file(data) if data.is_file() else ""
        return {
            **{name: value for name, value in asdict(request).items() if name != "out"},
            "weights": digest(marks_of(request.teacher)),
            "content": digest(marks),
            "images": digest(of_files({n: path for n, path in images.items() if path.is_file()})),
        }


def _learnable(answer: Answer, asked: Asked, controls: Controls) -> Answer:
    """The answer, or as a fault one that spells out a control token, which no data may."""
    sample = asked.sample
    if answer.fault or not (IMAGE_MARK in answer.text or controls.pattern.search(answer.text)):
        return answer
    field = sample.field.format(sample.first + 2 * len(sample.turns) - 1)
    expected = "an answer without the model's own tokens"
    return Answer("", True, str(fault(sample.place, field, shown(answer.text), expected)))


def _with(sample: Sample, said: Sequence[str]) -> Sample:
    turns = zip((question for question, _ in sample.turns), said, strict=True)
    return replace(sample, turns=tuple(turns))
