"""Does the README print what the package prints, and is there what the documents name?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mllmkd_kernels as mk
from benchmarks import targets
from benchmarks.shapes import gpu_headline

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_explained_plans_are_those_of_the_package() -> None:
    pytest.importorskip("triton")
    text = README.read_text(encoding="utf-8")
    block = text.split("<!-- explain:begin -->")[1].split("<!-- explain:end -->")[0]
    shown = re.findall(r">>> print\((.*)\)\n((?:(?!>>>|```).*\n)+)", block)
    assert len(shown) == 3
    for call, output in shown:
        assert output.strip() == str(eval(call, {"mk": mk, "torch": torch})).strip()


def test_memory_is_what_the_package_says() -> None:
    pytest.importorskip("triton")
    text = README.read_text(encoding="utf-8")
    block = text.split("<!-- memory:begin -->")[1].split("<!-- memory:end -->")[0]
    rows = [re.findall(r"\d+", row.replace(",", "")) for row in block.strip().splitlines()[2:]]
    assert len(rows) == 3
    gpu = {"device": "cuda", "gpu": "h100"}
    ways: list[Any] = [{}, gpu, {**gpu, "workspace_mb": 64.0}]
    for tokens, logits, *shown in (list(map(int, row)) for row in rows):
        assert logits == round(tokens * 151_936 * 4 / 2**20)
        plans = [
            mk.explain(tokens, 151_936, 896, 2048, dtype=torch.bfloat16, **options)
            for options in ways
        ]
        if plans[0].backend != "cpu":
            pytest.skip("the C++ kernels were not built")
        sizes = [size for plan in plans for size in (plan.workspace_bytes, plan.peak_bytes)]
        assert shown == [round(size / 2**20) for size in sizes], tokens


def test_targets_on_a_gpu_and_what_the_model_says_of_them_are_those_of_the_package() -> None:
    pytest.importorskip("triton")
    *cases, _ = gpu_headline()
    bounds = (targets.GPU_OVER_FLOOR, targets.GPU_OVER_FLOOR, targets.GPU_OVER_FLOOR_JSD)
    words = " ".join(README.read_text(encoding="utf-8").split())
    sentences = {
        "cuda": '`backend="cuda"` meets the first three, at {}, {} and {};',
        "triton": '`triton`, which is what "auto" takes, misses them, at {}, {} and {}.',
    }
    for backend, sentence in sentences.items():
        found = []
        for case, most in zip(cases, bounds, strict=True):
            plan = mk.explain(
                case.rows, case.vocab, case.d_s, case.d_t, dtype=torch.bfloat16, device="cuda",
                gpu="h100", backend=backend, divergence=case.divergence,
                train_head=case.train_head,
            )  # fmt: skip
            assert plan.seconds and plan.floor_seconds
            over = plan.seconds / plan.floor_seconds
            assert (over <= most) == (backend == "cuda"), case.title  # or the sentence is another
            assert plan.peak_bytes <= targets.GPU_MEMORY_GIB * 2**30
            found.append(f"{over:.2f}x")
        assert sentence.format(*found) in words
    small = mk.explain(
        8192, 151_936, 1024, 2560, dtype=torch.bfloat16, device="cuda", gpu="h100", backend="cuda",
        workspace_mb=600, main_grad="forward",
    )  # fmt: skip
    assert small.seconds and small.floor_seconds
    assert small.peak_bytes <= targets.GPU_MEMORY_GIB_ADDED * 2**30
    over = small.seconds / small.floor_seconds
    assert over <= targets.GPU_OVER_FLOOR_ADDED
    call = '`backend="cuda", workspace_mb=600`'
    fifth = f"the fifth target is {targets.GPU_OVER_FLOOR_ADDED:.2f}x"
    assert f"{call} trains a head at {over:.2f}x within 0.6 GiB: {fifth}" in words
    memory, relation = targets.GPU_MEMORY_GIB, targets.GPU_RELATION
    for figure in (f"{bounds[0]:.2f}x of", f"{bounds[2]:.2f}x with JSD", f"{memory} GiB"):
        assert figure in words
    assert f"{relation:.0f}x faster than through the logits" in words


def anchors(document: Path) -> set[str]:
    """What GitHub calls its headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" not in path:
            file = document.parent / path if path else document
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_tests_and_files_that_are_named_exist() -> None:
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", methods)
    assert len(named) > 14
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (file, name)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for file in re.findall(r"`(\w[\w/.]*/[\w.]+)`", contributing):
        assert any((ROOT / folder / file).exists() for folder in ("", "mllmkd_kernels")), file


def test_every_module_is_in_the_tree() -> None:
    tree = README.read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    shown = set(re.findall(r"\b\w+\.py\b", tree))
    folders = [ROOT / name for name in ("mllmkd_kernels", "training")]
    there = {path.name for folder in folders for path in folder.rglob("*.py")}
    ours = {path.name for path in (ROOT / "mllmkd_kernels").glob("[a-z]*.py")}
    assert shown - there == set() and ours - shown == set()
