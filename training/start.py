"""What is looked at before the first step of a run, and of a stage? What is wrong with a later
stage is better known now than after hours of an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mllmkd_kernels.experts import routers
from mllmkd_kernels.methods.stage import PROJECTOR
from mllmkd_kernels.objective import Objective
from mllmkd_kernels.rows import PAIR, UNITS, kind_of
from training import settings
from training.anatomy import anatomy, positions
from training.config import Config, require
from training.data.load import require_data
from training.data.records import DataError
from training.evaluation.chance import against_chance
from training.models import DTYPES, Processor, Vlm, build_model, build_processor, load_vlm
from training.pairs import check_pair
from training.teacher_cache.use import open_rows, stored_stages

Say = Callable[[str], None]


@dataclass(frozen=True)
class Teacher:
    """A model in memory; its processor where it needs batches of its own."""

    model: Vlm
    processor: Processor | None


def start(config: Config, stages: Sequence[str], say: Say) -> tuple[Vlm, Processor, Teacher | None]:
    """The student with its processor, and the teacher that one of these stages of the run needs,
    checked against each other and against what the stages ask. Where no stage is left, the
    processor alone.

    Raises:
        ConfigError: a stage has no data, or cannot make of the student what it asks.
        CheckpointError: a model is not there, or the two do not fit.
    """
    if not stages:
        return None, build_processor(config.model), None
    for name in stages:
        require_data(config.data, config.table[name].data)
    for note in _idle(config):
        say(note)
    model, processor = build_model(config.model, config.seed)
    _check_students(config, model)
    return model, processor, _teacher(config, stages, model, processor, say)


def check(config: Config, say: Say = print, ask: int | None = None) -> None:
    """What `run` looks at before its first step, and, asked so many samples, whether the teacher
    has anything to give (`training.evaluation.chance`).
    """
    _, processor, teacher = start(config, config.stages, say)
    if ask is not None:
        path = require(config.teacher, "teacher", "--ask asks one")
        asked = teacher or Teacher(*load_vlm(path, dtype=DTYPES[config.teacher_dtype]))
        for line in against_chance(config, asked.model, asked.processor or processor, ask):
            say(line)
    elif teacher is None:
        say(f"no stage of {', '.join(config.stages)} compares with a teacher: nothing to check")


def _idle(config: Config) -> Iterator[str]:
    """A note for each stage that trains the projector under an LM that nobody has trained yet."""
    if config.model.path is not None or config.model.language is not None:
        return
    for number, name in enumerate(config.stages, 1):
        if config.table[name].trains != PROJECTOR:
            return
        yield (
            f"{number}-{name}: trains the projector alone under a language model of random "
            "weights, which teaches next to nothing: leave the stage out or give it few steps, "
            "or set model.language"
        )


def _teacher(
    config: Config, stages: Sequence[str], model: Vlm, processor: Processor, say: Say
) -> Teacher | None:
    """The teacher that one of the stages needs, checked against the student."""
    stored = [name for name in stored_stages(config) if name in stages]
    for name in stored:
        open_rows(config, name)
    needs = {name: config.objective(name).needs for name in stages if name not in stored}
    needs = {name: need for name, need in needs.items() if need.teacher}
    if not needs:
        return None
    path = require(config.teacher, "teacher", f"stage {next(iter(needs))} compares with a teacher")
    teacher, its_processor = load_vlm(path, dtype=DTYPES[config.teacher_dtype])
    visual = any(need.visual for need in needs.values())
    report = check_pair(model, processor, teacher, its_processor, visual=visual)
    say(str(report))
    report.require()
    return Teacher(teacher, its_processor if report.own_batch else None)


def _check_students(config: Config, model: Vlm) -> None:
    """What a later stage makes of the student, trains of it or reads in it has to be possible."""
    found, parts, made = model.config, anatomy(model), False
    for name in config.stages:
        stage, where = config.table[name], f"stage.{name}"
        made = made or stage.student is not None  # of what is made only `fits` knows
        try:
            if not made:
                parts.require(*stage.trains)
                if config.objective(name).needs.router:
                    routers(model)
            elif stage.fits is not None:
                where = f"{where}.student"
                found = stage.fits(found, **settings.arguments(config.of_stage(name).student))
        except ValueError as error:
            raise settings.ConfigError(f"{where}: {error}") from error


def check_kinds(objective: Objective, dataset: Any, packing: bool) -> None:
    """Refuse rows of a kind that no sample is of: the mean over them would be 0 in every step; and
    samples packed, of which nobody knows then where one of a kind ends.
    """
    if packing and objective.needs.views:
        names = [name for name, term in objective.terms.items() if term.needs.views]
        raise settings.ConfigError(
            f"data.packing: got true, expected false: {', '.join(names)} tells samples apart"
        )
    if (samples := getattr(dataset, "samples", None)) is None:  # a stream is not counted
        return
    there = set(PAIR) if dataset.encoding.pairs else {sample.kind for sample in samples}
    for name in set(objective.over.values()) - set(UNITS):
        if (kind := kind_of(name)[1]) and kind not in there:
            known = ", ".join(sorted(map(str, there)))
            raise DataError(f"data: no sample is of kind {kind!r}, as {name} asks; kinds: {known}")


def too_long(model: Any, dataset: Any) -> list[str]:
    """A note where samples may be longer than the model's positions, and about how many are."""
    known, encoding = positions(model.config), dataset.encoding
    if known is None or encoding.max_length <= known:
        return []
    about = ""
    if samples := getattr(dataset, "samples", None):  # a stream is not counted
        longer = sum(encoding.estimate(sample) > known for sample in samples)
        about = f"; about {longer:,} of {len(samples):,} are longer"
    allowed = f"data.max_length allows samples of {encoding.max_length:,} tokens"
    return [f"the model has {known:,} positions, and {allowed}{about}"]
