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

import mllmkd_kernels as mk
from training.anatomy import image_token_id, positions
from training.data.chat import ChatEncoder
from training.data.item import IGNORE, Item, Seen
from training.data.records import IMAGE_MARK, DataError, Place, Sample
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
    student: Any,
    student_processor: Any,
    teacher: Any,
    teacher_processor: Any,
    *,
    visual: bool,
    max_length: int = 0,
) -> PairReport:
    """Compare two models and their processors.

    Args:
        student, teacher: image-text-to-text models; each runs once on two text tokens.
        student_processor, teacher_processor: theirs.
        visual: whether a loss compares visual rows.
        max_length: most tokens of a sample; 0 where it is not known.

    Returns:
        The report, faults included; `PairReport.require` raises them.
    """
    report = check_processors(student_processor, teacher_processor, visual=visual)
    both = _Both(student_processor.tokenizer, teacher_processor.tokenizer)
    found = [*_vocabularies(both, student, teacher), *_heads(student, teacher)]
    found += _image_tokens(student, student_processor, teacher, teacher_processor)
    found += _positions(student, teacher, max_length)
    return PairReport((*found, *report.findings), report.own_batch)


def check_processors(student: Any, teacher: Any, *, visual: bool) -> PairReport:
    """The part of `check_pair` that needs no models: what both processors make of samples."""
    both = _Both(student.tokenizer, teacher.tokenizer)
    found = list(_tokenizers(both))
    views, refused = [], []
    for who, processor in (("student", student), ("teacher", teacher)):
        try:
            views.append(_View.of(processor, _answer(both.ours)))
        except (ValueError, DataError) as error:  # a ConfigError is a ValueError
            refused.append(Finding("fault", f"{who}'s processor", str(error)))
    if refused:
        return PairReport((*found, *refused), own_batch=False)
    ours, theirs = views
    found += [_answers(ours, theirs, both), _templates(ours, theirs, both)]
    found += [_pixels(ours, theirs), _rows(ours, theirs, visual)]
    same = ours.ids == theirs.ids and ours.image_id == theirs.image_id
    same = same and all(map(_same_inputs, ours.seen, theirs.seen))
    return PairReport(tuple(found), own_batch=not same)


# --- tokens -------------------------------------------------------------------------------------


class _Both(NamedTuple):
    ours: Any
    theirs: Any


def _tokenizers(both: _Both) -> Iterator[Finding]:
    """The same text has to become the same ids: column k of both heads is one token."""
    a, b = both.ours.get_vocab(), both.theirs.get_vocab()
    what = "tokenizer"
    moved = sorted(token for token in a.keys() & b.keys() if a[token] != b[token])
    names_a, names_b = ({i: token for token, i in vocab.items()} for vocab in (a, b))
    added = {t.content for tok in both for t in tok.added_tokens_decoder.values()}
    renamed = [i for i in names_a.keys() & names_b.keys() if names_a[i] != names_b[i]]
    clashes = [i for i in renamed if not {names_a[i], names_b[i]} & (added | set(moved))]
    if moved or clashes:
        shown = [f"{t!r} is {a[t]} and {b[t]}" for t in moved[:SHOWN]]
        shown += [f"{i} is {names_a[i]!r} and {names_b[i]!r}" for i in clashes[:SHOWN]]
        yield Finding(
            "fault",
            what,
            f"{len(moved) + len(clashes)} tokens have other ids in the student and the teacher "
            f"({', '.join(shown[:SHOWN])}); take a teacher with the student's tokenizer",
        )
        return
    ids_a, ids_b = (tok(TEXT, add_special_tokens=False).input_ids for tok in both)
    if ids_a != ids_b:
        where = first_difference(ids_a, ids_b)
        text = f"the same vocabulary cuts text in another way: ids {where}; take the same tokenizer"
        yield Finding("fault", what, text)
        return
    yield Finding("ok", what, f"the same ids for the {len(a.keys() & b.keys())} tokens of both")
    for who, extra in (("student", a.keys() - b.keys()), ("teacher", b.keys() - a.keys())):
        if extra:
            vocab = a if who == "student" else b
            listed = [f"{t!r} ({vocab[t]})" for t in sorted(extra, key=vocab.__getitem__)[:SHOWN]]
            more = ", ..." if len(extra) > SHOWN else ""
            yield Finding("note", what, f"only the {who}'s has {', '.join(listed)}{more}")
    yield _special(both)


def _special(both: _Both) -> Finding:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    pairs = [(name, *(getattr(tok, name) for tok in both)) for name in names]
    odd = [f"{name} {mine!r} and {other!r}" for name, mine, other in pairs if mine != other]
    if odd:
        return Finding("note", "special tokens", f"{', '.join(odd)}; the answers decide, below")
    return Finding("ok", "special tokens", "the same")


