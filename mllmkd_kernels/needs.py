"""What has to be there before a loss can be computed? The union of what its terms need decides, and
nothing else does, whether a teacher is loaded, what is recorded of a model, what a cache stores,
what a pair is compared in and which entries a batch has.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from mllmkd_kernels.rows import kind_of


@dataclass(frozen=True)
class Needs:
    """What a term reads.

    Attributes:
        rows: row sets of the teacher.
        layers: hidden states of both models inside, by layer of the decoder (-1: the last one).
        attention: attention maps of both models, by layer.
        router: the student's router logits.
        views: entries of the batch that not every batch has: "kind", "rejected".
    """

    rows: frozenset[str] = frozenset()
    layers: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    router: bool = False
    views: frozenset[str] = frozenset()

    def __or__(self, other: Needs) -> Needs:
        return Needs(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))

    @property
    def teacher(self) -> bool:
        """Whether there has to be a teacher."""
        return bool(self.rows or self.layers or self.attention)

    @property
    def visual(self) -> bool:
        """Whether the image positions of the two models have to correspond."""
        return any(kind_of(name)[0] == "visual" for name in self.rows)
