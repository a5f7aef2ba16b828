"""Which tokens does this rank hold, when a head is cut by rows over the ranks of a process group?

Rank r holds a run of rows of the student's head and the same run of the teacher's, in the order of
the ranks. The shared vocabulary V is that of the *whole* heads; what a head has beyond it (padding)
belongs to no distribution and may lie on any rank.

    rank                0            1            2
    student's head  |------------|------------|---------|
    teacher's head  |------------|------------|---------|....|  longer by padding
                    0                                   V
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from mllmkd_kernels import checks


@dataclass(frozen=True)
class VocabSlice:
    """The run of the shared vocabulary that this rank holds.

    Attributes:
        start, stop: tokens [start, stop) lie here; none where they are equal.
        vocab: tokens of the shared vocabulary, over all ranks.
        widest: tokens on the rank that holds the most; all ranks take as many rows at a time as
            fit the workspace there.
    """

    start: int
    stop: int
    vocab: int
    widest: int


def vocab_rows(tokens: int, vocab: int, group: dist.ProcessGroup | None = None) -> slice:
    """The rows of a whole head that this rank keeps when `vocab` is cut evenly.

    Args:
        tokens: rows of the head. What it has beyond `vocab` goes to the last rank.
        vocab: the shared vocabulary, the same for both heads: then their slices line up.
        group: the process group; None is the default one.

    Raises:
        ValueError: `vocab` is not between 1 and `tokens`.
    """
    if not 1 <= vocab <= tokens:
        raise ValueError(f"vocab: got {vocab}, expected 1 to {tokens}, the rows of the head")
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    start, stop = vocab * rank // ranks, vocab * (rank + 1) // ranks
    return slice(start, tokens if rank == ranks - 1 else stop)


def vocab_slice(
    student_weight: Tensor,  # (V_s of this rank, D_s)
    teacher_weight: Tensor | None = None,  # (V_t of this rank, D_t)
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> VocabSlice:
    """Ask every rank what it holds. Call it once and pass the answer to each loss: the ranks
    exchange two numbers, which waits for the device.

    Args:
        student_weight, teacher_weight: this rank's rows of the heads, which may be none. The ranks'
            slices in order are the whole heads.
        vocab_size: the shared vocabulary; default the smaller whole head.
        group: the process group; None is the default one.

    Raises:
        ValueError: on every rank alike, where the two heads are cut at different tokens, or
            `vocab_size` exceeds a whole head.
    """
    heads = [w for w in (student_weight, teacher_weight) if w is not None]
    sizes = _gathered([w.shape[0] for w in heads], student_weight.device, group)
    ends = [[0, *accumulate(column)] for column in zip(*sizes, strict=True)]
    vocab = checks.vocabulary(vocab_size, *(e[-1] for e in ends))
    cuts = [[min(end, vocab) for end in e] for e in ends]
    runs = [list(pairwise(c)) for c in cuts]
    for rank, (ours, theirs) in enumerate(zip(runs[0], runs[-1], strict=True)):
        if ours != theirs and (ours[0] < ours[1] or theirs[0] < theirs[1]):
            raise ValueError(
                f"teacher_weight: rank {rank} holds tokens {list(theirs)} of the teacher's head "
                f"and {list(ours)} of the student's, of a shared vocabulary of {vocab}; expected "
                "the same: cut both heads with `vocab_rows`"
            )
    start, stop = runs[0][dist.get_rank(group)]
    return VocabSlice(start, stop, vocab, max(stop - start for start, stop in runs[0]))


def _gathered(
    numbers: list[int], device: torch.device, group: dist.ProcessGroup | None
) -> list[list[int]]:
    """The numbers of every rank."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, mine, group=group)
    return torch.stack(each).tolist()
