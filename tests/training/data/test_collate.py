"""Is a batch right-padded, and does a model see each sample in it as it sees it alone?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.training.llava_files import PATCH, SIZE, TOKENS, pixels, processor
from training.data.collate import Batch, Collator
from training.data.item import Item

IMAGE = processor().image_token_id


def item(length: int, images: int, seed: int = 0) -> Item:
    """Random ids around ``images`` runs of image tokens; the last two tokens are labelled."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, 12, (length,), generator=generator)
    words[1 : 1 + images * TOKENS] = IMAGE
    labels = torch.full((length,), -100)
    labels[-2:] = words[-2:]
    lens = torch.full((images,), TOKENS)
    one = Item(input_ids=words, labels=labels, image_lens=lens, sample_id=f"s{length}")
    if images:
        one["pixel_values"] = torch.randn(images, 3, SIZE, SIZE, generator=generator)
    return one


def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config).eval()


def inputs(batch: Batch) -> dict[str, Any]:
    """What of a batch a model's forward takes."""
    ours = ("labels", "image_lens", "sample_ids")
    return {name: value for name, value in batch.items() if name not in ours}


def test_right_padding() -> None:
    batch = Collator(processor())([item(7, 1), item(4, 0), item(12, 2)])
    pad = processor().tokenizer.pad_token_id
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (12 - n) for n in (7, 4, 12)]
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == pad).all()
    assert (batch["labels"][padding] == -100).all()
    assert batch["image_lens"].tolist() == [TOKENS] * 3
    assert batch["sample_ids"] == ["s7", "s4", "s12"]
    for row, one in enumerate([item(7, 1), item(4, 0), item(12, 2)]):
        length = one["input_ids"].numel()
        assert torch.equal(batch["input_ids"][row, :length], one["input_ids"])
        assert torch.equal(batch["labels"][row, :length], one["labels"])


def test_images_of_all_samples_in_order() -> None:
    items = [item(12, 2, seed=1), item(4, 0), item(7, 1, seed=2)]
    images = pixels(Collator(processor())(items))
    assert torch.equal(images[:2], pixels(items[0]))
    assert torch.equal(images[2:], pixels(items[2]))


def test_text_alone_has_no_pixels() -> None:
    assert "pixel_values" not in Collator(processor())([item(4, 0), item(5, 0)])


@torch.no_grad()
def test_model_sees_each_sample_of_a_mixed_batch_as_it_sees_it_alone() -> None:
    llava, collate = model(), Collator(processor())
    items = [item(7, 1, seed=3), item(4, 0, seed=4), item(12, 2, seed=5)]
    batch = llava(**inputs(collate(items))).logits
    for row, one in enumerate(items):
        alone = llava(**inputs(collate([one]))).logits[0]
        torch.testing.assert_close(batch[row, : len(alone)], alone, atol=1e-6, rtol=1e-5)
    # and the images matter: the comparison above would not notice if they were ignored
    other = items[0].copy()
    other["pixel_values"] = pixels(items[0]) + 1
    same, changed = inputs(collate(items[:1])), inputs(collate([other]))
    assert not torch.allclose(llava(**changed).logits, llava(**same).logits)


def test_bad_input() -> None:
    collate = Collator(processor())
    odd = item(7, 1)
    odd["pixel_values"] = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\(3, 8, 8\), \(3, 16, 16\)"):
        collate([item(7, 1), odd])
    padless = processor()
    padless.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad_token"):
        Collator(padless)
