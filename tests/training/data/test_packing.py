"""Does a model see packed samples as it sees them apart, and is a model that does not refused?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.training.data.test_collate import inputs, item, model
from tests.training.llava_files import TOKENS, processor
from training.data.collate import Collator
from training.data.packing import PackedCollator, check_packable
from training.settings import ConfigError

ITEMS = [item(9, 1, seed=3), item(4, 0, seed=4), item(14, 2, seed=5)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_logits_packed_are_logits_apart(attention: str) -> None:
    llava = model()
    llava.set_attn_implementation(attention)
    check_packable(llava)
    batch: Any = PackedCollator(processor())(ITEMS)
    assert batch["input_ids"].shape == (1, 27) and "attention_mask" not in batch
    assert batch["position_ids"][0].tolist() == [*range(9), *range(4), *range(14)]
    assert batch["image_lens"].tolist() == [TOKENS] * 3
    packed = llava(**inputs(batch), use_cache=False).logits[0]
    for one, logits in zip(ITEMS, packed.split([9, 4, 14]), strict=True):
        alone: Any = inputs(Collator(processor())([one]))
        torch.testing.assert_close(logits, llava(**alone).logits[0], atol=1e-6, rtol=1e-5)
    # without positions that begin again, samples would see those before them
    del batch["position_ids"]
    blended = llava(**inputs(batch), use_cache=False).logits[0]
    assert not torch.allclose(blended[9:13], packed[9:13], atol=1e-3)


def test_labels_of_a_packed_row_stay_with_their_samples() -> None:
    batch: Any = PackedCollator(processor())(ITEMS)
    assert torch.equal(batch["labels"][0], torch.cat([one["labels"] for one in ITEMS]))
    odd = item(6, 0)
    odd["labels"] = odd["input_ids"].clone()
    with pytest.raises(ValueError, match="first token of 's6' is a label"):
        PackedCollator(processor())([ITEMS[0], odd])


@pytest.mark.parametrize("name", ["llava-onevision", "internvl", "smolvlm"])
def test_models_of_one_position_a_token_pack(name: str) -> None:
    check_packable(tiny_models.build(name)[0])


def test_models_that_do_not_pack_are_refused(monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match=r"Qwen2_5_VL.* three positions a token"):
        check_packable(tiny_models.build("qwen2.5-vl")[0])
    # a model that sees over the borders: positions are dropped on their way
    llava = model()
    original = llava.model.forward

    def forward(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    monkeypatch.setattr(llava.model, "forward", forward)
    with pytest.raises(ConfigError, match="a packed sample differs from the same alone by"):
        check_packable(llava)
