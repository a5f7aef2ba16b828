"""Which benchmarks can be asked, and how? Reader, prompt and scorer of each, in one table.

The words after a question are LLaVA-1.5's, which the models of this family are compared with; they
can be changed for a model that was trained with others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from training.evaluation import questions as q
from training.evaluation import scores
from training.evaluation.captions import caption_scores
from training.evaluation.chair import chair
from training.evaluation.intervals import Figures

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
DESCRIBE = "Please describe this image in detail."
CAPTION = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read, asked and scored."""

    read: q.Reader
    score: Callable[..., Figures]  # a `scores.Scorer`; captions and chair take options
    instruction: str  # the last line of the prompt
    max_new_tokens: int
    help: str  # what --questions is


BENCHMARKS = {
    "vqav2": Benchmark(
        q.read_vqav2, scores.people_agree, SHORT, 16, "VQAv2: questions json, --annotations json"
    ),
    "textvqa": Benchmark(
        q.read_textvqa, scores.people_agree, SHORT, 16, "TextVQA: TextVQA_0.5.1_val.json"
    ),
    "gqa": Benchmark(
        q.read_gqa, scores.short_match, SHORT, 16, "GQA: testdev_balanced_questions.json"
    ),
    "pope": Benchmark(q.read_pope, scores.yes_no, SHORT, 16, "POPE: coco_pope_*.json"),
    "scienceqa": Benchmark(
        q.read_scienceqa, scores.letter_choice, LETTER, 16, "ScienceQA-IMG: problems.json"
    ),
    "coco": Benchmark(
        q.read_coco, caption_scores, CAPTION, 64, "COCO, NoCaps: captions json with annotations"
    ),
    "karpathy": Benchmark(
        q.read_karpathy, caption_scores, CAPTION, 64, "COCO by Karpathy: dataset_coco.json"
    ),
    "chair": Benchmark(
        q.read_chair,
        chair,
        DESCRIBE,
        512,
        "CHAIR: COCO's instances json; --annotations its captions json, --synonyms",
    ),
    "llava": Benchmark(q.read_llava, scores.exact_match, "", 64, "LLaVA json: exact match"),
}


def ask(benchmark: Benchmark, question: q.Question, instruction: str | None = None) -> str:
    """The words of the prompt: the question, then the instruction on a line of its own."""
    last = benchmark.instruction if instruction is None else instruction
    return "\n".join(part for part in (question.text, last) if part)
