"""How do the losses reach a GPU? The functions of a backend, as Triton kernels around a vendor's
GEMM (*chunk*) or around tensor-core products of their own (*stream*).

Importing this package imports Triton. `available` and `why_not` belong to `plan`, which must not.
On a machine without a GPU the kernels run in Triton's interpreter, on CPU tensors, where
``TRITON_INTERPRET=1`` was set before Triton was imported: for tests, not for work.

    divergence.py  the table of divergences, the twin of `mllmkd_kernels.divergence`
    tiles.py       helpers that kernels share
    diagnostics.py entropies and agreement, from the sweeps that there are
    rows.py        chunk: a block of logits → row terms and gradient block
    chunk.py       chunk: GEMM, rows, GEMM
    lanes.py       chunk: rows beside GEMMs, on two streams
    heads.py       stream: a tile of logits, multiplied in registers
    stream.py      stream: kernels that multiply tiles of both heads and keep statistics
    splits.py      stream: programs and parts of tiles
    sweeps.py      stream: sweeps over the vocabulary and the functions of the backend
    relation.py    tiles of R_s and R_t
    clustered.py   the same functions, with the CUDA row kernel
    tables.py      launch parameters per architecture
"""

from mllmkd_kernels.backends.triton.chunk import distill_rows
from mllmkd_kernels.backends.triton.relation import relation_grad, relation_stats
from mllmkd_kernels.backends.triton.sweeps import distill_stream, logprob_grad, logprob_rows

__all__ = [
    "distill_rows",
    "distill_stream",
    "logprob_grad",
    "logprob_rows",
    "relation_grad",
    "relation_stats",
]
