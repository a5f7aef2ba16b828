"""Where do samples come from? LLaVA json files, and data sets of HF `datasets`, local or streamed.

A source names its samples (`samples`, cheap: no image is opened) and opens their images
(`images`, `missing`). How a row is read is `training.data.records`' and `training.data.messages`'
business; which sources there are is the configuration's (`open_source`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from training.config import SourceConfig, require
from training.data.fields import ENTRY
from training.data.messages import parse_messages
from training.data.records import (
    DataError,
    Place,
    Sample,
    fault,
    read_samples,
    same,
    shown,
    system_of,
    unread_fields,
)
from training.settings import ConfigError

# What Pillow raises on damaged files; SyntaxError is how it reports a broken PNG chunk.
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
WHOLE_IMAGE = "an image file that decodes whole"
FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
ROWS_AT_ONCE = 1000


class Source(Protocol):
    """A list of samples and the images they name."""

    name: str
    weight: float

    def samples(self) -> Iterator[Sample | DataError]:
        """Every entry in order, a faulty one as its (unraised) fault."""
        ...

    def missing(self, sample: Sample, i: int) -> str | None:
        """Why image i cannot be there, or None; the image is not opened."""
        ...

    def images(self, sample: Sample) -> list[Image.Image]:
        """The images of a sample, decoded, RGB; `DataError` naming a damaged one."""
        ...


class LlavaSource:
    """A LLaVA ``.json`` or ``.jsonl`` file and the folder its image paths are relative to."""

    def __init__(self, path: str | Path, image_root: str | Path, weight: float = 1.0) -> None:
        self.path, self.image_root = Path(path), Path(image_root)
        self.name, self.weight = str(path), weight

    def samples(self) -> Iterator[Sample | DataError]:
        """Every entry of the file."""
        return read_samples(self.path)

    def missing(self, sample: Sample, i: int) -> str | None:
        """Whether the file of image i is not there."""
        path = self.image_root / sample.images[i]
        return None if path.is_file() else f"no such file: {path}"

    def images(self, sample: Sample) -> list[Image.Image]:
        """The sample's image files, decoded."""
        return [
            open_image(sample, i, name, self.image_root) for i, name in enumerate(sample.images)
        ]


class MessagesSource:
    """A map-style HF data set with messages (`training.data.messages`) and images.

    Raises:
        ConfigError: it has no column of messages.
    """

    def __init__(self, rows: Any, config: SourceConfig, image_root: str | Path) -> None:
        self.rows, self.config, self.image_root = rows, config, Path(image_root)
        self.name, self.weight = str(config.path), config.weight
        self._image_column = image_column(rows, config)

    def samples(self) -> Iterator[Sample | DataError]:
        """Every row; images are counted in the table, not decoded."""
        wanted = {"id", "kind", "system", self.config.messages, *ENTRY}
        names = self.rows.column_names
        text = _undecoded(self.rows.select_columns([name for name in names if name in wanted]))
        others = {name: ... for name in names if name not in wanted}  # there, and not looked at
        counts = self._counts()
        for i, row in enumerate(text):
            yield row_sample(row | others, i, self.config, next(counts))

    def missing(self, sample: Sample, i: int) -> str | None:
        """None: an image in a table is known to be bad only when it is opened."""
        return None

    def images(self, sample: Sample) -> list[Image.Image]:
        """The row's images, decoded."""
        row = self.rows[int(sample.place.where.split()[-1])] if self._image_column else {}
        return row_images(sample, row, self.config, self.image_root)

    def _counts(self) -> Iterator[int]:
        """Images of each row."""
        if self._image_column is None:
            yield from (0 for _ in range(len(self.rows)))
            return
        column = self.rows.select_columns([self._image_column]).with_format("arrow")
        for table in column.iter(batch_size=ROWS_AT_ONCE):
            for value in table[self._image_column]:
                one = value.as_py() if not hasattr(value, "values") else value.values
                yield 0 if one is None else (len(one) if hasattr(value, "values") else 1)


def image_column(rows: Any, config: SourceConfig) -> str | None:
    """The column of images, if there is one; `ConfigError` if there are no messages."""
    names = list(rows.column_names or [])
    if config.messages not in names:
        raise ConfigError(
            f"{config.path}: has columns {', '.join(names)}, "
            f"expected one named {config.messages!r} (messages: names another)"
        )
    candidates = [config.images, "image"] if config.images == "images" else [config.images]
    return next((name for name in candidates if name in names), None)


