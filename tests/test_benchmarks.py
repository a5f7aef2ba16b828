"""Does the benchmark suite measure what it says? Its figures are published, so they are tested."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    cli,
    memory,
    methods,
    peers,
    pilot,
    plots,
    readme,
    record,
    report,
    speed,
    step,
    suites,
    targets,
    truth,
    vlm,
)
from benchmarks.cli import ROOT, main
from benchmarks.problem import Problem, make
from benchmarks.session import Session
from benchmarks.shapes import (
    DTYPES,
    LOSSES,
    PREFERENCES,
    Case,
    StepCase,
    fallback,
    gpu_headline,
    headline,
    with_vocab,
)
from benchmarks.suites import SUITES
from mllmkd_kernels import reference

TINY = SUITES["tiny"]
#: What backend="auto" is on this machine.
OURS = methods.ours_by_default()
#: Vocabularies that differ, and no size a multiple of another.
CASE = Case("test", rows=7, d_t=9, d_s=5, vocab_t=41, vocab_s=37)


def _raises(*_: Any) -> Any:
    raise RuntimeError("first line\nsecond line: /somewhere/of/theirs.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of `all` on the tiny suite: every sub-command once, children included."""
    out = tmp_path_factory.mktemp("bench")
    only = f"floor,torch-eager,{OURS.key},{methods.MAIN_GRAD[OURS.key].key}"
    assert main(["all", "--suite", "tiny", "--only", only, "--out", str(out)]) == 0
    (path,) = out.glob("*.json")
    return path


# --- the figures ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_section_has_a_figure_for_every_method(run: Path) -> None:
    found = record.load(run)
    for section in record.SECTIONS:
        floor = {"floor"} if section == "speed" else set()
        added = {methods.MAIN_GRAD[OURS.key].key} if section in ("speed", "memory") else set()
        expected = {"torch-eager", OURS.key} | floor | added
        assert {row["method"] for row in found[section]} == expected
        assert {row["status"] for row in found[section]} == {"ok"}, section
    for row in found["speed"]:
        assert len(row["seconds"]) == TINY.rounds
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        if row["case"]["loss"] != "relation":
            assert row["over_floor"] > 0 and row["times_eager"] > 0
    for row in found["accuracy"]:
        if row["method"] == OURS.key:
            assert row["gradient"] <= row["contract"]
    assert [row["case"]["stage"] for row in found["step"]] == ["dpt", "dpt"]
    for row in found["step"]:
        assert len(row["seconds"]) == TINY.rounds and row["tokens_per_s"] > 0
        assert row["loss_off"] < 1e-5 and row["gradient_off"] < 1e-3
        budget, peaks = row["case"]["budget_mib"] * 2**20, dict(row["peaks"])
        assert {1, row["case"]["batch"]} <= set(peaks)
        fitting = [batch for batch, peak in peaks.items() if peak <= budget]
        assert row["largest_batch"] == max(fitting, default=0)


def test_runs_are_written_into_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {**{key: [] for key in record.REQUIRED}, "only": [], "suite": "cpu", "rounds": 5,
            "targets": []}  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli._folder(full).absolute().is_relative_to(tmp_path)
    monkeypatch.chdir(ROOT)
    assert cli._folder(full).samefile(record.RESULTS)
    assert cli._folder({**full, "rounds": 1}) == Path("runs", "benchmarks")


@pytest.mark.slow
def test_a_run_says_where_it_was_made_and_names_no_host(run: Path) -> None:
    found = record.load(run)
    assert found["machine"]["cpu"] and found["machine"]["cores"] >= 1
    assert found["machine"]["torch"] == torch.__version__
    assert "-tiny-" in run.name and not record.publishable(found)
    text = run.read_text() + (run.with_suffix("") / "report.md").read_text()
    assert str(ROOT) not in text
    if len(platform.node()) > 3:
        assert platform.node() not in text


@pytest.mark.slow
def test_the_report_shows_every_figure_it_links(run: Path) -> None:
    folder = run.with_suffix("")
    page = (folder / "report.md").read_text()
    for name in ("memory_against_size", "accuracy_ladder"):
        assert f"({name}.png)" in page
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert page.count("not measured") == 10  # the promises are about the headline shape


def test_ratios_are_formed_within_a_round() -> None:
    # The machine is ten times slower in round 2: medians of seconds would say 2.5, no round does.
    seconds = {"mine": [2.0, 20.0, 3.0], "floor": [1.0, 10.0, 1.2], "torch-eager": [4.0, 40.0, 6.0]}
    row = speed.figures(CASE, seconds["mine"], seconds)
    assert row["median_s"] == 3.0
    assert row["over_floor"] == 2.0
    assert row["times_eager"] == 2.0
    alone = speed.figures(CASE, seconds["mine"], {"mine": seconds["mine"]})
    assert alone["over_floor"] is None and alone["times_eager"] is None


