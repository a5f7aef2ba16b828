"""Do launch parameters come from where they should, and does a bad file say what is wrong?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from mllmkd_kernels.backends.triton import splits, tables

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KERNELS = tuple(tables.TABLES[90])
NAME = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def user_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An absent file, and a GPU that is only said to be there."""
    path = tmp_path / "cache" / "tables.json"
    monkeypatch.setenv("MLLMKD_TABLES", str(path))
    monkeypatch.setattr(tables, "_gpu", lambda device: (NAME, 90))
    tables.forget()
    yield path
    tables.forget()


def _entry(**changes: Any) -> dict[str, Any]:
    return dict(tables.TABLES[90]["rows"]["single"]) | changes


@pytest.mark.parametrize("arch", tables.TABLES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_table_has_every_kernel_with_the_same_parameters(kernel: str, arch: int) -> None:
    entries = list(tables.every(kernel, arch))
    tiny = tables.INTERPRETER[kernel]
    assert entries and {kind for kind, _ in entries} - {"half-tma"} == set(tiny)
    for kind, entry in entries:
        kind = kind.removesuffix("-tma")
        assert set(entry) == set(tiny[kind]) == set(tables.TABLES[90][kernel][kind])
        assert all(v & (v - 1) == 0 for k, v in entry.items() if k not in tables.COUNTS)


def test_the_interpreter_gets_tiny_blocks() -> None:
    for kernel in KERNELS:
        entry = tables.launch(kernel, CPU, torch.bfloat16)
        assert entry in tables.INTERPRETER[kernel].values()


def test_the_class_of_operands_follows_the_dtype() -> None:
    half = tables.launch("statistics", GPU, torch.bfloat16)
    assert half == tables.TABLES[90]["statistics"]["half"]
    assert half == tables.launch("statistics", GPU, torch.float16)
    assert tables.launch("statistics", GPU, torch.float32) != half
    # A kernel on fp32 logits has one class, whatever the model's dtype.
    assert tables.launch("rows", GPU, torch.bfloat16) == tables.launch("rows", GPU)


def test_operands_through_descriptors_may_have_tiles_of_their_own(user_table: Path) -> None:
    def gradient(dtype: torch.dtype, tma: bool) -> dict[str, int]:
        return tables.launch("gradient", GPU, dtype, tma)

    table = tables.TABLES[90]["gradient"]
    assert gradient(torch.bfloat16, True) == table["half-tma"]
    assert gradient(torch.bfloat16, False) == table["half"]
    assert gradient(torch.float32, True) == table["single"]
    # The tuner measures "half" as the GPU loads it: its entry wins over both.
    tuned = table["half"] | {"num_stages": 5}
    tables.write(user_table, NAME, {"gradient": {"half": tuned, "single": table["single"]}})
    assert gradient(torch.bfloat16, True) == gradient(torch.float16, False) == tuned


def test_fp32_that_was_tuned_is_not_for_16_bits(user_table: Path) -> None:
    table = tables.TABLES[90]["gradient"]
    tables.write(user_table, NAME, {"gradient": {"single": table["single"] | {"num_warps": 1}}})
    assert tables.launch("gradient", GPU, torch.bfloat16) == table["half"]


@pytest.mark.parametrize(
    ("capability", "table"),
    [(80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 120), (121, 120)],
)
def test_an_unknown_architecture_takes_the_nearest_older_table(capability: int, table: int) -> None:
    assert tables.architecture(capability) == table


def test_amds_gpus_have_a_table_of_their_own_and_no_descriptors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mllmkd_kernels.backends.calls import Head
    from mllmkd_kernels.backends.triton import heads

    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "an Instinct")
    x = torch.empty(16, 64, dtype=torch.bfloat16)
    head = Head(*(SimpleNamespace(is_cuda=True, device=GPU, data_ptr=x.data_ptr, itemsize=2,
                                  shape=x.shape, numel=x.numel),) * 2)  # type: ignore  # fmt: skip
    assert heads.tma(head) and tables._gpu(GPU)[1] == 94
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not heads.tma(head)
    found = tables.built_in("relation_grad", GPU)
    assert found == tables.TABLES[tables.HIP]["relation_grad"]["single"]


