"""Where are the 70,000 garment photographs, and what is on them?

Fashion-MNIST (MIT licence): 60,000 + 10,000 product photos, 28×28 grey, ten classes, an official
train / test split, in four "idx" files. Debian and Ubuntu ship them as the package
``dataset-fashion-mnist``; they are looked for in a folder the user names, where that package
installs them, in this project's ``build/`` folder, and last they are fetched there with apt, into
apt folders of its own: no root, nothing installed.

An idx file is a big-endian header (magic 0x0801 or 0x0803, then its dimensions) and raw bytes.
"""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Index = label; the published names, one word each.
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"
)  # fmt: skip
PHOTO = 28  # pixels on a side
PACKAGE = "dataset-fashion-mnist"
PACKAGE_FOLDER = Path("usr/share/datasets/fashion-mnist")
FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
CACHE = Path(__file__).resolve().parents[2] / "build" / "garments"

Bytes = NDArray[np.uint8]


class GarmentError(RuntimeError):
    """The photographs cannot be had or are not what they should be; the message says what to do."""


class Photos(NamedTuple):
    """All photographs and labels by official split; Pt train and Pe test photos."""

    train_images: Bytes  # (Pt, 28, 28)
    train_labels: Bytes  # (Pt,)
    test_images: Bytes  # (Pe, 28, 28)
    test_labels: Bytes  # (Pe,)


def photo_arrays(folder: str | Path | None = None, *, cache: Path = CACHE) -> Photos:
    """Read the photographs.

    Args:
        folder: where the four idx files lie; None looks for the Debian package, installed or in
            ``cache``, and fetches it into ``cache`` if need be.
        cache: a folder this project may write to.

    Raises:
        GarmentError: a file is missing, cut short or of another format, the files do not belong
            together, or the package cannot be fetched.
    """
    folder = find_photos(cache) if folder is None else Path(folder)
    photos = Photos(*(_read_idx(folder / name) for name in FILES))
    for images, labels, split in ((*photos[:2], "train"), (*photos[2:], "t10k")):
        if images.shape != (len(labels), PHOTO, PHOTO) or labels.max() >= len(CLASSES):
            raise GarmentError(
                f"{folder}/{split}-*: got images {images.shape} and {labels.shape} labels up to "
                f"{labels.max()}, expected (P, {PHOTO}, {PHOTO}) and (P,) below {len(CLASSES)}"
            )
    return photos


def find_photos(cache: Path = CACHE) -> Path:
    """The folder of the Debian package's files: installed, already fetched, or fetched now."""
    fetched = cache / PACKAGE_FOLDER
    for folder in (Path("/") / PACKAGE_FOLDER, fetched):
        if all((folder / name).is_file() for name in FILES):
            return folder
    _fetch(cache)
    return fetched


def _read_idx(path: Path) -> Bytes:
    dimensions = 3 if "images" in path.name else 1
    header = 4 * (1 + dimensions)
    try:
        content = gzip.decompress(path.read_bytes())
        magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:header])
        if magic != 0x800 + dimensions:
            raise ValueError(f"magic {magic:#x}")
        return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    except FileNotFoundError:
        raise GarmentError(f"{path}: no such file, expected {', '.join(FILES)} there") from None
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        expected = f"a whole gzipped idx file of {dimensions} dimensions"
        raise GarmentError(f"{path}: got {error}, expected {expected}") from error


def _fetch(cache: Path) -> None:
    """Download and unpack the package with apt folders of our own, so that root is not needed."""
    apt, unpacked = cache / "apt", cache / "unpacked"
    for stale in (apt, unpacked):
        shutil.rmtree(stale, ignore_errors=True)
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    options = {
        "Dir::State": apt / "state",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": apt / "cache",
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "",  # apt's own user could not write here
    }
    get = ["apt-get", "-qq", *(part for k, v in options.items() for part in ("-o", f"{k}={v}"))]
    print(f"fetching the Debian package {PACKAGE} (30 MB) into {cache}", flush=True)
    try:
        _run([*get, "update"], apt)
        _run([*get, "download", PACKAGE], apt)
        (package,) = apt.glob(f"{PACKAGE}_*.deb")
        _run(["dpkg-deb", "-x", package.name, str(unpacked)], apt)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        why = getattr(error, "stderr", None) or str(error)
        raise GarmentError(
            f"the Debian package {PACKAGE} cannot be fetched: {why.strip()}\n"
            f"Install it (apt-get install {PACKAGE}), or name a folder that holds Fashion-MNIST's "
            f"four files {', '.join(FILES)} (--garments DIR)."
        ) from error
    # Rename last: a fetch cut short must not look like a finished one.
    target = cache / PACKAGE_FOLDER.parts[0]
    shutil.rmtree(target, ignore_errors=True)
    (unpacked / PACKAGE_FOLDER.parts[0]).rename(target)
    for done in (apt, unpacked):
        shutil.rmtree(done)


def _run(command: list[str], folder: Path) -> None:
    """Run a tool quietly in English; its complaint becomes part of the error."""
    env = {**os.environ, "LC_ALL": "C"}
    subprocess.run(
        command, cwd=folder, env=env, check=True, capture_output=True, text=True, timeout=600
    )
