"""How does a student come to be compared on what it writes itself? (on-policy distillation)

    batch ─► prompts, padded on the left ─► student.generate ─► prompts and own answers ─► batch

`on_policy` is a view (`drawn`): answers are written before anything of a batch is counted or run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from mllmkd_kernels.batch import BESIDES, in_eval
from mllmkd_kernels.drawn import BatchView, Moment
from mllmkd_kernels.models import TOKEN_TYPES
from mllmkd_kernels.rows import Batch, entry

#: Sampling from the softmax itself, whatever the model's own generation config has.
PLAIN: dict[str, Any] = {
    "do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "num_beams": 1,
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True,
}  # fmt: skip


def on_policy(
    probability: float = 0.5, max_new_tokens: int = 64, temperature: float = 1.0
) -> BatchView:
    """A view in which the student writes the answers itself.

    Decided once a micro-batch, for all its samples and on all ranks alike. The student goes on from
    each sample's prompt, with its images, until one of its end tokens (of the generation config and
    the tokenizer), which belongs to the answer. The batch then has `on_policy` (B,) bool: both
    models see the same tokens, divergences compare them, and cross-entropy leaves them out. Its
    mean is over the answers that were given where its term is over "response:given", else over all.

    * Of a sample of several turns it writes the last answer; earlier ones are context, not
      compared. A sample without labels stays without.
    * It never writes a token that stands for an image, nor one that the teacher does not have.
    * The log counts `own_answers`, `own_cut` (no end within `max_new_tokens`; all of it is
      compared) and `own_empty` (nothing but an end, which is compared).
    * Under FSDP2 the ranks write in step, as many tokens as the longest answer of any: each token
      gathers each unit.
    * In evaluation batches stay as they are.

    Args:
        probability: of a micro-batch to be written by the student.
        max_new_tokens: the longest answer.
        temperature: of the sampling.

    Raises:
        ValueError: an argument out of its range. In a call: weights in pieces of FSDP1 or of
            DeepSpeed's third stage, packed rows, a teacher with batches of its own or rows that
            were stored; entries of one value a token that nothing is known of; an answer without a
            prompt, or with an image after it; no end token.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: got {probability}, expected one from 0 to 1")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")

    def view(batch: Batch, moment: Moment) -> Batch:
        if not moment.training:
            return batch
        _refuse(batch, moment)
        if moment.random().random() >= probability:
            return batch
        limits = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        return _rewritten(batch, moment, limits)

    return view


def _rewritten(batch: Batch, moment: Moment, limits: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with answers of the student's, padded on the right."""
    stops, prompts = _stops(moment), _prompts(batch, moment)
    answers = _answers(batch, moment, prompts, stops, limits)
    moment.notes["own_answers"] += len(answers)
    moment.notes["own_cut"] += sum(int(answer[-1]) not in stops for answer in answers)
    moment.notes["own_empty"] += sum(int(answer[0]) in stops for answer in answers)
    ignore, rows = moment.ignore_index, []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        labelled = bool((batch["labels"][i] != ignore).any())
        after = {
            "labels": answer if labelled else torch.full_like(answer, ignore),
            "input_ids": answer,
            "attention_mask": torch.ones_like(answer),
        } | {name: prompt.then[name].expand(len(answer)) for name in prompt.then}
        before = {**prompt.tokens, "labels": torch.full_like(prompt.tokens["input_ids"], ignore)}
        rows.append({name: torch.cat((before[name], after[name])) for name in after})
    fill = {"labels": ignore, "input_ids": min(stops)}
    made = {n: _padded([row[n] for row in rows], fill.get(n, 0), "right") for n in rows[0]}
    return {**batch, **made, "on_policy": torch.ones_like(made["labels"][:, 0], dtype=torch.bool)}


@dataclass(frozen=True)
class _Prompt:
    tokens: dict[str, Tensor]  # (n,) each: input_ids, attention_mask, TOKEN_TYPES
    then: dict[str, Tensor]  # of TOKEN_TYPES, () each: at the answer that was given


def _prompts(batch: Batch, moment: Moment) -> list[_Prompt]:
    """What comes before the last answer of each sample, without padding."""
    ids, labels = entry(batch, "input_ids"), entry(batch, "labels")
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    names = [name for name in TOKEN_TYPES if batch.get(name) is not None]
    columns = {"input_ids": ids, "attention_mask": mask, **{name: batch[name] for name in names}}
    unseen = _images(moment.student)
    found = []
    for i, labelled in enumerate(labels != moment.ignore_index):
        begins = (labelled & ~pad(labelled[:-1], (1, 0))).nonzero().flatten()
        start = int(begins[-1]) if len(begins) else len(labelled)
        real = mask[i].bool()
        kept = real.clone()
        kept[start:] = False
        if not kept.any():
            raise ValueError(f"labels: the answer of sample {i} has no prompt before it")
        if bool(torch.isin(ids[i][real & ~kept], ids.new_tensor(unseen)).any()):
            raise ValueError(f"input_ids: sample {i} has an image after its last answer")
        tokens = {name: column[i][kept] for name, column in columns.items()}
        at = min(start, len(labelled) - 1)
        found.append(_Prompt(tokens, {name: batch[name][i, at] for name in names}))
    return found


def _answers(
    batch: Batch,
    moment: Moment,
    prompts: list[_Prompt],
    stops: list[int],
    limits: Mapping[str, Any],
) -> list[Tensor]:
    """What the student writes after each prompt, its end token with it."""
    from transformers import GenerationConfig  # importing the package must not import it

    student, ids = moment.student, batch["input_ids"]
    fill = {"input_ids": min(stops)}
    inputs = {k: v for k, v in batch.items() if k not in (*BESIDES, "labels", *TOKEN_TYPES)}
    for name in prompts[0].tokens:
        rows = [prompt.tokens[name] for prompt in prompts]
        inputs[name] = _padded(rows, fill.get(name, 0), "left")
    config = GenerationConfig(
        **PLAIN, **limits, eos_token_id=stops, pad_token_id=min(stops),
        suppress_tokens=_unwritable(moment, stops) or None,
    )  # fmt: skip
    seed = moment.random(moment.rank).getrandbits(63)
    with in_eval(student), torch.no_grad(), seeded(seed, ids.device):
        sequences = student.generate(
            **inputs, generation_config=config, synced_gpus=not moment.whole
        )
    written = sequences[:, inputs["input_ids"].shape[1] :]
    ends = torch.isin(written, written.new_tensor(stops))
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, written.shape[1])
    return [row[:n] for row, n in zip(written, lengths.tolist(), strict=True)]


