"""What is a method? A table of stages, each of which trains some roles, on some data, for an
objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mllmkd_kernels.drawn import BatchView
from mllmkd_kernels.objective import Objective

#: Roles of parameters; a mixture of experts also has "experts" and "router", of its "language".
PROJECTOR, WHOLE = ("projector",), ("projector", "language")
SPARSE = ("projector", "experts", "router")


@dataclass(frozen=True, eq=False)
class Stage:
    """One row of a method's table. Whatever is callable here has its configuration for signature:
    its keyword arguments, with their types and defaults, are a section of the stage's settings.

    Attributes:
        name: of the stage, in configuration, folders and reports.
        trains: roles of the parameters that are trained; all others are frozen.
        data: the use of a source: "captions", "conversations", "preferences".
        template: how a sample becomes tokens: "pretrain", "chat".
        objective: section `loss`: () -> what is minimised.
        student: section `student`: (model) -> the model that is trained; None for the model as it
            is.
        fits: (configuration of the model, arguments of `student`) -> that of what `student` makes
            of it, or `ValueError`: asked before the first stage of a run.
        view: section `view`: () -> what becomes of a batch before it is counted, or None.
        callbacks: () -> a `transformers.TrainerCallback`, each.
        title: in a few words.
        defaults: of the stage's settings, where the method has others than the trainer.
        usual: whether a run that does not say its stages has this one.
    """

    name: str
    trains: tuple[str, ...]
    data: str
    template: str
    objective: Callable[..., Objective]
    student: Callable[..., Any] | None = None
    fits: Callable[..., Any] | None = None
    view: Callable[..., BatchView | None] | None = None
    callbacks: tuple[Callable[..., Any], ...] = ()
    title: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    usual: bool = True
