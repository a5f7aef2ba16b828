"""What is asked of a step whose weights or gradients are spread over processes?

* **Every process does the same.** A process whose samples have no image would give the projector no
  gradient while the others wait to sum theirs: DDP stops, FSDP2 and ZeRO sum the wrong numbers. And
  where the projector alone trains it would not go back through the language model, whose layers
  FSDP2 gathers for that. `touched` gives the projector a gradient of zero, by way of the language
  model. So DDP need not search the graph for unused parameters.
* **The head is whole in the forward.** The losses read `lm_head.weight` where no module is called.
  FSDP2 gathers the weights of its root unit, the student, when that is called and keeps them to the
  end of the backward pass: `units` leaves the tower and the projector to the root, and makes a unit
  of each layer of the language model. No process gathers a tower that another does not run.
  The head accelerate makes a unit of its own; `mllmkd_kernels.head_inputs` has it gathered. ZeRO-3
  is told to gather it with the student; it gathers each module of the tower when that runs, so
  there all processes need images (`same_modules`).
* **Saved weights are whole.** They are gathered in the first process; all processes must ask.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mllmkd_kernels import pieces
from training.anatomy import Anatomy
from training.models import CheckpointError
from training.settings import ConfigError

_SHIPPED = "training/accelerate/fsdp2.yaml"


@contextmanager
def touched(student: Any, projector: list[str]) -> Iterator[None]:
    """Inside, the student's embeddings have 0 added, with a gradient of zeros for each trained
    parameter of those names.

    The 0 is made before the student runs: autograd goes back in the order of the forward pass, and
    so these gradients are ready last in every process, with an image or without. ZeRO sums
    gradients in the order in which they are ready.
    """
    parameters = [student.get_parameter(name) for name in projector]
    zeros = [p.sum() * 0.0 for p in parameters if p.requires_grad]
    embeddings = student.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, output: sum(zeros, output))
    try:
        yield
    finally:
        hook.remove()


def units(student: nn.Module, parts: Anatomy) -> list[str]:
    """Class names of the layers that FSDP gathers one by one: those of the language model."""
    names: set[str] = set()
    for path in parts.modules["language"]:
        part = student.get_submodule(path)
        declared = set(getattr(part, "_no_split_modules", None) or ())
        names |= declared & {type(module).__name__ for module in part.modules()}
    return sorted(names)


def is_sharded(wrapped: Any) -> bool:
    """Whether no process holds the whole weights: of FSDP2, or of DeepSpeed's third stage."""
    partitions = getattr(wrapped, "zero_optimization_partition_weights", None)
    return isinstance(wrapped, FSDPModule) or bool(callable(partitions) and partitions())


def prepare(accelerator: Accelerator, student: nn.Module, parts: Anatomy) -> None:
    """Refuse what a distilled student cannot run in, and say what configuration files cannot.

    Args:
        accelerator: before it wraps anything.
        student: the model whose `parts` these are.

    Raises:
        ConfigError: FSDP version 1, whose flat weights have no head; checkpoints in pieces, which
            transformers cannot load; a teacher whose weights only the first process would load.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.ignored_modules = list(_without_numbers(student).values())
        _prepare_fsdp(plugin, units(student, parts))
    elif pieces.zero_stage(accelerator) == 3:
        _prepare_zero3(student, parts)


def _prepare_fsdp(plugin: Any, layers: list[str]) -> None:
    plugin.transformer_cls_names_to_wrap = layers
    expected = {
        "fsdp_version": (plugin.fsdp_version, 2),
        "fsdp_state_dict_type": (plugin.state_dict_type.name, "FULL_STATE_DICT"),
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, False),
    }
    for name, (got, want) in expected.items():
        if got != want:
            raise ConfigError(f"{name}: got {got}, expected {want}, as in {_SHIPPED}")
    if plugin.mixed_precision_policy is not None:
        # accelerate would return the loss, and sum the gradients, in 16 bits too
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def _without_numbers(student: nn.Module) -> dict[str, nn.Module]:
    """Modules with a weight that cannot be gathered, as a shared expert of width 0 has."""
    return {
        name: module
        for name, module in student.named_modules()
        if any(not p.numel() for p in module.parameters(recurse=False))
    }


def _prepare_zero3(student: Any, parts: Anatomy) -> None:
    """Have the head gathered with the student, and the projector, which `touched` reads."""
    if empty := list(_without_numbers(student)):
        raise ConfigError(
            f"zero_stage: 3 cannot gather a weight without numbers, as {empty[0]} of the student "
            "has; take zero2.yaml or fsdp2.yaml"
        )
    zero: Any = importlib.import_module("deepspeed").zero  # not everybody has it
    for name in parts.parameters("projector"):
        zero.register_external_parameter(student, student.get_parameter(name))
    for parameter in student.get_output_embeddings().parameters():
        zero.register_external_parameter(student, parameter)
    unset_hf_deepspeed_config()  # or the models of the next stage would be loaded in pieces


def same_modules(accelerator: Accelerator, with_images: list[bool]) -> None:
    """Refuse an optimiser step in which some processes run the tower and others do not, where that
    is a collective: in ZeRO-3, which would stop there without a word.

    Args:
        accelerator: has wrapped the step.
        with_images: of each micro-batch of this process.

    Raises:
        ConfigError: in all processes alike.
    """
    if pieces.zero_stage(accelerator) != 3:
        return
    found = gather_object([with_images])
    if any(flags != found[0] for flags in found):
        raise ConfigError(
            "zero_stage: 3 gathers the vision tower only where all processes run it, but of this "
            f"step's micro-batches the processes have images in {found}; expected images in every "
            "micro-batch or in none: take zero2.yaml or fsdp2.yaml, or sort out text-only samples"
        )


def load_whole(model: nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    """Copy whole weights, which every process has, into a model that may be sharded; raises
    `CheckpointError` naming `origin` and the keys that are missing, surplus or misshapen."""
    try:
        pieces.load_whole(model, state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{origin}: another architecture: {reason:.1000}") from error
