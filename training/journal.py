"""How does a stage write down what happens, so that a kill leaves no half line? One json a line.

A `Journal` is appended to while a stage runs, and read by people (``tail -f``) and tools. After a
kill its last line may be cut short: `read` leaves it out. Numbers that are not finite are written
as null, because json has no other word for them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


class Journal:
    """A .jsonl file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, *entries: Mapping[str, Any]) -> None:
        """Add a line each."""
        with writing(self.path), self.path.open("a") as file:
            file.writelines(map(_line, entries))

    def write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Make these the whole content."""
        write_whole(self.path, "".join(_line(entry) for entry in entries))

    def read(self) -> list[dict[str, Any]]:
        """Every whole entry; null comes back as nan."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{k: math.nan if v is None else v for k, v in e.items()} for e in entries]


class WriteError(OSError):
    """What could not be written; the message names it, and why."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever the disk says while `path` is written into a `WriteError`; its folder is made
    first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise WriteError(f"{path}: cannot be written: {why}") from error


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """The name to write a file or a folder under, which becomes `target` on leaving: after a kill,
    a power cut or a `WriteError` that is the old one or the new one (of a folder perhaps neither),
    never half."""
    staged = target.with_name(f".{target.name}.incomplete")
    with writing(target):
        remove(staged)
        try:
            yield staged
            publish(staged, target)
        except Exception:
            remove(staged)
            raise


def publish(staged: Path, target: Path) -> None:
    """Put `staged` on the disk, so that it survives a power cut too, then make it `target`."""
    for path in (*staged.rglob("*"), staged):
        _sync(path)
    old = target.with_name(f".{target.name}.old")
    replaced = staged.is_dir() and target.exists()
    if replaced:  # no folder takes the place of one, and to remove one takes time
        remove(old)
        os.replace(target, old)
    os.replace(staged, target)
    _sync(target.parent)
    if replaced:
        remove(old)


def free_bytes(path: Path) -> int:
    """Room on the disk of a path, which need not be there yet."""
    there = (path.absolute(), *path.absolute().parents)
    return shutil.disk_usage(next(part for part in there if part.exists())).free


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a file `whole`. What is no ordinary file (/dev/stdout) is written to as it is."""
    plain = text.encode(errors="backslashreplace")  # a lone surrogate is data to be looked at
    if path.exists() and not path.is_file():
        with writing(path):
            path.write_bytes(plain)
        return
    with whole(path) as staged:
        staged.write_bytes(plain)


def _line(entry: Mapping[str, Any]) -> str:
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }
    return json.dumps(plain, allow_nan=False) + "\n"
