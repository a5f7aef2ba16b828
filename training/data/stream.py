"""How are data sets read that are too large to hold, or that come over a network?

From front to end, shuffled among `shuffle_buffer` rows. Nothing is counted first, so there are no
epochs: a stage's `steps` must be set, and a source that runs out starts again, shuffled otherwise.
With several sources the next row is drawn from one of them with a chance as its `weight`. The seed
decides the order, and a resumed run reads up to where it was, so it sees what it would have seen.
With `skip_bad` faulty rows are left out and counted in ``dataset.skipped`` as they are met.

A row is known by its place in its source, however the rows are shuffled and in every pass: "row 7",
or "shard 2, row 7" where a source lies in several, because nobody has counted the shards before.

The readers, which are the data-loading processes of every rank, share each pass of a source: whole
shards, or of each shard every n-th row where there are fewer shards than readers. Who gets which
part goes round from pass to pass.

Of `datasets` are the shards, and the rows of a shard that are a reader's. Its own shuffle is not
used, because a row loses its place there, and because one data-loading process would have another
order than none. Nor is `interleave_datasets`: it starts a source again in the same order, and
refuses sources whose columns differ in type.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
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
from training.data.sources import image_column, load_rows, row_images, row_sample, undecoded

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
        rank, world: which of how many processes with such a data set this is.

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
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sources, self.image_root, self.encoding = list(sources), image_root, encoding
        self.seed, self.buffer, self.skip_bad = seed, buffer, skip_bad
        self.rank, self.world = rank, world
        self._skipped: Any = multiprocessing.Value("q")  # data-loading processes count, too
        loaded = [load_rows(one, f"data.sources[{i}]") for i, one in enumerate(self.sources)]
        self.rows = [_checked(*pair) for pair in zip(loaded, self.sources, strict=True)]

    @property
    def skipped(self) -> int:
        """Faulty rows that this process and those which load its data have left out."""
        return self._skipped.value

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        loading, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        reader, readers = self.rank * loading + own, self.world * loading
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + reader)
        weights = torch.tensor([one.weight for one in self.sources])
        series = [self._endless(which, reader, readers) for which in range(len(self.sources))]
        while True:
            which = int(torch.multinomial(weights, 1, generator=generator))
            yield next(series[which])

    def _endless(self, which: int, reader: int, readers: int) -> Iterator[Item]:
        """A reader's items of one source, again and again."""
        config = self.sources[which]
        root = Path(config.image_root or self.image_root)
        faulty = 0  # passes in a row
        for epoch in count():
            faulty += 1
            for row in self._shuffled(which, epoch, (reader - epoch) % readers, readers):
                item = self._item(row, config, root)
                if item is not None:
                    faulty = 0
                    yield item
            if faulty == readers:  # by now this one has read every part
                raise DataError(f"{config.path}: every row is faulty ({self.skipped} skipped)")

    def _shuffled(self, which: int, epoch: int, part: int, parts: int) -> Iterator[dict[str, Any]]:
        """A part of one pass over a source: its shards in another order, its rows by a buffer."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = _rows(self.rows[which], part, parts, generator)
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
        except DataError as error:
            if not self.skip_bad:
                raise
            with self._skipped:
                self._skipped.value += 1
                if self._skipped.value == 1:
                    print(f"skipped, as are all faulty rows: {error}")
            return None


def _checked(rows: Any, config: SourceConfig) -> Any:
    """A stream's rows, images as they are stored.

    Raises:
        ConfigError: it has no column of messages.
        DataError: it has no rows.
    """
    if rows.features:
        rows = undecoded(rows.decode(num_threads=0))  # from a hub it would decode ahead
    first = next(iter(rows), None)
    if first is None:
        raise DataError(f"{config.path}: no rows, expected at least one")
    image_column(rows.column_names or list(first), config)
    return rows


def _rows(rows: Any, part: int, parts: int, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """The rows of a part with their places, the shards shuffled."""
    from datasets.distributed import split_dataset_by_node

    shards, several = torch.arange(rows.num_shards), rows.num_shards > 1
    if len(shards) >= parts:
        shards, part, parts = shards[part::parts], 0, 1
    for k in shards[torch.randperm(len(shards), generator=generator)].tolist():
        shard = split_dataset_by_node(rows.shard(rows.num_shards, k), part, parts)
        numbers = count(part, parts)
        for batch in shard.iter(ROWS_AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                place = f"{f'shard {k}, ' if several else ''}row {next(numbers)}"
                yield {**dict(zip(batch, values, strict=True)), WHERE: place}
