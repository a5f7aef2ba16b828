"""Does the student prefer the better answer by more than the teacher does?
(LLaVA-MoD's preference distillation, arXiv 2408.15881)

    L = mean over pairs of  l(r_c, r_r),  r = log p(answer) − log p_teacher(answer)

of the chosen and the rejected answer to one prompt, l as `preference_loss` has it. The likelihood
of an answer is a sum over its tokens, over the whole vocabulary of each model. Every pair of an
optimiser step counts alike, whatever its length and in whichever micro-batch it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllmkd_kernels.heads import HeadInputs, take_rows
from mllmkd_kernels.logprob import fused_linear_logprob
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.preference import check_kind, preference_loss
from mllmkd_kernels.rows import PAIR, entry
from mllmkd_kernels.view import View

ROWS = tuple(f"response:{kind}" for kind in PAIR)
REPORTED = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


class Preference:
    """See above; over a batch of the chosen answers and then the rejected ones in the same order,
    which one forward of each model reads.

    The K of "kto_pair" is a mean over this micro-batch, on this rank: with a single pair in it, it
    is the pair's own other half, so that the loss compares the two answers as the others do.

    Args:
        name, weight: as of every `Term`.
        kind, beta, detach_baseline: as in `preference_loss`.

    Raises:
        ValueError, TypeError: no such kind, a β that is not above 0.
    """

    over = "pairs"
    needs = Needs(rows=frozenset(ROWS), views=frozenset({"kind", "rejected"}))

    def __init__(
        self,
        name: str,
        weight: float,
        kind: str = "kto_pair",
        beta: float = 0.1,
        detach_baseline: bool = True,
    ) -> None:
        self.name, self.weight, self.kind = name, weight, kind
        self.beta, self.detach_baseline = check_kind(kind, beta), detach_baseline
        self._rewards: tuple[Tensor, ...] = ()  # of both answers, as the last call found them

    def __call__(self, view: View) -> Tensor:
        """This micro-batch's share of the mean.

        Raises:
            ValueError: the batch is not one of pairs.
        """
        _check_order(view)
        ours = self._log_probabilities(view, view.student, "student")
        assert view.teacher is not None
        with torch.no_grad():
            theirs = self._log_probabilities(view, view.teacher, "teacher")
        self._rewards = tuple(
            self.beta * (a.detach() - b) for a, b in zip(ours, theirs, strict=True)
        )
        value = preference_loss(
            *ours, *theirs,
            kind=self.kind, beta=self.beta, detach_baseline=self.detach_baseline,
        )  # fmt: skip
        return value * view.share(self.over)

    def report_on(self, student: object) -> list[str]:
        """Names of what `report` gives."""
        return list(REPORTED)

    def report(self, view: View) -> dict[str, Tensor]:
        """This micro-batch's part in the means of β r of both answers, of their difference, and in
        the share of pairs whose chosen answer has the larger one.
        """
        better, worse = self._rewards
        found = (better, worse, better - worse, (better > worse).to(better.dtype))
        pairs = view.count(self.over)
        return {name: x.sum() / pairs for name, x in zip(REPORTED, found, strict=True)}

    @staticmethod
    def _log_probabilities(view: View, head: HeadInputs, who: str) -> tuple[Tensor, Tensor]:
        """Of the chosen and the rejected answers, (pairs,) each."""
        found = [view.rows(name) for name in ROWS]
        at = torch.cat([getattr(rows, who) for rows in found])
        logp = fused_linear_logprob(
            take_rows(head.hidden, at), head.weight, torch.cat([rows.labels for rows in found]),
            ignore_index=view.settings.ignore_index, bias=head.bias, softcap=head.softcap,
            vocab_size=view.settings.vocab_size, backend=view.settings.backend,
            workspace_mb=view.settings.workspace_mb,
        )  # fmt: skip
        samples, length = view.batch["labels"].shape
        sample = torch.cat([rows.student for rows in found]) // length
        chosen, rejected = logp.new_zeros(samples).index_add(0, sample, logp).chunk(2)
        return chosen, rejected


def _check_order(view: View) -> None:
    """The chosen answers, then as many rejected ones."""
    kinds = list(entry(view.batch, "kind"))
    if kinds != [kind for kind in PAIR for _ in range(len(kinds) // 2)]:
        raise ValueError(
            f"kind: got {kinds}, expected of a batch of pairs {PAIR[0]!r} for each pair and then "
            f"{PAIR[1]!r} for each, in the same order"
        )
