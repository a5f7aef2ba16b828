"""Can this student learn from this teacher? What has to agree, looked at before the first step.

Distillation compares rows and columns of two heads: column k has to be the same token in both, and
row n the same position of the same sample. Published pairs differ in places where nothing fails
(another end of turn, another tile size, one token inserted), so both processors encode probe
samples here, exactly as training encodes its data, and the results are compared. Each finding is
`ok`, a `note` (a difference that training deals with) or a `fault`, with what differs and what to
do. Where ids or pixels of a sample differ and its answers do not, the teacher gets a batch of its
own (`PairReport.own_batch`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from training.anatomy import image_token_id
from training.data.chat import ChatEncoder, row_id
from training.data.item import IGNORE, Item, Seen
from training.data.records import DataError, Place
from training.data.sample import IMAGE_MARK, Sample
from training.data.trial import first_difference
from training.models import CheckpointError

Level = Literal["ok", "note", "fault"]
SHAPES = {"square": (448, 448), "wide": (896, 448), "tall": (448, 896)}  # width, height
TEXT = "What is it? Ein Fuchs, 3½ m: naïve 火 — 'ok'\n\tdef f(x): return x**2  # 1,000"
SHOWN = 5  # examples named in a finding


class Finding(NamedTuple):
    """One line of a report: how bad, about what, and the facts."""

    level: Level
    what: str
    text: str


@dataclass(frozen=True)
class PairReport:
    """What was compared; `own_batch` says that the teacher needs ids or pixels of its own."""

    findings: tuple[Finding, ...]
    own_batch: bool

    def texts(self, *levels: Level) -> str:
        """The findings of these levels in one line."""
        return "; ".join(f"{f.what}: {f.text}" for f in self.findings if f.level in levels)

    def require(self) -> None:
        """Raise `CheckpointError` naming every fault, if there is one."""
        if faults := self.texts("fault"):
            raise CheckpointError(f"teacher and student do not fit: {faults}")

    def __str__(self) -> str:
        width = max(len(finding.what) for finding in self.findings)
        return "\n".join(f"{f.level:<5}  {f.what:<{width}}  {f.text}" for f in self.findings)


def check_pair(
    student: Any, student_processor: Any, teacher: Any, teacher_processor: Any, *, visual: bool
) -> PairReport:
    """Compare two models and their processors.

    Args:
        student, teacher: image-text-to-text models.
        student_processor, teacher_processor: theirs.
        visual: whether a loss compares visual rows.

    Returns:
        The report, faults included; `PairReport.require` raises them.
    """
    report = check_processors(student_processor, teacher_processor, visual=visual)
    sides = (
        _Side("student", student, student_processor),
        _Side("teacher", teacher, teacher_processor),
    )
    found = (*_vocabularies(*sides), *_image_tokens(*sides), *report.findings)
    return PairReport(found, report.own_batch)


def check_processors(student: Any, teacher: Any, *, visual: bool) -> PairReport:
    """The part of `check_pair` that needs no models: what both processors make of samples."""
    tokenizer = student.tokenizer
    found = list(_tokenizers(tokenizer, teacher.tokenizer))
    views, refused = [], []
    for who, processor in (("student", student), ("teacher", teacher)):
        try:
            views.append(_View.of(processor, _answer(tokenizer)))
        except (ValueError, DataError) as error:  # a ConfigError is a ValueError
            refused.append(Finding("fault", f"{who}'s processor", str(error)))
    if refused:
        return PairReport((*found, *refused), own_batch=False)
    ours, theirs = views
    found += [_answers(ours, theirs), _templates(ours, theirs)]
    found += [_pixels(ours, theirs), _rows(ours, theirs, visual)]
    same = ours.ids == theirs.ids and ours.image_id == theirs.image_id
    same = same and all(map(_same_inputs, ours.seen, theirs.seen))
    return PairReport(tuple(found), own_batch=not same)


# --- tokens -------------------------------------------------------------------------------------


class _Side(NamedTuple):
    who: str
    model: Any
    processor: Any


def _tokenizers(ours: Any, theirs: Any) -> Iterator[Finding]:
    """The same text has to become the same ids: column k of both heads is one token."""
    what, (a, b) = "tokenizer", (ours.get_vocab(), theirs.get_vocab())
    names_a, names_b = ({i: token for token, i in vocab.items()} for vocab in (a, b))
    moved = [f"{t!r} is {a[t]} and {b[t]}" for t in sorted(a.keys() & b.keys()) if a[t] != b[t]]
    added = {t.content for tok in (ours, theirs) for t in tok.added_tokens_decoder.values()}
    for i in names_a.keys() & names_b.keys():
        both = {names_a[i], names_b[i]}
        if len(both) == 2 and not both & added and not both & a.keys() & b.keys():
            moved.append(f"{i} is {names_a[i]!r} and {names_b[i]!r}")
    if moved:
        yield Finding(
            "fault",
            what,
            f"{len(moved)} tokens have other ids in the student and the teacher "
            f"({', '.join(moved[:SHOWN])}); take a teacher with the student's tokenizer",
        )
        return
    ids_a, ids_b = (tok(TEXT, add_special_tokens=False).input_ids for tok in (ours, theirs))
    if ids_a != ids_b:
        where = first_difference(ids_a, ids_b)
        text = f"the same vocabulary cuts text in another way: ids {where}; take the same tokenizer"
        yield Finding("fault", what, text)
        return
    yield Finding("ok", what, f"the same ids for the {len(a.keys() & b.keys())} tokens of both")
    for who, vocab, other in (("student", a, b), ("teacher", b, a)):
        if extra := sorted(vocab.keys() - other.keys(), key=vocab.__getitem__):
            yield Finding("note", what, f"only the {who}'s has {_listed(extra, vocab)}")


def _listed(tokens: list[str], vocab: dict[str, int]) -> str:
    more = ", ..." if len(tokens) > SHOWN else ""
    return ", ".join(f"{token!r} ({vocab[token]})" for token in tokens[:SHOWN]) + more


def _vocabularies(ours: _Side, theirs: _Side) -> Iterator[Finding]:
    """Head rows beyond the smaller head are padding, so no token of the student's may be there."""
    what = "vocabulary"
    for who, model, processor in (ours, theirs):
        rows, vocab = model.get_input_embeddings().weight.shape[0], processor.tokenizer.get_vocab()
        if max(vocab.values()) >= rows:
            last = _listed([max(vocab, key=vocab.__getitem__)], vocab)
            text = f"the {who}'s has {last}, its model {rows} embeddings"
            yield Finding("fault", what, f"{text}; resize them or take its own processor")
    heads = [side.model.get_output_embeddings().weight.shape[0] for side in (ours, theirs)]
    shared, vocab = min(heads), ours.processor.tokenizer.get_vocab()
    known = set(range(shared)) | {image_token_id(ours.model)}
    if beyond := [
        token for token in sorted(vocab, key=vocab.__getitem__) if vocab[token] not in known
    ]:
        text = (
            f"heads of {heads[0]} and {heads[1]} rows share {shared}, and the student's tokenizer "
            f"has {len(beyond)} tokens beyond: {_listed(beyond, vocab)}; take a teacher that has "
            "them"
        )
        yield Finding("fault", what, text)
        return
    cut = "" if heads[0] == heads[1] else f", the first {shared} are compared"
    yield Finding("note" if cut else "ok", what, f"heads of {heads[0]} and {heads[1]} rows{cut}")


