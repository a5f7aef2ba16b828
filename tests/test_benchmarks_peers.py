"""Is every peer asked for the same loss, and is one that cannot give it a row that says why?

The functions of other projects are tested where they are installed, those in Triton under its
interpreter where there is no GPU. What is ours, how they are looked for, called and judged, is
tested with stand-ins.
"""

from __future__ import annotations

import sys
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import methods, naive, peers, session, speed, truth
from benchmarks.problem import Problem, make
from benchmarks.session import Session
from benchmarks.shapes import LOSSES, PREFERENCES, Case
from benchmarks.suites import SUITES

CPU = torch.device("cpu")
#: Rows are a multiple of 8, which quack's kernels want; no other size is a multiple of another.
CASE = Case("test", rows=16, d_t=24, d_s=16, vocab_t=200, vocab_s=200)
#: Triton and nothing else: its interpreter runs them on a CPU.
INTERPRETED = {"liger-jsd", "liger-both", "trl-both", "fla", "liger-ce"}
PEERS = {peer.key: peer for peer in peers.PEERS}


def _method(peer: peers.Peer) -> methods.Method:
    return next(method for method in methods.METHODS if method.key == peer.key)


def _right(_: Any, problem: Problem) -> peers.Forward:
    return lambda: naive.loss_of(problem)


def _call(prepare: Any = _right, module: str = "torch.nn", function: str = "Linear") -> peers.Call:
    """One that is always there, with changes."""
    return peers.Call("torch", module, function, prepare)


def _peer(*calls: peers.Call, **changes: Any) -> peers.Peer:
    return peers.Peer("stand-in", "stand-in", frozenset({"ce+kl"}), calls, **changes)


def _vetted(peer: peers.Peer, case: Case = CASE) -> session.Verdict:
    return Session(SUITES["tiny"]).verdicts([methods._peer(peer)], case)[peer.key]


# --- the list ------------------------------------------------------------------------------------


def test_every_peer_is_a_method_with_all_it_says() -> None:
    assert len({method.key for method in methods.METHODS}) == len(methods.METHODS)
    for peer in peers.PEERS:
        method = _method(peer)
        assert peer.losses and peer.losses <= set(LOSSES)
        assert (method.label, method.losses) == (peer.label, peer.losses)
        assert method.why_not(CPU) == (peer.unfit(CPU) or peer.missing())


def test_versions_name_every_distribution_once() -> None:
    found = peers.versions()
    assert {"liger-kernel", "trl", "cut-cross-entropy", "quack-kernels"} <= set(found)
    assert "torch" not in found  # a record has it elsewhere


# --- what cannot run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no driver')", "cannot import odd_0: RuntimeError: no driver"),
        ("raise SystemExit(3)", "cannot import odd_1: SystemExit: 3"),
        ("import no_such_thing", "cannot import odd_2: ModuleNotFoundError: No module named"),
        ("raise ImportError('wants unsloth')", "cannot import odd_3: ImportError: wants unsloth"),
        ("other = 1", "odd_4 has no function"),
        ("import warnings; warnings.warn('no GPU'); function = 1", ""),
    ],
    ids=["raises", "exits", "lacks a requirement", "refuses", "renamed", "warns"],
)
def test_whatever_happens_at_import_is_a_reason(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    name = f"odd_{next(iter(request.node.callspec.indices.values()))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = _peer(_call(module=name, function="function")).missing()
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_a_module_that_is_not_there_is_not_installed() -> None:
    absent = peers.Call("no-such", "no_such.module", "f", _right)
    assert _peer(absent).missing().startswith("not installed: ")
    assert _peer(_call(), absent).missing().startswith("not installed: ")


def test_a_peer_for_another_device_is_not_even_imported() -> None:
    peer = _peer(_call(module="no_such_module_either"), on_gpu=True)
    assert methods._peer(peer).why_not(CPU) == "needs cuda, got cpu"


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = PEERS["quack"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert peer.unfit(torch.device("cuda")) == "needs compute capability 9.0, this GPU has 8.6"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert peer.unfit(torch.device("cuda")) == ""


def _raises(error: BaseException) -> Any:
    raise error


_THEIRS = RuntimeError("first line\nsecond line: /somewhere/of/theirs.py")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda *_: _raises(TypeError("their signature")), "TypeError: their signature"),
        (lambda *_: lambda: _raises(_THEIRS), "RuntimeError: first line"),
        (lambda *_: lambda: _raises(SystemExit("no driver")), "SystemExit: no driver"),
        (lambda _, p: lambda: p.hs.detach().sum(), "RuntimeError: element 0 of tensors"),
    ],
    ids=["build", "run", "exit", "no gradient"],
)
def test_whatever_a_peer_raises_is_a_row(prepare: Any, reason: str) -> None:
    verdict = _vetted(_peer(_call(prepare)))
    assert verdict.status == "failed" and verdict.reason.startswith(reason)
    assert "somewhere" not in verdict.reason


def test_a_failure_leaves_no_gradient_to_the_next_method() -> None:
    problem = make(CASE)

    def half_way(*_: Any) -> peers.Forward:
        problem.hs.grad = torch.ones_like(problem.hs)
        return lambda: _raises(_THEIRS)

    session.vet(methods._peer(_peer(_call(half_way))), problem, truth.truth(problem))
    assert problem.hs.grad is None


