"""What is different from `transformers.Trainer`? Five things; all else (loop, accelerate, resume,
logging) is its own.

1. **Normaliser.** Each mean of the loss is over the rows of the whole optimiser step: every micro-
   batch of every rank. `StepCounts` adds them up and the loss divides by the counts, so
   accumulating 4 micro-batches gives the big batch's gradient, however uneven they are. (With a
   mean-reduced loss the stock trainer gives 4 times it.)
2. **Checkpoints** are whole or absent (`training.checkpoint`), hold the student alone, load
   strictly, and carry the sums of an unfinished log entry.
3. **Logs** carry the four terms apart, rates and peak memory (`training.meter`), and are shown by
   `training.progress`.
4. **NaN.** An optimiser step with a number that is not finite is never made (`training.watch`).
5. **Signals.** SIGINT and SIGTERM end a run after the step in hand, saved (`training.interrupt`).
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import LlavaProcessor, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import mllmkd_kernels as mk
from mllmkd_kernels.hf_trainer import StepCounts
from training import checkpoint, sharding
from training.forecast import Forecast
from training.interrupt import Interrupted, StopRequest
from training.meter import Meter
from training.models import CheckpointError, load_state, load_vlm
from training.progress import Place, Progress
from training.settings import ConfigError
from training.step import TERMS, DistillStep
from training.watch import Watch

DIAGNOSTICS = ("student_entropy", "teacher_entropy", "agreement")


#: The whole weights once more, in a form of accelerate's, which `Trainer` writes beside an FSDP
#: optimizer's state; `_load_from_checkpoint` reads those of the student's folder.
SECOND_COPY = "pytorch_model_fsdp.bin"


class DistillTrainer(StepCounts, Trainer):
    """`transformers.Trainer` for a `DistillStep`.

    Args:
        step, args: what is trained, and how.
        processor, dataset, collator: the data; the processor is saved beside the student.
        title, place: of the stage, for the progress.
        on_nan, skip_limit: see `training.watch`.
        say: how messages are told.
        order: of the samples; None: shuffled by the seed.
    """

    def __init__(
        self,
        step: DistillStep,
        args: TrainingArguments,
        *,
        processor: LlavaProcessor,
        dataset: torch.utils.data.Dataset,
        collator: Any,
        title: str,
        place: Place | None = None,
        on_nan: str = "stop",
        skip_limit: int = 5,
        say: Callable[[str], None] = print,
        order: torch.utils.data.Sampler[int] | None = None,
    ) -> None:
        self.order = order
        super().__init__(model=step, args=args, train_dataset=dataset, data_collator=collator)
        sharding.prepare(self.accelerator, step, step.parts)
        self.step = step
        self.processor = processor
        folder = Path(args.output_dir or ".")
        if on_nan == "skip" and self.is_deepspeed_enabled:
            raise ConfigError("on_nan: got 'skip', which DeepSpeed's step does not allow; use stop")
        self.names = ("loss", *TERMS)
        if step.loss.diagnostics:
            self.names += DIAGNOSTICS if step.teacher is not None else DIAGNOSTICS[:1]
        self.meter = Meter(self.names, args.device)
        self.watch = Watch(
            step.loss,
            self.names,
            self.accelerator,
            folder,
            on_nan=on_nan,
            limit=skip_limit,
            say=say,
        )
        self.forecast = Forecast(step, args, title, dataset, say)
        self.stop = StopRequest()
        self.stopped_by = 0  # the signal on which all ranks agreed
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress(title, place or Place(), folder, say))
        self.add_callback(Stopper(self))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, timed from here, or from where a checkpoint's time ends.

        Raises `training.interrupt.Interrupted` after a signal, once a checkpoint is saved.
        """
        self.meter = Meter(self.names, self.args.device)
        if resume_from_checkpoint:
            self._restore(Path(resume_from_checkpoint))
        else:  # what an earlier try has skipped is skipped no more
            self.watch.load({"skipped": 0, "in_a_row": 0}, 0)
        try:
            with StopRequest() as self.stop:
                result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if "wandb" in (
                self.args.report_to or ()
            ):  # or the next stage would go on in this one's run
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

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: mk.RowCounts | None = None,  # pyright: ignore[reportIncompatibleMethodOverride]
    ) -> Any:
        """This micro-batch's share of the step's loss, times the number of ranks (DDP averages
        gradients)."""
        self.forecast.first_batch(inputs)
        output = model(**inputs, counts=num_items_in_batch)
        self.watch.see(inputs, num_items_in_batch, output)
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self._close(None)  # its backward makes the step as well
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`Trainer.training_step`; its sum over steps, which nothing here reads, would stay NaN
        after one."""
        return torch.nan_to_num(super().training_step(*args, **kwargs), 0.0, 0.0, 0.0)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The one place between the last backward and the update: look at the step."""
        norm = sharding.whole(super()._get_grad_norm(model, grad_norm=grad_norm))
        if not self.is_deepspeed_enabled and not self._close(norm):
            model.zero_grad(set_to_none=True)  # without a gradient the optimiser does nothing
        return norm

    def _close(self, norm: Any) -> bool:
        number = self.state.global_step + 1
        good, self.stopped_by = self.watch.close(number, norm, self.meter, self.stop.number)
        return good

    def count_batches(self, batches: list[dict[str, torch.Tensor]]) -> mk.RowCounts:
        """Rows of these micro-batches, this rank's alone."""
        with_images = [batch.get("pixel_values") is not None for batch in batches]
        sharding.same_modules(self.accelerator, with_images)
        return mk.count_rows(batches, self.step.image_token_id, self.step.loss.ignore_index)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the four terms (means over the steps since the last entry), rates and peak
        memory."""
        if "loss" in logs:
            logs |= self.meter.entry(self._total, self._most)
            if self.watch.skipped:
                logs["skipped"] = self.watch.skipped
        super().log(logs, start_time)

    def _total(self, value: torch.Tensor) -> torch.Tensor:
        summed: Any = self.accelerator.reduce(value, reduction="sum")
        return summed

    def _most(self, value: torch.Tensor) -> torch.Tensor:
        gathered: Any = self.accelerator.gather(value)
        return gathered.max()

    def student_state(self) -> dict[str, torch.Tensor] | None:
        """The student's weights where no process has them whole, else None. All processes call it;
        the first one gets them."""
        if not sharding.is_sharded(self.model_wrapped):
            return None
        return sharding.of_student(self.accelerator.get_state_dict(self.model_wrapped))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The student alone, as a folder that transformers loads."""
        if output_dir is None:
            raise ValueError("output_dir: got None, expected a folder")
        if self.args.should_save:
            state = None if state_dict is None else sharding.of_student(state_dict)
            self.step.student.save_pretrained(output_dir, state_dict=state)
            self.processor.save_pretrained(output_dir)

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
            state = {"meter": self.meter.state(), "watch": self.watch.state()}
            (staged / self._sums).write_text(json.dumps(state))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (staged / SECOND_COPY).unlink(missing_ok=True)
                checkpoint.publish(staged, target, self.args.save_total_limit or 1)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(checkpoint.not_written(staged, target, error)) from error

    @property
    def _sums(self) -> str:
        """The file of a checkpoint with this rank's part of the log."""
        return f"sums_{self.args.process_index}.json"

    def _restore(self, path: Path) -> None:
        """Log and guard as they were; a rank the run did not have then starts from nothing."""
        file = path / self._sums
        if file.is_file():
            state = json.loads(file.read_text())
            self.meter.load(state["meter"])
            self.watch.load(state["watch"], checkpoint.step_of(path))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Weights of a checkpoint into the student; `CheckpointError` where they do not fit
        exactly."""
        loaded, _ = load_vlm(resume_from_checkpoint)
        load_state(self.step.student, loaded.state_dict(), resume_from_checkpoint)


class Stopper(TrainerCallback):
    """Save and stop after the step at which all ranks agreed on a signal."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of the loop."""
        if self.trainer.stopped_by:
            control.should_save = control.should_training_stop = True
