"""Does the plan follow from the shapes, keep to its budget and say why?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mllmkd_kernels as mk
from mllmkd_kernels import gpu_time, hardware, plan
from mllmkd_kernels.backends import cpu
from mllmkd_kernels.backends.products import strip_bytes
from mllmkd_kernels.choose import choose_backend


@pytest.fixture
def needs_triton() -> None:
    pytest.importorskip("triton")


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("rows", [1, 31, 32, 100, 1000, 4096])
@pytest.mark.parametrize("budget", [1e-6, 1.0, 64.0, 4096.0])
def test_a_chunk_fits_the_budget_and_chunks_are_equal(rows: int, budget: float) -> None:
    c = plan.chunk_rows("eager", rows, 5000, 2, 4, budget)
    assert 1 <= c <= max(rows, 1)
    assert c <= plan.MIN_CHUNK_ROWS or c * 5000 * 2 * 4 <= budget * 2**20
    chunks = -(-rows // c)
    assert chunks * c - rows < chunks  # the last chunk lacks at most one row of each other


@pytest.mark.parametrize("budget", [None, 2000.0, 700.0, 300.0, 100.0, 1.0])
@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_chunks_on_a_gpu_are_whole_tiles_and_the_same_from_step_to_step(
    backend: str, train_head: bool, budget: float | None
) -> None:
    gpu = hardware.GPUS["h100"]

    def blocks(rows: int) -> tuple[int, int, int]:
        s = plan.Shapes(rows, 151_936, 1024, 2560, True, train_head, torch.bfloat16)
        return plan._gpu_blocks(s, backend, gpu, plan._budget(backend, budget))

    c, fold, beside = blocks(8192)
    assert {blocks(n) for n in (1, 100, 2100, 2200, 50_000)} == {(c, fold, 0)} and not beside
    assert fold % c == 0 and fold <= plan.MOST_FOLDED
    if plan._budget(backend, budget) >= gpu_time.ROW_TILE * 151_936 * 10:
        assert c % gpu_time.ROW_TILE == 0
    if c > plan.MIN_CHUNK_ROWS:
        inside = backend == "cuda" and fold == c  # dz takes the place of the student's logits
        assert 151_936 * (8 * c + 2 * fold * (not inside)) <= plan._budget(backend, budget)


def test_the_model_counts_what_moves_and_what_is_computed() -> None:
    """Each thing that a GPU has to do makes the prediction longer."""
    gpu = hardware.GPUS["h100"]
    s = plan.Shapes(8192, 151_936, 1024, 2560, True, True, torch.bfloat16)

    def seconds(shapes: plan.Shapes = s, c: int = 512, fold: int = 2048, of: Any = gpu) -> float:
        return gpu_time.fold(shapes, "triton", of, c, fold) / fold

    assert seconds() < 0.9 * seconds(fold=512)  # dw is read and written a quarter as often
    assert seconds() < 0.9 * seconds(c=128)  # so are the heads
    assert seconds(replace(s, divergence="jsd")) > 1.1 * seconds()
    assert seconds(replace(s, dtype=torch.float16)) > 1.3 * seconds()
    assert seconds(of=replace(gpu, clock=gpu.clock / 4)) > 1.1 * seconds()
    floor = s.floor_flops / gpu.half_flops
    assert 8192 * seconds() > floor and gpu_time.slower(3.0, 4.0) > 4.0
    saved = s.d_s * (8192 * 6 + 151_936 * 2)  # scaled and rounded; dw's first read left out
    assert gpu_time.once(s, gpu) == (saved + 2 * 8192 * 1024 * 2) / gpu.bandwidth
    added, later = (
        gpu_time.once(replace(s, main_grad=when), gpu) * gpu.bandwidth
        for when in ("forward", "backward")
    )
    assert (added, later) == pytest.approx((10 * 8192 * 1024, added + 8 * 151_936 * 1024))


def test_a_chunk_that_is_not_full_costs_what_it_is() -> None:
    """Rows that are no multiple of a fold are no reason to take fewer at a time."""
    gpu = hardware.GPUS["h100"]
    s = plan.Shapes(8192, 151_936, 1024, 2560, True, True, torch.bfloat16)
    even, odd = (gpu_time.chunk(s, "cuda", gpu, c, r) for c, r in ((1024, 2048), (896, 1792)))
    assert abs(odd / even - 1) < 0.02
    short = gpu_time.phases(s, "cuda", gpu, 896, 1024)
    multiplied = [p.times * p.work * gpu.half_flops for p in short if p.name == "logits"]
    wanted = [2.0 * m * 151_936 * d for m in (896, 128) for d in (1024, 2560)]
    assert multiplied == pytest.approx(wanted)


@pytest.mark.usefixtures("needs_triton")
def test_row_passes_beside_products_are_planned_where_they_are_asked_for() -> None:
    """The time of the slower lane and of all bytes; two of each block in the same budget."""

    def planned(**options: Any) -> plan.Plan:
        return mk.explain(
            8192, 151_936, 1024, 2560, dtype=torch.bfloat16, device="cuda", gpu="h100", **options
        )

    asked = planned(overlap=True, workspace_mb=2400.0)
    assert (asked.chunk_rows, asked.fold_rows, planned().beside) == (512, 2048, 0)
    assert asked.workspace_bytes - 2 * 2048 * 1024 == 2 * 151_936 * (8 * 512 + 2 * 2048)
    assert f"row passes on {asked.beside} of 132 multiprocessors" in str(asked)
    assert (asked.seconds or 0) < (planned().seconds or 0)
    with pytest.raises(ValueError, match="overlap: expected backend 'triton' or 'cuda', got 'eag"):
        mk.explain(8, 8, 8, backend="eager", overlap=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": 8.5}, TypeError, "rows: expected an integer, got float"),
        ({"dtype": torch.int8}, ValueError, "dtype: got torch.int8, expected one of"),
        ({"divergence": "kl"}, ValueError, "divergence: got 'kl'"),
    ],
)
def test_no_plan_of_a_call_that_cannot_be(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    sizes: dict[str, Any] = {"rows": 8, "vocab": 8, "d_s": 8, "d_t": 8}
    with pytest.raises(error, match=message):
        mk.explain(**sizes | change)


@pytest.mark.usefixtures("needs_triton")
def test_what_a_prediction_assumes_is_printed() -> None:
    text = str(mk.explain(8192, 151_936, 1024, 2560, device="cuda", gpu="h100"))
    assert "assumed of h100: 50 TFLOP/s, 3.0 TB/s, 22e12 instructions/s" in text


def test_an_ample_budget_is_one_chunk_and_a_poor_one_the_smallest() -> None:
    assert plan.chunk_rows("eager", 500, 100, 2, 4, None) == 500
    assert plan.chunk_rows("eager", 1024, 10**6, 2, 4, 1e-6) == plan.MIN_CHUNK_ROWS
    assert plan.chunk_rows("eager", 0, 100, 2, 4, None) == 1
    none = plan._chunk_on_gpu(
        plan.Shapes(0, 100, 8, 8, True, True, torch.bfloat16), "cuda", hardware.DEFAULT, None
    )
    assert (none.chunk_rows, none.fold_rows) == (1, 1)


def test_a_processor_takes_no_more_rows_whatever_the_budget() -> None:
    for backend in ("cpu", "eager"):
        assert plan.chunk_rows(backend, 1024, 65_536, 2, 4, None) == plan.CPU_CHUNK_ROWS
        assert plan.chunk_rows(backend, 1000, 100, 2, 4, 1e6) == 500


def test_saved_gradients_count_beside_the_workspace_that_is_kept() -> None:
    n, v, d = 64, 1000, 8
    eager = mk.explain(n, v, d, d, dtype=torch.bfloat16, backend="eager")
    assert eager.saved_bytes == 2 * eager.returned_bytes == (n + v) * d * 4
    assert eager.peak_bytes == eager.workspace_bytes + eager.saved_bytes - eager.returned_bytes
    if cpu.available():
        kept = mk.explain(n, v, d, d, dtype=torch.bfloat16, backend="cpu")
        assert kept.peak_bytes == kept.workspace_bytes + kept.saved_bytes
    frozen = mk.explain(n, v, d, d, train_hidden=False, train_head=False, backend="eager")
    assert frozen.saved_bytes == 0 and frozen.peak_bytes == frozen.workspace_bytes


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton", "cuda"])
def test_a_head_gradient_that_is_added_elsewhere_is_not_counted(backend: str) -> None:
    """In backward it is summed until then, and not returned; in forward it is neither."""
    if backend == "cpu" and not cpu.available():
        pytest.skip(cpu.why_not())
    n, v, d, device = 64, 1000, 8, "cuda" if backend in ("triton", "cuda") else "cpu"
    plans = [
        mk.explain(n, v, d, d, dtype=torch.bfloat16, backend=backend, device=device, main_grad=when)
        for when in (None, "backward", "forward")
    ]
    saved, returned = ([getattr(p, x) for p in plans] for x in ("saved_bytes", "returned_bytes"))
    assert saved == [4 * d * (n + v), 4 * d * (n + v), 4 * d * n]
    assert returned == [2 * d * (n + v), 2 * d * n, 2 * d * n]
    assert "dw is added to main_grad in forward" in str(plans[2])
    few = mk.explain(n, v, 2 * n, dtype=torch.bfloat16, backend="eager", main_grad="forward")
    assert few.saved_bytes == 4 * 2 * n * n  # nor its factors
    refused: list[dict[str, Any]] = [
        {"main_grad": "now"},
        {"main_grad": "forward", "train_head": False},
    ]
    for given in refused:
        with pytest.raises(ValueError, match="main_grad: expected None, or 'backward' or 'forwa"):
            mk.explain(n, v, d, **given)


def test_flops_count_every_product_once() -> None:
    n, v, d_s, d_t = 100, 1000, 30, 50
    everything = mk.explain(n, v, d_s, d_t, backend="eager")
    assert everything.flops == everything.floor_flops == 2 * n * v * (d_s + d_t + 2 * d_s)
    frozen = mk.explain(n, v, d_s, d_t, train_head=False, backend="eager")
    assert everything.flops - frozen.flops == 2 * n * v * d_s
    assert mk.explain(n, v, d_s, backend="eager").flops == 2 * n * v * 3 * d_s


def test_workspace_counts_blocks_and_strips() -> None:
    def planned(n: int, v: int, **options: Any) -> plan.Plan:
        return mk.explain(n, v, 8, 8, dtype=torch.bfloat16, backend="eager", **options)

    full, frozen = planned(64, 1000), planned(64, 1000, train_head=False)
    assert full.workspace_bytes == frozen.workspace_bytes
    assert full.saved_bytes - frozen.saved_bytes == 1000 * 8 * 4
    assert frozen.workspace_bytes == 64 * 1000 * 4 * (2 + plan.EAGER_BLOCKS)  # a strip is a chunk
    several = planned(4096, 10**5, train_head=False)
    strips = plan.EAGER_BLOCKS * strip_bytes(CPU)
    assert several.workspace_bytes == 2 * several.chunk_rows * 10**5 * 4 + strips
    assert several.workspace_bytes - strips <= plan.WORKSPACE_MB * 2**20


def test_the_plan_says_why() -> None:
    text = str(mk.explain(64, 1000, 8, 16, train_hidden=False, backend="eager"))
    assert text.startswith("eager backend, chunk algorithm, 64 rows at a time:")
    assert "asked for by name" in text and "gradients wanted: dw" in text
    assert "1.00x the least possible" in text
    none = mk.explain(64, 1000, 8, train_hidden=False, train_head=False, backend="eager")
    assert "gradients wanted: none" in str(none)


def test_auto_takes_the_kernels_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: True)
    assert choose_backend("auto", CPU)[0] == "cpu"
    assert choose_backend("auto", CUDA)[0] == "triton"
    assert choose_backend("auto", CUDA, (torch.float64,))[0] == "eager"
    assert choose_backend("auto", torch.device("meta"))[0] == "eager"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 5, 5, 5), "rows: expected at least 0, got -1"),
        ((1, 0, 5, 5), "vocab: expected at least 1, got 0"),
        ((1, 5, 0, 5), "d_s: expected at least 1, got 0"),
        ((1, 5, 5, -2), "d_t: expected at least 0, got -2"),
    ],
)
def test_sizes_that_cannot_be(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mk.explain(*arguments)


def test_what_was_measured_stands_beside_what_was_planned() -> None:
    text = str(mk.explain(16, 300, 8, 12, backend="eager", measure=True))
    assert "\n  measured " in text and "products alone" in text
    frozen = mk.explain(
        16, 300, 8, train_hidden=False, train_head=False, backend="eager", measure=True
    )
    assert frozen.measured
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="measure: there is no CUDA device"):
            mk.explain(16, 300, 8, device="cuda", backend="eager", measure=True)
