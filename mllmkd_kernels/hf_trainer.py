"""How does any `transformers.Trainer` distil? By one more base class.

    class MyTrainer(mk.DistillMixin, Trainer): ...      # or TRL's SFTTrainer, or your own subclass

    objective = mk.methods.llava_kd.objective()         # or any other mk.Objective
    MyTrainer(model=student, teacher=teacher, objective=objective, args=..., ...).train()

The trainer keeps its model, data, optimiser, checkpoints and wrappers; the mixin replaces

1. `compute_loss`: both models up to their heads, then the terms, inside the wrapper's forward so
   that DDP and FSDP do what they do there;
2. the normaliser: each mean is over the rows of the whole optimiser step, every micro-batch of
   every rank, so accumulation and data parallelism give the big batch's gradient;
3. logs: the terms by name (and the loss's diagnostics), in training and in evaluation, where
   they and the loss are means over the rows of the whole set, however it is cut into batches;
4. `prediction_step`: logits are made only where `compute_metrics` asks for them;
5. the loading of checkpoints, which for some classes silently loads nothing;
6. the batch, where a view makes another of it, before anything is counted (`drawn`).

The teacher is an attribute of the trainer, not of its model: no optimiser, checkpoint or wrapper
sees it. Terms with parameters of their own are the student's while it trains (`learned`). Left out:
context and sequence parallelism; teachers sharded over devices; such terms under DeepSpeed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllmkd_kernels import learned
from mllmkd_kernels.batch import (
    BESIDES,
    Teacher,
    count_rows,
    counts_of,
    distill_batch,
    forward_through,
    image_token_id,
)
from mllmkd_kernels.drawn import BatchView, DrawsThroughView
from mllmkd_kernels.experts import check_adapters
from mllmkd_kernels.llava_kd import LlavaKDLoss, LlavaKDOutput
from mllmkd_kernels.models import hidden_size
from mllmkd_kernels.objective import Losses, Objective
from mllmkd_kernels.pieces import zero_stage
from mllmkd_kernels.rows import Counts, RowCounts, by_name

if TYPE_CHECKING:  # importing the package must not import transformers
    from accelerate import Accelerator
    from transformers import Trainer
else:
    Trainer = object


def sum_counts(
    counts: RowCounts | Counts, accelerator: Accelerator
) -> RowCounts | dict[str, Tensor]:
    """The counts of all ranks of an `accelerate.Accelerator` together, as tensors on its device."""
    named, device = by_name(counts), accelerator.device
    local = torch.stack([torch.as_tensor(count, device=device) for count in named.values()])
    total: Any = accelerator.reduce(local, reduction="sum")
    summed = dict(zip(named, total.unbind(), strict=True))
    return RowCounts(**summed) if isinstance(counts, RowCounts) else summed


class StepCounts(Trainer):
    """For a trainer whose loss is a share of the whole step's mean: counts the rows of the step.

    `count_batches` says what there is in some micro-batches of this rank.
    """

    loss_is_scaled_for_ga = True  # transformers must not divide by the micro-batches again

    def count_batches(self, batches: list[dict[str, Any]]) -> RowCounts | Counts:
        """Rows of these micro-batches, this rank's alone."""
        raise NotImplementedError

    def _get_num_items_in_batch(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> RowCounts | Counts:
        return sum_counts(self.count_batches(batch_samples), self.accelerator)


class LoadsItsCheckpoints(Trainer):
    """For a trainer of vision-language models: a checkpoint's weights are loaded, or it raises.

    transformers saves some classes (LLaVA, Qwen2.5-VL) under the names of older versions, and
    `Trainer` loads by the newer ones, finds nothing and goes on with a warning
    (huggingface/transformers#43701). `from_pretrained` knows both.
    """

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._loading = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        learned.load(resume_from_checkpoint, self.accelerator.unwrap_model(self.model))

    def _load_best_model(self) -> None:
        self._loading = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if not (load_result.missing_keys and load_result.unexpected_keys):
            super()._issue_warnings_after_load(load_result)
            return
        student: Any = self.accelerator.unwrap_model(self.model)
        saved, info = type(student).from_pretrained(
            self._loading, config=student.config, dtype=student.dtype, output_loading_info=True
        )
        if info["missing_keys"] or info["unexpected_keys"]:
            raise ValueError(
                f"resume_from_checkpoint: {self._loading} lacks {sorted(info['missing_keys'])} of "
                f"{type(student).__name__} and has {sorted(info['unexpected_keys'])} besides"
            )
        student.load_state_dict(saved.state_dict() | learned.state(student))


class DistillMixin(DrawsThroughView, StepCounts, LoadsItsCheckpoints):
    """Goes before a `transformers.Trainer` class and makes its loss a distillation's.

    Args:
        teacher: a transformers model; frozen, put into eval mode and onto the trainer's device. Its
            dtype stays. It may share what the student does not train. Or what answers a batch with
            `HeadInputs`. None: cross-entropy alone.
        objective: the terms, and what they need. Those with parameters of their own are trained as
            the student is, at its rate, and are in checkpoints but in no saved model.
        kd_loss: LLaVA-KD's four terms instead; by default these, under the paper's weights.
        view: what becomes of a batch first, `mk.on_policy()` for instance.
        *args, **kwargs: the trainer's own.

    Batches are `mllmkd_kernels.batch`'s: what the student takes, with `labels`; optionally
    `teacher` (a batch of the teacher's own) and `image_lens`.

    Raises:
        ValueError: an argument that asks for another loss, or for what cannot be done here (several
            GPUs in one process, context or sequence parallelism); a teacher that is the student, or
            has parameters that the student trains.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Teacher | None,
        kd_loss: LlavaKDLoss | None = None,
        objective: Objective | None = None,
        view: BatchView | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.view, self.notes = view, Counter[str]()
        self._refuse_what_would_be_ignored()
        self.model_accepts_loss_kwargs = True  # what transformers before 5.19 goes by
        if objective is not None and kd_loss is not None:
            raise ValueError("kd_loss: got one beside an objective, expected either")
        given = objective if objective is not None else kd_loss
        self.objective: Objective | LlavaKDLoss = LlavaKDLoss() if given is None else given
        if isinstance(self.objective, Objective):
            self.objective.check_teacher(teacher)
        self.teacher = teacher
        self._attach(teacher)
        if isinstance(teacher, nn.Module):
            self._refuse_shared(teacher)
            teacher.eval().requires_grad_(False)
            if not hasattr(teacher, "hf_device_map"):  # placed by its loader, maybe quantised
                teacher.to(self.args.device)
        self._sums: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}  # by training or not
        self._counted_from: int | None = None
        self._evaluated: dict[str, Any] = {}

    @property
    def kd_loss(self) -> Any:
        """The objective, by its name where it is a `LlavaKDLoss`."""
        return self.objective

    @kd_loss.setter
    def kd_loss(self, loss: LlavaKDLoss) -> None:
        self.objective = loss

    def distill(
        self, student: nn.Module, batch: Mapping[str, Any], counts: Any
    ) -> Losses | LlavaKDOutput:
        """The loss of one batch, inside the wrapper's forward; to be overridden for models that
        are not transformers'. Evaluation puts its loss together from its terms.
        """
        return distill_batch(self.objective, student, self.teacher, batch, counts)

    def count_batches(self, batches: list[dict[str, Any]]) -> RowCounts | Counts:
        """What the means are over in these micro-batches, this rank's alone."""
        token = image_token_id(self.accelerator.unwrap_model(self.model))
        if isinstance(self.objective, Objective):
            return counts_of(self.objective, batches, token)
        return count_rows(batches, token, self.objective.ignore_index)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: RowCounts | Counts | None = None,  # pyright: ignore[reportIncompatibleMethodOverride]
    ) -> Any:
        """This micro-batch's share of the step's loss, times the number of ranks (whose gradients
        are averaged); without counts, the mean over this micro-batch.
        """
        student = self.accelerator.unwrap_model(model)

        def forward(batch: Mapping[str, Any]) -> Losses | LlavaKDOutput:
            with self.accelerator.autocast():
                return self.distill(student, batch, num_items_in_batch)

        output = forward_through(model, student, forward, inputs)
        if model.training and self._counted_from is None:
            self._counted_from = self.state.global_step
        self.note(model.training, inputs, output, num_items_in_batch)
        ranks = 1 if num_items_in_batch is None else self.accelerator.num_processes
        return (output.loss * ranks, output) if return_outputs else output.loss * ranks

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of an evaluation batch; a second forward for its logits where metrics want them."""
        inputs = self.seen(self._prepare_inputs(inputs), training=False)
        counts = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=counts)
            for name, rows in by_name(counts).items():
                self._evaluated[name] = self._evaluated.get(name, 0) + rows
            if prediction_loss_only:
                return loss, None, None
            left_out = (*BESIDES, "labels")
            outputs = model(**{k: v for k, v in inputs.items() if k not in left_out})
        return loss, outputs.logits, inputs["labels"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, with the terms and the loss that is made of them: means over the
        rows of all batches. A sample that accelerate repeats to even out the ranks counts again.
        """
        self._sums[False], self._evaluated = {}, {}
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        over = [self.objective.over[name] for name in self._sums[False]]
        means = self._means(False, [self._evaluated[name] for name in over])
        if means:
            means["loss"] = self.objective.weighted(means)
        output.metrics.update({f"{prefix}_{term}": mean for term, mean in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, means over the optimiser steps since the last entry, and what a view has
        noted since then.
        """
        if "loss" in logs and self._counted_from is not None:
            steps = self.state.global_step - self._counted_from
            logs.update(self._means(True, [steps] * len(self._sums[True])))
            self._sums[True], self._counted_from = {}, None
            logs.update(self.noted())
        super().log(logs, start_time)

    def note(
        self,
        training: bool,
        batch: Mapping[str, Any],
        output: Losses | LlavaKDOutput,
        counts: RowCounts | Counts | None,
    ) -> None:
        """Keep the terms of a batch for the log. Shares of means over a step are summed as they
        are; in evaluation their rows are.
        """
        sums, rows = self._sums[training], None if training or counts is None else by_name(counts)
        for name, share in output.terms.items():
            value = share.detach().float()
            value = value if rows is None else value * rows[self.objective.over[name]]
            sums[name] = sums.get(name, 0.0) + value

    def _means(self, training: bool, counts: list[Any]) -> dict[str, float]:
        """The sums over their counts (of steps or rows), all ranks' shares together."""
        sums = self._sums[training]
        if not sums:
            return {}
        total: Any = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
        counted = torch.as_tensor(counts, device=total.device).clamp(min=1)
        return dict(zip(sums, (total / counted).tolist(), strict=True))

    def _set_signature_columns_if_needed(self) -> None:
        """Entries that are not the student's arguments must reach the loss all the same."""
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = columns + [key for key in BESIDES if key not in columns]

    def _attach(self, teacher: Teacher | None) -> None:
        """The parameters of the objective's own become the student's."""
        student: Any = self.accelerator.unwrap_model(self.model)
        check_adapters(student)
        learned.detach(student)
        if not isinstance(self.objective, Objective):
            return
        self.objective.report_on(student)
        if not len(self.objective.learned):
            return
        fsdp: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if (fsdp is not None and fsdp.fsdp_version < 2) or zero_stage(self.accelerator) == 3:
            raise ValueError(
                f"objective: its terms {list(self.objective.learned)} have parameters, which no "
                "process could keep under FSDP1 or DeepSpeed's stage 3; expected DDP, FSDP2 or "
                "stage 2"
            )
        # one that is no model may say its own
        known = hidden_size(teacher) if isinstance(teacher, nn.Module) else None
        known = known or getattr(teacher, "hidden_size", None)
        if known is None:
            raise ValueError(
                f"teacher: is no model and has no hidden_size, which the objective's terms "
                f"{list(self.objective.learned)} are made for"
            )
        self.objective.build(hidden_size(student), known)
        terms = self.objective.learned.to(self.args.device)
        if fsdp is not None:  # which gathers what trains in one dtype
            terms.to(next(p.dtype for p in student.parameters() if p.requires_grad))
        learned.attach(student, terms)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        values = learned.state(self.accelerator.unwrap_model(self.model))
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            learned.save(folder / f"checkpoint-{self.state.global_step}", values)

    def _refuse_what_would_be_ignored(self) -> None:
        args, parallel = self.args, getattr(self.accelerator, "parallelism_config", None)
        loss_type = getattr(args, "loss_type", None)  # TRL's
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        sharded = parallel is not None and (
            parallel.cp_enabled or getattr(parallel, "sp_enabled", False)
        )
        expected = "the loss is kd_loss or objective"
        for name, given, why in (
            ("label_smoothing_factor", args.label_smoothing_factor, f"0: {expected}"),
            ("compute_loss_func", self.compute_loss_func, f"None: {expected}"),
            ("loss_type", None if loss_type == "nll" else loss_type, f"'nll': {expected}"),
            (
                "output_router_logits",  # in the config of the student
                getattr(text, "output_router_logits", False),
                f"False (of TRL router_aux_loss_coef=0.0): {expected}",
            ),
            (
                "n_gpu",
                args.n_gpu if args.n_gpu > 1 else 0,
                "one process a GPU: start with accelerate launch or torchrun",
            ),
            ("parallelism_config", parallel if sharded else None, "whole sequences on each rank"),
        ):
            if given:
                raise ValueError(f"{name}: got {given}, expected {why}")

    def _refuse_shared(self, teacher: nn.Module) -> None:
        """Freezing the teacher would freeze it in the student."""
        student = self.accelerator.unwrap_model(self.model)
        if teacher is student:
            raise ValueError(
                "teacher: is the student itself, expected another model (copy.deepcopy makes one)"
            )
        theirs = {id(p) for p in teacher.parameters()}
        shared = [n for n, p in student.named_parameters() if p.requires_grad and id(p) in theirs]
        if shared:
            raise ValueError(
                f"teacher: has {len(shared)} parameters that the student trains ({shared[0]} to "
                f"{shared[-1]}), expected none: freeze them in the student before, or copy them"
            )
