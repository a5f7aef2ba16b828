"""What does a run look like that was killed? Called by test_resume as a process of its own.

It imports everything once and forks a child for each run, because importing takes longer than the
run. A child that is to be killed counts the moments at which a kill could matter (before every
change of a file below the run's folder, at every micro-batch, at the end of every step) and sends
itself SIGKILL at the given one. What comes out is one json: the moments of the whole run, and what
each of the continued runs gave.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.training import tiny
from training import checkpoint, loop, settings, trainer
from training.config import Config
from training.step import TERMS

STEPS, SAVE, LOG = 5, 2, 3  # checkpoints fall inside log entries
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SHOWN = ("step", "loss", "grad_norm", "learning_rate", "padding", *TERMS)


def config(root: Path, out: Path) -> Config:
    """Two stages of five steps: the second pass over the 14 samples begins in step 4."""
    base = tiny.run_config(root, out, stages=("dpt", "dft"))
    stage = {"steps": STEPS, "batch_size": 4, "micro_batch": 2}
    plan = {"dpt": stage, "dft": stage, "save_steps": SAVE, "log_steps": LOG}
    return settings.build(Config, plan, base=base)


class Moments:
    """Counts moments from its creation on; `at` is the one to die at, None for none."""

    def __init__(self, out: Path, at: int | None) -> None:
        self.out, self.at, self.seen = str(out), at, []
        sys.addaudithook(self._audit)
        for owner, name in (
            (trainer.DistillTrainer, "compute_loss"),
            (trainer.Stopper, "on_step_end"),
        ):
            setattr(owner, name, self._counted(getattr(owner, name), name))

    def _counted(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._moment(name)
            return result

        return counted

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or not str(args[0]).startswith(self.out):
            return
        if event != "open" or args[2] & WRITING:
            self._moment(f"{event} {str(args[0]).removeprefix(self.out)}")

    def _moment(self, name: str) -> None:
        self.seen.append(name)
        if len(self.seen) - 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def child(work: Callable[[], Any], answer: Path) -> int:
    """Fork, work, write what comes out as json; the exit status as `waitpid` has it."""
    pid = os.fork()
    if pid == 0:
        try:
            answer.write_text(json.dumps(work()))
            os._exit(0)
        except BaseException as error:
            answer.write_text(json.dumps(f"{type(error).__name__}: {error}"))
            traceback.print_exc()
            os._exit(3)
    return os.waitpid(pid, 0)[1]


def whole(root: Path, out: Path, at: int | None = None) -> dict[str, Any]:
    """A run from where `out` stands to its end, or to its death."""
    moments = Moments(out, at)
    messages: list[str] = []
    results = loop.run(config(root, out), say=messages.append)
    curves = [[[entry[key] for key in SHOWN] for entry in r.history] for r in results]
    return {"curves": curves, "messages": messages, "moments": moments.seen}


def full_disk(root: Path, out: Path) -> None:
    """A run whose third checkpoint finds no room: files may not grow beyond 4 KiB from then on."""
    original = trainer.Trainer._save_checkpoint

    def save(self: Any, model: Any, trial: Any) -> None:
        if self.state.global_step == 2 * SAVE:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        original(self, model, trial)

    trainer.Trainer._save_checkpoint = save
    try:
        loop.run(config(root, out), say=lambda message: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def chosen(moments: list[str], many: int) -> list[int]:
    """Moments at random, and of every kind: training, checkpoints of either stage, the finished
    model, what is between the stages."""
    kinds: dict[str, list[int]] = {}
    for at, name in enumerate(moments):
        words = name.replace(".incomplete", "").split()
        place = Path(words[-1]).parts[1:3] if len(words) > 1 else ()
        kinds.setdefault(f"{words[0]} {[p.split('-')[0] for p in place]}", []).append(at)
    draw = random.Random(5)
    groups = list(kinds.values())
    draw.shuffle(groups)
    first = [draw.choice(group) for group in groups[:many]]
    return first + draw.sample(range(len(moments)), many - len(first))


def main(root: Path) -> None:
    """Write root/answers.json."""
    torch.set_num_threads(1)
    config(root, root)  # writes the data, tower and teacher
    assert child(lambda: whole(root, root / "whole"), root / "whole.json") == 0
    expected = json.loads((root / "whole.json").read_text())
    answers: dict[str, Any] = {"whole": expected, "killed": []}
    for at in chosen(expected["moments"], 10):
        out, file = root / f"killed-{at}", root / f"{at}.json"
        status = child(lambda: whole(root, out, at), file)  # noqa: B023
        assert status == signal.SIGKILL, f"moment {at}: wait status {status}, {file.read_text()}"
        child(lambda: whole(root, out), file)  # noqa: B023
        moment = expected["moments"][at]
        answers["killed"].append({"moment": moment, "out": str(out), "then": read(file)})
    out, file = root / "full", root / "full.json"
    child(lambda: full_disk(root, out), file)
    left = checkpoint.newest(out / "1-dpt")[0]
    answers["full"] = {"error": read(file), "left": left and left.name}
    child(lambda: whole(root, out), file)
    answers["full"]["then"] = read(file)
    (root / "answers.json").write_text(json.dumps(answers))


def read(file: Path) -> Any:
    """What a child wrote."""
    return json.loads(file.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
