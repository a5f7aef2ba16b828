"""What was a run begun with, and is it still that? Noted in its folder, compared when it goes on.

    out/config.yaml   the configuration
    out/inputs.json   fingerprints of the files it names: models, data, images, stored teacher rows

A run has begun once a stage has left a checkpoint or a model. Before that nothing is compared, and
a try that fails takes away what it wrote; a log with entries and a batch that made NaN stay. What
only finished stages read may be gone.

Left out: data sets named on a hub and what a stream reads, except their files where they are local.
"""

from __future__ import annotations

import glob
import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training import checkpoint, fingerprint, settings
from training.config import OWN, Config, DataConfig
from training.journal import write_whole
from training.lock import held
from training.models import marks_of
from training.settings import ConfigError
from training.teacher_cache.store import MANIFEST
from training.teacher_cache.use import stored_stages

CONFIG, INPUTS = "config.yaml", "inputs.json"
SHOWN = 3  # changed files in a message

# fields that do not change what is learned, so that a run may be continued with others
FREE = frozenset(
    {
        "out",
        "resume",
        "threads",
        "keep",
        "report_to",
        "on_nan",  # of runs that earlier versions began
        "skip_limit",  # likewise
        "eval_batch_size",
        "data.workers",
        "data.cache_mb",
        "teacher_cache.visual",  # of the writing; what was written says its manifest
        "teacher_cache.dtype",
        "teacher_cache.batch_size",
    }
)
Marks = dict[str, dict[str, str]]  # by field: by file


class Claim:
    """A run's folder, in the hands of this process alone."""

    def __init__(self, config: Config) -> None:
        self.config, self.out = config, Path(config.out)
        self.known: Marks = {}

    def begin(self) -> None:
        """Note configuration and inputs, or compare them with those that are noted.

        Raises:
            ConfigError: the run was begun with others, or `out` is in use and `resume` is false.
        """
        file = self.out / INPUTS
        if self.begun():
            self._compare()
            self.known = json.loads(file.read_text()) if file.is_file() else {}
        write_whole(self.out / CONFIG, settings.dump(self.config))
        self.check(self._method() | self._models() | self._data())

    def begun(self) -> bool:
        """Whether there is anything to go on from."""
        left = ("*/model", f"*/{checkpoint.PREFIX}*")
        return any(path.is_dir() for pattern in left for path in self.out.glob(pattern))

    def check(self, found: Marks) -> None:
        """Compare files with what they were, and note those that come for the first time."""
        for field, marks in found.items():
            changed = settings.differences(self.known.get(field, marks), marks)
            if changed:
                more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
                raise ConfigError(
                    f"{field}: has changed since {self.out} was begun "
                    f"({'; '.join(changed[:SHOWN])}{more}); put back what was there, name another "
                    f"`out`, or remove {self.out / INPUTS} to go on with what is there now"
                )
        if not found.keys() <= self.known.keys():
            self.known |= found
            write_whole(self.out / INPUTS, json.dumps(self.known, indent=1))

    def check_data(self, use: str, dataset: Any) -> None:
        """`check` the data of a use once more, with its images, as it is about to be read."""
        files = _data(self.config.data, use)
        self.check(files | {f"images of data.{use}": fingerprint.of_files(_images(dataset))})

    def tidy(self) -> None:
        """Take away what a try wrote that left nothing to go on from."""
        if self.begun():
            return
        for folder in self.config.folders:
            if not any(path.is_file() and path.stat().st_size for path in folder.rglob("*")):
                shutil.rmtree(folder, ignore_errors=True)
        if not any(path.is_dir() for path in self.out.iterdir()):
            for name in (CONFIG, INPUTS):
                (self.out / name).unlink(missing_ok=True)

    def _compare(self) -> None:
        """The configuration with the one that the run was begun with."""
        if not self.config.resume:
            raise ConfigError(
                f"out: {self.out} is in use and resume is false; remove it or name another folder"
            )
        if not (self.out / CONFIG).is_file():
            return
        stored = settings.read_yaml(self.out / CONFIG, "out")
        kept = {name: value for name, value in stored.items() if name not in FREE}
        before = settings.build(type(self.config), kept)
        lines = settings.differences(before, self.config)
        changed = [line for line in lines if line.split(":")[0] not in FREE]
        if changed:
            raise ConfigError(
                f"out: {self.out} was started with another configuration ({'; '.join(changed)}); "
                "go back to it, remove the folder or name another"
            )

    def _method(self) -> Marks:
        """The files of a method of the user's own, wherever they lie: what a term computes is no
        setting."""
        if self.config.method != OWN:
            return {}
        objectives = [stage.objective for stage in self.config.table.values()]
        made = [inspect.getsourcefile(getattr(o, "func", o)) for o in objectives]  # of a partial
        files = [Path(name) for name in dict.fromkeys(made) if name]
        marks = sorted((file.name, fingerprint.of_file(file)) for file in files)
        found = {name: [mark for other, mark in marks if other == name] for name, _ in marks}
        return {"files of the method": {name: ", ".join(many) for name, many in found.items()}}

    def _models(self) -> Marks:
        """The student or its parts, the teacher if it is to run, what is stored of one that is
        not."""
        config, left = self.config, self.config.left
        stored = [name for name in stored_stages(config) if name in left]
        parts = ("path", "processor") if config.model.path else ("vision", "language", "processor")
        names = {f"model.{part}": getattr(config.model, part) for part in parts}
        if any(config.compares(name) and name not in stored for name in left):
            names["teacher"] = config.teacher
        found = {field: marks_of(name) for field, name in names.items() if name is not None}
        for name in stored:
            file = Path(str(config.teacher_cache.path)) / name / MANIFEST
            if file.is_file():  # or it is missed soon
                found[f"teacher_cache.path, {name}"] = fingerprint.of_files({MANIFEST: file})
        return found

    def _data(self) -> Marks:
        """The data of all that is not done yet."""
        found: Marks = {}
        for name in self.config.left:
            found |= _data(self.config.data, self.config.table[name].data)
        if not all((folder / "scores.json").is_file() for folder in self.config.folders):
            found |= _data(self.config.data, "held_out")
        return found


@contextmanager
def claimed(config: Config) -> Iterator[Claim]:
    """The run's folder as a `Claim`, kept from other processes (`training.lock`)."""
    with held(Path(config.out), "out"):
        claim = Claim(config)
        try:
            claim.begin()
            yield claim
        finally:
            claim.tidy()


def _data(config: DataConfig, use: str) -> Marks:
    """Fingerprints of the files of a use's sources; not of what a hub has."""
    paths = {f"data.{use}": getattr(config, use)}
    for i, one in enumerate(config.sources):
        if one.use == use:
            paths[f"data.sources[{i}].path"] = one.path
    return {field: _files(path) for field, path in paths.items() if path is not None}


def _files(path: str) -> dict[str, str]:
    if Path(path).is_dir():
        return fingerprint.of_folder(Path(path))
    found = [path] if Path(path).is_file() else sorted(glob.glob(path))
    return fingerprint.of_files({name: Path(name) for name in found})


def _images(dataset: Any) -> dict[str, Path]:
    """The image files that a data set's samples name; images in tables are their table's."""
    paths = (
        Path(source.image_root) / image
        for sample, source in getattr(dataset, "entries", ())
        for image in sample.images
    )
    return {str(path): path for path in dict.fromkeys(paths) if path.is_file()}
