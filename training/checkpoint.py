"""How does a run survive being killed at any moment? Checkpoints that are whole or absent.

`transformers.Trainer` writes the files of a checkpoint one after another into its final folder, so
a kill in between leaves a folder that looks like a checkpoint and is not one; resuming from it
fails, or silently starts the optimiser afresh. Here a checkpoint is written to a staging folder,
listed in a manifest (file names and sizes), synced to disk, and renamed: a rename is atomic. Older
checkpoints are removed only after that. A folder without a manifest, or whose files are not as
listed (a full disk, a broken copy), is passed over on resume with a message.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from training import journal

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
STAGING = ".incomplete"


def publish(staged: Path, target: Path, keep: int) -> None:
    """Make the staged folder the checkpoint `target`, then remove all but the `keep` newest."""
    sizes = {str(p.relative_to(staged)): p.stat().st_size for p in staged.rglob("*") if p.is_file()}
    (staged / MANIFEST).write_text(json.dumps(sizes, indent=1))
    journal.publish(staged, target)
    for old in _numbered(target.parent)[:-keep]:
        journal.remove(old)  # half removed, it is no checkpoint


def not_written(staged: Path, target: Path, error: BaseException) -> str:
    """Remove what there is of a checkpoint that could not be written, to free its space; say what
    is left to continue from."""
    free = journal.free_bytes(target)
    shutil.rmtree(staged.parent, ignore_errors=True)
    last, _ = newest(target.parent)
    left = f"{last.name} is whole" if last is not None else "there is no earlier one"
    return (
        f"{target}: could not be written: {error} ({free / 2**20:,.0f} MiB were free); {left}. "
        "Free some space and give the same command again"
    )


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and a message for each newer one that is not
    whole."""
    messages = []
    for path in reversed(_numbered(folder)):
        why = fault(path)
        if why is None:
            return path, messages
        messages.append(f"{path}: ignored, not a whole checkpoint: {why}")
    return None, messages


def step_of(checkpoint: Path) -> int:
    """The optimiser step at which a checkpoint was taken."""
    return int(checkpoint.name.removeprefix(PREFIX))


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"no {MANIFEST}"
    try:
        sizes = json.loads(manifest.read_text())
    except json.JSONDecodeError:
        return f"{MANIFEST} is cut short"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return None


def _numbered(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)
