"""What is measured? Named shapes: pairs of real models, and the suites made of them.

A `Case` is one loss on one shape. Sizes are those of the published teacher-student pairs, because a
method's rank changes with them: Ds « Dt and V ≈ 152k is what LLaVA-KD trains, and no published
benchmark of a fused loss has it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

#: Which loss: CE + forward KL of the same rows (a distillation step), CE alone, forward KL alone,
#: or the relation loss of the logits of one image.
LOSSES = ("ce+kl", "ce", "kl", "relation")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Those that the promises are about.
PROMISED = ("fp32", "bf16")


@dataclass(frozen=True)
class Pair:
    """A published teacher and student: hidden sizes, rows of both heads, visual rows per image."""

    d_t: int
    d_s: int
    vocab_t: int
    vocab_s: int
    image_rows: int
    note: str


#: Vocabularies that differ are the point of some pairs: the tail of the larger head is padding.
PAIRS = {
    "qwen1.5-4b-0.5b": Pair(2560, 1024, 151936, 151936, 728, "LLaVA-KD-1B, the paper's main pair"),
    "qwen1.5-4b-1.8b": Pair(2560, 2048, 151936, 151936, 728, "LLaVA-KD-2B"),
    "qwen2.5-3b-0.5b": Pair(2048, 896, 151936, 151936, 728, "LLaVA-KD's released scripts"),
    "qwen2.5-7b-1.5b": Pair(3584, 1536, 152064, 151936, 728, "vocabularies differ"),
    "qwen2-7b-0.5b": Pair(3584, 896, 152064, 151936, 576, "LLaVA-MoD; vocabularies differ"),
    "llava1.5-13b-1.4b": Pair(5120, 2048, 32000, 32000, 576, "LLaVADI: a small vocabulary"),
    # Not a published pair: Qwen2.5-3B -> 0.5B with a vocabulary that leaves eager PyTorch room on a
    # laptop. The project's promises are stated for it, with 1,024 rows.
    "headline": Pair(2048, 896, 65536, 65536, 729, "Qwen2.5-3B → 0.5B, V cut to 65,536"),
}


@dataclass(frozen=True)
class Case:
    """One loss, forward and backward, on one shape.

    Attributes:
        pair: key of `PAIRS`, or any name for a shape of its own.
        rows: N. For "relation" the visual rows of one image.
        d_t, d_s, vocab_t, vocab_s: sizes of both heads; d_t and vocab_t are not read by "ce".
        dtype: key of `DTYPES`, of hidden states and heads alike.
        train_head: whether the student's head gets a gradient (DFT) or is frozen (DPT).
        loss: one of `LOSSES`.
        images: of `rows` rows each; more than one for "relation" only.
    """

    pair: str
    rows: int
    d_t: int
    d_s: int
    vocab_t: int
    vocab_s: int
    dtype: str = "fp32"
    train_head: bool = True
    loss: str = "ce+kl"
    images: int = 1

    @property
    def all_rows(self) -> int:
        """N, the rows of all images."""
        return self.rows * self.images

    @property
    def vocab(self) -> int:
        """V, the columns both models share."""
        return self.vocab_s if self.loss == "ce" else min(self.vocab_t, self.vocab_s)

    @property
    def floor_flops(self) -> int:
        """2·m·n·k of the matrix products that no exact method through logits avoids."""
        gradients = 1 + int(self.train_head)
        teacher = 0 if self.loss == "ce" else self.d_t
        flops = 2 * self.all_rows * self.vocab * (teacher + self.d_s * (1 + gradients))
        if self.loss == "relation":  # R_s, R_t and dR·Z_s, each N x N x V an image
            flops += 2 * self.images * self.rows**2 * self.vocab * 3
        return flops

    @property
    def input_bytes(self) -> int:
        """Hidden states and heads."""
        teacher = 0 if self.loss == "ce" else (self.all_rows + self.vocab_t) * self.d_t
        return (teacher + (self.all_rows + self.vocab_s) * self.d_s) * DTYPES[self.dtype].itemsize

    @property
    def gradient_bytes(self) -> int:
        """dh, and dw where the head is trained."""
        rows = self.all_rows + (self.vocab_s if self.train_head else 0)
        return rows * self.d_s * DTYPES[self.dtype].itemsize

    @property
    def title(self) -> str:
        """One line that names the case completely."""
        head = "head trained" if self.train_head else "head frozen"
        teacher = "" if self.loss == "ce" else f" Dt {self.d_t:,}"
        images = f"{self.images} x " if self.images > 1 else ""
        return (
            f"{self.loss}, {self.dtype}, {head}: {self.pair}, "
            f"N {images}{self.rows:,} V {self.vocab:,} Ds {self.d_s:,}{teacher}"
        )


def case(pair: str, rows: int, dtype: str, train_head: bool = True, loss: str = "ce+kl") -> Case:
    """The case of a named pair."""
    p = PAIRS[pair]
    return Case(pair, rows, p.d_t, p.d_s, p.vocab_t, p.vocab_s, dtype, train_head, loss)


def with_vocab(case: Case, vocab: int) -> Case:
    """The case with another vocabulary, the same in both models."""
    return replace(case, vocab_t=vocab, vocab_s=vocab)


def _vocabularies(case: Case, *vocabs: int) -> tuple[Case, ...]:
    return tuple(with_vocab(case, vocab) for vocab in vocabs)


@dataclass(frozen=True)
class Ladder:
    """Accuracy near convergence: the teacher is the student plus noise ε, ε falling."""

    case: Case
    epsilons: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003)


@dataclass(frozen=True)
class Sizes:
    """A transformer: hidden size, layers, attention heads."""

    hidden: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Vlm:
    """A teacher and a student multimodal model that share a vision tower and a vocabulary."""

    name: str
    teacher: Sizes
    student: Sizes
    tower: Sizes
    vocab: int
    image: int  # pixels on a side
    patch: int
    dtype: str

    @property
    def image_rows(self) -> int:
        """Visual rows of an image."""
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class StepCase:
    """A whole training step.

    Attributes:
        models: teacher and student.
        stage: "dpt" (the projector trains) or "dft" (projector, language model and head).
        text, answer: tokens of text a sample, and how many of them, the last, have a label.
        batch: samples of the step that is timed.
        budget_mib: what a step may need beyond weights and optimiser state, where the largest batch
            is looked for.
    """

    models: Vlm
    stage: str
    text: int
    answer: int
    batch: int
    budget_mib: int

    @property
    def tokens(self) -> int:
        """Of a sample, visual rows included."""
        return self.models.image_rows + self.text

    @property
    def title(self) -> str:
        """One line that names the case."""
        m = self.models
        return (
            f"{self.stage.upper()} step, {m.dtype}: {m.name}, V {m.vocab:,}, "
            f"{self.tokens} tokens a sample ({m.image_rows} visual)"
        )


def step_case(found: dict[str, Any]) -> StepCase:
    """The case of a record's row."""
    models = dict(found["models"])
    for who in ("teacher", "student", "tower"):
        models[who] = Sizes(**models[who])
    return StepCase(**{**found, "models": Vlm(**models)})


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