@pytest.mark.parametrize(
    ("capability", "dtype", "bound"),
    [
        (90, torch.float32, True), (90, torch.bfloat16, False), (80, torch.float16, False),
        (103, torch.bfloat16, True), (120, torch.bfloat16, True), (121, torch.float16, True),
    ],
)  # fmt: skip
def test_registers_are_bounded_where_fewer_gain_nothing(
    capability: int, dtype: torch.dtype, bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A streamed kernel's launch, as its launcher asks for it."""
    monkeypatch.setattr(tables, "_gpu", lambda device: (NAME, capability))
    operand = SimpleNamespace(device=GPU, dtype=dtype)
    head: Any = SimpleNamespace(h=operand, w=operand)
    found = splits.launch_of("statistics", (head,), False, None)
    assert found.get("maxnreg") == (255 if bound else None)


def test_a_gpu_older_than_every_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute capability 7\.5.*eager"):
        tables.architecture(75)


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="got 'nobody', expected one of rows"):
        tables.launch("nobody", GPU)


def test_what_is_returned_is_the_callers_own() -> None:
    tables.launch("rows", GPU)["BLOCK"] = 1
    assert tables.launch("rows", GPU)["BLOCK"] != 1


def test_what_is_tried_wins_while_it_is_tried() -> None:
    with tables.overridden("rows", _entry(BLOCK=32)):
        with tables.overridden("rows", _entry(BLOCK=16)):
            assert tables.launch("rows", CPU)["BLOCK"] == 16
        assert tables.launch("rows", GPU)["BLOCK"] == 32
        assert tables.built_in("rows", GPU) == _entry()
    assert tables.launch("rows", GPU) == _entry()


def test_a_users_entry_wins_on_the_gpu_it_names_and_only_there(
    user_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = _entry(num_warps=16)
    tables.write(user_table, NAME, {"rows": {"single": tuned}})
    assert tables.launch("rows", GPU) == tuned
    assert tables.launch("rows", GPU, torch.bfloat16) == tuned
    built_in = tables.TABLES[90]["statistics"]["half"]
    assert tables.launch("statistics", GPU, torch.bfloat16) == built_in
    monkeypatch.setattr(tables, "_gpu", lambda device: ("another GPU", 90))
    assert tables.launch("rows", GPU) == tables.TABLES[90]["rows"]["single"]
    # Another GPU's entries stand beside it.
    tables.write(user_table, "another GPU", {"rows": {"single": _entry(num_warps=4)}})
    assert tables.launch("rows", GPU)["num_warps"] == 4
    assert tables.read(user_table)[NAME]["rows"]["single"] == tuned


def test_an_empty_variable_means_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLMKD_TABLES", "")
    assert tables.path_of_user_table() is None
    assert tables.launch("rows", GPU) == tables.TABLES[90]["rows"]["single"]


def test_the_default_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLLMKD_TABLES")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert tables.path_of_user_table() == Path("/some/cache/mllmkd_kernels/tables.json")


@pytest.mark.parametrize(
    ("gpus", "field"),
    [
        ([], "gpus: expected an object"),
        ({NAME: 3}, f"gpus.{NAME}: expected an object"),
        ({NAME: {"nobody": {"single": {}}}}, "nobody.single: no such kernel"),
        ({NAME: {"rows": {"half": {}}}}, "rows.half: no such kernel or class"),
        ({NAME: {"rows": {"single": {"BLOCK": 64}}}}, "rows.single: expected \\["),
        ({NAME: {"rows": {"single": _entry(BLOCK=96)}}}, "single.BLOCK: expected a power of two"),
        ({NAME: {"rows": {"single": _entry(BLOCK="64")}}}, "single.BLOCK: expected a power"),
        ({NAME: {"rows": {"single": _entry(num_warps=True)}}}, "num_warps: expected a power"),
        ({NAME: {"rows": {"single": _entry(num_stages=0)}}}, "num_stages: expected a positive"),
    ],
)
def test_a_malformed_table_names_file_and_field(user_table: Path, gpus: Any, field: str) -> None:
    user_table.parent.mkdir()
    user_table.write_text(json.dumps({"schema": tables.SCHEMA, "gpus": gpus}))
    with pytest.raises(ValueError, match=rf"tables\.json: .*{field}"):
        tables.launch("rows", GPU)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 7, "gpus": {}}'])
def test_a_file_that_is_no_table_is_named(user_table: Path, text: str) -> None:
    user_table.parent.mkdir()
    user_table.write_text(text)
    with pytest.raises(ValueError, match=r"tables\.json"):
        tables.launch("rows", GPU)
