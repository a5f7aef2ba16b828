"""Does a LLaVA get, id by id, what LLaVA's own training made of a conversation?

`expected` says it once more, in the plainest way: pieces between images and answers are tokenised
apart, every answer ends with the end of sequence.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.training.data.test_template import subword_processor
from tests.training.llava_files import TOKENS, entry, processor
from tests.training.tiny_processors import UNENDED, llava
from training.data.chat import ChatEncoder
from training.data.item import IGNORE
from training.data.records import Place, parse_sample
from training.data.sample import Sample
from training.models import CHAT_TEMPLATE

RED = Image.new("RGB", (20, 30), (200, 0, 0))
PROCESSORS = {
    "start token": subword_processor,
    "bytes": lambda _: llava(),
    "words": lambda _: processor(),
}
TEXTS = [
    "what is it ?",
    " two\n",
    "a coat",
    "how many\n\nbag",
    "no",
    "yes . this is a bag .",
    "\tis it\n",
]
MARKS = [
    "<image>\n{}",
    "{}\n<image>",
    "<image>{}",
    "{} <image> {}",
    "<image>\n<image>\n{}",
    "<image><image>{}",
    "is <image> a\n<image> ?{}",
    "<image>",
]


def samples(count: int) -> list[Sample]:
    """Conversations with images before, after, within and without texts."""
    draw, made = random.Random(0), []
    for i in range(count):
        talk, images = [], 0
        for _ in range(draw.randint(1, 3)):
            mark = draw.choice(MARKS) if draw.random() < 0.6 else "{}"
            talk += [mark.replace("{}", draw.choice(TEXTS)), draw.choice(TEXTS)]
            images += mark.count("<image>")
        system = draw.choice([None, "", "this is a bag"])
        place = Place(Path("d.json"), f"index {i}")
        made.append(parse_sample(place, entry(*talk, image=["a.png"] * images, system=system)))
    return made


def expected(whole: Any, sample: Sample) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation."""
    tokenizer = whole.tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids if text else []

    made = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    labels = [IGNORE] * len(made)
    before = f"{sample.system} " if sample.system else ""
    for human, answer in sample.turns:
        if human.count("<image>") == 1:
            human = f"<image>\n{human.replace('<image>', '').strip()}"
        first, *others = f"{before}USER: {human} ASSISTANT:".split("<image>")
        prompt = ids(first)
        for text in others:
            prompt += [whole.image_token_id] * TOKENS + ids(text)
        said = [*ids(f" {answer}"), tokenizer.eos_token_id]
        made, labels = made + prompt + said, labels + [IGNORE] * len(prompt) + said
        before = ""
    return made, labels


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE, UNENDED], ids=["none", "ours", "1.5"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_ids_and_labels(tmp_path: Path, name: str, template: str | None) -> None:
    whole = PROCESSORS[name](tmp_path)
    whole.chat_template = template
    encoder = ChatEncoder(whole)
    for sample in samples(60):
        item = encoder.item(sample, encoder.see([RED] * len(sample.images)))
        ids, labels = expected(whole, sample)
        assert item["input_ids"].tolist() == ids, sample
        assert item["labels"].tolist() == labels, sample
        assert item["image_lens"].tolist() == [TOKENS] * len(sample.images)
        assert encoder.length(sample, None) == len(ids)


@pytest.mark.parametrize("name", PROCESSORS)
def test_captions(tmp_path: Path, name: str) -> None:
    whole = PROCESSORS[name](tmp_path)
    encoder = ChatEncoder(whole, "pretrain")
    for sample in samples(60):
        if sample.images and len(sample.turns) == 1:
            item = encoder.item(sample, encoder.see([RED] * len(sample.images)))
            said = whole.tokenizer(f"{sample.turns[0][1]}\n", add_special_tokens=False).input_ids
            start = whole.tokenizer("").input_ids[:1]
            start += [whole.image_token_id] * TOKENS * len(sample.images)
            assert item["input_ids"].tolist() == start + said
            assert item["labels"].tolist() == [IGNORE] * len(start) + said