def _vocabularies(both: _Both, student: Any, teacher: Any) -> Iterator[Finding]:
    """Head rows beyond the smaller head are padding, so no token may be there."""
    heads = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    shared = min(heads)
    images = [image_token_id(model) for model in (student, teacher)]
    beyond = {}
    for who, tok, image, model in zip(
        ("student", "teacher"), both, images, (student, teacher), strict=True
    ):
        rows = model.get_input_embeddings().weight.shape[0]
        vocab = tok.get_vocab()
        if max(vocab.values()) >= rows:
            token = max(vocab, key=vocab.__getitem__)
            text = f"the {who}'s has id {vocab[token]} ({token!r}), its model {rows} embeddings"
            yield Finding("fault", "vocabulary", f"{text}; resize them or take its own processor")
        beyond[who] = sorted((i, t) for t, i in vocab.items() if i >= shared and i != image)
    if beyond["student"]:
        shown = ", ".join(f"{token!r} ({i})" for i, token in beyond["student"][:SHOWN])
        yield Finding(
            "fault",
            "vocabulary",
            f"heads of {heads[0]} and {heads[1]} rows share {shared}, and the student's tokenizer "
            f"has {len(beyond['student'])} tokens beyond ({shown}); take a teacher that has them",
        )
        return
    cut = "" if heads[0] == heads[1] else f", the first {shared} are compared"
    level: Level = "note" if cut else "ok"
    yield Finding(level, "vocabulary", f"heads of {heads[0]} and {heads[1]} rows{cut}")


def _image_tokens(student: Any, processor_s: Any, teacher: Any, processor_t: Any) -> list[Finding]:
    found = []
    for who, model, processor in (
        ("student", student, processor_s),
        ("teacher", teacher, processor_t),
    ):
        expected, got = image_token_id(model), getattr(processor, "image_token_id", None)
        if got is not None and got != expected:
            text = f"the {who}'s model has id {expected}, its processor {got}; they are no pair"
            found.append(Finding("fault", "image token", text))
    ids = image_token_id(student), image_token_id(teacher)
    if found:
        return found
    if ids[0] == ids[1]:
        return [Finding("ok", "image token", f"id {ids[0]}")]
    return [Finding("note", "image token", f"ids {ids[0]} and {ids[1]}")]


def _positions(student: Any, teacher: Any, max_length: int) -> list[Finding]:
    """Whether a sample may be longer than either model was made for."""
    known = [positions(model.config) for model in (student, teacher)]
    text = " and ".join("unknown" if n is None else f"{n:,}" for n in known)
    if any(n is not None and n < max_length for n in known):
        text += f"; data.max_length allows samples of {max_length:,} tokens"
        return [Finding("note", "positions", text)]
    return [Finding("ok", "positions", text)]


# --- heads --------------------------------------------------------------------------------------


@torch.no_grad()
def _heads(student: Any, teacher: Any) -> list[Finding]:
    """Both models run up to their heads on two text tokens, which says widths and soft-caps."""
    heads, found = [], []
    for who, model in (("student", student), ("teacher", teacher)):
        text = [i for i in range(3) if i != image_token_id(model)][:2]
        tokens = torch.tensor([text], device=model.device)
        try:
            mask = torch.ones_like(tokens)
            heads.append(mk.head_inputs(model, input_ids=tokens, attention_mask=mask))
        except (TypeError, ValueError) as error:
            found.append(Finding("fault", f"{who}'s head", str(error)))
    if found:
        return found
    widths = [head.hidden.shape[-1] for head in heads]
    found.append(Finding("ok", "hidden size", f"{widths[0]} from {widths[1]}"))
    caps = [head.softcap for head in heads]
    level: Level = "ok" if caps[0] == caps[1] else "note"
    if any(caps):
        text = f"{caps[0]} and {caps[1]}; the loss applies each to its own logits"
        found.append(Finding(level, "soft-cap", text))
    return found


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
        return cls(processor, item, processor.image_token_id, seen)

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


def _answers(ours: _View, theirs: _View, both: _Both) -> Finding:
    """The rows of the response terms, one to one."""
    if ours.answers == theirs.answers:
        return Finding("ok", "answers", f"the same ids, ended by {_last(ours, both.ours)!r}")
    return Finding(
        "fault",
        "answers",
        f"the student learns {both.ours.decode(ours.answers)!r} and the teacher "
        f"{both.theirs.decode(theirs.answers)!r} of the same conversation; give both processors "
        "one chat_template",
    )


def _last(view: _View, tokenizer: Any) -> str:
    return tokenizer.decode(view.answers[-1:])


def _templates(ours: _View, theirs: _View, both: _Both) -> Finding:
    if ours.text == theirs.text:
        return Finding("ok", "chat template", "the same text")
    where = first_difference(ours.text, theirs.text, both.ours.decode)
    return Finding("note", "chat template", f"{where}; each model gets its own ids")


def _pixels(ours: _View, theirs: _View) -> Finding:
    """The tensors of the probes; where they differ, the settings that differ explain it."""
    if all(map(_same_inputs, ours.seen, theirs.seen)):
        return Finding("ok", "image processor", "the same pixels")
    a, b = (_settings(view.processor.image_processor) for view in (ours, theirs))
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    odd = [f"{key} {a.get(key)} and {b.get(key)}" for key in keys]
    why = ", ".join(odd[:SHOWN]) or "other code"
    return Finding("note", "image processor", f"{why}; each model gets its own pixels")


def _settings(image_processor: Any) -> dict[str, Any]:
    names = ("processor_class", "image_processor_type")
    return {key: v for key, v in image_processor.to_dict().items() if key not in names}


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
