"""Does the tuner keep what is right and pick what is fast? Kernels run in Triton's interpreter, and
time is told by the test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from mllmkd_kernels import tune
from mllmkd_kernels.backends.triton import tables

CPU = torch.device("cpu")
#: Seconds in the interpreter, every loop of every kernel more than once.
SIZES = tune.Sizes(rows=18, vocab=70, d_s=20, d_t=20, image_rows=19, images=2, chunk=10)
JOBS = {f"{job.kernel}-{job.kind}": job for job in tune.jobs()}


def _job(
    run: Callable[[tune.Launch], Tensor], candidates: tuple[tune.Launch, ...]
) -> tune.Job:  # fmt: skip
    return tune.Job("rows", "single", torch.float32, lambda sizes, device: run, candidates)


def _search(job: tune.Job, cost: Callable[[tune.Launch], float], rounds: int = 3) -> tune.Outcome:
    """`search` on a clock that asks `cost` about the launch of the last run."""
    last: list[tune.Launch] = []

    def recorded(sizes: tune.Sizes, device: torch.device) -> Callable[[tune.Launch], Tensor]:
        run = job.prepare(sizes, device)

        def wrapped(launch: tune.Launch) -> Tensor:
            last.append(launch)
            return run(launch)

        return wrapped

    def timer(run: Callable[[], object]) -> float:
        run()
        return cost(last[-1])

    watched = tune.Job(job.kernel, job.kind, job.dtype, recorded, job.candidates)
    return tune.search(watched, SIZES, CPU, timer, rounds)


def _launch(block: int) -> tune.Launch:
    return {"BLOCK": block, "num_warps": 1, "num_stages": 1}


def test_the_fastest_candidate_with_the_same_result_wins() -> None:
    def run(launch: tune.Launch) -> Tensor:
        if launch["BLOCK"] == 8:
            raise RuntimeError("long story\nout of resource: shared memory")
        return torch.tensor([1.0, 2.0 if launch["BLOCK"] != 16 else 2.1])

    candidates = tuple(map(_launch, (8, 16, 32, 128, 256)))
    outcome = _search(_job(run, candidates), lambda launch: 1.0 / launch["BLOCK"])
    assert outcome.best == _launch(256)
    assert outcome.seconds_best == 1 / 256
    assert outcome.before == tables.built_in("rows", CPU)
    failed, wrong = outcome.refused
    assert "BLOCK=8 " in failed and "out of resource: shared memory" in failed
    assert "BLOCK=16 " in wrong and "off by" in wrong
    assert "2 did not count" in tune.describe(outcome)


def test_a_nan_does_not_count() -> None:
    outcome = _search(
        _job(
            lambda launch: torch.tensor(torch.nan if launch["BLOCK"] == 8 else 1.0), (_launch(8),)
        ),
        lambda launch: launch["BLOCK"],
    )
    assert outcome.best == outcome.before and outcome.refused


def test_one_percent_does_not_move_the_built_in_parameters() -> None:
    def run(launch: tune.Launch) -> Tensor:
        return torch.ones(2)

    outcome = _search(_job(run, (_launch(8),)), lambda x: 0.99 if x["BLOCK"] == 8 else 1.0)
    assert outcome.best == outcome.before
    assert "kept" in tune.describe(outcome)


def test_every_kernel_of_the_tables_is_tuned_with_parameters_of_its_kind() -> None:
    wanted = {(k, kind) for k, kinds in tables.TABLES[90].items() for kind in kinds}
    wanted = {(k, kind) for k, kind in wanted if kind != "half-tma"}  # "half" on such a GPU
    assert {(job.kernel, job.kind) for job in JOBS.values()} == wanted
    for job in JOBS.values():
        keys = set(tables.TABLES[90][job.kernel][job.kind])
        assert job.candidates and all(set(c) == keys for c in job.candidates)
        built_in = tables.TABLES[90][job.kernel]
        assert built_in.get(f"{job.kind}-tma", built_in[job.kind]) in job.candidates


@pytest.mark.parametrize("name", JOBS)
def test_a_kernel_gives_one_result_whatever_the_parameters(name: str) -> None:
    """The inputs that a job makes are right for its kernel, and running twice changes nothing."""
    job = JOBS[name]
    other = tables.built_in(job.kernel, CPU, job.dtype)
    for key in ("BLOCK", "BLOCK_V", "block"):
        if key in other:
            other[key] *= 2
    small = tune.Job(job.kernel, job.kind, job.dtype, job.prepare, (other,))
    outcome = _search(small, lambda launch: 1.0 if launch != other else 0.5, rounds=1)
    assert outcome.best == other and not outcome.refused


def test_the_winners_become_a_table_that_launch_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tables.json"
    monkeypatch.setenv("MLLMKD_TABLES", str(path))
    monkeypatch.setattr(tables, "_gpu", lambda device: ("a GPU", 90))
    best = tables.TABLES[90]["rows"]["single"] | {"num_warps": 16}
    outcome = tune.Outcome(JOBS["rows-single"], best, best, 1.0, 1.0, ())
    tables.write(path, "a GPU", tune.as_table([outcome]))
    assert tables.launch("rows", torch.device("cuda", 0)) == best


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_help_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tune.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("--kernel", "--quick", "MLLMKD_TABLES", *{job.kernel for job in JOBS.values()}):
        assert word in text
