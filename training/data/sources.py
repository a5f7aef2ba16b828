"""Where do samples come from? LLaVA json files, and data sets of HF `datasets`, local or streamed.

A source names its samples (`samples`, cheap: no image is opened) and opens their images
(`images`, `missing`). Which sources there are is the configuration's business (`open_source`), how
a LLaVA file is read `training.data.records`'. Rows of the others are as most chat data sets have
them, with the names of the columns free::

    {"messages": [{"role": "user", "content": "what is it"},              # a string, or parts:
                  {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": "a coat"}, ...],
     "images": [PIL image, bytes, or path, ...]}                          # or one; may be absent

Images stand where their parts do, or where a string says ``<image>``. If no message says where,
they come first, as is the custom. A part may also name its image itself ({"type": "image", "image":
"a.png"}); then there is no column. A system message comes first and once, or is a column `system`.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from training.config import SourceConfig, require
from training.data.faults import DataError, Place, fault, named
from training.data.fields import ENTRY
from training.data.images import PICTURE_DEPTH, flat, not_there, open_image
from training.data.preferences import FIELDS, told
from training.data.records import read_samples
from training.data.sample import (
    CHAT,
    LLAVA,
    Sample,
    placed,
    same,
    sample_of,
    system_of,
    unread_fields,
)
from training.models import is_missing_folder
from training.settings import ConfigError

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
ROWS_AT_ONCE = 1000


class Source(Protocol):
    """A list of samples and the images they name."""

    name: str
    weight: float
    identity: Hashable  # where its images come from: equal names of equal identity are one image

    def samples(self) -> Iterator[Sample | DataError]:
        """Every entry in order, a faulty one as its (unraised) fault."""
        ...

    def missing(self, sample: Sample, i: int) -> str | None:
        """Why image i cannot be there, or None; the image is not opened."""
        ...

    def images(self, sample: Sample) -> list[Image.Image]:
        """The images of a sample (`training.data.images`); `DataError` naming a damaged one."""
        ...


class LlavaSource:
    """A LLaVA ``.json`` or ``.jsonl`` file and the folder its image paths are relative to."""

    def __init__(self, path: str | Path, image_root: str | Path, weight: float = 1.0) -> None:
        self.path, self.image_root = Path(path), Path(image_root)
        self.name, self.weight = str(path), weight
        self.identity: Hashable = self.image_root.absolute()

    def samples(self) -> Iterator[Sample | DataError]:
        """Every entry of the file."""
        return read_samples(self.path)

    def missing(self, sample: Sample, i: int) -> str | None:
        """Whether the file of image i is not there."""
        return not_there(sample.images[i], self.image_root)

    def images(self, sample: Sample) -> list[Image.Image]:
        """The sample's image files, decoded."""
        return _opened(sample, sample.images, self.image_root)


class MessagesSource:
    """A map-style HF data set with messages and images.

    Raises:
        ConfigError: it has no column of messages.
    """

    def __init__(self, rows: Any, config: SourceConfig, image_root: str | Path) -> None:
        self.rows, self.config, self.image_root = rows, config, Path(image_root)
        self.name, self.weight = str(config.path), config.weight
        self.identity: Hashable = (config, self.image_root.absolute())
        column = image_column(rows.column_names, config)
        # as Arrow keeps them: a row's images are decoded here, and others not at all
        stored = None if column is None else rows.select_columns([column]).with_format("arrow")
        self._column, self._stored = column, stored

    def samples(self) -> Iterator[Sample | DataError]:
        """Every row; images are counted in the table, not decoded."""
        wanted = {"id", "kind", "system", self.config.messages, *ENTRY, *FIELDS}
        names = self.rows.column_names
        text = undecoded(self.rows.select_columns([name for name in names if name in wanted]))
        others = {name: ... for name in names if name not in wanted}  # there, and not looked at
        counts = self._counts()
        for i, row in enumerate(text):
            yield row_sample(row | others, f"row {i}", self.config, next(counts, 0))

    def missing(self, sample: Sample, i: int) -> str | None:
        """None: an image in a table is known to be bad only when it is opened."""
        return None

    def images(self, sample: Sample) -> list[Image.Image]:
        """The row's images, decoded."""
        with named(sample.place, "image", "a row that can be read"):
            i = int(sample.place.where.split()[-1])
            value = None if self._stored is None else self._stored[i][self._column].to_pylist()[0]
        return row_images(sample, value, self.image_root)

    def _counts(self) -> Iterator[int]:
        """Images of each row, as long as there is a column of them."""
        for table in () if self._stored is None else self._stored.iter(batch_size=ROWS_AT_ONCE):
            yield from (_count(one) if one.is_valid else 0 for one in table[self._column])


