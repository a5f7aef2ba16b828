"""What can be measured? Named shapes: pairs of real models, ladders, whole training steps.

A `Case` is one loss on one shape. Sizes are those of the published teacher-student pairs, because a
method's rank changes with them: Ds « Dt and V ≈ 152k is what LLaVA-KD trains, and no published
benchmark of a fused loss has it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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


def headline(dtype: str) -> Case:
    """The shape that the project's promises are about."""
    return case("headline", 1024, dtype)


def fallback(dtype: str) -> Case:
    """The shape that the promises of the backend without a compiler are about: the fewest rows."""
    return with_vocab(case("headline", 128, dtype), 16384)[0]


def gpu_headline() -> tuple[Case, Case, Case, Case]:
    """What the targets on a GPU are about: head trained, head frozen, head trained with JSD, the
    relation of 8 images.
    """
    trained = case("qwen1.5-4b-0.5b", 8192, "bf16")
    frozen = replace(trained, train_head=False)
    relation = replace(frozen, rows=729, loss="relation", images=8)
    return trained, frozen, replace(trained, loss="ce+jsd"), relation
