"""What does the demo know of a model that it trained?"""

from __future__ import annotations

from dataclasses import dataclass

from mllmkd_kernels.llava_kd import TERMS
from training.evaluation.held_out import Scores
from training.loop import StageResult


@dataclass(frozen=True)
class Run:
    """One trained model: which, from which seed, and its stages."""

    name: str
    seed: int
    stages: list[StageResult]

    @property
    def scores(self) -> Scores:
        """Held-out scores after the last stage."""
        scores = self.stages[-1].scores
        if scores is None:
            raise ValueError(
                f"{self.name}, seed {self.seed}: no held-out scores; set data.held_out"
            )
        return scores

    def row(self) -> dict[str, float]:
        """The run's numbers, in the order of the table's columns."""
        last = self.stages[-1]
        row = {"questions": self.scores.questions}
        row["low"], row["high"] = self.scores.interval()
        row |= self.scores.kinds
        row["perplexity"] = self.scores.perplexity
        row |= {term: last.history[-1].get(term, 0.0) for term in TERMS}
        row["steps"] = sum(stage.summary["steps"] for stage in self.stages)
        row["seconds"] = sum(stage.summary["seconds"] for stage in self.stages)
        row["tokens_per_second"] = last.summary["tokens_per_second"]
        row["peak_gib"] = max(stage.summary["peak_gib"] for stage in self.stages)
        return row