@pytest.mark.parametrize("where", ["build", "run"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("too many rows"), SystemExit("no more"), torch.OutOfMemoryError("no memory")],
    ids=lambda error: type(error).__name__,
)
def test_a_peer_that_fails_at_full_size_is_a_row_too(
    where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(_: Any, problem: Problem) -> peers.Forward:
        if problem.case.rows <= session.CHECK_ROWS:  # right on the few rows that are checked
            return lambda: naive.loss_of(problem)
        return _raises(error) if where == "build" else lambda: _raises(error)

    peer = _peer(_call(prepare))
    monkeypatch.setattr(methods, "METHODS", (methods.EAGER, methods._peer(peer)))
    case = replace(CASE, rows=session.CHECK_ROWS + 1)
    rows = {r["method"]: r for r in speed.measure(Session(SUITES["tiny"], rounds=1), case)}
    assert rows["torch-eager"]["median_s"] > 0
    assert rows[peer.key]["status"] == "failed" and str(error) in rows[peer.key]["reason"]
    assert "median_s" not in rows[peer.key]


# --- what is wrong, and what is merely coarse ----------------------------------------------------


def _off_by(share: float) -> peers.Peer:
    return _peer(_call(lambda _, problem: lambda: (1 + share) * naive.loss_of(problem)))


@pytest.mark.parametrize(
    ("dtype", "share", "status"),
    [("fp32", 0.1, "wrong"), ("fp32", 4e-3, "wrong"), ("bf16", 0.1, "wrong"), ("bf16", 4e-3, "ok")],
)
def test_errors_of_the_size_of_bf16_pass_in_bf16_alone(
    dtype: str, share: float, status: str
) -> None:
    verdict = _vetted(_off_by(share), replace(CASE, dtype=dtype))
    assert verdict.status == status
    assert verdict.errors is not None  # printed either way
    assert all(error > share / 2 for error in asdict(verdict.errors).values())
    assert ("off by" in verdict.reason) == (status == "wrong")


# --- how they are called -------------------------------------------------------------------------


def _rows_of_equal_heads(hs: Tensor, ws: Tensor, _b: None, ht: Tensor, wt: Tensor, *_: Any) -> Any:
    """As TRL's: a divergence for each row, and a second output."""
    assert ws.shape[0] == wt.shape[0], "a kernel would read beyond the smaller head"
    z_s, z_t = F.linear(hs, ws).float(), F.linear(ht, wt).float()
    rows = F.kl_div(z_s.log_softmax(-1), z_t.log_softmax(-1), log_target=True, reduction="none")
    return rows.sum(1), None


class _CrossEntropy:
    """As Liger's: weight first."""

    def __init__(self, accum_dtype: torch.dtype) -> None:
        assert accum_dtype == torch.float32

    def __call__(self, ws: Tensor, hs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hs, ws).float(), labels)


@pytest.mark.parametrize("vocabs", [(200, 200), (208, 200), (200, 208)], ids=str)
@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
def test_two_calls_make_one_loss_over_the_shared_vocabulary(
    vocabs: tuple[int, int], train_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl: Any = types.ModuleType("trl.kernels.chunked_divergence")
    trl.ChunkedDivergenceFunction = types.SimpleNamespace(apply=_rows_of_equal_heads)
    liger: Any = types.ModuleType("liger_kernel.transformers")
    liger.LigerFusedLinearCrossEntropyLoss = _CrossEntropy
    for module in (trl, liger):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(peers, "_why_not_importable", lambda *call: "")  # it remembers the truth
    case = replace(CASE, vocab_t=vocabs[0], vocab_s=vocabs[1], train_head=train_head)
    kl = replace(PEERS["trl"], key="stand-in", losses=frozenset({"kl"}))
    assert _vetted(kl, replace(case, loss="kl")).status == "ok"
    both = replace(PEERS["trl-both"], key="stand-in", on_gpu=False)
    assert _vetted(both, case).status == "ok"


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("key", PEERS)
def test_peers_that_are_installed_compute_the_loss(
    key: str, train_head: bool, dtype: str, device: torch.device
) -> None:
    peer = PEERS[key]
    interpreted = device.type == "cpu" and key in INTERPRETED
    why_not = peer.missing() or ("" if interpreted else peer.unfit(device))
    if why_not:
        pytest.skip(f"{key}: {why_not}")
    for loss in sorted(peer.losses):
        images = 4 if loss in PREFERENCES else 1
        case = replace(CASE, loss=loss, dtype=dtype, train_head=train_head, images=images)
        problem = make(case, device=str(device))
        method = methods.Method(key, peer.label, peer.losses, peer.build)
        found = truth.errors(method, problem, truth.truth(problem))
        assert not truth.verdict(found, dtype), (loss, found)


# --- torch.compile -------------------------------------------------------------------------------


def test_a_cpu_compiles_only_where_every_backend_is_compared() -> None:
    def keys(**how: Any) -> set[str]:
        return {method.key for method in methods.select(CASE, **how)}

    compiled = methods.COMPILED.key
    assert compiled in keys(every_backend=True)
    assert compiled not in keys(every_backend=False)
    assert compiled in keys(every_backend=False, only=(compiled,))
    assert compiled in keys(every_backend=True, device="cuda")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_pytorch_is_right_and_leaves_no_gradient_behind() -> None:
    problem = make(CASE)
    methods.COMPILED.build(problem)
    assert problem.hs.grad is None and problem.ws.grad is None
    found = truth.errors(methods.COMPILED, problem, truth.truth(problem))
    assert not truth.verdict(found, "fp32"), found
