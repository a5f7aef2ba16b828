"""Has a teacher anything to give? How often it is right, against giving always the same answer.

Counted by `kind` of question on a random part of the held-out data, or of the conversations where
none is held out. The rival knows the most frequent answer of each kind in all of that data. Where
answers mostly occur once, as captions and descriptions do, exact match says nothing of a model, and
nothing is concluded.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from training.config import Config
from training.data.collate import Collator
from training.data.load import has_data, open_data
from training.data.sample import Sample
from training.evaluation.held_out import NO_KIND, Scores, evaluate
from training.settings import ConfigError


def against_chance(config: Config, teacher: Any, processor: Any, samples: int) -> Iterator[str]:
    """One line for each kind of question, `ok` or `note`, and the teacher's perplexity.

    Args:
        config: whose held-out data, or else conversations.
        teacher, processor: a model and what encodes for it.
        samples: how many it is asked at most.

    Raises:
        ConfigError: there is no such data, or it is streamed.
        DataError: a faulty entry.
    """
    use = "held_out" if has_data(config.data, "held_out") else "conversations"
    data: Any = open_data(config.data, processor, use, "chat", seed=config.seed)
    if not hasattr(data, "samples"):
        raise ConfigError("data.held_out: got null and streamed conversations, expected a file")
    total = len(data)
    places = sorted(random.Random(config.seed).sample(range(total), min(samples, total)))
    teacher.to(torch.accelerator.current_accelerator() or "cpu")
    size, title = min(config.eval_batch_size, len(places)), "asking the teacher"
    part = data.some(places)
    scores = evaluate(teacher, part, Collator(processor), batch_size=size, title=title)
    yield f"the teacher on {len(places):,} of {total:,} samples ({use}): {scores}"
    yield from verdicts(scores, data.samples)


def verdicts(scores: Scores, samples: list[Sample]) -> Iterator[str]:
    """What a teacher's `scores` say of it, kind by kind, where the data are these `samples`."""
    answers: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for sample in samples:
        answers[sample.kind or NO_KIND][tuple(answer for _, answer in sample.turns)] += 1
    for kind, right in scores.kinds.items():
        known = answers[kind]
        (best, times), n = known.most_common(1)[0], known.total()
        low, high = scores.interval(kind)
        if 2 * sum(count == 1 for count in known.values()) > n:
            yield f"note   {kind}: most answers occur once, exact match says nothing of the teacher"
            continue
        said = f"{right:.3f} (95% {low:.3f} to {high:.3f} of {scores.counts[kind]:,}) are right"
        rival = f"the answer {' / '.join(best)!r} to all would be in {times / n:.3f}"
        if low > times / n:
            yield f"ok     {kind}: {said}; {rival}"
        else:
            chance = "no more than chance"
            yield f"note   {kind}: {said}, {chance}: {rival}; it has little to give there"
