"""Is the processor an ordinary one: saved, read back by transformers alone, and consistent?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from tests.training.llava_files import TOKENS, WORDS, entry, processor, write
from training.data.chat import ChatEncoder
from training.data.records import DataError, Place, parse_sample
from training.data.template import image_tokens
from training.demo.words import build_processor, collect_words

QUESTION = "USER: <image>\nwhat is this? ASSISTANT:"


def test_reloads_with_auto_processor_alone(tmp_path: Path) -> None:
    first = processor()
    first.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    # "alone": every class that was read back is transformers' own
    parts = (again, again.tokenizer, again.image_processor)
    assert {type(part).__module__.split(".")[0] for part in parts} == {"transformers"}
    assert isinstance(again, LlavaProcessor)
    picture = Image.new("RGB", (40, 30), (255, 0, 51))
    before, after = (p(images=picture, text=QUESTION) for p in (first, again))
    assert before.keys() == after.keys() == {"input_ids", "attention_mask", "pixel_values"}
    for key in before:
        assert np.array_equal(np.asarray(before[key]), np.asarray(after[key]))
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert again.chat_template == first.chat_template


def test_pixels_are_resized_and_scaled_to_one() -> None:
    pixels = processor()(images=Image.new("RGB", (40, 30), (255, 0, 51)), text=QUESTION)
    image = torch.as_tensor(pixels["pixel_values"][0])
    assert image.shape == (3, 16, 16)
    torch.testing.assert_close(image[:, 3, 5], torch.tensor([1.0, -1.0, -0.6]))


def test_image_tokens_is_what_the_processor_makes_of_an_image() -> None:
    picture = Image.new("RGB", (40, 30))
    dropping = processor()
    dropping.vision_feature_select_strategy = "default"
    for p, expected in ((processor(), TOKENS), (dropping, TOKENS - 1)):
        made = p(images=picture, text=QUESTION).input_ids[0].count(p.image_token_id)
        assert image_tokens(p) == made == expected


def test_processor_and_encoder_agree_on_the_prompt() -> None:
    p = processor()
    one = parse_sample(Place(Path("d")), entry("<image>\nwhat is this?", "a coat", image="a"))
    encoder = ChatEncoder(p)
    seen = encoder.see([Image.new("RGB", (16, 16))])
    prompt = encoder.prompt(one, seen)["input_ids"].tolist()
    assert p(images=Image.new("RGB", (16, 16)), text=QUESTION).input_ids[0] == prompt
    content = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    talk = [{"role": "user", "content": content}]
    assert p.apply_chat_template(talk, add_generation_prompt=True) == QUESTION
    talk.append({"role": "assistant", "content": [{"type": "text", "text": "a coat"}]})
    talk.append({"role": "user", "content": [{"type": "text", "text": "how many?"}]})
    assert p.apply_chat_template(talk) == f"{QUESTION} a coat</s>USER: how many? ASSISTANT:"
    strings = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "a bag"}]
    assert p.apply_chat_template(strings) == "USER: how ASSISTANT: a bag</s>"


def test_text_survives_a_round_trip() -> None:
    tokenizer = processor().tokenizer
    ids = tokenizer("what is this? a coat</s>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "what is this ? a coat"
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_collect_words(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", [entry("<image>\nis it red?", "yes, t-shirt", image="a")])
    second = write(tmp_path / "b.jsonl", [entry("how", "two")])
    words = collect_words(first, second)
    assert words == [",", "?", "how", "is", "it", "red", "t-shirt", "two", "yes"]
    ids = build_processor(words, image_size=16, patch_size=8).tokenizer("is it red? yes, t-shirt")
    assert 2 not in ids.input_ids
    write(tmp_path / "b.jsonl", [entry("how", "two"), "broken"])
    with pytest.raises(DataError, match="line 2"):
        collect_words(first, second)


@pytest.mark.parametrize("size", [(16, 5), (0, 8), (16, 0), (4, 8)])
def test_bad_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"got {size[0]} and {size[1]}, expected positive sizes"):
        build_processor(WORDS, image_size=size[0], patch_size=size[1])


@pytest.mark.parametrize("word", ["</s>", "<image>", "two words", "what?", "", " coat"])
def test_bad_words(word: str) -> None:
    with pytest.raises(ValueError, match="expected single words"):
        build_processor(["coat", word], image_size=16, patch_size=8)
