"""Does the check without a GPU see what it is there to see? And do the kernels pass it?"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from benchmarks.methods import BY_KEY
from tests.gpu import __main__ as command
from tests.gpu import baseline, calls, offline, resources
from tests.gpu.resources import Row

ROW = Row(
    kernel="k", call="c", config="", target="sm_90", compiler="triton", instructions=1000,
    registers=128, stack=0, shared=1024, spills=0, matrix="wgmma", tma=True, needs=("wgmma", "tma"),
)  # fmt: skip


# --- the verdict ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"stack": 64}, None),  # an array on the stack is no spill
        ({"spills": 3}, "spills (3)"),
        ({"spills": 3, "target": "sm_100"}, "spills (3)"),
        ({"spills": 3, "target": "sm_80"}, "spills (3)"),
        ({"shared": 227 * 1024}, None),
        ({"shared": 227 * 1024 + 1}, "232449 B of shared memory of 232448"),
        ({"shared": 200 * 1024, "target": "sm_80"}, "204800 B of shared memory of 166912"),
        ({"matrix": "mma.sync"}, "no wgmma (mma.sync)"),
        ({"tma": False}, "no TMA"),
        ({"matrix": "-", "tma": False, "needs": ()}, None),
        ({"matrix": "mma.sync", "tma": False, "target": "sm_80"}, None),
    ],
)
def test_what_fails_a_row(change: dict, fault: str | None) -> None:
    assert dataclasses.replace(ROW, **change).faults() == ([fault] if fault else [])


def test_amds_assembly_says_what_cuobjdump_says_of_nvidias() -> None:
    text = (
        "k:\n\ts_load_dword s0, s[0:1], 0x0\n\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1]\n"
        "\t.section x\n    .private_segment_fixed_size: 16\n    .vgpr_count:     96\n"
        "    .vgpr_spill_count: 3\n"
    )
    compiled = SimpleNamespace(asm={"amdgcn": text}, metadata=SimpleNamespace(shared=32))
    assert resources._of_amd(compiled) == {
        "instructions": 2, "registers": 96, "stack": 16, "shared": 32, "spills": 3,
        "matrix": "mfma",
    }  # fmt: skip


def test_a_kernel_that_grew_is_a_fault_until_it_is_accepted(tmp_path: Path) -> None:
    path, before = tmp_path / "instructions.json", dataclasses.replace(ROW, compiler="triton 1")
    baseline.accept([before, dataclasses.replace(before, target="sm_100")], ["triton 1"], path)
    for count, faults in ((1050, 0), (1051, 1)):
        now = dataclasses.replace(before, instructions=count)
        assert len(baseline.grown([now], path)) == faults
    (fault,) = baseline.grown([dataclasses.replace(before, instructions=2000)], path)
    assert fault == "k: c, sm_90, triton 1: 2000 instructions, 1000 accepted (+100%)"
    # A second configuration in the same call counts too; another compiler's code is another's.
    assert baseline.grown([before, before], path)
    assert not baseline.grown([dataclasses.replace(before, compiler="triton 2")] * 2, path)
    baseline.accept([before, before], ["triton 1"], path)
    assert not baseline.grown([before, before], path)
    assert baseline.read(path)["triton 1"] == {"k: c": {"sm_90": 2000, "sm_100": 1000}}
    # Nothing is forgotten but an older version of what was accepted.
    baseline.accept([dataclasses.replace(before, compiler="nvcc 1")], ["nvcc 1"], path)
    baseline.accept([dataclasses.replace(before, compiler="triton 2")], ["triton 2"], path)
    assert list(baseline.read(path)) == ["nvcc 1", "triton 2"]


def test_accepted_instructions_are_of_calls_that_there_are() -> None:
    names = {call.name for call in calls.every()}
    accepted = baseline.read()
    assert any(compiler.startswith("triton ") for compiler in accepted)
    for line, counts in (x for found in accepted.values() for x in found.items()):
        kernel, call = line.split(": ", 1)
        assert call in names | {"rows_cluster.cu"}, line
        assert kernel.endswith("kernel") and set(counts) <= set(resources.SHARED_LIMIT), line


def test_usage_is_read_and_missing_figures_are_an_error() -> None:
    text = "Function k:\n REG:255 STACK:592 SHARED:0 LOCAL:0 CONSTANT[0]:620 TEXTURE:0"
    assert resources.of_usage(text)["STACK"] == 592
    with pytest.raises(RuntimeError, match="no STACK"):
        resources.of_usage("REG:1 SHARED:0 LOCAL:0")


def test_ptxas_output_becomes_rows() -> None:
    text = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'\n"
        "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function '_Z1jv' for 'sm_100'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 24 registers\n"
    )
    first, second = resources.of_ptxas(text)
    assert first == {
        "kernel": "_Z1kv", "target": "sm_90", "stack": 16, "spills": 8, "registers": 40,
        "shared": 1024,
    }  # fmt: skip
    assert (second["target"], second["registers"], second["shared"]) == ("sm_100", 24, 0)


# --- the kernels ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_configuration_of_every_kernel_compiles_for_sm_90_and_passes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = offline.main(["--quick", "--only-installed", "--arch", "90", "--processes", "1"])
    text = capsys.readouterr().out
    assert status == 0, text[-4000:]
    for kernel in ("row_kernel", "statistics_kernel", "values_kernel", "gradient_kernel",
                   "relation_stats_kernel", "relation_grad_kernel", "merge_kernel"):  # fmt: skip
        assert kernel in text, kernel
    assert "wgmma" in text and "yes" in text


def test_a_call_that_does_not_compile_is_a_fault_with_its_cause() -> None:
    found = offline.Findings()
    job = offline.Job(call="no such call", target="sm_90", triton="")
    offline.compile_all([job], 1, found, lambda what: None)
    assert not found.rows and len(found.faults()) == 1
    assert "'no such call', sm_90, Triton installed" in found.faults()[0]


def test_what_is_not_compiled_in_time_is_a_fault() -> None:
    found = offline.Findings()
    jobs = [offline.Job("chunk jsd", "sm_90", "")] * 2
    offline.compile_all(jobs, 1, found, lambda what: None, end=0.0)
    assert len(found.faults()) == 2 and "the time was over" in found.faults()[0]


def test_names_narrow_the_selection() -> None:
    names = [call.name for call in calls.every()]
    assert len(set(names)) == len(names)
    assert [call.name for call in calls.selected(calls.every(), "stream jsd")] == [
        "stream jsd", "stream jsd, no gradient",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--kernel", "nobody"], "nobody"), (["--arch", "75"], "75")]
)
def test_an_unknown_selection_is_an_error(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = offline.main(arguments)
    except SystemExit as stop:
        status = stop.code
    text = capsys.readouterr()
    assert status == 2 and words in text.out + text.err


# --- the command for a machine with a GPU ---------------------------------------------------------


def _stage(name: str, **changes: object) -> command.Stage:
    return dataclasses.replace(command.Stage(name, 5, ("true",)), **changes)  # type: ignore


@pytest.mark.parametrize(
    ("status", "outcome"), [(0, "passed"), (1, "failed"), (None, "stopped")]
)  # fmt: skip
def test_a_stage_ends_as_its_command_does(status: int | None, outcome: str) -> None:
    assert command.perform(_stage("tests"), lambda stage: status).outcome == outcome


def test_a_stage_that_cannot_run_is_skipped_and_says_why() -> None:
    result = command.perform(_stage("sanitizer", command=(), note="not here"), lambda stage: 1)
    assert result.outcome == "skipped"
    assert "not here" in command.summary([result])


def test_the_whole_fits_into_ten_minutes() -> None:
    for quick in (False, True):
        longest = (max(s.seconds for s in group) for group in command.groups(command.stages(quick)))
        assert sum(longest) <= 540  # and a minute for what is between them


def test_every_stage_names_files_that_exist() -> None:
    for stage in command.stages(quick=False):
        for word in stage.command:
            if word.startswith("tests/"):
                assert (command.ROOT / word).exists(), word


def test_a_stage_that_takes_too_long_is_stopped(folders: Path) -> None:
    assert command._run(_stage("tests", seconds=1, command=("sleep", "60"))) is None


def test_an_unknown_stage_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--stages", "tests,nobody"]) == 2
    assert "got nobody, expected some of build, compile" in capsys.readouterr().out


def test_without_a_gpu_the_command_points_to_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--stages", "tests"]) == 2
    assert "gpu-offline" in capsys.readouterr().out


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results and logs go elsewhere."""
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(command, "LOGS", tmp_path / "logs")
    return tmp_path