def _padded(rows: list[Tensor], value: int, side: str) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators as after `manual_seed`, and afterwards as they were."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        yield


def _stops(moment: Moment) -> list[int]:
    """Ids that end an answer."""
    tokenizer = getattr(moment.processor, "tokenizer", moment.processor)
    found = end_ids(getattr(moment.student, "generation_config", None), tokenizer)
    if not found:
        raise ValueError(
            "student: neither its generation_config nor the processing_class has an eos_token_id, "
            "which ends an answer"
        )
    return sorted(found)


def end_ids(*known: Any) -> set[int]:
    """The end tokens of generation configs and tokenizers."""
    found: set[int] = set()
    for one in known:
        ids = getattr(one, "eos_token_id", None)
        found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    return found


def _special(student: Any) -> dict[str, int]:
    """By name the ids that are no text's, of images and their borders, in a model's config."""
    known = student.config.to_dict().items()
    ends, text = ("_token_id", "_token_index"), ("bos", "eos", "pad")
    named = {k: v for k, v in known if k.endswith(ends) and not k.startswith(text)}
    return {k: v for k, v in named.items() if isinstance(v, int) and v >= 0}


def _images(student: Any) -> list[int]:
    return [v for k, v in _special(student).items() if k.startswith(("image", "video"))]


def _unwritable(moment: Moment, stops: list[int]) -> list[int]:
    """Special ids that end nothing, and rows of the head beyond the teacher's vocabulary."""
    size = moment.student.get_output_embeddings().weight.shape[0]
    shared, teacher = size, moment.teacher
    if isinstance(teacher, nn.Module) and hasattr(teacher, "get_input_embeddings"):
        embeddings: Any = teacher
        shared = min(size, embeddings.get_input_embeddings().weight.shape[0])
    special = {i for i in _special(moment.student).values() if i < shared} - set(stops)
    return sorted(special) + list(range(shared, size))


def _refuse(batch: Batch, moment: Moment) -> None:
    """What the student cannot write in, or the teacher not read."""
    shape = entry(batch, "labels").shape
    known = ("input_ids", "attention_mask", "labels", *TOKEN_TYPES)
    strange = [
        name
        for name, value in batch.items()
        if name not in known and isinstance(value, Tensor) and value.shape == shape
    ]
    for name, given, why in (
        (
            "student",
            not moment.whole and not isinstance(moment.student, FSDPModule),
            "weights in pieces of FSDP1 or DeepSpeed's stage 3, expected DDP, FSDP2 or stage 2",
        ),
        ("teacher", batch.get("teacher"), "a batch of its own, expected the student's processor"),
        ("teacher_hidden", "teacher_hidden" in batch, "stored rows, expected a teacher that runs"),
        ("position_ids", "position_ids" in batch, "packed rows, expected padded ones"),
        (", ".join(strange), strange, "values of tokens, unknown for those of a new answer"),
    ):
        if given:
            raise ValueError(f"{name}: on_policy got {why}")
