"""What does LLaVA's own template refuse, and does a saved one write the same?

Ids and labels: `test_llava_ids`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer, LlavaProcessor

from tests.training.llava_files import TOKENS, WORDS, entry, processor
from training.data.chat import ChatEncoder
from training.data.records import DataError, Place, parse_sample
from training.data.sample import Sample
from training.demo.words import build_processor
from training.models import CHAT_TEMPLATE

PLACE = Place(Path("d.json"), "index 0")
PICTURE = Image.new("RGB", (20, 30), (200, 0, 0))


def sample(*messages: str, image: str | list[str] | None = None) -> Sample:
    return parse_sample(PLACE, entry(*messages, image=image))


def encode(encoder: ChatEncoder, one: Sample) -> tuple[list[int], list[int]]:
    """Ids and labels."""
    item = encoder.item(one, encoder.see([PICTURE] * len(one.images)))
    return item["input_ids"].tolist(), item["labels"].tolist()


def test_the_saved_chat_template_writes_the_same_text(tmp_path: Path) -> None:
    """As training sees it: what others render with the processor alone."""
    whole = subword_processor(tmp_path)
    talk = entry(
        "<image>\nwhat is it?", "a coat", "how\nmany", "two", image="a.png", system="no bag"
    )
    ids, _ = encode(ChatEncoder(whole), parse_sample(PLACE, talk))
    messages: list[dict[str, Any]] = [{"role": "system", "content": "no bag"}]
    for i, (_, text) in enumerate(list(parse_sample(PLACE, talk).texts())[1:]):
        parts: list[dict[str, str]] = [{"type": "text", "text": text.removeprefix("<image>\n")}]
        parts = parts if i else [{"type": "image"}, *parts]
        messages.append({"role": ("user", "assistant")[i % 2], "content": parts})
    whole.chat_template = CHAT_TEMPLATE
    text = whole.apply_chat_template(messages, tokenize=False)
    text = text.replace("<image>", "<image>" * TOKENS)
    assert whole.tokenizer.decode(ids, skip_special_tokens=False) == f"<s>{text}"


@pytest.mark.parametrize(
    "one",
    [sample("what", "a coat"), sample("<image>what", "coat", "how", "two", image="a.png")],
    ids=["text", "two_turns"],
)
def test_pretrain_wants_images_and_one_turn(one: Sample) -> None:
    with pytest.raises(DataError, match="expected images and one turn"):
        encode(ChatEncoder(processor(), "pretrain"), one)


@pytest.mark.parametrize("template", ["chat", "pretrain"])
def test_prompt_is_what_training_saw_before_the_answer(template: str) -> None:
    encoder = ChatEncoder(processor(), template)  # type: ignore[arg-type]
    one = sample("<image>\nwhat is it", "a coat", image="a.png")
    ids, labels = encode(encoder, one)
    prompt = encoder.prompt(one, encoder.see([PICTURE]))["input_ids"].tolist()
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt) - 1] == -100 and labels[len(prompt)] != -100


def test_answer_of_unknown_words_is_a_fault() -> None:
    encoder = ChatEncoder(processor())
    with pytest.raises(DataError, match=r"conversations\[3\].value.*zebra.*tokenizer knows"):
        encode(encoder, sample("what", "a coat", "what", "a zebra"))
    unknown = encode(encoder, sample("zebra", "a coat"))[0][1]
    assert unknown == encoder.tokenizer.unk_token_id  # in a question it is only an unknown word


def test_spelled_out_image_token_is_a_fault() -> None:
    other = processor()
    other.tokenizer.add_special_tokens({"additional_special_tokens": ["<|pad|>"]})
    other.image_token = "<|pad|>"
    other.chat_template = CHAT_TEMPLATE.replace("<image>", "<|pad|>")
    other.image_token_id = other.tokenizer.convert_tokens_to_ids("<|pad|>")
    with pytest.raises(DataError, match=r"conversations\[0\].*own tokens"):
        encode(ChatEncoder(other), sample("<image> what <|pad|>", "a coat", image="a.png"))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"template: got 'plain', expected 'chat' or 'pretrain'"):
        ChatEncoder(processor(), "plain")  # type: ignore[arg-type]
    mute = processor()
    mute.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        ChatEncoder(mute)
    loose = processor()
    loose.image_processor.size = {"shortest_edge": 16}
    with pytest.raises(ValueError, match="expected a fixed height and width"):
        ChatEncoder(loose)


def subword_processor(folder: Path) -> LlavaProcessor:
    """A byte-level BPE tokenizer that puts a start token before every text, as Llama's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    fast.save_pretrained(folder)
    whole = build_processor([], image_size=16, patch_size=8)
    return LlavaProcessor(
        image_processor=whole.image_processor,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        patch_size=8,
        vision_feature_select_strategy="full",
    )
