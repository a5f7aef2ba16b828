"""What does a run add to `mllmkd_kernels.DistillMixin`? The policies of a long one.

The mixin makes a `transformers.Trainer` distil: the loss, its normaliser, what a data-parallel
wrapper must see. Here are

1. **Checkpoints** that are whole or absent (`training.checkpoint`), load strictly, and carry the
   sums of an unfinished log entry;
2. **Logs** with rates and peak memory (`training.meter`), shown by `training.progress`;
3. **NaN**: an optimiser step with a number that is not finite is never made (`training.watch`);
4. **Signals**: SIGINT and SIGTERM end a run after the step in hand, saved (`training.interrupt`);
5. **Roles**: what is frozen stays in eval mode, and every process gives the projector a gradient,
   whether its samples have images or not (`training.sharding`).
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import mllmkd_kernels as mk
from mllmkd_kernels import learned
from mllmkd_kernels.pieces import whole
from training import checkpoint, sharding
from training.anatomy import anatomy
from training.data.stream import StreamDataset
from training.interrupt import Interrupted, StopRequest
from training.meter import Meter
from training.models import CheckpointError, load_vlm
from training.progress import Progress
from training.settings import ConfigError
from training.watch import Watch

#: The whole weights once more, in a form of accelerate's, which `Trainer` writes beside an FSDP
#: optimizer's state; `_load_from_checkpoint` reads those of the student's folder.
SECOND_COPY = "pytorch_model_fsdp.bin"
SUMS = "sums_{}.json"  # of a checkpoint: a rank's part of the log


class DistillTrainer(mk.DistillMixin, Trainer):
    """The trainer of one stage.

    Args:
        student, args: what is trained, and how.
        teacher: what the objective compares with; see `mllmkd_kernels.DistillMixin`.
        objective: what is minimised.
        view: what becomes of a batch first; see `mllmkd_kernels.DistillMixin`.
        processor, dataset, collator: the data; the processor is saved beside the student.
        title: of the stage, for the progress.
        say: how messages are told.
        order: of the samples; None: shuffled by the seed.
        callbacks: more of them, the method's.
    """

    def __init__(
        self,
        student: Any,
        args: TrainingArguments,
        *,
        teacher: Any,
        objective: mk.Objective,
        processor: Any,
        dataset: torch.utils.data.Dataset,
        collator: Any,
        title: str,
        say: Callable[[str], None] = print,
        order: torch.utils.data.Sampler[int] | None = None,
        view: mk.BatchView | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.order = order
        super().__init__(
            model=student,
            args=args,
            train_dataset=dataset,
            data_collator=collator,
            processing_class=processor,
            teacher=teacher,
            objective=objective,
            view=view,
            callbacks=callbacks,
        )
        self.student = student
        self.parts = anatomy(student)  # walks every name, so not in each step
        self._projector = self.parts.parameters("projector")
        tower = self.parts.parameters("vision")
        self._still = not any(student.get_parameter(name).requires_grad for name in tower)
        sharding.prepare(self.accelerator, student, self.parts)
        folder = Path(args.output_dir or ".")
        self.names = ("loss", *objective.names)
        self.meter = Meter(self.names, args.device)
        self.watch = Watch(objective, self.names, self.accelerator, folder, say)
        self.stop = StopRequest()
        self.stopped_by = 0  # the signal on which all ranks agreed
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        shown = [name for name in objective.names if "/" not in name]  # of parts: in the log alone
        self.add_callback(Progress(title, shown, folder))
        self.add_callback(Policies(self))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, timed from here, or from where a checkpoint's time ends.

        Raises `training.interrupt.Interrupted` after a signal, once a checkpoint is saved.
        """
        self.meter = Meter(self.names, self.args.device)
        if resume_from_checkpoint:
            self._restore(Path(resume_from_checkpoint))
        try:
            with StopRequest() as self.stop:
                result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if "wandb" in (self.args.report_to or ()):  # the next stage is a run of its own
                importlib.import_module("wandb").finish()
        if self.stopped_by and self.state.global_step < self.state.max_steps:
            step = f"step {self.state.global_step:,} of {self.state.max_steps:,}"
            where = self.args.output_dir
            raise Interrupted(
                self.stopped_by, f"saved {where} at {step}; the same command continues there"
            )
        return result

    def take_over(self, path: Path) -> None:
        """Weights, log and state of a checkpoint after which no step is left to make."""
        self._load_from_checkpoint(str(path))
        self._restore(path)
        self.state = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order if self.order is not None else super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> Any:
        """`Trainer`'s; the rows of a stream are this rank's already, and not to be shared again."""
        loader = super().get_train_dataloader()
        shard = loader.dataset
        if isinstance(shard, IterableDatasetShard) and isinstance(shard.dataset, StreamDataset):
            shard.num_processes, shard.process_index = 1, 0
        return loader

    # --- a step -----------------------------------------------------------------------------------

    def distill(self, student: Any, batch: Mapping[str, Any], counts: Any) -> Any:
        """The mixin's, with what is frozen in eval mode and a gradient for the whole projector."""
        if self._still:
            self.parts.still(student)
        with sharding.touched(student, self._projector):
            return super().distill(student, batch, counts)

    def seen(self, *args: Any, **kwargs: Any) -> Any:
        """The mixin's; what a view cannot do with these data is the configuration's fault."""
        try:
            return super().seen(*args, **kwargs)
        except ValueError as error:
            raise ConfigError(f"view: {error}") from error

    def note(self, training: bool, batch: Any, output: Any, counts: Any) -> None:
        """The guard sees every micro-batch, and the meter every step that it lets through."""
        self.watch.see(batch, counts, output)
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self.close(None)  # its backward makes the step as well

    def close(self, norm: Any) -> None:
        """End the optimiser step in hand, whose update may be made."""
        number = self.state.global_step + 1
        self.stopped_by = self.watch.close(number, norm, self.meter, self.stop.number)

    def count_batches(self, batches: list[dict[str, torch.Tensor]]) -> Any:
        """The mixin's; first all ranks agree on where there are images."""
        with_images = [batch.get("pixel_values") is not None for batch in batches]
        sharding.same_modules(self.accelerator, with_images)
        return super().count_batches(batches)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms (means over the steps since the last entry), rates and peak memory."""
        if "loss" in logs:
            ranks: Any = self.accelerator
            total = partial(ranks.reduce, reduction="sum")
            logs |= self.meter.entry(total, lambda value: ranks.gather(value).max())
        super().log(logs, start_time)

    # --- checkpoints ------------------------------------------------------------------------------

    def student_state(self) -> dict[str, torch.Tensor] | None:
        """The student's weights where no process has them whole, else None. All processes call it;
        the first one gets them."""
        if not sharding.is_sharded(self.model_wrapped):
            return None
        whole: Any = self.accelerator.get_state_dict(self.model_wrapped)
        return whole or {}  # some wrappers give None to all but the first process

    def bare_student(self) -> Any:
        """The student as it was before accelerate wrapped its forward, and without the objective's
        own parameters."""
        student: Any = self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        learned.detach(student)
        return student

    def _get_output_dir(self, trial: Any) -> str:
        """Where `Trainer._save_checkpoint` writes: the staging folder."""
        return str(Path(self.args.output_dir or ".") / checkpoint.STAGING)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        name = f"{checkpoint.PREFIX}{self.state.global_step}"
        staged = Path(self._get_output_dir(trial)) / name
        target = staged.parent.parent / name
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            state = {"meter": self.meter.state(), "notes": self.notes}
            (staged / SUMS.format(self.args.process_index)).write_text(json.dumps(state))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (staged / SECOND_COPY).unlink(missing_ok=True)
                checkpoint.publish(staged, target, self.args.save_total_limit or 1)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(checkpoint.not_written(staged, target, error)) from error

    def _restore(self, path: Path) -> None:
        """The log as it was. A rank the run did not have then has no part of it, but notes by the
        names that all sum.
        """
        own = path / SUMS.format(self.args.process_index)
        file = own if own.is_file() else path / SUMS.format(0)
        if not file.is_file():
            return
        state = json.loads(file.read_text())
        notes = state.get("notes", {})
        self.notes.update(notes if file == own else dict.fromkeys(notes, 0))
        if file == own:
            self.meter.load(state["meter"])

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Weights of a checkpoint into the student; `CheckpointError` where they do not fit
        exactly."""
        loaded, _ = load_vlm(resume_from_checkpoint)
        state = loaded.state_dict() | learned.saved(resume_from_checkpoint, self.student)
        sharding.load_whole(self.student, state, resume_from_checkpoint)


class Policies(TrainerCallback):
    """Between backward and update the guard looks; after a signal the step in hand is the last."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients; of a bad step nothing is updated, because this raises."""
        model: Any = self.trainer.model_wrapped
        if self.trainer.is_deepspeed_enabled:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.trainer.close(whole(torch.nn.utils.get_total_norm(gradients)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of the loop, once all ranks agree on a signal."""
        if self.trainer.stopped_by:
            control.should_save = control.should_training_stop = True
