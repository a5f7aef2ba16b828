"""Which private methods of `transformers.Trainer` do we override, and does it still call them?

A new version that renames one, calls it otherwise or no longer calls it fails here, by
the method's name, and not somewhere in a run.
"""

from __future__ import annotations

import inspect
import re

import pytest
from transformers import Trainer

from training.trainer import DistillTrainer

# name -> its parameters, as Trainer declares them
OVERRIDDEN = {
    "_get_num_items_in_batch": ["self", "batch_samples", "device"],
    "_get_output_dir": ["self", "trial"],
    "_get_train_sampler": ["self", "train_dataset"],
    "_issue_warnings_after_load": ["self", "load_result"],
    "_load_best_model": ["self"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_set_signature_columns_if_needed": ["self"],
}


def test_no_other_is_overridden():
    ours = [c for c in DistillTrainer.__mro__ if not c.__module__.startswith("transformers")]
    names = {name for cls in ours[: ours.index(object)] for name in vars(cls)}
    private = {n for n in names if re.match(r"_[a-z]", n) and hasattr(Trainer, n)}
    assert private == OVERRIDDEN.keys()


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trainer_has_it_and_calls_it(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == OVERRIDDEN[name]
    assert re.search(rf"self\.{name}\b", inspect.getsource(Trainer))
