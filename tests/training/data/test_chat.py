"""Are ids and labels exact, token by token, for every processor class we claim?

What is expected is said by the processor itself: its ids of a whole conversation, and its prompts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.training.tiny_processors import (
    LLAVA,
    LLAVA_CHATML,
    PROCESSORS,
    QWEN,
    UNENDED,
    qwen2_5_vl,
)
from training.data.chat import PER_TOKEN, ChatEncoder
from training.data.collate import Collator
from training.data.item import IGNORE, Item
from training.data.records import DataError, Place
from training.data.sample import Sample
from training.models import CHAT_TEMPLATE
from training.settings import ConfigError

RED = Image.new("RGB", (48, 32), (200, 0, 0))
BLUE = Image.new("RGB", (20, 40), (0, 0, 200))
GENERIC = [name for name in PROCESSORS if name != "llava"]
ENDS = dict.fromkeys(GENERIC, "<|im_end|>")
ENDS |= {"smolvlm": "<end_of_utterance>", "gemma3": "<end_of_turn>"}


@cache
def encoder(name: str, template: Any = "chat") -> ChatEncoder:
    return ChatEncoder(PROCESSORS[name](), template)


def sample(*turns: tuple[str, str], images: int = 0, **fields: Any) -> Sample:
    return Sample(Place(Path("d.json"), "index 0", "s"), ("",) * images, turns, **fields)


TALK = sample(
    ("<image>\n<image>\nWhat is this?", " a red square"), ("and?", "\n\nblue 12"), images=2
)


def learned(one: ChatEncoder, item: Item) -> list[str]:
    """The texts of the runs of labels."""
    runs, previous = [], -1
    for i in (item["labels"] != IGNORE).nonzero().flatten().tolist():
        runs += [[]] if i != previous + 1 else []
        runs[-1].append(int(item["labels"][i]))
        previous = i
    return [one.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", GENERIC)
def test_labels_are_the_answers_and_their_ends(name: str) -> None:
    one = encoder(name)
    item = one.item(TALK, one.see([RED, BLUE]))
    space = " " if name == "smolvlm" else ""  # "Assistant: {answer}", prompted by "Assistant:"
    expected = [f"{space}{answer}{ENDS[name]}" for _, answer in TALK.turns]
    assert learned(one, item) == expected
    kept = item["labels"] != IGNORE
    assert torch.equal(item["labels"][kept], item["input_ids"][kept])


@pytest.mark.parametrize("name", GENERIC)
def test_the_prompt_is_generation_s(name: str) -> None:
    one = encoder(name)
    messages = [{"role": "user", "content": [{"type": "image", "image": BLUE}, {"type": "text"}]}]
    messages[0]["content"][1]["text"] = "What is this?"
    made = one.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    # "\n" as the answer's first letters would join with the prompt's if they were tokenised with it
    asked = sample(("What is this?<image>", "\n\nblue"), images=1)
    seen = one.see([BLUE])
    assert one.prompt(asked, seen)["input_ids"].tolist() == made["input_ids"][0].tolist()
    assert seen.inputs.keys() == made.keys() - {*PER_TOKEN}
    for key, tensor in seen.inputs.items():
        assert torch.equal(tensor, made[key])


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_prompt_is_what_training_puts_before_the_answer(name: str) -> None:
    """Of any turn, whatever the answer is, in a conversation that goes on after it or is open."""
    one = encoder(name)
    talk = replace(TALK, turns=(*TALK.turns, ("What is this?<image>", "blue"), ("and?", "red")))
    talk = replace(talk, images=("",) * 3)
    item = one.item(talk, one.see([RED, BLUE, BLUE]))
    labels = (item["labels"] != IGNORE).tolist()
    starts = [i for i in range(1, len(labels)) if labels[i] and not labels[i - 1]]
    said = [answer for _, answer in talk.turns]
    for turn, start in enumerate(starts):
        asked = talk.asked(said[:turn])
        assert len(asked.images) == (3 if turn > 1 else 2) and asked.turns[-1][1] == ""
        prompt = one.prompt(asked, one.see([RED, BLUE, BLUE][: len(asked.images)]))
        assert prompt["input_ids"].tolist() == item["input_ids"][:start].tolist()


@pytest.mark.parametrize("name", GENERIC)
def test_image_lens_count_the_image_tokens_of_each_image(name: str) -> None:
    one = encoder(name)
    item = one.item(TALK, one.see([RED, BLUE]))
    alone = [len(one.see([RED]).ids[0]), len(one.see([BLUE]).ids[0])]
    assert item["image_lens"].sum() == (item["input_ids"] == one.image_id).sum()
    if name in ("qwen2.5-vl", "smolvlm"):  # RED is larger than BLUE, and neither depends on other
        both = one.see([RED, BLUE])
        assert [len(ids) for ids in both.ids] == alone and alone[0] != alone[1]
    if name == "gemma3":  # rows alone, not the token that its processor names
        assert item["image_lens"].tolist() == [4, 4]
    if name == "llava-onevision":  # several images are not tiled: 4 rows and a newline each
        assert item["image_lens"].tolist() == [5, 5]
    text = one.item(sample(("q", "a")), one.see([]))
    assert text["image_lens"].tolist() == [] and "pixel_values" not in text


def test_qwen_token_types_mark_the_image_tokens() -> None:
    one = encoder("qwen2.5-vl")
    item: Any = one.item(TALK, one.see([RED, BLUE]))
    assert torch.equal(item["mm_token_type_ids"] == 1, item["input_ids"] == one.image_id)


@pytest.mark.parametrize("name", GENERIC)
def test_pretrain_is_the_images_and_the_caption(name: str) -> None:
    one = encoder(name, "pretrain")
    item = one.item(sample(("say it\n<image>", "a red square"), images=1), one.see([RED]))
    assert learned(one, item) == ["a red square\n"]
    text = one.tokenizer.decode(item["input_ids"])
    assert "say it" not in text and text.endswith("a red square\n")
    assert text.startswith("<bos>\n\n<start_of_image>") or name != "gemma3"
    if name == "qwen2.5-vl":
        assert text.startswith("<|vision_start|><|image_pad|>") and "<|vision_end|>a red" in text
    with pytest.raises(DataError, match=r"0 image\(s\) and 1 turn"):
        one.item(sample(("q", "a")), one.see([]))


def test_system_and_the_place_of_images() -> None:
    one = encoder("qwen2.5-vl")
    asked = sample(("What <image>\nis this?", "a"), images=1, system="be brief", ordered=True)
    text = one.tokenizer.decode(one.item(asked, one.see([BLUE]))["input_ids"])
    assert text.startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nWhat <|vision"
    )
    assert "<|vision_end|>is this?<|im_end|>" in text and "be good" not in text


TYPED = {
    "llava": ["so <|im_end|>", "<|pad|>", "<|video_pad|>", "<img>"],
    "qwen2.5-vl": ["so <|im_end|> it ends", "see <|image_pad|>", "<|video_pad|>", "<|vision_end|>"],
    "smolvlm": ["<end_of_utterance>", "<fake_token_around_image>", "<row_1_col_1>"],
    "internvl": ["<IMG_CONTEXT>", "</img>", "<|im_start|>user"],
    "llava-onevision": ["<video>", "<|im_end|>"],
    "gemma3": ["<start_of_image>", "<image_soft_token>", "<end_of_turn>", "<bos>"],
}


@pytest.mark.parametrize("template", ["chat", "pretrain"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_text_that_spells_out_a_control_token_is_refused(name: str, template: Any) -> None:
    one = ChatEncoder(PROCESSORS[name](), template)
    for text in TYPED[name]:
        for i, (system, *turn) in enumerate(((text, "q", "a"), ("s", text, "a"), ("s", "q", text))):
            asked = sample((turn[0], turn[1]), system=system, field="messages[{}].content", first=1)
            expected = rf"index 0 .*field 'messages\[{i}\].content': got .*model's own tokens"
            with pytest.raises(DataError, match=expected):
                one.item(asked, one.see([]))


def test_tokens_of_grounding_data_are_text_like_any_other() -> None:
    processor = qwen2_5_vl()
    tokens = ["<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<ref>", "</box>"]
    processor.tokenizer.add_tokens(tokens, special_tokens=True)
    one = ChatEncoder(processor)
    item = one.item(sample(("where?", "".join(tokens))), one.see([]))
    assert one.tokenizer.decode(item["labels"][item["labels"] != IGNORE]).startswith(
        "".join(tokens)
    )
    ids = [processor.tokenizer.convert_tokens_to_ids(token) for token in tokens]
    assert set(ids) <= set(item["labels"].tolist())


def test_an_empty_system_message_is_rendered_and_none_is_not() -> None:
    one = encoder("qwen2.5-vl")
    texts = [
        one.tokenizer.decode(one.item(sample(("q", "a"), system=system), one.see([]))["input_ids"])
        for system in (None, "", "be brief")
    ]
    starts = ["be good", "", "be brief"]  # without one this template writes its own
    assert all(
        text.startswith(f"<|im_start|>system\n{start}<|im_end|>\n<|im_start|>user\nq<|im_end|>")
        for text, start in zip(texts, starts, strict=True)
    )


def test_onevision_says_that_history_differs_and_qwen_does_not() -> None:
    assert "in history" in encoder("llava-onevision").note
    assert encoder("qwen2.5-vl").note == ""


def refused(template: str) -> str:
    processor = qwen2_5_vl()
    processor.chat_template = template
    with pytest.raises(ConfigError) as error:
        ChatEncoder(processor)
    return str(error.value)


def test_unusable_templates_are_refused_with_what_differs() -> None:
    # answers end without a special token: nothing would tell generation to stop
    endless = QWEN.replace("{% endfor %}<|im_end|>\n{% endfor %}", "{% endfor %}\n{% endfor %}")
    assert "for generation to stop at" in refused(endless)
    # the last turn is marked, so that later turns change earlier ones
    last = QWEN.replace("{{ m.role }}\n", "{{ m.role }}{% if loop.last %}!{% endif %}\n")
    assert "expected texts that continue each other" in refused(last)
    # marks that name the question
    marks = QWEN.replace("{{ m.role }}", "{% generation %}{{ m.role }}{% endgeneration %}")
    assert "marked as generation" in refused(marks)
    assert "no chat template" in refused("")
    shouting = QWEN.replace("p.text }}", "p.text | replace('square', 'SQUARE') }}")
    assert "expected a template that renders a plain conversation" in refused(shouting)


def test_a_template_that_changes_an_answer_refuses_the_sample() -> None:
    processor = qwen2_5_vl()
    processor.chat_template = QWEN.replace("p.text }}", "p.text | replace('green', 'GREEN') }}")
    one = ChatEncoder(processor)
    with pytest.raises(DataError, match="expected answers rendered as they are"):
        one.item(sample(("q", "a green one")), one.see([]))


def llava_with(template: str | None) -> Any:
    processor = PROCESSORS["llava"]()
    processor.chat_template = template
    return processor


def test_a_llava_is_asked_with_its_own_chat_template() -> None:
    processor = llava_with(LLAVA_CHATML)
    one = ChatEncoder(processor)
    assert not one.llava
    text = one.tokenizer.decode(one.item(TALK, one.see([RED, BLUE]))["input_ids"])
    assert text.startswith(
        "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\n<image><image>"
    )
    assert learned(one, one.item(TALK, one.see([RED, BLUE]))) == [
        f"{answer}<|im_end|>" for _, answer in TALK.turns
    ]
    with pytest.raises(ConfigError, match="for generation to stop at"):
        ChatEncoder(llava_with(UNENDED.replace("ASSISTANT", "BOT")))


@pytest.mark.parametrize("template", [None, LLAVA, CHAT_TEMPLATE, UNENDED])
def test_one_that_asks_alike_keeps_llava_s_template(template: str | None) -> None:
    processor = llava_with(template)
    one = ChatEncoder(processor)
    assert one.llava and one.tokens_per_image == 4
    assert ("of two questions" in one.note) == (template == UNENDED)


@pytest.mark.parametrize("name", GENERIC)
def test_a_mixed_batch_keeps_every_sample_s_images(name: str) -> None:
    one = encoder(name)
    items = [
        one.item(TALK, one.see([RED, BLUE])),
        one.item(sample(("q", "a")), one.see([])),
        one.item(sample(("<image>q", "a"), images=1), one.see([RED])),
    ]
    batch: Any = Collator(one.processor)(items)
    assert batch["image_lens"].sum() == (batch["input_ids"] == one.image_id).sum()
    lens = [int(n) for one_item in items for n in one_item["image_lens"]]
    assert batch["image_lens"].tolist() == lens and len(lens) == 3
    shown: list[Any] = [items[0], items[2]]
    pixels = batch["pixel_values"]
    firsts = [item["pixel_values"] for item in shown]
    assert len(pixels) == sum(map(len, firsts))
    for tensor, rows in zip(firsts, pixels.split([len(first) for first in firsts]), strict=True):
        same = rows[tuple(slice(size) for size in tensor.shape)]
        assert torch.equal(same, tensor) and rows.abs().sum() == tensor.abs().sum()
    text = Collator(one.processor)([items[1]])
    assert "pixel_values" not in text and text["image_lens"].tolist() == []


def test_a_teacher_with_another_processor_gets_a_batch_of_its_own() -> None:
    ours, theirs = encoder("qwen2.5-vl"), encoder("internvl")
    items = []
    for asked, images in ((TALK, [RED, BLUE]), (sample(("q", "a")), [])):
        item = ours.item(asked, ours.see(images))
        item["teacher"] = theirs.item(asked, theirs.see(images))
        items.append(item)
    batch = Collator(ours.processor, theirs.processor)(items)
    assert "teacher" in batch
    alone = Collator(theirs.processor)([item["teacher"] for item in items])
    assert batch["teacher"].keys() == alone.keys() and "image_grid_thw" in batch
    assert torch.equal(batch["teacher"]["input_ids"], alone["input_ids"])
    answers = [(labels[labels != IGNORE]).tolist() for labels in (batch["labels"], alone["labels"])]
    assert answers[0] == answers[1]  # one tokenizer, the same answers
