"""What would early stopping have given the SFT students? Their longest run, looked at afterwards.

`Kept` sets the model of every checkpoint aside while the run goes on, so that its time stays its
own. Afterwards each is scored on the development split, questions about training images that the
students do not see; the best one, the earliest of equals, is scored on what is held out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllmkd_kernels.methods import Stage
from training.checkpoint import PREFIX
from training.config import load
from training.data.collate import Collator
from training.data.dataset import LlavaDataset
from training.demo.config import DemoConfig
from training.evaluation.held_out import evaluate
from training.journal import whole, write_whole
from training.loop import StageResult
from training.models import load_vlm

KEPT, FOUND = "kept", "early.json"


class Kept(TrainerCallback):
    """Copies the model of every checkpoint to `kept/STEP` beside it."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Copy one, unless it is there for an interruption."""
        folder, step = Path(str(args.output_dir)), state.global_step
        if step % args.save_steps:
            return
        (folder / KEPT).mkdir(exist_ok=True)
        with whole(folder / KEPT / str(step)) as staged:
            unread = shutil.ignore_patterns("optimizer.*")
            shutil.copytree(folder / f"{PREFIX}{step}", staged, ignore=unread)


def kept_sft() -> tuple[Stage, ...]:
    """The method whose one stage is SFT, its checkpoints' models kept."""
    return (replace(load().table["sft"], callbacks=(Kept,)),)


@dataclass(frozen=True)
class Early:
    """Where early stopping would have ended a run.

    Attributes:
        step: of the model that is best on the development split.
        questions: its held-out accuracy.
        development: step and accuracy on the development split of each model looked at.
    """

    step: int
    questions: float
    development: list[tuple[int, float]]


def early_stopping(demo: DemoConfig, stage: StageResult) -> Early:
    """Where it would have ended a stage of `kept_sft`; looked up where it is known."""
    folder = stage.model.parent
    if (folder / FOUND).is_file():
        return Early(**json.loads((folder / FOUND).read_text()))
    models = {int(path.name): path for path in (folder / KEPT).glob("[0-9]*")}
    models[int(stage.summary["steps"])] = stage.model
    development = accuracies(demo, "dev", dict(sorted(models.items())))
    step = max(development, key=lambda one: one[1])[0]
    early = Early(step, accuracies(demo, demo.held_out, {step: models[step]})[0][1], development)
    write_whole(folder / FOUND, json.dumps(asdict(early), indent=1))
    shutil.rmtree(folder / KEPT, ignore_errors=True)
    return early


def accuracies(demo: DemoConfig, split: str, models: Mapping[int, Path]) -> list[tuple[int, float]]:
    """The step and the accuracy on the questions of a split of each model."""
    found, data = [], None
    for step, path in models.items():
        model, processor = load_vlm(path, dtype=torch.float32)
        data = data or LlavaDataset(demo.split(split), demo.images, processor, cache_mb=1_500)
        scores = evaluate(model, data, Collator(processor), title=f"{split}, step {step}")
        found.append((step, scores.questions))
    return found
