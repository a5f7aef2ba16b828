"""What is in a data set, as this trainer would read it? Every entry is opened and encoded, once.

Counted: entries that would be skipped, grouped by reason with examples; tokens a sample (and how
many are image tokens and labels), images a sample, and what was done to images so that they are as
a person sees them (`training.data.images`). A few sound samples, evenly spread, are kept
with their tokens for the page (`training.data.page`). Nothing is trained and nothing is changed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from training.bar import track
from training.data.encoding import Encoding
from training.data.images import conversions
from training.data.item import IGNORE, Item, apart
from training.data.records import DataError
from training.data.sample import Sample
from training.data.sources import Source

EXAMPLES = 3  # of each reason
FAULT = re.compile(r": field '(?P<field>[^']*)': got (?P<got>.*), expected (?P<expected>.*)$", re.S)
BINS = 16


@dataclass
class Shown:
    """A sample to be rendered."""

    sample: Sample
    item: Item
    images: list[Image.Image]


@dataclass
class Report:
    """What was found."""

    names: list[str]
    read: int = 0
    sound: int = 0  # entries that can be trained on
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)  # of a pair, of either answer
    labels: int = 0
    image_tokens: int = 0
    images: Counter[int] = field(default_factory=Counter)  # images a sample -> samples
    conversions: Counter[str] = field(default_factory=Counter)  # what was done -> images
    shown: list[Shown] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)  # fields that are not read -> samples
    notes: list[str] = field(default_factory=list)

    @property
    def n_images(self) -> int:
        """Images of the sound entries; one of several entries counts in each."""
        return sum(n * samples for n, samples in self.images.items())

    def histogram(self) -> list[tuple[int, int, int]]:
        """Samples by length: (from, to inclusive, how many), at most 16 bins of equal width."""
        if not self.lengths:
            return []
        low, high = min(self.lengths), max(self.lengths)
        width = -(-(high - low + 1) // BINS)
        counts = Counter((length - low) // width for length in self.lengths)
        return [
            (low + b * width, low + (b + 1) * width - 1, counts[b]) for b in range(max(counts) + 1)
        ]

    def percentile(self, share: float) -> int:
        """The length that this share of the samples does not exceed."""
        ordered = sorted(self.lengths)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def read_data(
    sources: Sequence[Source],
    encoding: Encoding,
    *,
    show: int = 12,
    limit: int | None = None,
    positions: int | None = None,
) -> Report:
    """Read every entry (or the first `limit` of each source) and count what is found.

    Args:
        sources: what to read.
        encoding: how it is encoded.
        show: how many samples are kept for the page.
        limit: how many entries of each source are read.
        positions: how many tokens the model was made for; longer samples are noted.

    Raises:
        DataError: a source that cannot be read at all.
    """
    report = Report([source.name for source in sources], notes=encoding.notes)
    for source in sources:
        entries = list(source.samples())[:limit]
        wanted = spread(len(entries), -(-show // len(sources)))
        before, due = len(report.shown), 0
        for i, entry in enumerate(track(entries, f"reading {source.name}", "samples")):
            report.read += 1
            due += i in wanted  # a faulty entry leaves its place to the next sound one
            try:
                _count(report, source, encoding, entry, len(report.shown) - before < due)
            except DataError as error:
                reason = reason_of(str(error))
                report.reasons[reason] += 1
                examples = report.examples.setdefault(reason, [])
                if len(examples) < EXAMPLES:
                    examples.append(str(error))
    if positions is not None and (longer := sum(n > positions for n in report.lengths)):
        report.notes.append(
            f"{longer:,} samples are longer than the model's {positions:,} positions (up to "
            f"{max(report.lengths):,} tokens); data.max_length={positions} would refuse them"
        )
    return report


def _count(
    report: Report, source: Source, encoding: Encoding, entry: Sample | DataError, show: bool
) -> None:
    """Encode an entry and add it to the report; its fault is raised."""
    if isinstance(entry, DataError):
        raise entry
    images = source.images(entry)
    item = encoding.item(entry, lambda: images)
    report.sound += 1
    for one in apart([item]):
        report.lengths.append(len(one["input_ids"]))
        report.labels += int((one["labels"] != IGNORE).sum())
        report.image_tokens += int(one["image_lens"].sum())
    report.images[len(images)] += 1
    report.conversions.update(done for image in images for done in conversions(image))
    report.unread.update(entry.unread)
    if show:
        report.shown.append(Shown(entry, item, images))


def reason_of(message: str) -> str:
    """A fault without what is its entry's own: the field, and what was expected of it."""
    found = FAULT.search(message)
    if found is None:
        return message.split("\n")[0]
    name = re.sub(r"\[\d+\]", "[]", found["field"])
    kind = "no such file" if found["got"].startswith("no such file") else ""
    return f"{name}: {kind + ', ' if kind else ''}expected {found['expected']}"


def spread(total: int, most: int) -> list[int]:
    """At most `most` indices below `total`, evenly spread, the first and the last among them."""
    count = min(total, most)
    return sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})
