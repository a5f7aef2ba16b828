"""How does a sample become an item for the student and, if it differs, one for the teacher?

Images are opened and processed once a sample; what a processor made of them is kept in memory up to
a budget, because small sets of images are asked about again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from training.data.chat import encoder_for
from training.data.item import Item, ItemEncoder, Seen
from training.data.records import Sample, fault
from training.data.template import TemplateName

TYPICAL_IMAGE = (448, 448)  # what an image counts as in an estimate of lengths
LETTERS_PER_TOKEN = 4

Images = Callable[[], Sequence[Image.Image]]


class Encoding:
    """A processor, perhaps the teacher's too, and the limit of a sample's length.

    Args:
        processor: any image-text processor with a chat template (`training.data.chat`), or one of
            LLaVA's own (`training.data.template`) whose images all have one size.
        teacher: the teacher's processor, if it differs: each item then has a ``teacher`` item,
            made by it of the same sample.
        template: ``chat`` or ``pretrain`` (`training.data.template`, `training.data.chat`).
        system: a system line or message for samples without one of their own.
        max_length: most tokens a sample may have, image tokens included. A longer one is a
            fault: cutting it could cut an image or the answer.
        image_cache_mb: keep processed images in memory up to this size, per process.

    Raises:
        ValueError: a bad max_length, image_cache_mb, template or processor (a `ConfigError` where
            the processor's chat template cannot be trained with).
    """

    def __init__(
        self,
        processor: Any,
        *,
        teacher: Any = None,
        template: TemplateName = "chat",
        system: str = "",
        max_length: int = 2048,
        image_cache_mb: int = 0,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}, expected at least 1")
        if image_cache_mb < 0:
            raise ValueError(f"image_cache_mb: got {image_cache_mb}, expected 0 or more")
        self.max_length = max_length
        both = [processor] if teacher is None else [processor, teacher]
        self.encoders: list[ItemEncoder] = [encoder_for(one, template, system) for one in both]
        self.cache: list[dict[tuple[str, ...], Seen]] = [{} for _ in both]
        self.cache_left = image_cache_mb << 20

    @property
    def notes(self) -> list[str]:
        """What the encoders say of their processors' templates."""
        return list(dict.fromkeys(encoder.note for encoder in self.encoders if encoder.note))

    def item(self, sample: Sample, images: Images) -> Item:
        """The sample's item, the teacher's within it; `images` is called if they are needed.

        Raises:
            DataError: the sample cannot be encoded or is too long, or what `images` raises.
        """
        kept = all(sample.images in cache for cache in self.cache)
        opened = [] if kept else images()
        items = [self._item(which, sample, opened) for which in range(len(self.encoders))]
        for extra in items[1:]:
            items[0]["teacher"] = extra
        return items[0]

    def check(self, sample: Sample, images: Images) -> None:
        """Raise what `item` would raise, without processing images where that can be avoided."""
        for encoder in self.encoders:
            seen = None if encoder.fixed_image_tokens else encoder.see(images())
            self._fits(sample, encoder.length(sample, seen))

    def estimate(self, sample: Sample) -> int:
        """About how many tokens the sample has: 4 letters a token, images of a usual size."""
        letters = sum(len(text) for _, text in sample.texts())
        return letters // LETTERS_PER_TOKEN + len(sample.images) * self._tokens_per_image()

    def _tokens_per_image(self) -> int:
        if not hasattr(self, "_typical"):
            seen = self.encoders[0].see([Image.new("RGB", TYPICAL_IMAGE)])
            self._typical = len(seen.ids[0])
        return self._typical

    def _item(self, which: int, sample: Sample, images: Sequence[Image.Image]) -> Item:
        """The sample as one of the encoders makes it."""
        encoder, cache = self.encoders[which], self.cache[which]
        seen = cache.get(sample.images)
        if seen is None:
            seen = encoder.see(images)
            if seen.nbytes <= self.cache_left:  # when full nothing is evicted: order is random
                self.cache_left -= seen.nbytes
                cache[sample.images] = seen
        item = encoder.item(sample, seen)
        self._fits(sample, len(item["input_ids"]))
        return item

    def _fits(self, sample: Sample, length: int) -> None:
        if length > self.max_length:
            got = f"{length} tokens"
            raise fault(sample.place, "conversations", got, f"at most max_length {self.max_length}")
