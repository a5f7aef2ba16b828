"""How are data sets read that are too large to hold, or that come over a network?

From front to end, shuffled among `shuffle_buffer` rows. Nothing is counted first, so there are no
epochs: a stage's `steps` must be set, and a source that runs out starts again, shuffled otherwise.
With several sources the next row is drawn from one of them with a chance as its `weight`. The seed
decides the order, and a resumed run reads up to where it was, so it sees what it would have seen.
With `skip_bad` faulty rows are left out and counted in ``dataset.skipped`` as they are met.

A row is known by its place in its source, however the rows are shuffled and in every pass: "row 7",
or "shard 2, row 7" where a source lies in several, because nobody has counted the shards before.

Left out: several processes (each would read every row; save the data set to disk instead).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from training.config import SourceConfig
from training.data.encoding import Encoding
from training.data.images import flat
from training.data.item import Item
from training.data.records import DataError
from training.data.sources import image_column, load_rows, row_images, row_sample

WHERE = "place in the source"  # a column of ours
ROWS_AT_ONCE = 16


class StreamDataset(IterableDataset[Item]):
    """Streamed HF data sets of messages as an endless series of `Item`s.

    Args:
        sources: their configurations.
        image_root: the folder their image paths are relative to, if they do not say.
        encoding: what makes items of samples.
        seed: of the order.
        buffer: rows that a source is shuffled among.
        skip_bad: leave faulty rows out instead of raising.
        where: the sources' dotted path in messages.

    Raises:
        ConfigError: a source that cannot be streamed.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        image_root: str,
        encoding: Encoding,
        *,
        seed: int = 0,
        buffer: int = 1000,
        skip_bad: bool = False,
        where: str = "data.sources",
    ) -> None:
        self.sources, self.image_root, self.encoding = list(sources), image_root, encoding
        self.seed, self.buffer, self.skip_bad = seed, buffer, skip_bad
        self.skipped = 0
        loaded = [load_rows(one, f"{where}[{i}]") for i, one in enumerate(self.sources)]
        self.rows = [_checked(*pair) for pair in zip(loaded, self.sources, strict=True)]

    def __iter__(self) -> Iterator[Item]:
        generator = torch.Generator().manual_seed(self.seed)
        weights = torch.tensor([one.weight for one in self.sources])
        series = [self._endless(which) for which in range(len(self.sources))]
        while True:
            which = int(torch.multinomial(weights, 1, generator=generator))
            yield next(series[which])

    def _endless(self, which: int) -> Iterator[Item]:
        """The items of one source, again and again."""
        config = self.sources[which]
        root = Path(config.image_root or self.image_root)
        for epoch in count():
            sound = False
            for row in self._shuffled(which, epoch):
                item = self._item(row, config, root)
                if item is not None:
                    sound = True
                    yield item
            if not sound:
                raise DataError(f"{config.path}: every row is faulty ({self.skipped} skipped)")

    def _shuffled(self, which: int, epoch: int) -> Iterator[dict[str, Any]]:
        """One pass over a source: its shards in another order, its rows by a buffer."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = _rows(self.rows[which], generator)
        buffer = list(islice(rows, self.buffer))
        for row in rows:
            at = int(torch.randint(len(buffer), (1,), generator=generator))
            yield buffer[at]
            buffer[at] = row
        yield from (buffer[at] for at in torch.randperm(len(buffer), generator=generator).tolist())

    def _item(self, row: dict[str, Any], config: SourceConfig, root: Path) -> Item | None:
        images = row.get(config.images, row.get("image") if config.images == "images" else None)
        try:
            sample = row_sample(row, row[WHERE], config, len(flat(images)))
            if isinstance(sample, DataError):
                raise sample
            return self.encoding.item(
                sample, lambda: row_images(sample, images, root), (config, root)
            )
        except DataError:
            if not self.skip_bad:
                raise
            self.skipped += 1
            return None


def _checked(rows: Any, config: SourceConfig) -> Any:
    """A stream's rows, images as they are stored.

    Raises:
        ConfigError: it has no column of messages.
        DataError: it has no rows.
    """
    for name, feature in (rows.features or {}).items():
        if (stored := _stored(feature)) != feature:
            rows = rows.cast_column(name, stored)
    first = next(iter(rows), None)
    if first is None:
        raise DataError(f"{config.path}: no rows, expected at least one")
    image_column(rows.column_names or list(first), config)
    return rows


def _rows(rows: Any, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Rows with their places, the shards shuffled; in a data-loading process those of its shards.

    `datasets` could shuffle, too, but would then no longer say which row is which.
    """
    shards = torch.randperm(rows.num_shards, generator=generator).tolist()
    worker = get_worker_info()
    for k in shards if worker is None else shards[worker.id :: worker.num_workers]:
        name = f"shard {k}, " if len(shards) > 1 else ""
        numbers = count()
        for batch in rows.shard(len(shards), k).iter(ROWS_AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                yield {**dict(zip(batch, values, strict=True)), WHERE: f"{name}row {next(numbers)}"}


def _stored(feature: Any) -> Any:
    """A column's type with its media as they are stored: `training.data.images` decodes images."""
    from datasets import Audio, Image, Video

    if isinstance(feature, (Audio, Image, Video)):
        return replace(feature, decode=False)
    if isinstance(feature, dict):
        return {name: _stored(inner) for name, inner in feature.items()}
    inner = getattr(feature, "feature", None)  # of a list
    return feature if inner is None else replace(feature, feature=_stored(inner))
