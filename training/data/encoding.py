"""How does a sample become an item for the student and, if it differs, one for the teacher?

Images are opened and processed once a sample; what a processor made of them, and the item with its
tokens, are kept in memory up to a budget, because small sets are trained on again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from training.data.chat import ChatEncoder
from training.data.faults import fault, named, shown
from training.data.item import IGNORE, Item, Seen, own_bytes
from training.data.sample import Sample
from training.data.template import TemplateName

TYPICAL_IMAGE = (448, 448)  # what an image counts as in an estimate of lengths
LETTERS_PER_TOKEN = 4
PROCESSED = "images that the processor takes"
ENCODED = "a conversation that tokenizer and template take"

Images = Callable[[], Sequence[Image.Image]]


class Encoding:
    """A processor, perhaps the teacher's too, and the limit of a sample's length.

    Args:
        processor: any image-text processor with a chat template (`training.data.chat`), or one of
            LLaVA's own (`training.data.template`) whose images all have one size.
        teacher: the teacher's processor, if it differs: each item then has a ``teacher`` item,
            made by it of the same sample.
        template: ``chat`` or ``pretrain`` (`training.data.template`, `training.data.chat`).
        max_length: most tokens a sample may have, image tokens included. A longer one is a
            fault: cutting it could cut an image or the answer.
        cache_mb: keep processed images and the items made of them in memory up to this size, per
            process.
        pairs: samples have two answers, of which the last turns are learned: an item of the better
            one, and in it as ``rejected`` one of the worse. Without, samples have one answer.

    Raises:
        ValueError: a bad template or processor (a `ConfigError` where the processor's chat
            template cannot be trained with).
    """

    def __init__(
        self,
        processor: Any,
        *,
        teacher: Any = None,
        template: TemplateName = "chat",
        max_length: int = 2048,
        cache_mb: int = 0,
        pairs: bool = False,
    ) -> None:
        self.max_length, self.pairs = max_length, pairs
        both = [processor] if teacher is None else [processor, teacher]
        self.encoders: list[ChatEncoder] = [ChatEncoder(one, template) for one in both]
        # for each encoder, by where the images come from and their names there
        self.cache: list[dict[Hashable, Seen]] = [{} for _ in both]
        self.items: dict[Hashable, Item] = {}
        self.cache_left = cache_mb << 20

    @property
    def notes(self) -> list[str]:
        """What the encoders say of their processors' templates."""
        return list(dict.fromkeys(encoder.note for encoder in self.encoders if encoder.note))

    def item(self, sample: Sample, images: Images, identity: Hashable = None) -> Item:
        """The sample's item, the teacher's within it.

        Args:
            sample: what to encode.
            images: called if they are needed.
            identity: where its images come from (`training.data.sources.Source`); of samples with
                the same one, images of equal names are the same.

        Raises:
            DataError: the sample cannot be encoded or is too long, or its images cannot be had;
                whatever else a library raises on the way comes out as this.
        """
        key = (identity, sample)
        if key not in self.items:
            made = self._items(sample, images, identity, "item")
            if not self._kept(identity, sample) or not self._room(own_bytes(made)):
                return made
            self.items[key] = made
        return Item(**self.items[key])

    def prompt(self, sample: Sample, images: Images, identity: Hashable = None) -> Item:
        """What generation of the sample's last answer starts from; arguments and faults as
        `item`'s."""
        return self._items(sample, images, identity, "prompt")

    def _items(self, sample: Sample, images: Images, identity: Hashable, make: str) -> Item:
        """What the encoders' method `make` makes of a sample, the teacher's within it."""
        self.admit(sample)
        key = (identity, sample.images)
        opened = [] if self._kept(identity, sample) else self._images(sample, images)
        many = range(len(self.encoders))
        items = [self._item(which, sample, opened, key, make) for which in many]
        for extra in items[1:]:
            items[0]["teacher"] = extra
        return items[0]

    def admit(self, sample: Sample) -> None:
        """Raise `DataError` unless the sample has as many answers as are wanted: no look at it."""
        if self.pairs and sample.rejected is None:
            raise fault(sample.place, "rejected", "nothing", "a worse answer: pairs are compared")
        if not self.pairs and sample.rejected is not None:
            expected = "no such field: an answer is learned, not preferred to another"
            raise fault(sample.place, sample.answers[1], shown(sample.rejected), expected)

    def check(self, sample: Sample, images: Images) -> None:
        """Raise what `item` would raise, without processing images where that can be avoided."""
        self.admit(sample)
        for encoder in self.encoders:
            seen = None
            if encoder.tokens_per_image is None:
                seen = self._seen(encoder, sample, self._images(sample, images))
            for one in sample.apart():
                with named(sample.place, "conversations", ENCODED):
                    length = encoder.length(one, seen)
                self._fits(sample, length)

    def estimate(self, sample: Sample) -> int:
        """About how many tokens the sample has: 4 letters a token, images of a usual size; of a
        pair, with the longer answer.
        """
        letters = max(sum(len(text) for _, text in one.texts()) for one in sample.apart())
        return letters // LETTERS_PER_TOKEN + len(sample.images) * self._tokens_per_image()

    def _tokens_per_image(self) -> int:
        if not hasattr(self, "_typical"):
            seen = self.encoders[0].see([Image.new("RGB", TYPICAL_IMAGE)])
            self._typical = len(seen.ids[0])
        return self._typical

    def _item(
        self, which: int, sample: Sample, images: Sequence[Any], key: Hashable, make: str
    ) -> Item:
        """The sample as one of the encoders makes it."""
        encoder, cache = self.encoders[which], self.cache[which]
        seen = cache.get(key)
        if seen is None:
            seen = self._seen(encoder, sample, images)
            if self._room(seen.nbytes):
                cache[key] = seen
        with named(sample.place, "conversations", ENCODED):
            item, *worse = [getattr(encoder, make)(one, seen) for one in sample.apart()]
        for other in worse:
            item["rejected"] = other
        for one in (item, *worse):
            self._fits(sample, len(one["input_ids"]))
            if self.pairs:
                _last_answer(one["labels"])
        return item

    def _kept(self, identity: Hashable, sample: Sample) -> bool:
        """Whether what every processor made of the sample's images is kept."""
        return all((identity, sample.images) in cache for cache in self.cache)

    def _room(self, nbytes: int) -> bool:
        """Whether so much more can be kept, which is then counted as kept. When memory is full
        nothing is evicted: order is random."""
        if fits := nbytes <= self.cache_left:
            self.cache_left -= nbytes
        return fits

    def _images(self, sample: Sample, images: Images) -> Sequence[Image.Image]:
        """The opened images, one for each that the sample names."""
        with named(sample.place, "image", "images that can be had"):
            opened = images()
        if len(opened) != len(sample.images):
            got = f"{len(opened)} image(s) for {len(sample.images)} in the messages"
            raise fault(sample.place, "image", got, "one image per place")
        return opened

    def _seen(self, encoder: ChatEncoder, sample: Sample, images: Sequence[Image.Image]) -> Seen:
        with named(sample.place, "image", PROCESSED, ", ".join(sample.images)):
            return encoder.see(images)

    def _fits(self, sample: Sample, length: int) -> None:
        if length > self.max_length:
            got = f"{length} tokens"
            raise fault(sample.place, "conversations", got, f"at most max_length {self.max_length}")


def _last_answer(labels: Tensor) -> None:
    """Take away the labels of all but the last answer; what is between two has none."""
    last = (labels != IGNORE).nonzero()[-1]
    labels[: int((labels[: int(last)] == IGNORE).nonzero()[-1])] = IGNORE
