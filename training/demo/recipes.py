"""How are teacher and students trained? Their runs as configurations of the trainer.

All are small models, started from random weights, students of one seed from the same. No
pre-trained LM stands behind them, so the projector-only stages can do little and are kept short,
and rates are those of training from scratch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllmkd_kernels.methods import Stage
from training import settings
from training.config import OWN, Config, class_for, config_class
from training.demo.answers import write_pairs
from training.demo.config import DemoConfig
from training.demo.rows import ANSWERED, LABELLED, PAIRS, RECOMPOSED, Row
from training.demo.tell import say
from training.loop import StageResult, run

Values = dict[str, Any]


def teacher(demo: DemoConfig) -> Config:
    """192 wide, 4 layers, on all the training data: PT, where there are captions, then SFT."""
    shared = {"batch_size": demo.batch_size, "warmup": 0.05}
    captions = _captions(demo.split("pretrain"))
    stages = {
        "pt": {"steps": demo.teacher_pt_steps, "lr": 1e-3, **shared},
        "sft": {"steps": demo.teacher_sft_steps, "lr": demo.teacher_lr, **shared},
    }
    if not captions:
        del stages["pt"]
    sources = [*captions, {"path": str(demo.split("train"))}]
    return _run(demo, "teacher", "llava-kd", stages, sources, {"hidden": 192, "layers": 4})


def trained(demo: DemoConfig, row: Row, seed: int) -> list[StageResult]:
    """The stages of a row, made or reused, after those of the row that it comes after."""
    before = [] if row.after is None else trained(demo, row.after, seed)
    return before + run(student(demo, row, seed, before[-1].model if before else None), say)


def student(demo: DemoConfig, row: Row, seed: int, before: Path | None = None) -> Config:
    """64 wide, 2 layers, as a row says; `before` is the model of the row that it comes after."""
    model: Values = {"hidden": 64, "layers": 2, **row.sizes}
    if row.regularised:
        model["dropout"] = demo.dropout
    taught = None if row.stages == ("sft",) else demo.teacher
    sources = _shown(demo, row.shown)
    if before is not None and row.ladder:
        taught = before
    elif before is not None:
        model["path"] = str(before)
    if before is not None and row.stages == (PAIRS,):
        pairs = write_pairs(demo, before, demo.folder / f"seed{seed}" / "pairs")
        sources.append({"path": str(pairs), "use": "preferences"})
    name = f"seed{seed}/{row.slug}"
    return _run(demo, name, row.method, _stages(demo, row), sources, model, taught, seed)


def _stages(demo: DemoConfig, row: Row) -> dict[str, Values]:
    """How the stages of a row are optimised. Of several the demo says how long each is; DFT has the
    steps of DPT too where there are no captions.
    """
    steps = dict.fromkeys(row.stages, round(row.share * demo.student_steps))
    if len(steps) > 1:
        steps = {"dpt": demo.dpt_steps, "sft": demo.sft_steps, "dft": demo.dft_steps}
        if not _captions(demo.split("student_pretrain")):
            steps["dft"] += steps.pop("dpt")
    values: Values = {
        "lr": row.rate * demo.student_lr,
        "batch_size": demo.batch_size,
        "warmup": demo.student_warmup,
        "beta2": 0.95,
        "loss": row.loss,
        **row.settings,
    }
    if row.regularised:
        values |= {"weight_decay": demo.weight_decay, "loss": {"smoothing": demo.smoothing}}
    return {name: {"steps": count, **values} for name, count in steps.items()}


def _shown(demo: DemoConfig, shown: Sequence[str]) -> list[Values]:
    """The sources of these kinds of data; labelled ones have `demo.labelled` of what is seen."""
    more: list[Values] = []
    if ANSWERED in shown:
        more.append({"path": str(demo.answered)})
    if RECOMPOSED in shown:
        root = str(demo.recomposed.parent)
        more.append({"path": str(demo.recomposed), "image_root": root})
    if LABELLED not in shown:
        return more
    labelled: Values = {"path": str(demo.split("student_train"))}
    if more:
        ratio = demo.labelled / (1 - demo.labelled)
        others = sum(entries(one["path"]) for one in more)
        labelled["weight"] = ratio * others / entries(labelled["path"])
    return [*_captions(demo.split("student_pretrain")), labelled, *more]


def _captions(path: Path) -> list[Values]:
    """The source of captions, if there are any."""
    return [{"path": str(path), "use": "captions"}] if path.is_file() else []


def entries(file: str | Path) -> int:
    """How many a json file has."""
    return len(json.loads(Path(file).read_text(encoding="utf-8")))


def _run(
    demo: DemoConfig,
    name: str,
    method: str | tuple[Stage, ...],
    stages: Mapping[str, Any],
    sources: Sequence[Values],
    sizes: Mapping[str, Any],
    taught: Path | None = None,
    seed: int = 0,
) -> Config:
    """What teacher and students have in common."""
    tower, held_out = str(demo.folder / "tower"), str(demo.split(demo.held_out))
    values = {
        "out": str(demo.folder / name),
        "method": method if isinstance(method, str) else OWN,
        "stages": list(stages),
        "stage": stages,
        "teacher": None if taught is None else str(taught),
        # the tower is trained up to its last layer, so that is what the projector reads
        "model": {"vision": tower, "processor": tower, "feature_layer": -1, **sizes},
        "data": {
            "sources": [*sources, {"path": held_out, "use": "held_out"}],
            "image_root": str(demo.images),
            "cache_mb": 1_500,
        },
        "seed": seed,
        "log_steps": 20,
        "save_steps": demo.save_steps,
        "keep": 1,
        "threads": demo.threads,
    }
    cls = class_for(values) if isinstance(method, str) else config_class(method, OWN)
    return settings.build(cls, values)
