"""Is another process at work in this folder? One at a time, and the second is told whose it is.

The operating system holds the lock and lets it go when its process ends, however that ends: nothing
is left to be removed by hand. A file beside it says who has it. Both are gone when the work is
done, and so is the folder if it was made for the work and nothing came into it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from training.journal import write_whole, writing
from training.settings import ConfigError

LOCK, OWNER = ".lock", ".lock-owner.json"


@contextmanager
def held(folder: Path, field: str) -> Iterator[None]:
    """Keep `folder`, which is made if it is not there, from other processes.

    Raises:
        ConfigError: another process has it; the message names `field`, its id, host and start.
        WriteError: the folder cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"{field}: {folder} is in use by {_owner(folder)}; wait for it, stop it, or name "
                "another folder"
            ) from None
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        me = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        write_whole(folder / OWNER, json.dumps(me))
        yield
    finally:
        for name in (OWNER, LOCK):
            with suppress(OSError):
                (folder / name).unlink()
        lock.release()
        with suppress(OSError):  # the first that is not empty
            for path in made:
                path.rmdir()


def _owner(folder: Path) -> str:
    """Who holds the lock, as far as is known."""
    try:
        who = json.loads((folder / OWNER).read_text())
    except (OSError, ValueError):  # it has only just begun
        return "another process"
    return f"process {who['process']} on {who['host']} since {who['since']}"
