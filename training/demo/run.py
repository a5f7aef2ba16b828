"""Does distillation help? Teacher, SFT student and distilled student, in minutes.

    data     a LLaVA-format folder; everything below is trained from it as from anyone's data
    tower    a small SigLIP, trained as a classifier on all training photos (or questions), then
             frozen and shared
    teacher  192 wide, 4 layers: PT + SFT on all the training questions
    answered by the teacher: more questions about the students' images (`training data answer`)
    sft      64 wide, 2 layers: SFT alone on the limited data, regularised, as many steps as the
             distilled one
    distilled  the same student, same limited data and the teacher's answers: DPT → SFT → DFT
    no-label the same student, DFT on the teacher's answers alone: it sees no true label
    long     SFT again, for as many *seconds* as the distilled one took; and what early stopping on
             a development split would have made of it

Students of one seed start from the same weights. Where the data has no captions (a folder of one's
own may have none) PT and DPT are left out. Everything is kept in `out` and continued if the command
is given again; `training.demo.report` turns what is there into a table, pictures and a verdict.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from training.demo import recipes, report, rows
from training.demo.answers import answer_questions
from training.demo.config import DemoConfig
from training.demo.early import early_stopping, kept_sft
from training.demo.easy_vqa import easy_vqa
from training.demo.folder import write_folder
from training.demo.own import own
from training.demo.results import Run
from training.demo.scenes import scenes
from training.demo.tell import part, say
from training.demo.tower import make_tower
from training.lock import held
from training.loop import run

SOURCES = {"scenes": scenes, "easy-vqa": easy_vqa}


def demo(config: DemoConfig) -> report.Report:
    """Run the whole demo and write its report; returns what the report shows."""
    with held(config.folder, "out"):
        start = time.perf_counter()
        runs = [prepared(config)]
        for seed in range(config.seeds):
            runs += students(config, seed)
        with part("early stopping of the longest"):
            early = [
                early_stopping(config, r.stages[0]) for r in runs if r.name == report.EQUAL_TIME
            ]
        with part("report"):
            return report.write_report(config, runs, early, time.perf_counter() - start)


def prepared(config: DemoConfig) -> Run:
    """What students are trained from, made or reused: data, tower, teacher (which is returned) and
    its answers.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with part("data"):
        write_folder(config.folder / "data", SOURCES.get(config.data, own)(config))
    with part("vision tower"):
        make_tower(config)
    with part("teacher"):
        teacher = Run(report.TEACHER, 0, run(recipes.teacher(config), say))
    with part("the teacher answers"):
        answer_questions(config, config.teacher, config.answered.parent)
    return teacher


def students(config: DemoConfig, seed: int) -> list[Run]:
    """The students of one seed."""

    def trained(name: str, row: rows.Row) -> Run:
        with part(f"{name}, seed {seed}"):
            return Run(name, seed, recipes.trained(config, row, seed))

    plain = trained(report.EQUAL_STEPS, rows.SFT)
    distilled = trained(report.DISTILLED, rows.DISTILLED)
    unlabelled = trained(report.UNLABELLED, rows.UNLABELLED)
    longer = max(1.0, distilled.total("seconds") / plain.total("seconds"))
    row = replace(rows.SFT, method=kept_sft(), share=longer, folder="long")
    return [plain, trained(report.EQUAL_TIME, row), distilled, unlabelled]
