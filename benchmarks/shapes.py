"""What is measured? Named shapes: pairs of real models, and the suites made of them.

A `Case` is one loss on one shape. Sizes are those of the published teacher-student pairs, because a
method's rank changes with them: Ds « Dt and V ≈ 152k is what LLaVA-KD trains, and no published
benchmark of a fused loss has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

#: Preference losses of pairs of answers, by the names of `mk.preference_loss`.
PREFERENCES = {"dpo": "sigmoid", "kto": "kto_pair"}
#: Which loss: CE + forward KL or JSD of the same rows (a distillation step), CE alone, forward KL
#: alone, the relation loss of the logits of one image, or a preference loss with the teacher as
#: reference.
LOSSES = ("ce+kl", "ce+jsd", "ce", "kl", "relation", *PREFERENCES)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Those that the promises are about.
PROMISED = ("fp32", "bf16")


#: Published teachers and students: Dt, Ds, and rows of both heads, Vt, Vs. Vocabularies that differ
#: are the point of some: the tail of the larger head is padding.
PAIRS = {
    "qwen1.5-4b-0.5b": (2560, 1024, 151936, 151936),  # LLaVA-KD-1B, the paper's main pair
    "qwen1.5-4b-1.8b": (2560, 2048, 151936, 151936),  # LLaVA-KD-2B
    "qwen2.5-3b-0.5b": (2048, 896, 151936, 151936),  # LLaVA-KD's released scripts
    "qwen2.5-7b-1.5b": (3584, 1536, 152064, 151936),
    "qwen2-7b-0.5b": (3584, 896, 152064, 151936),  # LLaVA-MoD
    "llava1.5-13b-1.4b": (5120, 2048, 32000, 32000),  # LLaVADI: a small vocabulary
    # Not a published pair: Qwen2.5-3B -> 0.5B with a vocabulary that leaves eager PyTorch room on a
    # laptop. The project's promises are stated for it, with 1,024 rows.
    "headline": (2048, 896, 65536, 65536),
}


@dataclass(frozen=True)
class Case:
    """One loss, forward and backward, on one shape.

    Attributes:
        pair: key of `PAIRS`, or any name for a shape of its own.
        rows: N. For "relation" the visual rows of one image, for a preference loss the tokens of
            one answer.
        d_t, d_s, vocab_t, vocab_s: sizes of both heads; d_t and vocab_t are not read by "ce".
        dtype: key of `DTYPES`, of hidden states and heads alike.
        train_head: whether the student's head gets a gradient (DFT) or is frozen (DPT).
        loss: one of `LOSSES`.
        images: of `rows` rows each, or answers, the first half chosen; else 1.
        threads: of the processor; 0 for all that PyTorch takes.
        halvings: how often it was made smaller, because there was no time for all of it.
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
    threads: int = 0
    halvings: int = 0

    def halved(self, times: int) -> Case:
        """The same with rows and vocabularies halved in turn, rows first."""
        rows, vocab = (times + 1) // 2, times // 2
        return replace(
            self, rows=max(1, self.rows >> rows), vocab_t=self.vocab_t >> vocab,
            vocab_s=self.vocab_s >> vocab, halvings=times,
        )  # fmt: skip

    def made_of(self, asked: Case) -> bool:
        """Whether it is what there was time for of another."""
        return self == asked.halved(self.halvings)

    @property
    def all_rows(self) -> int:
        """N, the rows of all images or answers."""
        return self.rows * self.images

    @property
    def vocab(self) -> int:
        """V, the columns both models share."""
        return self.vocab_s if self.loss == "ce" else min(self.vocab_t, self.vocab_s)

    @property
    def divergence(self) -> str:
        """Of a distillation step, by the names of `mk.Divergence`."""
        return "jsd" if self.loss == "ce+jsd" else "forward_kl"

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
    def elements(self) -> int:
        """Of hidden states and heads."""
        teacher = 0 if self.loss == "ce" else (self.all_rows + self.vocab_t) * self.d_t
        return teacher + (self.all_rows + self.vocab_s) * self.d_s

    @property
    def input_bytes(self) -> int:
        """Hidden states and heads."""
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def gradient_bytes(self) -> int:
        """dh, and dw where the head is trained."""
        rows = self.all_rows + (self.vocab_s if self.train_head else 0)
        return rows * self.d_s * DTYPES[self.dtype].itemsize

    @property
    def size(self) -> str:
        """Rows and vocabulary."""
        images = f"{self.images} x " if self.images > 1 else ""
        return f"N {images}{self.rows:,} V {self.vocab:,}"

    @property
    def title(self) -> str:
        """One line that names the case completely."""
        head = "head trained" if self.train_head else "head frozen"
        teacher = "" if self.loss == "ce" else f" Dt {self.d_t:,}"
        threads = f", threads: {self.threads}" if self.threads else ""
        halved = f", halved {self.halvings} times" if self.halvings else ""
        return (
            f"{self.loss}, {self.dtype}, {head}: {self.pair}, "
            f"{self.size} Ds {self.d_s:,}{teacher}{threads}{halved}"
        )


def case(pair: str, rows: int, dtype: str, train_head: bool = True, loss: str = "ce+kl") -> Case:
    """The case of a named pair."""
    return Case(pair, rows, *PAIRS[pair], dtype, train_head, loss)


def with_vocab(case: Case, *vocabs: int) -> tuple[Case, ...]:
    """The case with other vocabularies, the same in both models."""
    return tuple(replace(case, vocab_t=vocab, vocab_s=vocab) for vocab in vocabs)


@dataclass(frozen=True)
class Ladder:
    """Accuracy near convergence: the teacher is the student plus noise ε, ε falling."""

    case: Case
    epsilons: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003)

    def halved(self, times: int) -> Ladder:
        """With its rows halved: errors are those of the vocabulary, whatever the rows."""
        rows = max(1, self.case.rows >> times)
        return replace(self, case=replace(self.case, rows=rows, halvings=times))


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


def headline(dtype: str) -> Case:
    """The shape that the project's promises are about."""
    return case("headline", 1024, dtype)


def fallback(dtype: str) -> Case:
    """The shape that the promises of the backend without a compiler are about: the fewest rows."""
    return with_vocab(case("headline", 128, dtype), 16384)[0]


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
    few = case("headline", 256, "bf16")
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
        memory=(*big, *relation, *answers, *fallbacks, *sweep),
        accuracy=_LADDERS,
        every_backend=(*cross_entropy, *fallbacks),
        step=step,
        weights=dict(zip(big, (20.0, 10.0), strict=True))
        | dict.fromkeys(step, 8.0)
        | dict.fromkeys((*_LADDERS, *relation, images, *answers), 4.0)
        | dict.fromkeys((*fallbacks, *sweep, *threads), 4.0),
    )


def gpu_headline() -> tuple[Case, Case, Case, Case]:
    """What the targets on a GPU are about: head trained, head frozen, head trained with JSD, the
    relation of 8 images.
    """
    trained = case("qwen1.5-4b-0.5b", 8192, "bf16")
    frozen = replace(trained, train_head=False)
    relation = replace(frozen, rows=729, loss="relation", images=8)
    return trained, frozen, replace(trained, loss="ce+jsd"), relation


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
        device="cuda",
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
        device="cuda",
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
