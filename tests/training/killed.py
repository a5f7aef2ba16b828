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
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mllmkd_kernels.llava_kd import TERMS
from tests.training import tiny
from training import checkpoint, loop, settings, trainer
from training.config import Config

STEPS, SAVE, LOG = 5, 2, 3  # checkpoints fall inside log entries
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SHOWN = ("step", "loss", "grad_norm", "learning_rate", "padding", *TERMS)


def config(root: Path, out: Path) -> Config:
    """Two stages of five steps: the second pass over the 14 samples begins in step 4."""
    base = tiny.run_config(root, out, stages=("dpt", "dft"))
    stage = {"steps": STEPS, "batch_size": 4, "micro_batch": 2}
    plan = {"dpt": stage, "dft": stage}
    return settings.changed(base, stage=plan, save_steps=SAVE, log_steps=LOG)


class Moments:
    """Counts moments from its creation on; `at` is the one to die at, None for none."""

    def __init__(self, out: Path, at: int | None) -> None:
        self.out, self.at, self.seen = str(out), at, []
        sys.addaudithook(self._audit)
        for owner, name in (
            (trainer.DistillTrainer, "compute_loss"),
            (trainer.Policies, "on_step_end"),
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
    """`start`, and wait; the exit status as `waitpid` has it."""
    return os.waitpid(start(work, answer), 0)[1]


def start(work: Callable[[], Any], answer: Path) -> int:
    """Fork, work, write what comes out as json; the child's process id."""
    pid = os.fork()
    if pid == 0:
        try:
            answer.write_text(json.dumps(work()))
            os._exit(0)
        except BaseException as error:
            answer.write_text(json.dumps(f"{type(error).__name__}: {error}"))
            traceback.print_exc()
            os._exit(3)
    return pid


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
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


KINDS = (  # of moments, by what their names contain; the first that fits
    ("training", ("compute_loss", "on_step_end")),
    ("removing an old checkpoint", ("shutil.rmtree /1-dpt/check", "shutil.rmtree /2-dft/check")),
    ("publishing a checkpoint", ("os.rename /1-dpt/.incomplete", "os.rename /2-dft/.incomplete")),
    ("writing a checkpoint", ("/.incomplete/checkpoint",)),
    ("publishing the model", ("os.rename /1-dpt/.model", "os.rename /2-dft/.model")),
    ("writing the model", ("/.model.incomplete",)),
    ("the log", ("log.jsonl",)),
    ("between the stages", ("",)),
)


def chosen(moments: list[str], many: int) -> list[int]:
    """One moment of every kind, the others from all of them, at random."""
    kinds: dict[str, list[int]] = {name: [] for name, _ in KINDS}
    for at, moment in enumerate(moments):
        kinds[next(k for k, words in KINDS if any(w in moment for w in words))].append(at)
    draw = random.Random(5)
    first = [draw.choice(group) for group in kinds.values()]
    return first + draw.sample(range(len(moments)), many - len(first))


def two_ranks(root: Path) -> list[list[Any]]:
    """What the ranks of two runs of two processes say: one in which rank 1 meets a bad batch in
    step 2, and one in which rank 1 alone gets SIGTERM in step 2."""
    answers = []
    for number, what in enumerate(("nan", "term")):
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        files = [root / f"{what}{rank}.json" for rank in range(2)]
        pids = []
        for rank, file in enumerate(files):
            os.environ.update(store, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
            out = root / f"ranks-{number}"
            pids.append(start(lambda: one_rank(root, out, what, rank), file))  # noqa: B023
        for pid in pids:
            os.waitpid(pid, 0)
        answers.append([read(file) for file in files])
    for name in (*store, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    return answers


def one_rank(root: Path, out: Path, what: str, rank: int) -> None:
    """One of the two processes; the fault is rank 1's."""
    original = trainer.DistillTrainer.compute_loss

    def faulty(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if rank == 1 and self.state.global_step == 1:
            if what == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            elif "pixel_values" in inputs:
                inputs["pixel_values"][0, 0, 0, 0] = torch.nan
        return original(self, model, inputs, *args, **kwargs)

    trainer.DistillTrainer.compute_loss = faulty
    plan = {"dpt": {"micro_batch": 2, "batch_size": 4}}  # on two ranks: no accumulation
    loop.run(settings.changed(config(root, out), stage=plan), say=lambda message: None)


def free_port() -> int:
    """One that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    answers["ranks"] = two_ranks(root)
    (root / "answers.json").write_text(json.dumps(answers))


def read(file: Path) -> Any:
    """What a child wrote."""
    return json.loads(file.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
