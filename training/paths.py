"""What does a path mean that somebody typed? `~` is the home folder; some names are of a hub.

Models and data sets are named by a folder or by `NAME` or `OWNER/NAME` on a hub. What can only be a
folder is never looked up there: a hub that cannot be reached is asked again and again, for every
file there could be, and what comes back says nothing of the folder that is missing.
"""

from __future__ import annotations

import os
from pathlib import Path


def expanded(value: str) -> str:
    """`value` with a leading ``~`` or ``~user`` as that home folder; `ValueError` if there is
    none."""
    if not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError(f"no home folder of {value.split('/')[0]!r}")
    return path


def is_missing_folder(name: str | Path) -> bool:
    """Whether `name` is not there and cannot be a name on a hub."""
    text = str(name)
    local = isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1
    return local and not Path(text).exists()
