"""Are these the very files that were there before, and is the same asked of them?

Files are known by name, size and content.

A file is hashed whole where that is cheap: up to 16 MiB, and json, which is read whole anyway. Of a
larger one 1,024 blocks of 16 KiB are, evenly spread, the first and the last among them: a model
that was trained further differs in most of its tensors, other data in its size. Of many files all
names and sizes count, and the contents of some.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from training.journal import write_whole
from training.settings import ConfigError, differences

BLOCKS, BLOCK = 1024, 16 << 10
CONTENTS = 256  # files of a folder whose contents count
MODEL_FILES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}


def of_files(files: Mapping[str, Path]) -> dict[str, str]:
    """A mark of each file by its name; of more than 256 one of all and one of each of some."""
    marks = {}
    if len(files) > CONTENTS:
        sizes = [(name, path.stat().st_size) for name, path in sorted(files.items())]
        marks["all names and sizes"] = f"{len(files)} files {digest(sizes)}"
    # chosen by the hash of their names: an added file displaces at most one of them
    chosen = heapq.nsmallest(CONTENTS, files, key=lambda name: digest(name))
    return marks | {name: of_file(files[name]) for name in sorted(chosen)}


def of_folder(folder: Path, kinds: Iterable[str] = ()) -> dict[str, str]:
    """`of_files` of all below a folder, hidden files and caches left out; of a folder's own files
    of some kinds, where `kinds` names suffixes."""
    found = folder.iterdir() if kinds else folder.rglob("*")
    names = {str(path.relative_to(folder)): path for path in found if path.is_file()}
    return of_files(
        {
            name: path
            for name, path in names.items()
            if not name.startswith((".", "cache-")) and (not kinds or path.suffix in kinds)
        }
    )


def of_file(path: Path) -> str:
    """Size and hash of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= BLOCKS * BLOCK or path.suffix in (".json", ".jsonl"):
            found = file_digest(file, lambda: blake2b(digest_size=8))
        else:
            found = blake2b(digest_size=8)
            for i in range(BLOCKS):
                file.seek(i * (size - BLOCK) // (BLOCKS - 1))
                found.update(file.read(BLOCK))
    return f"{size} bytes {found.hexdigest()}"


def digest(value: Any) -> str:
    """16 hexadecimal digits of a json-able value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def same_request(file: Path, now: Mapping[str, Any], begun: bool) -> None:
    """Note in `file` what its folder's answers are answers to, or, if some are there, make sure
    that it is the same; `ConfigError` naming what changed."""
    if begun and file.is_file() and (changed := differences(json.loads(file.read_text()), now)):
        raise ConfigError(
            f"--out: {file.parent} holds answers to something else ({'; '.join(changed)}); "
            "remove the folder or name another"
        )
    write_whole(file, json.dumps(now, indent=1))
