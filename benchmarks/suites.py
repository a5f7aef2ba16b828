"""What does one run measure? Suites of cases, and which of them matter most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.shapes import (
    PREFERENCES,
    PROMISED,
    Case,
    Ladder,
    Sizes,
    StepCase,
    Vlm,
    case,
    fallback,
    gpu_headline,
    headline,
    with_vocab,
)


@dataclass(frozen=True)
class Suite:
    """What one run measures.

    Attributes:
        name, note: for the command line.
        speed, memory, accuracy, step: the cases of each section.
        rounds: interleaved rounds after one of warm-up.
        every_backend: cases that all backends of ours compute; the others see only the one that
            ``backend="auto"`` chooses, because a fallback is many times slower.
        device: where it is measured, "cpu" or "cuda"; the command line sets it.
        weights: how much more of the time than others, where there is not enough, those cases have
            that are measured first: promises, and what the README shows.
    """

    name: str
    note: str
    speed: tuple[Case, ...]
    memory: tuple[Case, ...]
    accuracy: tuple[Ladder, ...]
    every_backend: tuple[Case, ...]
    rounds: int = 5
    device: str = "cpu"
    step: tuple[StepCase, ...] = ()
    weights: Mapping[Any, float] = field(default_factory=dict)

    def sections(self, parts: Iterable[str]) -> dict[Any, list[str]]:
        """case → those of `parts` that have it, in the order in which cases are measured."""
        parts = list(parts)
        cases = dict.fromkeys((*self.weights, *(c for part in parts for c in getattr(self, part))))
        having = {case: [part for part in parts if case in getattr(self, part)] for case in cases}
        return {case: found for case, found in having.items() if found}


# Small on purpose (rows and hidden size do not change a relative error, the vocabulary does), and
# the sizes of the published comparison of rounding schemes, so that its figures can be compared.
_LADDER = Case("ladder", 64, 256, 256, 32000, 32000, loss="kl")
_LADDERS = tuple(Ladder(replace(_LADDER, dtype=dtype)) for dtype in PROMISED)

# Small models with a large vocabulary: on two cores a step takes a second, and its losses matter.
_SMALL = Vlm(
    "small pair", Sizes(384, 4, 6), Sizes(192, 3, 3), Sizes(96, 3, 4), 32768, 160, 16, "fp32"
)
# LLaVA-KD's main pair at its published sizes, with its tower: SigLIP so400m, patch 14 at 384.
_REAL = Vlm(
    "Qwen1.5-4B → 0.5B sizes", Sizes(2560, 40, 20), Sizes(1024, 24, 16), Sizes(1152, 27, 16),
    151936, 384, 14, "bf16",
)  # fmt: skip
_TOY = Vlm("toy pair", Sizes(32, 2, 2), Sizes(16, 2, 2), Sizes(16, 2, 2), 512, 32, 8, "fp32")


def _stages(dft: StepCase) -> tuple[StepCase, ...]:
    """Both stages: captions, half as long and all of it answer, and conversations."""
    half = dft.text // 2
    return replace(dft, stage="dpt", text=half, answer=half), dft


def with_fewer_threads(case: Case) -> tuple[Case, ...]:
    """The case with 1, 2, 4, … threads, fewer than this process has."""
    doublings = range((torch.get_num_threads() - 1).bit_length())
    return tuple(replace(case, threads=2**n) for n in doublings)


def _cpu_suite() -> Suite:
    big = tuple(headline(dtype) for dtype in PROMISED)
    # A quarter of the headline's rows where the ratio is wanted, not the seconds.
    few, fewer = case("headline", 256, "bf16"), case("headline", 128, "bf16")
    real = case("qwen2.5-3b-0.5b", 128, "bf16"), case("qwen2-7b-0.5b", 128, "bf16", False)
    # A quarter of the vocabulary: for all of it torch's chunked cross-entropy needs 16 s a round.
    cross_entropy = with_vocab(replace(few, loss="ce"), 16384)
    frozen = replace(few, train_head=False)
    fallbacks = tuple(fallback(dtype) for dtype in PROMISED)
    one = case("headline", 729, "bf16", train_head=False, loss="relation")
    relation = (one, replace(one, train_head=True))
    (pairs,) = with_vocab(replace(few, rows=64, images=8, loss="dpo"), 16384)
    answers = (pairs, *(replace(pairs, dtype="fp32", loss=loss) for loss in PREFERENCES))
    # N, V and threads from one point, in the dtype that every processor has arithmetic for.
    point = fallbacks[0]
    sweep = *(replace(point, rows=rows) for rows in (32, 512)), *with_vocab(point, 4096, 32768)
    threads = with_fewer_threads(point)
    step = _stages(StepCase(_SMALL, "dft", 64, 40, 4, 192))
    images = replace(one, rows=256, images=3)
    return Suite(
        "cpu",
        "two CPU cores, minutes",
        speed=(
            *(*big, *relation, images, *answers, *fallbacks, *sweep, *threads),
            *(frozen, *cross_entropy, *real),
        ),
        # Of `fewer` rows there is least to save.
        memory=(*big, *relation, *answers, *fallbacks, *sweep, fewer),
        accuracy=_LADDERS,
        every_backend=(*cross_entropy, *fallbacks),
        step=step,
        weights=dict(zip(big, (20.0, 10.0), strict=True))
        | dict.fromkeys(step, 15.0)
        | dict.fromkeys((*_LADDERS, *relation, images, *answers), 4.0)
        # Points of other sizes make no line, and of a small size no promise about memory.
        | dict.fromkeys((point, *sweep, *threads), 8.0)
        | {fallbacks[1]: 12.0},
    )


def _headline_suite() -> Suite:
    cases = gpu_headline()
    return Suite(
        "headline",
        "a GPU's targets alone, a minute",
        speed=cases,
        memory=cases,
        accuracy=_LADDERS,
        every_backend=cases,
        rounds=10,
    )


def _gpu_suite() -> Suite:
    trained, frozen, jsd, relation = gpu_headline()
    both = (trained, frozen)
    middle = replace(trained, rows=4096)
    sweep = (replace(trained, rows=1024), middle, *with_vocab(middle, 32000, 65536))
    other = (
        case("qwen2.5-7b-1.5b", 4096, "bf16"),
        case("llava1.5-13b-1.4b", 4096, "bf16"),
        *(replace(trained, loss=loss) for loss in ("ce", "kl")),
        *(replace(trained, rows=1024, dtype=dtype) for dtype in ("fp32", "fp16")),
    )
    answers = [replace(trained, rows=512, images=16, loss=loss) for loss in PREFERENCES]
    sizes = (
        *(replace(relation, rows=rows) for rows in (256, 1024)),
        *(replace(relation, images=images) for images in (1, 16)),
    )
    (wide,) = with_vocab(replace(_LADDER, d_t=1024, d_s=1024, dtype="bf16"), 151936)
    return Suite(
        "gpu",
        "one large GPU, minutes",
        speed=(
            *both,
            jsd,
            *sweep,
            *other,
            relation,
            replace(relation, train_head=True),
            *sizes,
            *answers,
        ),
        memory=(*sweep, *both, relation, *sizes, *answers),
        accuracy=(*_LADDERS, Ladder(wide)),
        every_backend=both,
        rounds=10,
        step=_stages(StepCase(_REAL, "dft", 256, 128, 4, 16384)),
    )


def _quick_suite() -> Suite:
    small = Case("quick", 128, 512, 256, 16384, 16384)
    middle = replace(small, dtype="bf16")
    # Few rows of fp16: most processors have no arithmetic for it, and emulate it.
    few = replace(small, dtype="fp16", rows=16)
    pairs = replace(middle, rows=16, images=4, loss="dpo")
    cases = (small, middle, few, replace(middle, loss="relation"), pairs)
    (ladder,) = with_vocab(replace(_LADDER, dtype="bf16"), 8000)
    return Suite(
        "quick",
        "about a minute: that everything runs; too small for the promises",
        speed=cases,
        memory=(middle, replace(middle, rows=512), *with_vocab(middle, 65536)),
        accuracy=(Ladder(ladder, (0.3, 0.03)),),
        every_backend=cases,
        step=_stages(StepCase(_SMALL, "dft", 64, 40, 1, 256))[:1],
    )


def _tiny_suite() -> Suite:
    tiny = Case("tiny", 24, 24, 16, 640, 608)
    relation = replace(tiny, loss="relation", dtype="bf16")
    ladder = replace(tiny, loss="kl", d_t=16, vocab_t=608)
    pairs = replace(tiny, rows=6, images=4, loss="kto")
    cases = (tiny, replace(tiny, dtype="bf16", train_head=False), relation, pairs)
    return Suite(
        "tiny",
        "seconds: for testing the suite itself; its figures mean nothing",
        speed=cases,
        memory=(replace(tiny, rows=12), tiny, pairs),
        accuracy=(Ladder(ladder, (0.3, 0.03)), Ladder(replace(ladder, dtype="bf16"), (0.3, 0.03))),
        every_backend=cases,
        rounds=2,
        step=_stages(StepCase(_TOY, "dft", 8, 4, 2, 2))[:1],
    )


SUITES = {
    s.name: s
    for s in (_cpu_suite(), _gpu_suite(), _headline_suite(), _quick_suite(), _tiny_suite())
}
