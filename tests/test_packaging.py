"""What is in a wheel, in a source distribution, and what do builds that cannot compile leave?

Each builds from a copy of this tree, through the hooks that pip calls, without a network and
without compiling: the compilers here are missing or fail.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import mllmkd_kernels as mk

ROOT = Path(__file__).parents[1]
FOLDERS = ("mllmkd_kernels", "csrc", "training", "benchmarks", "examples", "tests", "docs")
FILES = (
    "setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", ".clang-format",
    "LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
)  # fmt: skip
NEVER = ("*.so", "*.pyc", "__pycache__", "_left_out.json")
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
NO_EXTENSION = {"MLLMKD_NO_EXT": "1"}
NO_COMPILER = {"CXX": "no-such-c++"}
HOOK = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])('made')"
#: README's call at a small size, twice.
CALLS = """
import sys, torch, mllmkd_kernels as mk
def call(**options):
    h_s, w_s, h_t, w_t = torch.ones(4, 8), torch.ones(9, 8), torch.ones(4, 6), torch.ones(9, 6)
    labels = torch.zeros(4, dtype=torch.int64)
    return mk.fused_linear_distill(h_s, w_s, h_t, w_t, labels, kd_weight=0.25, **options).loss
call(backend="eager"); print("asked for it", file=sys.stderr); call(); call(); print(mk.__file__)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is built from, with leftovers of an earlier build and an older layout."""
    tree = tmp_path / "tree"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns(*NEVER))
    for file in FILES:
        shutil.copy(ROOT / file, tree)
    for lib in (
        "build/lib",
        f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}",
    ):
        for old in ("training/old.py", "mllmkd_kernels/old.py", f"mllmkd_kernels/{MODULE}"):
            (tree / lib / old).parent.mkdir(parents=True, exist_ok=True)
            (tree / lib / old).write_text("old")
    (tree / "mllmkd_kernels" / MODULE).write_text("old")
    return tree


def command(
    folder: Path, *arguments: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLLMKD_", "CXX", "PYTHON"))}
    return subprocess.run(
        [python, *arguments], cwd=folder, env={**clean, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def built(tree: Path, hook: str, **environment: str) -> Path:
    """What the hook made."""
    done = command(tree, "-c", HOOK, hook, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = (tree / "made").iterdir()
    return made


def installed(wheel: Path, folder: Path) -> str:
    """The Python of a new environment with the wheel and what this one has, but for an editable
    install: those hook into imports, and only where a .pth file is read.
    """
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("-packages")]
    (packages / "what_it_needs.pth").write_text("\n".join(ours))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    return str(folder / "bin" / "python")


def inside(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture
def failing(tmp_path: Path) -> dict[str, str]:
    """A C++ compiler that is there, and fails when it is to compile."""
    real = shutil.which("c++")
    if real is None:
        pytest.skip("no C++ compiler to stand in for")
    script = tmp_path / "failing-c++"
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo "error: broken" >&2; exit 1;; esac\n'
        f'exec {real} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return {"CXX": str(script)}


# --- wheels --------------------------------------------------------------------------------------


def test_a_wheel_installs_the_library_alone(tree: Path) -> None:
    wheel = built(tree, "build_wheel", **NO_EXTENSION)
    names = inside(wheel)
    info = f"mllmkd_kernels-{mk.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"mllmkd_kernels", info}
    modules = {str(file.relative_to(tree)) for file in (tree / "mllmkd_kernels").rglob("*.py")}
    assert modules <= names
    beside = {"mllmkd_kernels/py.typed", "mllmkd_kernels/_left_out.json"}
    assert {n for n in names if n.startswith("mllmkd_kernels/")} == modules | beside
    assert wheel.name == f"mllmkd_kernels-{mk.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        complete(Parser().parsestr(archive.read(f"{info}/METADATA").decode()))


def complete(metadata: Message) -> None:
    """All that describes the package is there, and nobody is named."""
    for field in ("Summary", "License-Expression", "License-File", "Keywords", "Requires-Python"):
        assert metadata[field], field
    assert metadata["Version"] == mk.__version__
    assert metadata["Description-Content-Type"] == "text/markdown" and metadata.get_payload()
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    for field in ("Author", "Author-email", "Maintainer", "Maintainer-email", "Home-page"):
        assert metadata[field] is None, field


def test_without_a_compiler_the_eager_package_is_built_and_its_calls_say_why_once(
    tree: Path, tmp_path: Path
) -> None:
    wheel = built(tree, "build_wheel", **NO_COMPILER)
    assert f"mllmkd_kernels/{MODULE}" not in inside(wheel)
    (tmp_path / "empty").mkdir()
    python = installed(wheel, tmp_path / "venv")
    done = command(tmp_path / "empty", "-c", CALLS, python=python)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "venv") in done.stdout
    assert done.stderr.startswith("asked for it") and done.stderr.count("UserWarning") == 1
    assert "the eager backend is used" in done.stderr
    assert "no C++ compiler: `no-such-c++` was not found" in done.stderr
    (tree / "mllmkd_kernels" / MODULE).unlink()
    done = command(tree, "-c", CALLS, python=python)  # what lies here goes before the installed
    assert f"not built in {tree / 'mllmkd_kernels'}; build them with" in done.stderr
    assert "`pip install --no-build-isolation -e .`" in done.stderr


def test_a_build_that_fails_is_an_error_and_leaves_no_old_kernels(
    tree: Path, failing: dict[str, str]
) -> None:
    done = command(tree, "-c", HOOK, "build_wheel", **failing)
    assert done.returncode != 0
    assert "error: broken" in done.stdout + done.stderr
    assert not list((tree / "made").glob("*"))
    in_place = command(tree, "setup.py", "build_ext", "--inplace", **failing)
    assert in_place.returncode != 0
    assert not (tree / "mllmkd_kernels" / MODULE).exists()


@pytest.mark.parametrize("how", ["build_ext --inplace", "build_editable"])
def test_in_place_no_old_kernels_stay_where_none_are_built(tree: Path, how: str) -> None:
    if how == "build_editable":
        built(tree, how, **NO_COMPILER)
    else:
        done = command(tree, "setup.py", *how.split(), **NO_COMPILER)
        assert done.returncode == 0
        assert "built without C++ kernels: no C++ compiler: `no-such-c++`" in done.stderr
    assert not (tree / "mllmkd_kernels" / MODULE).exists()
    note = json.loads((tree / "mllmkd_kernels" / "_left_out.json").read_text())
    assert note == {"C++ kernels": "no C++ compiler: `no-such-c++` was not found"}


def test_kernels_that_are_required_are_not_left_out(tree: Path) -> None:
    required = {"MLLMKD_REQUIRE_EXT": "1"}
    done = command(tree, "setup.py", "build_ext", "--inplace", **NO_COMPILER, **required)
    assert done.returncode != 0 and "`no-such-c++` was not found" in done.stderr
    done = command(tree, "setup.py", "build_ext", "--inplace", **NO_EXTENSION, **required)
    assert done.returncode == 0


def test_setuptools_that_are_too_old_are_named(tree: Path) -> None:
    """Those that come with Python 3.11 do not know the metadata."""
    run = "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    old = f"import setuptools; setuptools.__version__ = '65.5.0'; {run}"
    done = command(tree, "-c", old, **NO_EXTENSION)
    assert done.stderr == "setuptools 65.5.0: pip install 'setuptools>=77.0.3'\n"


@pytest.mark.parametrize(
    ("program", "missing", "extra"),
    [("training", "scipy", "train"), ("benchmarks", "matplotlib", "bench")],
)
def test_what_a_program_needs_is_named(program: str, missing: str, extra: str) -> None:
    run = f"import runpy; runpy.run_module({program!r}, run_name='__main__', alter_sys=True)"
    done = command(ROOT, "-c", f"import sys; sys.modules[{missing!r}] = None; {run}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f'`pip install --no-build-isolation -e ".[{extra}]"`' in done.stderr


# --- source distributions ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_source_distribution_holds_all_it_takes_to_build_and_to_test(
    tree: Path, tmp_path: Path
) -> None:
    with tarfile.open(built(tree, "build_sdist", **NO_EXTENSION)) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"mllmkd_kernels-{mk.__version__}"
    leftovers = ("build", "made", "mllmkd_kernels.egg-info")
    expected = {
        file.relative_to(tree)
        for file in tree.rglob("*")
        if file.is_file() and file.relative_to(tree).parts[0] not in leftovers
    }
    there = {file.relative_to(unpacked) for file in unpacked.rglob("*") if file.is_file()}
    assert expected - there == {Path("mllmkd_kernels", MODULE)}
    wheel = built(unpacked, "build_wheel", **NO_EXTENSION)
    assert "mllmkd_kernels/ops.py" in inside(wheel)
    some = ("tests/test_rows.py", "tests/test_examples.py::test_the_page_shows_the_scripts")
    done = command(unpacked, "-m", "pytest", "-q", "-p", "no:cacheprovider", *some)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_version_is_said_in_one_place() -> None:
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