def _image_tokens(*sides: _Side) -> list[Finding]:
    found, ids = [], [image_token_id(side.model) for side in sides]
    for (who, _, processor), expected in zip(sides, ids, strict=True):
        if (got := row_id(processor)) != expected:
            text = f"the {who}'s model has id {expected}, its processor {got}; they are no pair"
            found.append(Finding("fault", "image token", text))
    level: Level = "ok" if ids[0] == ids[1] else "note"
    return found or [Finding(level, "image token", f"ids {ids[0]} and {ids[1]}")]


# --- samples ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """What one processor makes of the probes."""

    processor: Any
    item: Item  # a conversation of two turns and an image
    image_id: int
    seen: list[Seen]  # of one image of each shape

    @classmethod
    def of(cls, processor: Any, answer: str) -> _View:
        encoder = ChatEncoder(processor)
        rng = np.random.default_rng(0)
        shapes = [(height, width, 3) for width, height in SHAPES.values()]
        images = [
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), "RGB") for shape in shapes
        ]
        seen = [encoder.see([image]) for image in images]
        turns = ((f"{IMAGE_MARK}\n{answer}", answer), (answer, answer))
        item = encoder.item(Sample(Place(Path("probe")), ("",), turns), seen[0])
        return cls(processor, item, encoder.image_id, seen)

    @property
    def ids(self) -> list[int]:
        """Every id of the conversation."""
        return self.item["input_ids"].tolist()

    @property
    def text(self) -> list[int]:
        """Without the image's."""
        return [i for i in self.ids if i != self.image_id]

    @property
    def answers(self) -> list[int]:
        """The labels."""
        return self.item["labels"][self.item["labels"] != IGNORE].tolist()