def test_a_stage_that_hangs_or_fails_takes_nothing_with_it(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one before has handed out its record by then, and the one after still runs."""
    record = {"suite": "headline", "complete": True, "targets": [
        {"promise": "fast", "found": "1.2x", "holds": True},
        {"promise": "small", "found": "9 GiB", "holds": False},
    ]}  # fmt: skip
    (folders / "results").mkdir()
    (folders / "out").mkdir()
    monkeypatch.setenv("OUT", str(folders / "out"))
    write = f"import pathlib; pathlib.Path({str(folders / 'results' / 'a.json')!r}).write_text"
    programs = {
        "headline": f"{write}({json.dumps(record)!r})",
        "tests": "import time; print('at it', flush=True); time.sleep(60)",
        "large": "raise ValueError('what is wrong')",
        "bench": "print('measured')",
    }
    found = [
        command.Stage(name, 2 if name == "tests" else 60, (sys.executable, "-c", program))
        for name, program in programs.items()
    ]
    monkeypatch.setattr(command, "stages", lambda quick, rehearse: found)
    assert command.main(["--rehearse"]) == 1
    assert (folders / "out" / "a.json").exists()
    text = (folders / "out" / "summary.txt").read_text()
    assert text.strip() in capsys.readouterr().out
    outcomes = re.findall(r"^  (\w+) +(passed|failed|stopped) ", text, re.MULTILINE)
    assert [how for _, how in outcomes] == ["passed", "stopped", "failed", "passed"]
    for line in ("pass  fast: 1.2x", "FAIL  small: 9 GiB", "| at it", "| ValueError: what is"):
        assert line in text, line


@pytest.mark.slow
def test_a_rehearsal_measures_judges_and_sums_up(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tests that need a GPU are skipped; the rest of the stage is what a GPU sees."""
    status = command.main(["--rehearse", "--stages", "build,headline,large,sanitizer"])
    text = capsys.readouterr().out
    assert status == 0, text[-4000:]
    outcomes = re.findall(r"^  (\w+) +(passed|skipped|failed|stopped) ", text, re.MULTILINE)
    ran = ["headline", "large", "sanitizer"]
    assert outcomes == [("build", "skipped"), *((stage, "passed") for stage in ran)]
    assert "targets, suite tiny" in text and "gradient error" in text
    (path,) = (folders / "runs").glob("*.json")
    record = json.loads(path.read_text())
    assert record["complete"] is True
    added = {row["status"] for row in record["speed"] if row["method"].endswith("-main-grad")}
    assert added == {"ok"} and set(command.METHODS.split(",")) <= set(BY_KEY)
    assert "skipped" in (folders / "logs" / "large.log").read_text()
    assert "triton main_grad" in (folders / "logs" / "sanitizer.log").read_text()


def test_every_stage_is_rehearsed() -> None:
    real, rehearsed = (command.stages(False, rehearse) for rehearse in (False, True))
    assert [stage.name for stage in real] == [stage.name for stage in rehearsed]
    assert all(stage.command for stage in rehearsed[1:])
    assert not any("cuda" in stage.command for stage in rehearsed)


def test_results_are_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    (results / "run").mkdir(parents=True)
    out.mkdir()
    (results / "run.json").write_text(json.dumps({}))
    (results / "run" / "report.md").write_text("")
    monkeypatch.setattr(command, "RESULTS", results)
    monkeypatch.setattr(command, "RUNS", tmp_path / "none")
    monkeypatch.setattr(command, "LOGS", tmp_path / "none")
    monkeypatch.setenv("OUT", str(out))
    command._hand_out(since=0)
    assert {path.name for path in out.iterdir()} == {"run.json", "gpu.tar.gz"}
    with tarfile.open(out / "gpu.tar.gz") as archive:
        assert set(archive.getnames()) == {"results/run.json", "run/report.md"}


def test_stages_side_by_side_hand_out_what_they_have_while_they_run(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ends when it sees the second's file, and its own record outside."""
    (folders / "results").mkdir()
    (folders / "out").mkdir()
    monkeypatch.setenv("OUT", str(folders / "out"))
    monkeypatch.setattr(command, "OFTEN", 0.1)
    record = {"suite": "s", "targets": []}
    waiting = (
        f"import pathlib, time; at = pathlib.Path({str(folders)!r})\n"
        f"(at / 'results' / 'a.json').write_text({json.dumps(record)!r})\n"
        "while not ((at / 'second').exists() and (at / 'out' / 'a.json').exists()):\n"
        "    time.sleep(0.05)"
    )
    writing = f"open({str(folders / 'second')!r}, 'w').close()"
    found = [
        _stage("build", seconds=60, command=(sys.executable, "-c", waiting)),
        _stage("compile", seconds=60, command=(sys.executable, "-c", writing), beside=True),
    ]
    first = next(command.groups(command.stages(quick=False)))
    assert [stage.name for stage in first] == ["build", "compile"]
    monkeypatch.setattr(command, "stages", lambda quick, rehearse: found)
    assert command.main(["--rehearse"]) == 0


#: Compiles the row kernel with an fp32 dz, in the place of the logits, and prints its PTX.
_ROW_KERNEL = """
import torch
from mllmkd_kernels.backends.triton.rows import row_losses
from tests.gpu import pretended

def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="cuda")

with pretended.gpu("sm_90", lambda compiled, constants: print(compiled.asm["ptx"])):
    z = empty(8, {vocab})
    row_losses(z, None, None, None, empty(8, dtype=torch.int64), empty(8), None,
               empty(8), empty(8), "forward_kl", 0.0, 1.0, 0.0, 0.0, -100, z)
"""


@pytest.mark.parametrize("vocab", [1000, 20_000], ids=["whole row", "long row"])
def test_no_warp_overwrites_a_label_that_another_has_yet_to_read(vocab: int) -> None:
    """Between the load of the label's logit, for the CE that is stored first, and any other store
    stands a barrier. The interpreter has one thread and sees no race.
    """
    command = [sys.executable, "-W", "ignore", "-c", _ROW_KERNEL.format(vocab=vocab)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = re.findall(r"ld\.global|st\.global|bar\.sync", done.stdout)
    before = steps[: steps.index("st.global")]
    assert before[-2:] == ["ld.global", "bar.sync"]