def headline(dtype: str) -> Case:
    """The shape that the project's promises are about."""
    return case("headline", 1024, dtype)


def fallback(dtype: str) -> Case:
    """The shape that the promises of the backend without a compiler are about: the fewest rows."""
    return with_vocab(case("headline", 128, dtype), 16384)


def gpu_headline(train_head: bool) -> Case:
    """The shape that the targets on a GPU are about."""
    return case("qwen1.5-4b-0.5b", 8192, "bf16", train_head)


def gpu_relation() -> Case:
    """The relation loss of the targets on a GPU: 8 images, both heads frozen."""
    one = case("qwen1.5-4b-0.5b", 729, "bf16", train_head=False, loss="relation")
    return replace(one, images=8)


# Small on purpose (rows and hidden size do not change a relative error, the vocabulary does), and
# the sizes of the published comparison of rounding schemes, so that its figures can be compared.
_LADDER = Case("ladder", 64, 256, 256, 32000, 32000, loss="kl")


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


def _stages(
    models: Vlm, text: int, answer: int, batch: int, budget_mib: int
) -> tuple[StepCase, ...]:
    """Both stages: captions, all of it answer, and conversations."""
    return (
        StepCase(models, "dpt", text // 2, text // 2, batch, budget_mib),
        StepCase(models, "dft", text, answer, batch, budget_mib),
    )


def _cpu_suite() -> Suite:
    big = tuple(headline(dtype) for dtype in PROMISED)
    # A quarter of the headline's rows where the ratio is wanted, not the seconds.
    frozen = (case("headline", 256, "bf16", train_head=False),)
    real = (
        case("qwen2.5-3b-0.5b", 128, "bf16"),
        case("qwen2-7b-0.5b", 128, "bf16", train_head=False),
    )
    # A quarter of the vocabulary: for all of it torch's chunked cross-entropy needs 16 s a round.
    cross_entropy = (with_vocab(case("headline", 256, "bf16", loss="ce"), 16384),)
    fallbacks = tuple(fallback(dtype) for dtype in PROMISED)
    relation = tuple(
        case("headline", 729, "bf16", trained, "relation") for trained in (False, True)
    )
    fewer = replace(relation[0], rows=256)
    few = case("headline", 256, "bf16")
    sweep = (
        *(replace(few, rows=rows) for rows in (128, 256, 512)),
        *_vocabularies(few, 16384, 2**17),
    )
    return Suite(
        "cpu",
        "two CPU cores, minutes",
        speed=(
            *big,
            *frozen,
            *real,
            *cross_entropy,
            *fallbacks,
            *relation,
            replace(fewer, images=3),
        ),
        memory=big + fallbacks + sweep + frozen + relation,
        accuracy=tuple(Ladder(replace(_LADDER, dtype=dtype)) for dtype in PROMISED),
        every_backend=(*cross_entropy, *fallbacks, few),
        step=_stages(_SMALL, 64, 40, 4, 192),
    )


def _gpu_suite() -> Suite:
    trained, frozen = gpu_headline(True), gpu_headline(False)
    middle = replace(trained, rows=4096)
    sweep = (replace(trained, rows=1024), middle, *_vocabularies(middle, 32000, 65536))
    other = (
        case("qwen2.5-7b-1.5b", 4096, "bf16"),
        case("llava1.5-13b-1.4b", 4096, "bf16"),
        replace(trained, loss="ce"),
        replace(trained, loss="kl"),
        *(replace(trained, rows=1024, dtype=dtype) for dtype in ("fp32", "fp16")),
    )
    relation = gpu_relation()
    relations = (
        relation,
        replace(relation, train_head=True),
        *(replace(relation, rows=rows) for rows in (256, 1024)),
        *(replace(relation, images=images) for images in (1, 16)),
    )
    wide = replace(_LADDER, vocab_t=151936, vocab_s=151936, d_t=1024, d_s=1024, dtype="bf16")
    return Suite(
        "gpu",
        "one large GPU, minutes",
        speed=(trained, frozen, *sweep, *other, *relations),
        memory=(*sweep, trained, frozen, *relations[:1], *relations[2:]),
        accuracy=(*(Ladder(replace(_LADDER, dtype=dtype)) for dtype in PROMISED), Ladder(wide)),
        every_backend=(trained, frozen),
        rounds=10,
        device="cuda",
        step=_stages(_REAL, 256, 128, 4, 16384),
    )


def _quick_suite() -> Suite:
    small = Case("quick", 128, 512, 256, 16384, 16384)
    cases = tuple(replace(small, dtype=dtype) for dtype in PROMISED)
    # Few rows: most processors have no fp16 arithmetic, and emulate it.
    cases += (replace(small, dtype="fp16", rows=16),)
    relation = (replace(small, dtype="bf16", loss="relation"),)
    ladder = replace(_LADDER, vocab_t=8000, vocab_s=8000, dtype="bf16")
    return Suite(
        "quick",
        "about a minute: that everything runs; too small for the promises",
        speed=cases + relation,
        memory=(cases[1], replace(cases[1], rows=512), with_vocab(cases[1], 65536)),
        accuracy=(Ladder(ladder, (0.3, 0.03)),),
        every_backend=cases + relation,
        step=_stages(_SMALL, 64, 40, 1, 256)[:1],
    )


def _tiny_suite() -> Suite:
    tiny = Case("tiny", 24, 24, 16, 640, 608)
    relation = replace(tiny, loss="relation", dtype="bf16")
    ladder = replace(tiny, loss="kl", d_t=16, vocab_t=608)
    cases = (tiny, replace(tiny, dtype="bf16", train_head=False), relation)
    return Suite(
        "tiny",
        "seconds: for testing the suite itself; its figures mean nothing",
        speed=cases,
        memory=(replace(tiny, rows=12), tiny),
        accuracy=(Ladder(ladder, (0.3, 0.03)), Ladder(replace(ladder, dtype="bf16"), (0.3, 0.03))),
        every_backend=cases,
        rounds=2,
        step=_stages(_TOY, 8, 4, 2, 2)[:1],
    )


SUITES = {
    suite.name: suite for suite in (_cpu_suite(), _gpu_suite(), _quick_suite(), _tiny_suite())
}
