"""Are the photographs read whole or refused, and does a failed fetch say what to do?"""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from training.demo import garments
from training.demo.garments import FILES, GarmentError, photo_arrays


def idx(values: np.ndarray, magic: int | None = None) -> bytes:
    """An idx file: magic number, dimensions, bytes."""
    magic = 0x800 + values.ndim if magic is None else magic
    return struct.pack(f">{1 + values.ndim}I", magic, *values.shape) + values.tobytes()


def write_photos(folder: Path) -> Path:
    """Five training and three test photos with labels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in FILES:
        count = 5 if name.startswith("train") else 3
        shape, top = ((count, 28, 28), 256) if "images" in name else ((count,), 10)
        content = idx(rng.integers(0, top, shape).astype(np.uint8))
        (folder / name).write_bytes(gzip.compress(content))
    return folder


def test_reads_a_folder(tmp_path: Path) -> None:
    photos = photo_arrays(write_photos(tmp_path))
    assert [part.shape for part in photos] == [(5, 28, 28), (5,), (3, 28, 28), (3,)]
    rng = np.random.default_rng(0)
    assert (photos.train_images == rng.integers(0, 256, (5, 28, 28))).all()
    assert (photos.train_labels == rng.integers(0, 10, 5)).all()


def test_what_is_fetched_lies_in_the_build_folder_of_the_checkout() -> None:
    assert Path(__file__).parents[3] / "build" / "garments" == garments.CACHE


def test_missing_file(tmp_path: Path) -> None:
    (write_photos(tmp_path) / FILES[1]).unlink()
    with pytest.raises(GarmentError, match=r"train-labels-idx1-ubyte\.gz: no such file"):
        photo_arrays(tmp_path)


def test_cut_gzip(tmp_path: Path) -> None:
    path = write_photos(tmp_path) / FILES[0]
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(GarmentError, match="expected a whole gzipped idx file of 3 dimensions"):
        photo_arrays(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (FILES[0], b"\0" * 9, "expected a whole gzipped idx file of 3"),
        (FILES[0], idx(np.zeros((5, 28, 28), np.uint8), 0x801), "got magic 0x801, expected"),
        (
            FILES[0],
            idx(np.zeros((5, 28, 28), np.uint8))[:-1],
            "cannot reshape array of size 3919",
        ),
        (FILES[0], idx(np.zeros((5, 32, 32), np.uint8)), r"got images \(5, 32, 32\)"),
        (FILES[1], idx(np.zeros(4, np.uint8)), r"\(4,\) labels"),
        (FILES[3], idx(np.full(3, 10, np.uint8)), "labels up to 10, expected .* below 10"),
    ],
    ids=["header", "magic", "cut", "size", "count", "label"],
)
def test_wrong_content(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (write_photos(tmp_path) / name).write_bytes(gzip.compress(content))
    with pytest.raises(GarmentError, match=message):
        photo_arrays(tmp_path)


def tools(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Make PATH hold these shell scripts and a shell's own tools only."""
    folder.mkdir()
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    for name in ("sh", "cp", "mkdir"):
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(garments, "PACKAGE_FOLDER", Path("usr/share/datasets/never-installed"))


def test_fetch_without_apt_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools(tmp_path / "bin", monkeypatch)
    with pytest.raises(GarmentError, match=r"(?s)'apt-get'\nInstall it .*--garments DIR"):
        photo_arrays(cache=tmp_path / "cache")


def test_failed_fetch_shows_apt_s_complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools(
        tmp_path / "bin",
        monkeypatch,
        apt_get="echo 'E: Unable to locate package' >&2; exit 100",
        dpkg_deb="exit 1",
    )
    with pytest.raises(GarmentError, match=r"Unable to locate package\nInstall it"):
        photo_arrays(cache=tmp_path / "cache")


def test_fetch_unpacks_once_and_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_photos(tmp_path / "photos")
    tools(
        tmp_path / "bin",
        monkeypatch,
        # the last argument of apt-get is the package, that of dpkg-deb the folder to unpack to
        apt_get='for last; do :; done; [ "$last" = update ] || echo deb > "${last}_1_all.deb"',
        dpkg_deb=(
            'for last; do :; done; mkdir -p "$last/usr/share/datasets" && '
            f'cp -r {photos} "$last/usr/share/datasets/never-installed"'
        ),
    )
    cache = tmp_path / "cache"
    assert len(photo_arrays(cache=cache).train_labels) == 5
    assert [path.name for path in cache.iterdir()] == ["usr"]
    monkeypatch.setenv("PATH", "")  # a second fetch would fail for want of apt-get
    assert len(photo_arrays(cache=cache).train_labels) == 5