def row_sample(
    row: Mapping[str, Any], i: int, config: SourceConfig, n_images: int | None
) -> Sample | DataError:
    """The sample of a row, or its fault."""
    name, kind = row.get("id"), row.get("kind")
    place = Place(Path(str(config.path)), f"row {i}", None if name is None else str(name))
    images = "image" if config.images == "images" and "images" not in row else config.images
    read = ("id", "kind", "system", config.messages, images)
    try:
        unread = unread_fields(place, "", row, read, ENTRY)
        talk, system = row[config.messages], system_of(place, row)
        sample, paths = parse_messages(place, talk, n_images, system)
    except DataError as error:
        return error
    numbered = tuple(f"{config.path} row {i} image {j}" for j in range(len(sample.images)))
    unread = same((*unread, *sample.unread))
    kind = None if kind is None else str(kind)
    return replace(sample, images=tuple(paths) or numbered, kind=kind, unread=unread)


def _undecoded(rows: Any) -> Any:
    """The rows with sounds and films as they are stored: they are refused, not played."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, (datasets.Audio, datasets.Video)):
            rows = rows.cast_column(name, replace(feature, decode=False))
    return rows


def row_images(
    sample: Sample, row: Mapping[str, Any], config: SourceConfig, image_root: Path
) -> list[Image.Image]:
    """A row's images, decoded: those its messages name, or those of its column."""
    if not sample.images:
        return []
    values = row.get(config.images, row.get("image") if config.images == "images" else None)
    if values is None:
        values = list(sample.images)
    if not isinstance(values, (list, tuple)):
        values = [values]
    return [open_image(sample, i, value, image_root) for i, value in enumerate(values)]


def open_image(sample: Sample, i: int, value: Any, image_root: Path) -> Image.Image:
    """An image given as a PIL image, bytes, a path, or both of the last in a mapping.

    Raises:
        DataError: it is damaged, missing, or none of these.
    """
    if isinstance(value, Mapping):  # how `datasets` keeps an image that it does not decode
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (str, Path)):
        value = image_root / value
    what = str(value) if isinstance(value, Path) else f"{type(value).__name__}"
    try:
        if isinstance(value, Image.Image):
            return value.convert("RGB")
        if not isinstance(value, (bytes, Path)):
            raise fault(sample.place, f"image[{i}]", shown(value), "an image, bytes or a path")
        with Image.open(BytesIO(value) if isinstance(value, bytes) else value) as image:
            return image.convert("RGB")  # decodes all of it
    except DataError:
        raise
    except BROKEN_IMAGE as error:
        got = f"{what}: {type(error).__name__}: {error}"
        raise fault(sample.place, f"image[{i}]", got, WHOLE_IMAGE) from error


def open_source(config: SourceConfig, where: str, image_root: str) -> Source:
    """The source a configuration describes; `where` is its dotted path in messages.

    Raises:
        ConfigError: no path, nothing there, or not what `kind` says.
        DataError: a LLaVA file that cannot be read.
    """
    path = require(config.path, f"{where}.path", "a file, folder or data set")
    root = config.image_root or image_root
    if _is_llava(path, config):
        return LlavaSource(path, root, config.weight)
    return MessagesSource(load_rows(config, where), config, root)


def load_rows(config: SourceConfig, where: str) -> Any:
    """The HF data set that a source names: saved to disk, data files, or from the hub."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(str(config.path))
    try:
        if path.is_dir() and any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
            rows: Any = datasets.load_from_disk(path)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[config.split]
            return rows.to_iterable_dataset() if config.stream else rows
        if path.suffix in FORMATS:
            kind, files = FORMATS[path.suffix], str(path)
            return datasets.load_dataset(
                kind, data_files=files, split="train", streaming=config.stream
            )
        return datasets.load_dataset(
            str(config.path), config.name, split=config.split, streaming=config.stream
        )
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        text = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(
            f"{where}: {path} cannot be read as a data set: {type(error).__name__}: {text}"
        ) from error


def _is_llava(path: str, config: SourceConfig) -> bool:
    """Whether a source is a LLaVA file: as it says, or by its first entry."""
    if config.kind != "auto" or Path(path).suffix not in (".json", ".jsonl"):
        return config.kind == "llava"
    if config.stream or not Path(path).is_file():
        return not config.stream
    with open(path, encoding="utf-8", errors="replace") as file:
        head = file.read(1 << 16)
    return not _has_key(head, config.messages) or _has_key(head, "conversations")


def _has_key(head: str, key: str) -> bool:
    return f"{json.dumps(key)}:" in head.replace(" ", "")
