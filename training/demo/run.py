"""Does distillation help? Teacher, SFT student and distilled student on real photographs, in
minutes.

    data     a LLaVA-format folder; everything below is trained from it as from anyone's data
    tower    a small SigLIP, trained as a classifier on all training photos (or questions), then
             frozen and shared
    teacher  192 wide, 4 layers: PT + SFT on all the training questions
    answers  of the teacher to more questions about the students' images: `training data answer`
    sft      64 wide, 2 layers: SFT alone on the limited data, regularised, as many steps as the
             distilled one
    long     the same for as many *seconds* as the distilled one took; and what early stopping on a
             development split would have made of it
    distilled  the same student, same limited data and the teacher's answers: DPT → SFT → DFT
    unlabelled  the same student, DFT on the teacher's answers alone: it sees no true label

Students of one seed start from the same weights. Where the data has no captions (a folder of one's
own may have none) PT and DPT are left out. Everything is kept in `out` and continued if the command
is given again; `training.demo.report` turns what is there into a table, pictures and a verdict.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from training.data.answer import Request, answer
from training.data.dataset import LlavaDataset
from training.demo import recipes
from training.demo.early import early_stopping, kept_sft
from training.demo.easy_vqa import write_easy_vqa
from training.demo.folder import LlavaFolder
from training.demo.garments import photo_arrays
from training.demo.own import write_own
from training.demo.recipes import MADE, DemoConfig
from training.demo.report import (
    DISTILLED,
    EQUAL_STEPS,
    EQUAL_TIME,
    TEACHER,
    UNLABELLED,
    Report,
    write_report,
)
from training.demo.scenes import write_scenes
from training.demo.tower import photo_tower, question_tower
from training.demo.trained import Run
from training.demo.words import build_processor
from training.lock import held
from training.loop import StageResult, run
from training.settings import ConfigError, differences, to_dict

console = Console(stderr=True)


def demo(config: DemoConfig) -> Report:
    """Run the whole demo and write its report; returns what the report shows."""
    with held(config.folder, "out"):
        return _demo(config)


def _demo(config: DemoConfig) -> Report:
    """`demo`, in a folder that no other writes to."""
    start = time.perf_counter()
    folder, teacher = prepared(config)
    runs = [teacher]
    for seed in range(config.seeds):
        runs += students(config, seed)
    with part("early stopping of the longest"):
        early = [early_stopping(config, r.stages[0]) for r in runs if r.name == EQUAL_TIME]
    with part("report"):
        report = write_report(config, runs, early, folder, time.perf_counter() - start)
    return report


def prepared(config: DemoConfig) -> tuple[LlavaFolder, Run]:
    """What students are trained from: data, tower, teacher and its answers, made or reused."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with part("data"):
        folder = make_data(config)
    with part("vision tower"):
        make_tower(config, folder)
    with part("teacher"):
        teacher = Run(TEACHER, 0, run(recipes.demo_teacher(config), say))
    with part("the teacher answers"):
        answer_questions(config)
    return folder, teacher


def students(config: DemoConfig, seed: int) -> list[Run]:
    """The students of one seed."""
    with part(f"student by SFT alone, seed {seed}"):
        plain = run(recipes.demo_sft(config, seed, config.student_steps, "sft"), say)
    with part(f"distilled student, seed {seed}"):
        distilled = run(recipes.demo_distilled(config, seed), say)
    with part(f"distilled student without labels, seed {seed}"):
        unlabelled = run(recipes.demo_unlabelled(config, seed), say)
    ratio = _seconds(distilled) / _seconds(plain)
    steps = max(config.student_steps, round(config.student_steps * ratio))
    with part(f"student by SFT alone for as long ({ratio:.1f} x the steps), seed {seed}"):
        long = run(recipes.demo_sft(config, seed, steps, "long", method=kept_sft()), say)
    return [
        Run(EQUAL_STEPS, seed, plain),
        Run(EQUAL_TIME, seed, long),
        Run(DISTILLED, seed, distilled),
        Run(UNLABELLED, seed, unlabelled),
    ]


def make_data(config: DemoConfig) -> LlavaFolder:
    """The LLaVA-format folder, written or reused."""
    out = config.folder / "data"
    if config.data == "easy-vqa":
        return write_easy_vqa(out, student_n=config.student_n, per_image=config.per_image)
    if config.data not in MADE:
        if not Path(config.data).is_dir():
            raise ConfigError(
                f"data: got {config.data!r}, expected {', '.join(MADE)} or a folder that is there"
            )
        return write_own(out, config.data, student_n=config.student_n)
    return write_scenes(
        out,
        train_n=config.train_n,
        test_n=config.test_n,
        student_n=config.student_n,
        per_image=config.per_image,
        garments=config.garments,
    )


def answer_questions(config: DemoConfig) -> None:
    """The teacher's answers to the students' questions, in `out/answered`, written or reused."""
    answers_of(config, config.teacher, config.answered.parent)


def answers_of(
    config: DemoConfig, model: Path, out: Path, *, keep_cut: bool = False
) -> list[dict[str, Any]]:
    """A model's answers to the students' questions, in `out`, written or reused: the entries."""
    request = Request(
        str(model),
        str(config.split("student_questions")),
        out,
        image_root=str(config.images),
        batch_size=256,
        max_new_tokens=16,
        keep_cut=keep_cut,
    )
    path, found = answer(request)
    say(f"{path}: {found.written} of {found.entries} questions answered")
    return json.loads(path.read_text(encoding="utf-8"))


def make_tower(config: DemoConfig, folder: LlavaFolder) -> None:
    """The shared vision tower and processor in `out/tower`, trained or reused."""
    path = config.folder / "tower"
    sizes = config.tower
    if path.is_dir():
        made = json.loads((path / "tower.json").read_text()).get("sizes", {})
        if changed := differences(made, to_dict(sizes)):
            raise ConfigError(
                f"out: {path} was made with another tower ({'; '.join(changed)}); go back to it, "
                "remove the folder or name another"
            )
        say(f"{path}: already there")
        return
    processor = build_processor(
        folder.words(), image_size=sizes.image_size, patch_size=sizes.patch_size
    )
    start = time.perf_counter()
    if config.data == "scenes":
        tower, accuracy = photo_tower(sizes, photo_arrays(config.garments))
    else:
        questions = LlavaDataset(folder.json("train"), config.images, processor, cache_mb=1_500)
        tower, accuracy = question_tower(sizes, questions)
    staging = path.with_name(".tower.incomplete")
    tower.save_pretrained(staging)
    processor.save_pretrained(staging)
    took = time.perf_counter() - start
    facts = {"accuracy": accuracy, "seconds": took, "sizes": to_dict(sizes)}
    (staging / "tower.json").write_text(json.dumps(facts))
    staging.rename(path)
    say(f"{path}: accuracy of its probe {accuracy:.3f}")


def say(message: str) -> None:
    """One line on stderr, out of the way of the progress bars."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def part(title: str) -> Iterator[None]:
    """Announce a part of the demo, and the seconds it took."""
    console.rule(title, align="left")
    start = time.perf_counter()
    yield
    say(f"{title}: {time.perf_counter() - start:.0f} s")


def _seconds(stages: list[StageResult]) -> float:
    return sum(stage.summary["seconds"] for stage in stages)
