"""Does what is believed of a chat template hold? Tried on a conversation when an encoder is made.

Pieces against the whole, prompts against the template's generation prompt, and, where the template
marks answers itself (`generation` blocks), against its marks.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from training.data.item import IGNORE
from training.data.records import DataError, Place
from training.data.sample import IMAGE_MARK, Sample


def check_template(encoder: Any) -> None:
    """Compare a `ChatEncoder`'s ids with the processor's own on a conversation with two images.

    Raises:
        ConfigError: they differ; the message shows where.
    """
    images = [Image.new("RGB", (64, 48), (200, 30, 30)), Image.new("RGB", (40, 60), (30, 30, 200))]
    human = f"{IMAGE_MARK}{IMAGE_MARK}What is this?"
    turns = ((human, "A red square, and a blue one."), ("How many are there?", "There are 2."))
    for shown, opening in ((images, human), ([], "What is this?")):
        sample = Sample(
            Place(Path("probe")),
            ("",) * len(shown),
            ((opening, turns[0][1]), turns[1]),
            ordered=True,
        )
        try:
            _compare(encoder, sample, shown)
        except DataError as error:
            raise encoder.refusal(
                str(error), "a template that renders a plain conversation"
            ) from error


def _compare(encoder: Any, sample: Sample, images: list[Image.Image]) -> None:
    if encoder.template == "pretrain":
        return  # no conversation: nothing of it is rendered
    item: dict[str, Any] = dict(encoder.item(sample, encoder.see(images)))
    talk = encoder.messages(sample, [answer for _, answer in sample.turns])
    shown = iter(images)
    for part in (part for message in talk for part in message["content"]):
        if part["type"] == "image":
            part["image"] = next(shown)
    whole = partial(
        encoder.processor.apply_chat_template, tokenize=True, return_dict=True, return_tensors="pt"
    )
    labels = item["labels"].tolist()
    starts = [i for i in range(1, len(labels)) if labels[i] != IGNORE == labels[i - 1]]
    ends = [(talk[:-1], starts[1]), (talk[:-3], starts[0])]
    if encoder.note:  # its history differs from its prompts: only the first prompt can agree
        ends = ends[1:]
    else:
        _same(encoder, item, whole(talk), len(item["input_ids"]), "a whole conversation")
    for messages, length in ends:
        made = whole(messages, add_generation_prompt=True)
        _same(encoder, item, made, length, "a prompt for generation")
    if re.search(r"\{%-?\s*generation\s", encoder.processor.chat_template):
        made = whole(talk, return_assistant_tokens_mask=True)
        marked = made["input_ids"][0][made["assistant_masks"][0].bool()]
        text = encoder.tokenizer.decode(marked)
        if not all(
            answer in text and human.split(">")[-1] not in text for human, answer in sample.turns
        ):
            raise encoder.refusal(f"{text!r} marked as generation", "the answers, and only them")


def _same(encoder: Any, item: dict[str, Any], made: Any, length: int, what: str) -> None:
    """Refuse the template unless the first `length` tokens of the item are the processor's."""
    for name in ("input_ids", *encoder._extras):
        ours, theirs = item[name][:length].tolist(), made[name][0].tolist()
        if ours != theirs:
            decode = encoder.tokenizer.decode
            where = first_difference(ours, theirs, decode if name == "input_ids" else str)
            raise encoder.refusal(f"in {what}, {name}: {where}", "pieces that make up the whole")


def first_difference(ours: Any, theirs: Any, show: Any = str) -> str:
    """Where two texts or lists of ids part, and how each goes on."""
    pairs = zip(ours, theirs, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    shown = [show(side[at : at + 12]) for side in (ours, theirs)]
    return f"{shown[0]!r} at {at} in place of {shown[1]!r}"
