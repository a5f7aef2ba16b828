"""What is different from `transformers.Trainer`? Four things; all else (loop, accelerate, resume,
logging) is its own.

1. **Normaliser.** Each mean of the loss is over the rows of the whole optimiser step: every micro-
   batch of every rank. `_get_num_items_in_batch` counts them and the loss divides by the counts, so
   accumulating 4 micro-batches gives the big batch's gradient, however uneven they are. (With a
   mean-reduced loss the stock trainer gives 4 times it.)
2. **Checkpoints** are whole or absent (`training.checkpoint`), hold the student alone, and load
   strictly.
3. **Logs** carry the four terms apart, tokens per second and peak memory.
4. **The bar** shows them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import LlavaProcessor, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import mllmkd_kernels as mk
from training import checkpoint
from training.meter import Meter
from training.models import load_state, load_vlm
from training.step import TERMS, DistillStep, count_rows


class DistillTrainer(Trainer):
    """`transformers.Trainer` for a `DistillStep`."""

    loss_is_scaled_for_ga = True  # compute_loss returns a share of the whole step's mean

    def __init__(
        self,
        step: DistillStep,
        args: TrainingArguments,
        *,
        processor: LlavaProcessor,
        dataset: torch.utils.data.Dataset,
        collator: Any,
        title: str,
    ) -> None:
        super().__init__(model=step, args=args, train_dataset=dataset, data_collator=collator)
        self.step = step
        self.processor = processor
        self.meter = Meter(args.device)
        self.terms = torch.zeros(len(TERMS), device=args.device)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(Bar(title))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, timed from here."""
        self.meter = Meter(self.args.device)
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: mk.RowCounts | None = None,  # pyright: ignore[reportIncompatibleMethodOverride]
    ) -> Any:
        """This micro-batch's share of the step's loss, times the number of ranks (DDP averages
        gradients)."""
        output = model(**inputs, counts=num_items_in_batch)
        self.meter.add(int(inputs["attention_mask"].sum()))
        self.terms += torch.stack([getattr(output, term).detach() for term in TERMS])
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _get_num_items_in_batch(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> mk.RowCounts:
        counts = count_rows(batch_samples, self.step.image_token_id)
        if self.args.world_size > 1:
            local = torch.tensor([counts], device=device)
            gathered: Any = self.accelerator.gather(local)
            counts = mk.RowCounts(*gathered.sum(0).tolist())
        return counts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the four terms (means over the steps since the last entry), tokens/s and peak
        memory."""
        if "loss" in logs:
            steps = self.state.global_step - self._last_logged
            means: Any = self.accelerator.reduce(self.terms / steps, reduction="sum")
            logs |= dict(zip(TERMS, means.tolist(), strict=True))  # pyright: ignore[reportAttributeAccessIssue]
            logs["seconds"] = self._seconds_before + self.meter.seconds
            logs["tokens_per_second"] = self.meter.tokens_per_second
            logs["peak_gib"] = self.meter.peak_gib
            self.terms.zero_()
            self._last_logged = self.state.global_step
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The student alone, as a folder that transformers loads."""
        if output_dir is None:
            raise ValueError("output_dir: got None, expected a folder")
        self.step.student.save_pretrained(output_dir)
        self.processor.save_pretrained(output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        """Where `Trainer._save_checkpoint` writes: the staging folder."""
        return str(Path(self.args.output_dir or ".") / checkpoint.STAGING)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        name = f"{checkpoint.PREFIX}{self.state.global_step}"
        staged = Path(self._get_output_dir(trial)) / name
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            target = staged.parent.parent / name
            checkpoint.publish(staged, target, self.args.save_total_limit or 1)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Weights of a checkpoint into the student; `CheckpointError` where they do not fit
        exactly."""
        loaded, _ = load_vlm(resume_from_checkpoint)
        load_state(self.step.student, loaded.state_dict(), resume_from_checkpoint)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        path = kwargs.get("resume_from_checkpoint")
        self._last_logged, self._seconds_before = 0, 0.0
        if path:
            self._last_logged = checkpoint.step_of(Path(path))
            state = TrainerState.load_from_json(str(Path(path) / TRAINER_STATE_NAME))
            self._seconds_before = state.log_history[-1]["seconds"]
        return super()._inner_training_loop(*args, **kwargs)


class Bar(TrainerCallback):
    """One progress bar a stage: steps, loss and its terms, tokens per second."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar where the run starts, which after a resume is not 0."""
        if state.is_world_process_zero:
            steps = state.max_steps
            self.bar = tqdm(total=steps, initial=state.global_step, desc=self.title, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance; the last step is always logged, whatever log_steps."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest entry of the loss curve."""
        if self.bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"}
            shown |= {term: f"{logs[term]:.3f}" for term in TERMS if logs.get(term)}
            self.bar.set_postfix(shown | {"tok/s": f"{logs['tokens_per_second']:.0f}"})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar, leaving its last line."""
        if self.bar is not None:
            self.bar.close()
