"""Where do an objective's own parameters live while a trainer trains? In the student, as one more
submodule of it: optimiser, DDP and FSDP2 take them for its own. No student is saved with them; a
checkpoint has them in a file of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mllmkd_kernels.pieces import load_whole, whole

PLACE = "objective_terms"  # of the submodule
FILE = f"{PLACE}.safetensors"  # in a checkpoint


def attach(student: Any, terms: nn.ModuleDict) -> None:
    """Make `terms` the student's, in place of an earlier objective's."""
    detach(student)
    student.add_module(PLACE, terms)
    ignored = set(getattr(student, "_keys_to_ignore_on_save", None) or ())
    student._keys_to_ignore_on_save = ignored | set(names(student))


def detach(student: Any) -> None:
    """Leave the student as it was."""
    if hasattr(student, PLACE):
        student._keys_to_ignore_on_save = student._keys_to_ignore_on_save - set(names(student))
        delattr(student, PLACE)


def names(student: nn.Module) -> list[str]:
    """Names of the parameters and buffers in the student's state."""
    terms = getattr(student, PLACE, None)
    return [] if terms is None else [f"{PLACE}.{name}" for name in terms.state_dict()]


def state(student: nn.Module) -> dict[str, Tensor]:
    """Their whole values, by the names of the student's state. All processes must call it."""
    terms = getattr(student, PLACE, None)
    values = {} if terms is None else terms.state_dict()
    return {f"{PLACE}.{name}": whole(x.detach()) for name, x in values.items()}


def saved(folder: str | Path, student: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint has of them, under the names of the student's state.

    Raises:
        ValueError: it has others than the student.
    """
    from safetensors.torch import load_file

    file, expected = Path(folder) / FILE, names(student)
    found = load_file(file) if file.is_file() else {}
    if set(found) != set(expected):
        raise ValueError(f"{file}: has {sorted(found)}, expected {sorted(expected)}")
    return found


def save(folder: str | Path, values: dict[str, Tensor]) -> None:
    """Write `state` into a checkpoint."""
    from safetensors.torch import save_file

    if values:
        save_file({n: x.contiguous() for n, x in values.items()}, Path(folder) / FILE)


def load(folder: str | Path, student: nn.Module) -> None:
    """Values of a checkpoint into the student."""
    terms: Any = getattr(student, PLACE, None)
    if terms is not None:
        values = saved(folder, student)
        load_whole(terms, {n.removeprefix(f"{PLACE}."): x for n, x in values.items()})