def _answer(tokenizer: Any) -> str:
    """A text both as question and as answer, of words that the tokenizer knows."""
    text = "A red square."
    if tokenizer.unk_token_id in tokenizer(text, add_special_tokens=False).input_ids:
        words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
        text = tokenizer.decode([max(words)])
    return text


def _answers(ours: _View, theirs: _View) -> Finding:
    """The rows of the response terms, one to one."""
    said = [view.processor.tokenizer.decode(view.answers) for view in (ours, theirs)]
    if ours.answers == theirs.answers:
        last = ours.processor.tokenizer.decode(ours.answers[-1:])
        return Finding("ok", "answers", f"the same ids, ended by {last!r}")
    return Finding(
        "fault",
        "answers",
        f"the student learns {said[0]!r} and the teacher {said[1]!r} of the same conversation; "
        "give both processors one chat_template",
    )


def _templates(ours: _View, theirs: _View) -> Finding:
    if ours.text == theirs.text:
        return Finding("ok", "chat template", "the same text")
    where = first_difference(ours.text, theirs.text, ours.processor.tokenizer.decode)
    return Finding("note", "chat template", f"{where}; each model gets its own ids")


def _pixels(ours: _View, theirs: _View) -> Finding:
    """The tensors of the probes; where they differ, the settings that differ explain it."""
    if all(map(_same_inputs, ours.seen, theirs.seen)):
        return Finding("ok", "image processor", "the same pixels")
    a, b = (view.processor.image_processor.to_dict() for view in (ours, theirs))
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    why = ", ".join(f"{key} {a.get(key)} and {b.get(key)}" for key in keys[:SHOWN]) or "other code"
    return Finding("note", "image processor", f"{why}; each model gets its own pixels")


def _same_inputs(ours: Seen, theirs: Seen) -> bool:
    a, b = ours.inputs, theirs.inputs
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _rows(ours: _View, theirs: _View, visual: bool) -> Finding:
    """Rows of images of several shapes: those of the visual terms, one to one."""
    counts = [[seen.lens[0] for seen in view.seen] for view in (ours, theirs)]
    pairs = zip(SHAPES, *counts, strict=True)
    if counts[0] == counts[1]:
        return Finding("ok", "visual rows", ", ".join(f"{shape} {n}" for shape, n, _ in pairs))
    text = ", ".join(f"{shape} {n} and {m}" for shape, n, m in pairs)
    if not visual:
        return Finding("note", "visual rows", f"{text}; no visual term compares them")
    text += "; weigh the terms over visual rows with 0, or take a teacher whose images have as many"
    return Finding("fault", "visual rows", text)