def test_floor_flops_of_the_headline_are_the_four_products() -> None:
    # Student logits, dh, dw over Ds 896 and teacher logits over Dt 2048.
    assert headline("fp32").floor_flops == 2 * 1024 * 65536 * (3 * 896 + 2048)
    frozen = replace(headline("fp32"), train_head=False)
    assert frozen.floor_flops == 2 * 1024 * 65536 * (2 * 896 + 2048)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux /proc")
def test_peak_rise_sees_memory_that_is_already_free_again() -> None:
    mib = 2**20
    rise = memory.peak_rise(lambda: [torch.ones(64 * mib // 4), None][1])
    assert 62 * mib < rise < 72 * mib
    assert memory.peak_rise(lambda: None) < 2 * mib


# --- the truth, and what is not measured ---------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
def test_truth_is_the_reference_in_fp64(loss: str, train_head: bool) -> None:
    images = 4 if loss in PREFERENCES else 1
    problem = make(replace(CASE, loss=loss, train_head=train_head, images=images))
    h, w = (x.detach().double().requires_grad_(True) for x in (problem.hs, problem.ws))
    z_s, z_t = reference.logits(h, w, vocab_size=problem.case.vocab), None
    if loss != "ce":
        ht, wt = (x.double() for x in problem.teacher())
        z_t = reference.logits(ht, wt, vocab_size=problem.case.vocab)
    if loss == "relation" and z_t is not None:
        expected = reference.relation_cosine(z_s, z_t, torch.tensor([0, 7]))
    elif loss in PREFERENCES and z_t is not None:  # answers of 7 tokens: two chosen, two rejected
        ratio = (z_s.log_softmax(1) - z_t.log_softmax(1)).gather(1, problem.labels[:, None])
        r = ratio.view(4, 7).sum(1)
        margin = 0.1 * (r[:2] - r[2:])
        if loss == "kto":
            k = r.view(2, 2).mean(1).clamp(min=0).detach()
            expected = 1 - torch.cat((0.1 * (r[:2] - k[1]), 0.1 * (k[0] - r[2:]))).sigmoid().mean()
        else:
            expected = -margin.sigmoid().log().mean()
    else:
        _, ce, kd = reference.linear_distill(
            z_s, z_t, problem.labels if loss != "kl" else None, ce_weight=1.0,
            divergence="jsd" if loss == "ce+jsd" else "forward_kl",
        )  # fmt: skip
        expected = ce.mean() + kd.mean()
    expected.backward()
    found = truth.truth(problem)
    assert torch.allclose(found.loss, expected, rtol=1e-12)
    assert h.grad is not None and truth.relative(found.dh, h.grad) < 1e-12
    if train_head:
        assert w.grad is not None and found.dw is not None
        assert truth.relative(found.dw, w.grad) < 1e-12
    else:
        assert found.dw is None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_pytorch_and_ours_compute_the_same_loss(loss: str, dtype: str) -> None:
    case = replace(CASE, loss=loss, dtype=dtype, images=4 if loss in PREFERENCES else 1)
    verdicts = Session(TINY).verdicts([methods.EAGER, *methods.OURS], case)
    for key, verdict in verdicts.items():
        assert verdict.status in ("ok", "missing"), (key, verdict.reason)
    assert verdicts["torch-eager"].status == verdicts["mk-eager"].status == "ok"


def _broken(run: methods.Run | None, key: str, missing: str = "") -> methods.Method:
    def build(problem: Problem) -> methods.Run:
        right = methods.EAGER.build(problem)

        def half() -> torch.Tensor | None:
            loss = right()
            assert problem.hs.grad is not None
            problem.hs.grad *= 0.5
            return loss

        return run or half

    return methods.Method(key, key, frozenset({"ce+kl"}), build, lambda _: missing)


def test_a_method_that_is_wrong_fails_or_is_missing_becomes_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer = peers.Peer("x", "x", methods.ALL, (peers.Call("x", "no_such_module", "f", _raises),))
    unusable = (
        _broken(None, "half-gradient"),
        _broken(_raises, "raises"),
        _broken(lambda: None, "returns-nothing"),
        _broken(None, "absent", peer.missing()),
    )
    monkeypatch.setattr(methods, "METHODS", (methods.EAGER, *unusable))
    rows = {row["method"]: row for row in speed.measure(Session(TINY, rounds=1), CASE)}
    assert rows["torch-eager"]["status"] == "ok"
    assert rows["half-gradient"]["status"] == "wrong"
    assert "gradient off by" in rows["half-gradient"]["reason"]
    assert rows["raises"]["status"] == "failed"
    assert rows["raises"]["reason"] == "RuntimeError: first line"
    assert rows["returns-nothing"]["status"] == "failed"
    assert rows["absent"]["status"] == "missing" and "no_such_module" in rows["absent"]["reason"]
    assert all("median_s" not in rows[method.key] for method in unusable)


def test_a_nan_is_wrong() -> None:
    assert truth.verdict(truth.Errors(float("nan"), 0.0, 0.0), "bf16")
    assert truth.verdict(truth.Errors(0.0, float("nan"), None), "bf16")
    assert not truth.verdict(truth.Errors(0.0, 0.0, None), "bf16")


# --- the time of a run ---------------------------------------------------------------------------


def _ways(*seconds: float) -> list[pilot.Option]:
    return [pilot.Option(None, 1, s) for s in seconds]


def test_a_level_is_found_for_what_does_not_fit_and_changes_nothing_that_does() -> None:
    cheap, dear, fixed = _ways(5.0, 4.0, 3.0), _ways(60.0, 30.0, 10.0, 5.0), _ways(20.0)
    waiting = [(1.0, cheap), (1.0, dear), (1.0, fixed)]

    def chosen(left: float, weight: float = 1.0) -> list[float]:
        found = pilot.level([(1.0, cheap), (weight, dear), (1.0, fixed)], left)
        weights = (1.0, weight, 1.0)
        return [
            pilot.fitting(options, w * found).seconds
            for w, (_, options) in zip(weights, waiting, strict=True)
        ]

    assert chosen(85.0) == [5.0, 60.0, 20.0]
    for left in (28.0, 33.0, 50.0, 84.0):
        assert sum(chosen(left)) <= left
    assert chosen(55.0)[0] == 5.0  # a cheap one loses nothing to a dear one
    assert chosen(54.0) == [5.0, 10.0, 20.0]
    assert chosen(54.0, weight=20.0) == [4.0, 30.0, 20.0]  # but to one that matters more
    assert chosen(0.0) == [3.0, 5.0, 20.0]  # nothing is left out


def _nothing(case: Case, device: str) -> Problem:
    """In place of a pilot's tensors."""
    h, w = torch.empty(0), torch.empty(0)
    return Problem(case, h, w, None, None, labels=torch.empty(0))


_nothing.cache_clear = lambda: None


class _Machine:
    """A clock that goes on with what is done: a step takes `rates` seconds a FLOP of the floor, by
    method and dtype, and a case `more` times of what was predicted.
    """

    def __init__(self, rates: dict[tuple[str, str], float], more: float = 1.0) -> None:
        self.now, self.rates, self.more = 0.0, rates, more

    def once(self, method: methods.Method, problem: Problem) -> float:
        case = problem.case
        spent = self.rates.get((method.key, case.dtype), 1e-11) * case.floor_flops
        self.now += spent
        return spent

    def chosen(self, session: Session, minutes: float) -> dict[Any, pilot.Option]:
        """What a run measures, case by case as it was asked for."""
        costs = pilot.Costs(1e-8, 1e-8, 5e-9, 0.2)
        ahead = pilot.Pilot(session, minutes, lambda: self.now, self.once, lambda *_: costs)
        cases, found = session.suite.sections(record.SECTIONS), {}
        ahead.start(cases)
        for case in cases:
            found[case] = ahead.choose(case)
            self.now += self.more * found[case].seconds
        return found


@pytest.mark.parametrize("more", [0.7, 1.0, 1.3])
def test_a_run_ends_in_its_minutes_on_a_processor_without_bf16_arithmetic(
    more: float, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    suite = suites._cpu_suite()
    monkeypatch.setattr(pilot, "_tensors", _nothing)
    slow = ("floor", "torch-eager", "liger", "liger-dpo", "liger-kto")
    machine = _Machine({(key, "bf16"): 3e-10 for key in slow}, more)  # 3.3 GFLOP/s
    found = machine.chosen(Session(suite), 10.0)
    assert 500 < machine.now <= 600
    for case, option in found.items():
        assert option.rounds >= pilot.LEAST or not isinstance(case, Case)
    assert found[headline("fp32")].case == headline("fp32")
    bf16 = found[headline("bf16")].case
    assert bf16.made_of(headline("bf16")) and bf16.all_rows * bf16.vocab >= 128 * 8192
    fp32 = [case for case in suite.memory if case.dtype == "fp32" and case.rows <= 128]
    assert all(found[case].case == case for case in fp32 if case.images == 1)


def test_a_run_is_whole_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot, "_tensors", _nothing)
    session = Session(SUITES["cpu"])
    for case, option in _Machine({}).chosen(session, 60.0).items():
        assert option.case == case and (option.rounds == session.rounds or hasattr(case, "case"))


@pytest.mark.parametrize("minutes", [0.0, 0.5])
def test_nothing_is_left_out_where_there_is_no_time(
    minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot, "_tensors", _nothing)
    machine = _Machine({})
    found = machine.chosen(Session(SUITES["cpu"]), minutes)
    assert set(found) == set(SUITES["cpu"].sections(record.SECTIONS)) and machine.now < 240


@pytest.mark.parametrize("loss", LOSSES)
def test_a_smaller_case_is_of_the_one_that_was_asked_for(loss: str) -> None:
    asked = replace(headline("bf16"), loss=loss)
    small = asked.halved(5)
    assert (small.rows, small.vocab_t, small.vocab_s) == (128, 16384, 16384)
    assert small.made_of(asked) and asked.made_of(asked) and "halved 5 times" in small.title
    assert not small.made_of(replace(asked, dtype="fp32")) and not asked.made_of(small)
    rows = [{"method": "x", "case": asdict(small), "over_floor": 1.0}]
    assert targets.figure({"speed": rows}, "over_floor", "x", asked) == 1.0
    session = Session(SUITES["cpu"])
    for asked in session.suite.every_backend:
        assert session.methods(asked.halved(3)) == session.methods(asked)


def test_a_record_says_what_there_was_no_time_for(tmp_path: Path) -> None:
    found = _record()
    small = asdict(headline("bf16").halved(5))
    for row in (*found["speed"], *found["memory"]):
        if row["case"] == asdict(headline("bf16")):
            row["case"] = small
    found["speed"][0]["seconds"] = [1.0] * 3
    assert record.cut(found) == (1, 1)
    lost = "1 cases are smaller, N and V halved in turn, and 1 of fewer rounds"
    assert lost in report.machine_line(found)
    marks = [target["holds"] for target in targets.judge(found, "mk-eager")]
    assert marks == [True] * 12  # judged all the same
    text = readme.block(record.save(found, tmp_path), tmp_path)
    assert "for all of it: bf16 is of N 128 V 16,384, for every method alike." in text
    ours = "| mllmkd_kernels, eager backend | 1.00 s | 1.10x | 2.00x | 0 MiB | 1.00 s | 1.10x |"
    assert ours in text


def test_a_step_that_takes_long_is_not_warmed_up_and_others_are() -> None:
    session, calls = Session(TINY, rounds=2, cold={"slow"}), []
    builds = {key: lambda key=key: lambda: calls.append(key) for key in ("slow", "fast")}
    seconds, _ = speed.interleaved(session, "", builds, lambda: None, float("inf"))
    assert calls == ["fast", *2 * ["slow", "fast"]]
    assert [len(of) for of in seconds.values()] == [2, 2]
    seconds, _ = speed.interleaved(session, "", builds, lambda: None, 0.0)
    assert [len(of) for of in seconds.values()] == [1, 1]  # one round there is


@pytest.mark.slow
def test_the_pilot_of_a_real_machine_knows_every_method() -> None:
    session = Session(TINY, only=("floor", "torch-eager", "mk-eager"))
    ahead = pilot.Pilot(session, 10.0)
    cases = TINY.sections(["speed", "memory"])
    ahead.start(cases)
    assert min(asdict(ahead._costs).values()) > 0
    assert {method for method, _ in ahead._rates} == set(session.only)
    assert [ahead.choose(case).case for case in cases] == list(cases)


# --- whole training steps ------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [3.0, 7.9, 40.0])
@pytest.mark.parametrize("budget", [0.5, 12.0, 50.0, 1000.0])
def test_the_largest_batch_fits_and_the_next_does_not(slope: float, budget: float) -> None:
    # Not quite a line: workspaces grow in steps.
    def peak(batch: int) -> float:
        return 2 + slope * batch + batch**0.5 + 3 * (batch > 5)

    found, peaks = step.largest(peak, budget, (1, 2))
    assert found == 0 or peaks[found] <= budget  # it was measured
    assert peak(found + max(1, found // 20)) > budget
    assert len(peaks) <= 2 + step.TRIES


def test_a_batch_that_runs_out_of_memory_does_not_fit() -> None:
    found, peaks = step.largest(lambda n: n if n < 11 else float("inf"), 1e9, (1, 4))
    assert found == 10 and peaks[11] == float("inf")


def test_a_peak_that_does_not_grow_ends_the_search() -> None:
    found, peaks = step.largest(lambda n: 1.0, 2.0, (1, 2))
    assert found == max(peaks) and len(peaks) == 2 + step.TRIES


def _compared() -> list[dict[str, Any]]:
    return [{"method": key, "status": "ok"} for key in ("torch-eager", "mk-eager")]


@pytest.mark.parametrize("stage", ["dpt", "dft"])
def test_naive_and_our_losses_train_alike(stage: str) -> None:
    case = replace(TINY.step[0], stage=stage)
    rows = _compared()
    trainings = {row["method"]: step._training(case, row["method"], "cpu") for row in rows}
    step._compare(case, rows, trainings)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert rows[0]["loss"] > 0 and rows[1]["gradient_off"] > 0  # compared with another's
    student, _ = vlm.pair(case.models, "cpu")
    frozen = {id(p) for p in student.model.vision_tower.parameters()}
    free = {id(p) for p in student.parameters()} - frozen
    trained = {id(p) for p in trainings["mk-eager"].trained}
    assert (trained < free and len(trained) == 4) if stage == "dpt" else trained == free
    # Another loss is told apart.
    trainings["mk-eager"].loss.relation = 0.4
    step._compare(case, rows, trainings)
    assert [row["status"] for row in rows] == ["ok", "wrong"]
    assert "off plain PyTorch's" in rows[1]["reason"]


def test_a_step_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    case, rows, build = TINY.step[0], _compared(), step._training

    def broken(case: StepCase, key: str, device: str) -> Any:
        training = build(case, key, device)
        if key == "mk-eager":
            training.step = _raises
        return training

    monkeypatch.setattr(step, "_training", broken)
    step._time(Session(TINY, rounds=1), case, rows)
    assert rows[0]["tokens_per_s"] > 0 and "seconds" not in rows[1]
    assert (rows[1]["status"], rows[1]["reason"]) == ("failed", "RuntimeError: first line")
    vlm.pair.cache_clear()  # its weights have moved


def test_a_step_moves_what_is_trained_and_nothing_else() -> None:
    training = step._training(TINY.step[0], "mk-eager", "cpu")
    student, teacher = vlm.pair(TINY.step[0].models, "cpu")
    before = {name: p.clone() for name, p in student.named_parameters()}
    frozen = [p.clone() for p in teacher.parameters()]
    training.step(training.batch(2))
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("model.multi_modal_projector.") for name in moved)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), frozen, strict=True))
    assert all(p.grad is None for p in student.parameters())
    vlm.pair.cache_clear()  # its weights have moved


def test_without_transformers_a_step_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", {"safetensors": True}.get)
    rows = step.measure(Session(TINY), TINY.step[0])
    assert len(rows) == 2 and {row["status"] for row in rows} == {"missing"}
    assert rows[0]["reason"] == "needs transformers"


@pytest.mark.slow
def test_whatever_ends_a_child_is_a_row() -> None:
    def raised(function: Any, *arguments: Any) -> str:
        found = memory.apart("cpu", function, *arguments)
        assert found.pop("status") == "failed"
        return found["reason"]

    assert raised(_raises) == "RuntimeError: first line"
    assert raised(os._exit, 1).startswith("the child process was killed")
    assert raised(sys.exit, "no driver") == "SystemExit: no driver"


# --- promises ------------------------------------------------------------------------------------


def _record(**changes: Any) -> dict[str, Any]:
    """A publishable record with figures that keep every promise, unless changed."""
    figures = {
        "over_floor": 1.1,
        "times_eager": 2.0,
        "extra": 100,
        "share": 0.5,
        "fallback": 1.0,
        "fallback_extra": 150,
    } | changes
    speed_rows, memory_rows, accuracy_rows = [], [], []
    for dtype in ("fp32", "bf16"):
        case = asdict(headline(dtype))
        slower = {
            "case": asdict(fallback(dtype)),
            "method": "mk-eager",
            "label": "",
            "status": "ok",
        }
        speed_rows.append(slower | {"median_s": 1.0, "over_floor": 2.0,
                                    "times_eager": figures["fallback"]})  # fmt: skip
        memory_rows.append(slower | {"extra_bytes": figures["fallback_extra"]})
        memory_rows.append(slower | {"method": methods.EAGER.key, "extra_bytes": 300})
        for method in (methods.EAGER, methods.OURS[-1]):
            ours = method is not methods.EAGER
            same = {"case": case, "method": method.key, "label": method.label, "status": "ok"}
            speed_rows.append(
                same
                | {"median_s": 1.0, "over_floor": figures["over_floor"] if ours else 2.2,
                   "times_eager": figures["times_eager"] if ours else 1.0}
            )  # fmt: skip
            memory_rows.append(same | {"extra_bytes": figures["extra"] if ours else 300})
            ladder = {"case": case | {"loss": "kl"}, "epsilon": 0.1, "contract": 1e-3}
            accuracy_rows.append(same | ladder | {"gradient": figures["share"] * 1e-3})
    return record.new(Session(replace(TINY, name="cpu"))) | {
        "speed": speed_rows, "memory": memory_rows, "accuracy": accuracy_rows,
        "judged_method": "mk-eager", "judged": "ours", "targets": [],
    }  # fmt: skip


def test_promises_that_hold() -> None:
    found = targets.judge(_record(), "mk-eager")
    assert len(found) == 12
    assert all(target["holds"] is True for target in found)


@pytest.mark.parametrize(
    ("change", "fail"),
    [
        ({"over_floor": 1.16}, 2),
        ({"times_eager": 1.5}, 1),  # enough for fp32, not for bf16
        ({"times_eager": 1.3}, 2),
        ({"fallback": 0.89}, 2),
        ({"fallback_extra": 201}, 2),
        ({"extra": 101}, 2),
        ({"share": 1.01}, 2),
        ({"share": float("nan")}, 2),
    ],
)
def test_promises_that_do_not_hold(change: dict[str, float], fail: int) -> None:
    found = targets.judge(_record(**change), "mk-eager")
    assert sum(target["holds"] is False for target in found) == fail


def test_a_promise_that_was_not_measured_is_neither() -> None:
    found = targets.judge(_record() | {"speed": [], "memory": [], "accuracy": []}, "mk-eager")
    assert {target["holds"] for target in found} == {None}


# --- records and the README ----------------------------------------------------------------------


def test_only_whole_runs_are_published_and_the_newest_by_its_own_date(tmp_path: Path) -> None:
    assert not record.published(tmp_path)
    whole = _record()
    for date in ("2026-03-01T00:00:00Z", "2026-01-01T00:00:00Z"):  # the older is written last
        record.save(whole | {"date": date}, tmp_path)
    part = {name: value for name, value in whole.items() if name != "memory"}
    unjudged = {"targets": [{"holds": None}]}
    changes = ({"suite": "quick"}, {"only": ["floor"]}, {"rounds": 4}, {"minutes": 9.0}, unjudged)
    for other in (part, *(whole | change for change in changes)):
        record.save(other | {"date": "2026-09-01T00:00:00Z"}, tmp_path)
    found = [path.name[-15:] for _, path in record.published(tmp_path)]
    assert found == ["2026-01-01.json", "2026-03-01.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 0}'])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json"):
        record.load(tmp_path / "odd.json")


def test_a_record_is_whole_whenever_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it is written anew, it is the one before."""
    path = record.save(_record(), tmp_path)

    def half(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(text.encode()[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        record.save(_record(), tmp_path)
    assert record.load(path)["suite"] == _record()["suite"]


def test_the_readme_is_rewritten_from_the_newest_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\ntyped by hand\n{readme.END}\nafter\n")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert main(["readme"]) == 2
    assert "no full run yet" in capsys.readouterr().out
    record.save(_record(), tmp_path)
    assert main(["readme"]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n") and text.endswith(f"{readme.END}\nafter\n")
    assert "typed by hand" not in text
    assert "| mllmkd_kernels, eager backend | 1.00 s | 1.10x | 2.00x | 0 MiB |" in text


def test_the_readme_says_who_is_absent_where_the_package_loses_and_what_is_below_the_floor(
    tmp_path: Path,
) -> None:
    found = _record(over_floor=0.5, extra=400, share=0.5)
    cpu = {"gflops": 300.0, "label": "ours"}
    absent = {"method": "peer", "label": "Theirs", "status": "missing", "reason": "needs cuda"}
    for row in [row for row in found["speed"] if row["case"] == asdict(headline("fp32"))]:
        row |= cpu if row["method"] != "torch-eager" else {"median_s": 0.5}
        found["speed"].append({**row, "method": "floor", "label": methods.FLOOR.label,
                               "gflops": 150.0, "over_floor": 1.0})  # fmt: skip
        found["speed"].append({"case": row["case"], **absent})
    for row in found["accuracy"]:
        row["gradient"] *= 2 if row["method"] != "torch-eager" else 1
    found["speed"] = [row for row in found["speed"] if row["case"]["dtype"] == "fp32"]
    text = readme.block(record.save(found, tmp_path), tmp_path)
    assert "those products alone: in fp32 300 GFLOP/s against 150, hence 0.50x." in text
    assert "Not in these tables: Theirs (missing: needs cuda)." in text
    assert "| Theirs" not in text and "| missing" not in text
    lost = text.split("Where the package loses to plain PyTorch:")[1]
    assert f"- speed, ours, {headline('fp32').title}: 1.00 s against 500 ms." in lost
    assert lost.count("- memory") == 2 and lost.count("2.0x the error") == 2
    assert "Where the package loses" not in readme.block(
        record.save(_record(), tmp_path / "wins"), tmp_path
    )


def test_the_readme_names_the_newest_record_of_every_other_machine(tmp_path: Path) -> None:
    path = record.save(_record(), tmp_path)
    for units, date in (("OLD", "2026-01-01"), ("OLD", "2026-01-02"), ("NEW", "2026-02-01")):
        other: dict[str, Any] = _record(times_eager=7.0) | {"date": f"{date}T00:00:00Z"}
        other["machine"]["vector_units"] = units
        record.save(other, tmp_path)
    text = readme.block(path, tmp_path)
    assert text.count("faster than PyTorch: fp32 7.00x (N 1,024 V 65,536) and bf16 7.00x") == 2
    assert "2026-01-02" in text and "2026-02-01" in text and "2026-01-01" not in text


def _steps() -> list[dict[str, Any]]:
    same = {"status": "ok", "median_s": 2.0, "min_s": 1.0, "max_s": 3.0, "seconds": [2.0] * 5,
            "loss_off": 0.0, "gradient_off": 1e-7}  # fmt: skip
    return [
        {"case": asdict(case), "method": key, "label": label, **same, "tokens_per_s": 1234.5,
         "times_eager": 2.5, "extra_bytes": 7 * 2**20, "largest_batch": batch}
        for case in (TINY.step[0], replace(TINY.step[0], stage="dft"))
        for key, label, batch in (("torch-eager", "PyTorch", 3), ("mk-cpu", "ours", 40))
    ]  # fmt: skip


def test_steps_are_in_the_readme_and_the_report_if_they_were_measured(tmp_path: Path) -> None:
    old = _record()
    assert "training step" not in readme.block(record.save(old, tmp_path / "old"), tmp_path)
    new = old | {"step": _steps()}
    assert record.publishable(old) and record.publishable(new)
    path = record.save(new, tmp_path / "new")
    text = readme.block(path, tmp_path)
    assert "A whole training step" in text and "within 2 MiB" in text
    assert "| DFT, ours | 1,234 | 2.50x | 7 MiB | 40 |" in text
    alone = new | {"speed": [], "memory": [], "accuracy": []}
    page = report.write(alone, tmp_path / "page").read_text()
    assert "## DPT step, fp32: toy pair" in page
    assert "| ours | 2.00 s | 1.00 s – 3.00 s | 1,234 | 2.50x | 7 MiB | 40 |" in page
    assert "Losses agree to 0e+00, gradients to 1e-07." in page


def test_time_and_memory_are_drawn_against_what_was_swept(tmp_path: Path) -> None:
    base = replace(headline("bf16"), rows=256)
    cases = [replace(base, rows=n) for n in (128, 256, 512)]
    cases += with_vocab(base, 16384, 2**17)
    cases.append(replace(base, train_head=False))
    rows = [
        {"case": asdict(case), "method": "mk-cpu", "label": "ours", "extra_bytes": case.rows * 1e6,
         "predicted_bytes": None}
        for case in cases
    ]  # fmt: skip
    found = {axis: plots._most_swept(rows, axis) for axis in plots.AXES}
    sizes = {axis: [plots._size(row, axis) for row in rows] for axis, rows in found.items()}
    swept = {"rows N": [128, 256, 512], "vocabulary V": [256 * 256, 16384, 2**17]}
    assert sizes == swept | {"threads": []}
    assert plots.memory_against_size({"memory": rows[:1]}) is None
    assert list(plots.draw({"memory": rows}, tmp_path)) == ["memory_against_size.png"]
    timed = [row | {"median_s": row["case"]["rows"] / 1e3} for row in rows]
    machine = {"threads": 4}
    drawn = plots.draw({"speed": timed, "machine": machine}, tmp_path)
    assert list(drawn) == ["time_against_size.png"]


def test_a_processor_is_swept_over_rows_vocabulary_and_its_threads(threads: None) -> None:
    torch.set_num_threads(6)
    cases = suites._cpu_suite().speed
    record = {"machine": {"threads": 6}}
    swept = [{"case": plots._with_threads(asdict(case), record)} for case in cases]
    sizes = {
        ax: sorted(plots._size(r, ax) for r in plots._most_swept(swept, ax)) for ax in plots.AXES
    }
    assert sizes == {"rows N": [32, 128, 512], "vocabulary V": [4096, 16384, 32768],
                     "threads": [1, 2, 4, 6]}  # fmt: skip


def test_a_case_is_measured_with_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    every, seen = torch.get_num_threads(), []
    monkeypatch.setattr(speed, "_measured", lambda *_: seen.append(torch.get_num_threads()) or [])
    speed.measure(Session(TINY), replace(CASE, threads=every + 1))
    assert (seen, torch.get_num_threads()) == ([every + 1], every)


@pytest.mark.parametrize(
    "text", ["", readme.BEGIN, readme.END + readme.BEGIN, 2 * (readme.BEGIN + readme.END)]
)
def test_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="bench:begin"):
        readme.rewritten(text, "new")


def test_the_readme_of_this_repository_is_current() -> None:
    _, path = record.published(record.RESULTS)[-1]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.rewritten(text, readme.block(path, ROOT)) == text, (
        "README.md is stale or was edited by hand: python -m benchmarks readme"
    )


# --- the command line ----------------------------------------------------------------------------


def test_the_benchmarks_need_the_package_alone() -> None:
    for path in Path(cli.__file__).parent.glob("*.py"):
        assert "training" not in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M)


def test_an_unknown_method_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["speed", "--suite", "tiny", "--only", "floor,nobody"]) == 2
    assert "got nobody, expected some of floor" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("rounds", ["0", "-1", "many"])
def test_rounds_are_positive(rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speed", "--rounds", rounds])
    assert "expected a positive number" in capsys.readouterr().err


def test_help_names_every_command_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert tuple(cli.SECTIONS) == record.SECTIONS
    for word in (*cli.SECTIONS, "all", "readme", *methods.BY_KEY):
        assert word in text


def test_one_section_alone(tmp_path: Path) -> None:
    command = "accuracy"
    out = ["--suite", "tiny", "--only", "torch-eager,mk-eager", "--rounds", "1"]
    assert main([command, *out, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert f"-tiny-{command}-" in path.name
    found = json.loads(path.read_text())
    assert [name for name in record.SECTIONS if name in found] == [command]


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit], ids=["limit", "killed"])
def test_a_run_that_is_stopped_keeps_every_case_that_was_measured(
    how: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = []

    def measure(session: Session, case: Case) -> list[dict[str, Any]]:
        if len(measured) == 2:
            raise how
        measured.append(case)
        return real(session, case)

    real = speed.measure
    monkeypatch.setattr("benchmarks.speed.measure", measure)
    arguments = ["all", "--suite", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    arguments += ["--only", "floor,mk-eager"]
    if how is SystemExit:
        with pytest.raises(SystemExit):
            main(arguments)
    else:
        assert main(arguments) == 0
        assert "interrupted; measured: speed" in capsys.readouterr().out
    (path,) = tmp_path.glob("*-unfinished.json")
    found = record.load(path)
    assert len({json.dumps(row["case"]) for row in found["speed"]}) == 2
    assert found["targets"] and not record.publishable(found)


def _on_a_gpu(over: float, over_more: float, gib: tuple[float, float], times: float) -> list[Any]:
    """What is found of the backend "auto" takes, and of another that was measured on one case."""
    trained, frozen, jsd, relation = map(asdict, gpu_headline())
    added, extra = methods.MAIN_GRAD["mk-triton"].key, [2**30 * size for size in gib]
    rows = [{"method": "mk-triton", "case": case, "over_floor": over, "times_eager": times,
             "extra_bytes": extra[0]} for case in (trained, frozen, relation)]  # fmt: skip
    rows += [{"method": method, "case": case, "over_floor": over_more, "extra_bytes": extra[1]}
             for method, case in (("mk-triton", jsd), (added, trained))]  # fmt: skip
    rows += [{"method": "mk-cuda", "case": trained, "over_floor": over, "extra_bytes": extra[0]}]
    record = {"machine": {"gpu": "one"}, "suite": "headline", "speed": rows, "memory": rows}
    return targets.judge(record, "mk-triton")


def test_a_gpu_has_targets_of_its_own_and_every_backend_that_was_measured_is_judged() -> None:
    within = _on_a_gpu(1.29, 1.49, (1.7, 0.59), 20.5)
    beyond = _on_a_gpu(1.31, 1.51, (1.8, 0.61), 19.0)
    for found, holds in ((within, True), (beyond, False)):
        assert [target["holds"] for target in found] == [holds] * 7 + [None] * 2 + [holds] * 2
        other = ["cuda backend, trained head" in target["promise"] for target in found]
        assert other == [False] * 9 + [True] * 2


@pytest.mark.slow
def test_a_run_measures_what_a_gpu_is_judged_by(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, frozen, relation, _ = TINY.speed
    monkeypatch.setattr(targets, "gpu_headline", lambda: (trained, frozen, trained, relation))
    found = record.load(run)
    found["machine"]["gpu"] = "pretended"
    # Of the others there is the accuracy of those that the run was asked for, which are none.
    marks = [target["holds"] for target in targets.judge(found, OURS.key)]
    assert len(marks) == 9 and None not in marks


def test_what_is_added_to_an_accumulator_is_the_gradient_of_the_head() -> None:
    method, problem = methods.MAIN_GRAD["mk-eager"], make(CASE)
    step = method.build(problem)
    for _ in range(2):  # zeroed between steps, as a gradient is dropped
        step()
        assert problem.ws.grad is None and problem.dw is problem.main_grad
        assert problem.dw is not None and problem.dw.any()
        first = problem.dw.clone()
        problem.forget_gradients()
        assert problem.dw is None
    assert method.plan is not None
    right = truth.truth(problem).dw
    assert right is not None and truth.relative(first, right) < 1e-5
    assert method.computes(CASE) and not method.computes(replace(CASE, train_head=False))
    without = memory.predicted(methods.BY_KEY["mk-eager"], headline("bf16"))
    sums, found = 4 * 65536 * 896, memory.predicted(method, headline("bf16"))
    assert found and without and found < without - sums / 4
