"""A folder in LLaVA's format as a torch Dataset: one entry in, ids, labels and pixels out.

Faults are found as early as they can be. At construction every entry is validated
(`training.data.records`) and every image file must be there; on access images are decoded and the
ids built. By default the first fault raises a `DataError`. With ``skip_bad=True`` construction also
decodes every image and encodes every conversation, drops what is faulty, and lists it in
``dataset.skipped``: so the length is known, and no entry is ever replaced by another.

Left out: shuffling and sharding (the sampler's), augmentation, EXIF rotation, and any choice of
image geometry (the processor's).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset

from training.data.chat import encoder_for
from training.data.item import Item, ItemEncoder, Seen
from training.data.records import DataError, Sample, fault, read_samples
from training.data.template import TemplateName

# What Pillow raises on damaged files; SyntaxError is how it reports a broken PNG chunk.
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
WHOLE_IMAGE = "an image file that decodes whole"


class Skip(NamedTuple):
    """An entry left out by ``skip_bad``: its place among the file's entries, its id, and why."""

    index: int
    id: str | None
    reason: str


class LlavaDataset(Dataset[Item]):
    """LLaVA json as a map-style dataset of `Item`s.

    Args:
        json_path: a LLaVA ``.json`` or ``.jsonl`` file (`training.data.records`).
        image_root: the folder that image paths are relative to.
        processor: any image-text processor with a chat template (`training.data.chat`), or a
            `LlavaProcessor` whose images all have one size.
        template: ``chat`` or ``pretrain`` (`training.data.template`, `training.data.chat`).
        system: a line before the first turn of ``chat``.
        max_length: most tokens a sample may have, image tokens included. A longer one is a
            fault: cutting it could cut an image or the answer.
        skip_bad: leave faulty entries out, counted and listed, instead of raising.
        teacher: the teacher's processor, if it differs: each item then has a ``teacher`` item,
            made by it of the same sample.
        image_cache_mb: keep processed images in memory up to this size, per process.

    Raises:
        DataError: the file is unusable, an entry is faulty, or (skip_bad) none is sound.
        ValueError: a bad max_length, image_cache_mb, template or processor (a `ConfigError` where
            the processor's chat template cannot be trained with).

    Attributes:
        samples: the validated entries in file order; ``samples[i].kind`` and ``.turns`` belong to
            item i.
        skipped: the entries left out (always empty unless ``skip_bad``).
    """

    def __init__(
        self,
        json_path: str | Path,
        image_root: str | Path,
        processor: Any,
        *,
        teacher: Any = None,
        template: TemplateName = "chat",
        system: str = "",
        max_length: int = 2048,
        skip_bad: bool = False,
        image_cache_mb: int = 0,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}, expected at least 1")
        if image_cache_mb < 0:
            raise ValueError(f"image_cache_mb: got {image_cache_mb}, expected 0 or more")
        self.json_path, self.image_root = Path(json_path), Path(image_root)
        self.max_length, self.skip_bad = max_length, skip_bad
        self.encoder: ItemEncoder = encoder_for(processor, template, system)
        self.encoders = [self.encoder]
        if teacher is not None:
            self.encoders.append(encoder_for(teacher, template, system))
        self.samples: list[Sample] = []
        self.skipped: list[Skip] = []
        self._cache: list[dict[tuple[str, ...], Seen]] = [{} for _ in self.encoders]
        self._cache_left = image_cache_mb << 20
        self._image_faults: dict[Path, str | None] = {}  # images are shared: look at each once
        for index, entry in enumerate(self._entries()):
            try:
                self.samples.append(self._checked(entry))
            except DataError as error:
                if not skip_bad:
                    raise
                self.skipped.append(Skip(index, error.id, str(error)))
        self._image_faults.clear()
        if self.skipped:
            self._report_skips()
        if not self.samples:
            raise DataError(f"{json_path}: all of its {len(self.skipped)} entries are faulty")

    def __len__(self) -> int:
        """How many entries are sound."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """Item ``index``; raises `DataError` if an image is damaged or the sample is too long."""
        sample = self.samples[index]
        images = [] if self._kept(sample) else self._images(sample)
        items = [self._item(which, sample, images) for which in range(len(self.encoders))]
        for extra in items[1:]:
            items[0]["teacher"] = extra
        return items[0]

    def image_path(self, image: str) -> Path:
        """Where an image named by an entry lies."""
        return self.image_root / image

    def _entries(self) -> Iterator[Sample | DataError]:
        entries = read_samples(self.json_path)
        if not self.skip_bad:
            return entries
        # Decoding every image takes time that a user should see pass.
        console = Console(stderr=True)
        return iter(track(list(entries), f"checking {self.json_path.name}", console=console))

    def _checked(self, entry: Sample | DataError) -> Sample:
        """The entry if it is sound, else its fault: cheap checks, or with skip_bad all of them."""
        if isinstance(entry, DataError):
            raise entry
        for i, image in enumerate(entry.images):
            path = self.image_path(image)
            if path not in self._image_faults:
                self._image_faults[path] = self._image_fault(path)
            if (got := self._image_faults[path]) is not None:
                raise fault(entry.place, f"image[{i}]", got, WHOLE_IMAGE)
        if self.skip_bad:
            for encoder in self.encoders:
                fixed = encoder.fixed_image_tokens
                seen = None if fixed else encoder.see(self._images(entry))
                self._fits(entry, encoder.length(entry, seen))
        return entry

    def _fits(self, sample: Sample, length: int) -> None:
        if length > self.max_length:
            got = f"{length} tokens"
            raise fault(sample.place, "conversations", got, f"at most max_length {self.max_length}")

    def _item(self, which: int, sample: Sample, images: list[Image.Image]) -> Item:
        """The sample as one of the encoders makes it, its images from the cache if kept there."""
        encoder, cache = self.encoders[which], self._cache[which]
        seen = cache.get(sample.images)
        if seen is None:
            seen = encoder.see(images)
            if seen.nbytes <= self._cache_left:  # when full nothing is evicted: order is random
                self._cache_left -= seen.nbytes
                cache[sample.images] = seen
        item = encoder.item(sample, seen)
        self._fits(sample, len(item["input_ids"]))
        return item

    def _kept(self, sample: Sample) -> bool:
        return all(sample.images in cache for cache in self._cache)

    def _image_fault(self, path: Path) -> str | None:
        """Why an image is unusable, or None: looked for, and with skip_bad decoded."""
        if not path.is_file():
            return f"no such file: {path}"
        if self.skip_bad:
            try:
                _decoded(path)
            except BROKEN_IMAGE as error:
                return _damage(path, error)
        return None

    def _images(self, sample: Sample) -> list[Image.Image]:
        images = []
        for i, name in enumerate(sample.images):
            path = self.image_path(name)
            try:
                images.append(_decoded(path))
            except BROKEN_IMAGE as error:
                got = _damage(path, error)
                raise fault(sample.place, f"image[{i}]", got, WHOLE_IMAGE) from error
        return images

    def _report_skips(self) -> None:
        first = self.skipped[0].reason
        total = len(self.skipped) + len(self.samples)
        print(
            f"{self.json_path}: skipped {len(self.skipped)} of {total} entries, "
            f"listed in dataset.skipped; the first: {first}"
        )


def _decoded(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")  # decodes all of it


def _damage(path: Path, error: Exception) -> str:
    return f"{path}: {type(error).__name__}: {error}"