def _count(value: Any) -> int:
    """How many images `flat` makes of a value that lies in Arrow; their bytes are not touched."""
    import pyarrow as pa

    lists = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
    if not value.is_valid or not isinstance(value.type, lists):
        return 1
    kind, levels = value.type, 0
    while isinstance(kind, lists):
        kind, levels = kind.value_type, levels + 1
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if numbers and levels in PICTURE_DEPTH and len(value.values):
        return 1
    return sum(map(_count, value.values))


def image_column(names: Sequence[str], config: SourceConfig) -> str | None:
    """The column of images, if there is one; `ConfigError` if there are no messages."""
    if config.messages not in names and "chosen" not in names:
        raise ConfigError(
            f"{config.path}: has columns {', '.join(names)}, "
            f"expected one named {config.messages!r} (messages: names another)"
        )
    candidates = [config.images, "image"] if config.images == "images" else [config.images]
    return next((name for name in candidates if name in names), None)


def row_sample(
    row: Mapping[str, Any], where: str, config: SourceConfig, n_images: int
) -> Sample | DataError:
    """The sample of a row with so many images in its column, or its fault."""
    name, kind = row.get("id"), row.get("kind")
    place = Place(Path(str(config.path)), where, None if name is None else str(name))
    try:
        with named(place, "messages", "messages that can be read"):
            read = {"id", "kind", "system", config.messages, image_column(list(row), config) or ""}
            talk = told(place, row, CHAT, config.messages)
            unread = unread_fields(place, "", row, read | talk.read, ENTRY)
            sample, paths = sample_of(place, talk, CHAT, system_of(place, row))
        if paths and n_images not in (0, len(paths)):
            got = f"{n_images} image(s) in the column and {len(paths)} named in messages"
            raise fault(place, config.images, got, "as many, or no column")
        numbered = tuple(f"{config.path} {where} image {j}" for j in range(n_images))
        sample = placed(sample, numbered or tuple(paths), anywhere=True)
    except DataError as error:
        return error
    kind = None if kind is None else str(kind)
    return replace(sample, kind=kind, unread=same((*unread, *sample.unread)))


def undecoded(rows: Any) -> Any:
    """A table or stream with its media as they are stored: `training.data.images` decodes images;
    sounds and films are refused, not played.
    """
    for name, feature in rows.features.items():
        if (stored := _stored(feature)) != feature:
            rows = rows.cast_column(name, stored)
    return rows


def _stored(feature: Any) -> Any:
    """A column's type with its media as they are stored."""
    from datasets import Audio, Image, Video

    if isinstance(feature, (Audio, Image, Video)):
        return replace(feature, decode=False)
    if isinstance(feature, dict):
        return {name: _stored(inner) for name, inner in feature.items()}
    inner = getattr(feature, "feature", None)  # of a list
    return feature if inner is None else replace(feature, feature=_stored(inner))


def row_images(sample: Sample, value: Any, image_root: Path) -> list[Image.Image]:
    """A row's images, decoded: those of its column's value, or else those its messages name."""
    return _opened(sample, flat(value) or sample.images, image_root) if sample.images else []


def _opened(sample: Sample, values: Sequence[Any], image_root: Path) -> list[Image.Image]:
    return [
        open_image(sample.place, f"image[{i}]", value, image_root) for i, value in enumerate(values)
    ]


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
    if is_missing_folder(str(config.path)):
        raise ConfigError(f"{where}.path: {config.path}: no such file or folder")
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
    messages = _has_key(head, config.messages) or _has_key(head, CHAT.role)
    return not messages or _has_key(head, LLAVA.messages)


def _has_key(head: str, key: str) -> bool:
    return f"{json.dumps(key)}:" in head.replace(" ", "")
