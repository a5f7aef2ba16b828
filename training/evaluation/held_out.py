"""What did the model learn? Exact match by question kind, and perplexity of the answers, on held-
out data.

Exact match means: greedy decoding writes the answer, to its end token, word for word. One forward
pass over question and answer decides it, with no decoding: greedy decoding writes the answer if and
only if, after every prefix of it, the most likely token is the next one. (A test holds this against
`training.generate`.) In a conversation of several turns each answer is judged after the given
earlier ones.

Perplexity is exp of the mean negative log-likelihood over all answer tokens, end tokens included.
Logits are made for the answer rows only, a block at a time, so a head of 152k rows is no problem.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

import mllmkd_kernels as mk
from mllmkd_kernels import reference
from mllmkd_kernels.batch import in_eval, run_to_head
from training.bar import track
from training.data.collate import Collator
from training.data.dataset import SampleDataset
from training.data.item import IGNORE
from training.evaluation.intervals import numbered, share, wilson

ROW_BLOCK = 1024  # logits of this many answer rows at a time
NO_KIND = "all"
CAPTION = "caption"
QUESTIONS = ""  # all kinds but captions, among the intervals


@dataclass(frozen=True)
class Scores:
    """Held-out results; accuracies are shares of samples whose every answer is exact."""

    kinds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    perplexity: float = math.nan
    tokens: int = 0
    intervals: dict[str, list[float]] = field(default_factory=dict)

    @property
    def questions(self) -> float:
        """Accuracy over all samples that are questions, that is, not captions."""
        asked = {kind: n for kind, n in self.counts.items() if kind != CAPTION}
        return sum(self.kinds[k] * n for k, n in asked.items()) / max(sum(asked.values()), 1)

    def interval(self, kind: str | None = None) -> tuple[float, float]:
        """95% confidence interval of the accuracy of one kind, or of `questions`: what other
        images from where these come from would give (`evaluation.intervals`); Wilson's of as many
        samples where it is not known which of them share an image.
        """
        if known := self.intervals.get(QUESTIONS if kind is None else kind):
            return known[0], known[1]
        asked = [k for k in self.counts if (k != CAPTION if kind is None else k == kind)]
        n = sum(self.counts[k] for k in asked)
        right = sum(round(self.kinds[k] * self.counts[k]) for k in asked)
        return wilson(right, n)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in self.kinds.items())
        low, high = self.interval()
        return (
            f"exact match {self.questions:.3f} (95% {low:.3f} to {high:.3f}; {kinds}), "
            f"perplexity {self.perplexity:.3f}"
        )


def evaluate(
    model: Any,
    dataset: SampleDataset,
    collator: Collator,
    *,
    batch_size: int = 256,
    title: str = "held-out",
) -> Scores:
    """Score `model` on every sample of `dataset`, which must be encoded with the chat template."""
    hits: list[bool] = []
    nll, tokens = 0.0, 0
    for exact, row_nll in answers(model, dataset, collator, batch_size, title):
        hits += exact.tolist()
        nll += float(row_nll.double().sum())
        tokens += len(row_nll)
    kinds: dict[str, list[int]] = defaultdict(list)  # the places of its samples
    for i, sample in enumerate(dataset.samples):
        kinds[sample.kind or NO_KIND].append(i)
    right = {kind: sum(hits[i] for i in kinds[kind]) / len(kinds[kind]) for kind in sorted(kinds)}
    parts = kinds | {QUESTIONS: [i for kind in kinds if kind != CAPTION for i in kinds[kind]]}
    intervals = {kind: _interval(dataset, hits, part) for kind, part in parts.items() if part}
    mean = torch.tensor(nll / max(tokens, 1), dtype=torch.float64)
    perplexity = mean.exp().item()  # inf where math.exp overflows
    return Scores(right, {kind: len(kinds[kind]) for kind in right}, perplexity, tokens, intervals)


def _interval(dataset: SampleDataset, hits: Sequence[bool], part: Sequence[int]) -> list[float]:
    found = share(hits[i] for i in part).interval(numbered(dataset.samples[i].images for i in part))
    assert found is not None, "a share has an interval"
    return list(found)


@torch.no_grad()
def answers(
    model: Any,
    dataset: SampleDataset,
    collator: Collator,
    batch_size: int,
    title: str,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each batch of `dataset`, in order: exact (B,) bool, and NLL of its answer tokens (N,)."""
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)  # pyright: ignore[reportArgumentType]
    for batch in track(loader, title, "batches"):
        batch = send_to_device(batch, model.device)
        labels = batch["labels"][:, 1:]
        with in_eval(model):
            inputs = run_to_head(model, batch)
        rows = labels != IGNORE
        best, nll = _score(inputs, inputs.hidden[:, :-1][rows], labels[rows])
        correct = torch.ones_like(rows)
        correct[rows] = best == labels[rows]
        yield correct.all(dim=1), nll


def _score(
    head: mk.HeadInputs,
    hidden: torch.Tensor,  # (N, D)
    labels: torch.Tensor,  # (N,)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely token and negative log-likelihood of the label, for each answer row."""
    best, nll = [], []
    for h, y in zip(hidden.split(ROW_BLOCK), labels.split(ROW_BLOCK), strict=True):
        logits = reference.logits(h, head.weight, head.bias, head.softcap).float()
        best.append(logits.argmax(dim=-1))
        nll.append(F.cross_entropy(logits, y, reduction="none"))
    if not best:
        return labels, hidden.new_zeros(0)
    return torch.cat(best), torch.cat(nll)
