"""The backend "cuda": Triton's functions, with the CUDA row kernel between the products of *chunk*.

It reads each row of logits once, where Triton's reads it two or three times: 10 bytes a token of
the vocabulary instead of 18 for forward KL. Until it has been timed it is taken only by name.
"""

from mllmkd_kernels.backends.triton.chunk import distill_rows_cuda as distill_rows
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
