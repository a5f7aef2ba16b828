"""The four terms of LLaVA-KD in one call, for a loop or a trainer of one's own.

What is computed stands in `methods.llava_kd`, how in `objective`; this is their plain signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from mllmkd_kernels import checks
from mllmkd_kernels.distill import fused_linear_distill
from mllmkd_kernels.divergence import Divergence
from mllmkd_kernels.head_functions import HeadFunctions
from mllmkd_kernels.heads import HeadInputs
from mllmkd_kernels.methods import llava_kd
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.objective import DIAGNOSTICS, Objective
from mllmkd_kernels.relation import fused_linear_relation, head_gram
from mllmkd_kernels.rows import IGNORE_INDEX, RowCounts

TERMS = ("ce", "response_kl", "visual_kl", "relation")


class LlavaKDOutput(NamedTuple):
    """The loss and its four terms.

    The terms are means in nats (`relation` in [0, 2]) before their weights are applied, detached:
    with the counts of a whole optimiser step they are this micro-batch's share, and sum to the
    step's mean. A term that was not asked for, or has no rows, is 0.

    With ``diagnostics=True`` entropies (in nats) and top-1 agreement of the response rows follow,
    shares of means likewise; see `DistillOutput`. They are None where they are not asked for or not
    known: all three if no term has response rows, the last two if no term has a teacher's head.
    """

    loss: Tensor
    ce: Tensor
    response_kl: Tensor
    visual_kl: Tensor
    relation: Tensor
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    agreement: Tensor | None = None

    @property
    def terms(self) -> dict[str, Tensor]:
        """All means by name, those that are there."""
        return {k: x for k, x in self._asdict().items() if k != "loss" and x is not None}


class LlavaKDLoss(nn.Module):
    """LLaVA-KD's loss for any pair of models that share a vocabulary.

    Args:
        ce, response, visual, relation: weights of the four terms; the paper's are 1, 1, 1, 0.5 (its
            released code has 1 for all four). A weight of 0 skips the work of its term.
        temperature: T of both softmaxes in the two KL terms.
        divergence: what the two KL terms use, a name or a `Divergence`.
        ignore_index: label of positions without one.
        vocab_size: shared vocabulary, default the smaller head.
        response_shift: False distils the *unshifted* answer positions, as the released code of
            LLaVA-MoD and LLAVADI does against its papers; cross-entropy is shifted either way.
        relation_batch: True takes one cosine over the R of all images of the batch together, as the
            released LLaVA-KD code does; the paper's form, the default, has one per image.
        diagnostics: also return entropies and agreement of the response rows, at next to no cost.
        backend, workspace_mb: as in `fused_linear_distill`.

    Raises:
        ValueError, TypeError: a weight below 0, or none; an unknown divergence; no temperature.
    """

    def __init__(
        self,
        ce: float = 1.0,
        response: float = 1.0,
        visual: float = 1.0,
        relation: float = 0.5,
        temperature: float = 1.0,
        divergence: str | Divergence = "forward_kl",
        *,
        ignore_index: int = IGNORE_INDEX,
        vocab_size: int | None = None,
        response_shift: bool = True,
        relation_batch: bool = False,
        diagnostics: bool = False,
        backend: str = "auto",
        workspace_mb: float | None = None,
    ) -> None:
        super().__init__()
        weights = {"ce": ce, "response": response, "visual": visual, "relation": relation}
        for name, weight in weights.items():
            checks.weight(name, weight)
        self.ce, self.response, self.visual, self.relation = ce, response, visual, relation
        self.temperature, self.divergence = temperature, Divergence.of(divergence)
        checks.temperature(temperature)
        self.ignore_index, self.vocab_size = ignore_index, vocab_size
        self.response_shift, self.relation_batch = response_shift, relation_batch
        self.diagnostics = diagnostics
        self.backend, self.workspace_mb = backend, workspace_mb
        self._functions = HeadFunctions(fused_linear_distill, fused_linear_relation, head_gram)

    def forward(
        self,
        student: HeadInputs,
        teacher: HeadInputs | None,
        labels: Tensor,  # (B, T)
        image_mask: Tensor | None = None,  # (B, T) bool
        *,
        num_items_in_batch: RowCounts | int | Tensor | None = None,
        image_lens: Tensor | list[int] | None = None,
        teacher_labels: Tensor | None = None,  # (B, T')
        teacher_image_mask: Tensor | None = None,  # (B, T')
    ) -> LlavaKDOutput:
        """The loss of one micro-batch.

        Args:
            student, teacher: heads and hidden states; a None teacher leaves cross-entropy alone
                (the SFT stage). The teacher's hidden states may be (M + K, D), stored ones say: its
                M response rows and then its K visual rows, each in the order of the batch. A loss
                without visual terms takes the M alone as well.
            labels: (B, T) int64, unshifted, `ignore_index` where there is none.
            image_mask: (B, T) bool, True at image positions. None, or no True: no visual terms, as
                for text alone.
            num_items_in_batch: what the means divide by. `RowCounts` over the whole optimiser step
                is exact under gradient accumulation and data parallelism. A single number counts
                response rows; the visual terms, for which it says nothing, are then means of this
                micro-batch weighted by its share of response rows. None means the rows of this
                micro-batch.
            image_lens: visual rows of each image in order; None takes each run of image positions
                for one image.
            teacher_labels, teacher_image_mask: (B, T') where the teacher's sequence has other
                positions.

        Raises:
            ValueError: shapes that do not fit; teacher and student select different numbers of rows
                (both named).
            RuntimeError: a frozen head was written to through ``.data`` since its Gram was made.
        """
        own = {"labels": teacher_labels, "image_mask": teacher_image_mask}
        batch = {"labels": labels, "image_mask": image_mask, "image_lens": image_lens}
        objective = self.objective(teacher is not None)
        if teacher is not None and teacher.hidden.ndim == 2 and not self.response_shift:
            raise ValueError(
                "teacher.hidden: its rows are selected already, response_shift=False cannot select "
                "others; expected (B, T, D)"
            )
        view = objective.view(student, teacher, {**batch, "teacher": own}, num_items_in_batch)
        view.compare("response", "visual", "images")  # whatever the weights are
        loss, means = objective.sum(view)
        none = loss.new_zeros(())
        terms = (means.get(name, none) for name in TERMS)
        return LlavaKDOutput(loss, *terms, *(means.get(name) for name in DIAGNOSTICS))

    def objective(self, with_teacher: bool = True) -> Objective:
        """The terms under the weights that this module has now; without a teacher the first one."""
        compared = (self.response, self.visual, self.relation)
        return llava_kd.objective(
            self.ce,
            *(weight if with_teacher else 0.0 for weight in compared),
            divergence=self.divergence,
            temperature=self.temperature,
            shift=self.response_shift,
            joint=self.relation_batch,
            vocab_size=self.vocab_size,
            ignore_index=self.ignore_index,
            diagnostics=self.diagnostics,
            backend=self.backend,
            workspace_mb=self.workspace_mb,
            functions=self._functions,
        )

    #: By name of a mean in `LlavaKDOutput`, which of `RowCounts` it is over.
    over: ClassVar[Mapping[str, str]] = dict.fromkeys(LlavaKDOutput._fields[1:], "response") | {
        "visual_kl": "visual",
        "relation": "images",
    }

    def weighted(self, means: Mapping[str, float]) -> float:
        """The loss that the four terms make, by their names in `LlavaKDOutput`."""
        return self.objective().weighted(means)

    @property
    def needs(self) -> Needs:
        """What has to be there for the terms whose weight is not 0."""
        return self.objective().needs
