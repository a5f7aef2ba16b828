"""Distillation losses for multimodal LLMs from hidden states and ``lm_head`` weights: logits exist
a block of rows at a time, in a workspace whose size you choose.

Read the names below downwards and you follow the data: a model is run up to its head, rows are
chosen, losses are computed and their gradients leave. `mllmkd_kernels.reference` holds the
definitions.
"""

from mllmkd_kernels import methods
from mllmkd_kernels.affinity import affinity_loss
from mllmkd_kernels.backends.cpu import release_workspace
from mllmkd_kernels.balance import balance_loss
from mllmkd_kernels.batch import count_rows, counts_of, distill_batch, forward_through
from mllmkd_kernels.distill import DistillOutput, fused_linear_distill
from mllmkd_kernels.divergence import Divergence
from mllmkd_kernels.drawn import BatchView, Moment
from mllmkd_kernels.explain import explain
from mllmkd_kernels.heads import HeadInputs
from mllmkd_kernels.hf_trainer import DistillMixin, sum_counts
from mllmkd_kernels.llava_kd import LlavaKDLoss, LlavaKDOutput
from mllmkd_kernels.logits import fused_linear_logit_mse, logit_std
from mllmkd_kernels.logprob import fused_linear_logprob
from mllmkd_kernels.models import head_inputs
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.objective import Losses, Objective, Term
from mllmkd_kernels.own_answers import on_policy
from mllmkd_kernels.plan import Plan
from mllmkd_kernels.preference import preference_loss
from mllmkd_kernels.relation import fused_linear_relation, head_gram, relation_cosine
from mllmkd_kernels.rows import RowCounts, image_seqlens, response_rows, visual_rows
from mllmkd_kernels.sweep import RowTerm
from mllmkd_kernels.upcycle import upcycle
from mllmkd_kernels.view import View
from mllmkd_kernels.vocab_parallel import (
    vocab_parallel_distill,
    vocab_parallel_gram,
    vocab_parallel_relation,
)
from mllmkd_kernels.vocab_slices import VocabSlice, vocab_rows, vocab_slice

__version__ = "0.1.0"

__all__ = [
    "BatchView",
    "DistillMixin",
    "DistillOutput",
    "Divergence",
    "HeadInputs",
    "LlavaKDLoss",
    "LlavaKDOutput",
    "Losses",
    "Moment",
    "Needs",
    "Objective",
    "Plan",
    "RowCounts",
    "RowTerm",
    "Term",
    "View",
    "VocabSlice",
    "affinity_loss",
    "balance_loss",
    "count_rows",
    "counts_of",
    "distill_batch",
    "explain",
    "forward_through",
    "fused_linear_distill",
    "fused_linear_logit_mse",
    "fused_linear_logprob",
    "fused_linear_relation",
    "head_gram",
    "head_inputs",
    "image_seqlens",
    "logit_std",
    "methods",
    "on_policy",
    "preference_loss",
    "relation_cosine",
    "release_workspace",
    "response_rows",
    "sum_counts",
    "upcycle",
    "visual_rows",
    "vocab_parallel_distill",
    "vocab_parallel_gram",
    "vocab_parallel_relation",
    "vocab_rows",
    "vocab_slice",
]
