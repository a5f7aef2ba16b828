"""Sources as a torch Dataset: one entry in, ids, labels and pixels out.

Faults are found as early as they can be. At construction every entry is validated and every image
file must be there; on access images are decoded and the ids built. By default the first fault
raises a `DataError`. With ``skip_bad=True`` construction also decodes every image and encodes every
conversation, drops what is faulty, and lists it in ``dataset.skipped``: so the length is known, and
no entry is ever replaced by another.

Left out: shuffling and sharding (`training.data.sampler`), augmentation, and any choice of image
geometry (the processor's); how a stored picture becomes pixels is `training.data.images`'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from training.bar import track
from training.data.encoding import Encoding
from training.data.images import WHOLE_IMAGE
from training.data.item import Item
from training.data.records import DataError, fault
from training.data.sample import Sample
from training.data.sampler import ModalitySampler
from training.data.sources import LlavaSource, Source


class Skip(NamedTuple):
    """An entry left out by ``skip_bad``: its place among its source's, its id, and why."""

    index: int
    id: str | None
    reason: str


class SampleDataset(Dataset[Item]):
    """Some sources as one map-style dataset of `Item`s, in order.

    Args:
        sources: where the samples come from.
        processor: what encodes them; with it the options of `training.data.encoding.Encoding`.
        skip_bad: leave faulty entries out, counted and listed, instead of raising.

    Raises:
        DataError: a source is unusable, an entry is faulty, or (skip_bad) none is sound.
        ValueError: as `Encoding`.

    Attributes:
        samples: the validated entries in order; ``samples[i].kind`` and ``.turns`` belong to
            item i.
        skipped: the entries left out (always empty unless ``skip_bad``).
    """

    def __init__(
        self, sources: Sequence[Source], processor: Any, *, skip_bad: bool = False, **options: Any
    ) -> None:
        self.sources, self.skip_bad = sources, skip_bad
        self.encoding = Encoding(processor, **options)
        self.samples: list[Sample] = []
        self.skipped: list[Skip] = []
        self._source: list[int] = []  # of each sample, its place in sources
        for which, source in enumerate(sources):
            self._read(which, source)
        if not self.samples:
            names = ", ".join(source.name for source in sources)
            raise DataError(
                f"{names}: all of its {len(self.skipped)} entries are faulty; the first: "
                f"{self.skipped[0].reason}"
            )

    def __len__(self) -> int:
        """How many entries are sound."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """Item ``index``; a `DataError`, and nothing else, if it cannot be made."""
        sample, source = self.samples[index], self.sources[self._source[index]]
        return self.encoding.item(sample, lambda: source.images(sample), source.identity)

    @property
    def entries(self) -> Iterator[tuple[Sample, Source]]:
        """The samples in order, each with its source."""
        for sample, which in zip(self.samples, self._source, strict=True):
            yield sample, self.sources[which]

    def some(self, places: Sequence[int]) -> SampleDataset:
        """The samples at these places alone."""
        part = copy(self)
        part.samples = [self.samples[i] for i in places]
        part._source = [self._source[i] for i in places]
        return part

    def sampler(self, step_size: int, seed: int, group: bool) -> ModalitySampler:
        """An order of training: sources by weight, steps by modality and length if `group`."""
        return ModalitySampler(
            [self.encoding.estimate(sample) if group else 0 for sample in self.samples],
            [bool(sample.images) for sample in self.samples],
            step_size,
            seed,
            weights=[self.sources[which].weight for which in self._source],
            group=group,
        )

    def _read(self, which: int, source: Source) -> None:
        """Add a source's sound entries, and note or raise its faults."""
        faults: dict[str, str | None] = {}  # images are shared: look at each once
        sound = len(self.samples)
        skipped = len(self.skipped)
        for index, entry in enumerate(self._entries(source)):
            try:
                self.samples.append(self._checked(source, entry, faults))
                self._source.append(which)
            except DataError as error:
                if not self.skip_bad:
                    raise
                self.skipped.append(Skip(index, error.id, str(error)))
        if lost := self.skipped[skipped:]:
            total = len(lost) + len(self.samples) - sound
            print(
                f"{source.name}: skipped {len(lost)} of {total} entries, "
                f"which `data check` counts by reason; the first: {lost[0].reason}"
            )

    def _entries(self, source: Source) -> Iterator[Sample | DataError]:
        entries = source.samples()
        if not self.skip_bad:
            return entries
        # Decoding every image takes time that a user should see pass.
        return track(list(entries), f"checking {Path(source.name).name}", "samples")

    def _checked(
        self, source: Source, entry: Sample | DataError, faults: dict[str, str | None]
    ) -> Sample:
        """The entry if it is sound, else its fault: cheap checks, or with skip_bad all of them."""
        sample = present(source, entry, faults)
        self.encoding.admit(sample)
        if self.skip_bad:
            images = source.images(sample)
            self.encoding.check(sample, lambda: images)
        return sample


def present(source: Source, entry: Sample | DataError, faults: dict[str, str | None]) -> Sample:
    """The entry if it is well formed and its images are there, else its fault; `faults` are those
    of the images that were looked for before."""
    if isinstance(entry, DataError):
        raise entry
    for i, image in enumerate(entry.images):
        if image not in faults:
            faults[image] = source.missing(entry, i)
        if (got := faults[image]) is not None:
            raise fault(entry.place, f"image[{i}]", got, WHOLE_IMAGE)
    return entry


class LlavaDataset(SampleDataset):
    """One LLaVA json file (`training.data.records`) as a dataset; options as `SampleDataset`'s."""

    def __init__(
        self, json_path: str | Path, image_root: str | Path, processor: Any, **options: Any
    ) -> None:
        super().__init__([LlavaSource(json_path, image_root)], processor, **options)
