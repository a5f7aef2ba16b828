"""Tiny random models of the real transformers classes, each with a batch: what the tests run.

Each builder returns `(model, batch)`; `MODELS` names them. Two samples a batch, the second padded;
V = 101 is a multiple of nothing. What is left out: pretrained weights, processors, video.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

V, D, IMAGE = 101, 32, 99  # vocabulary, hidden width, the id of the image token
TEXT: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
}
# 4 patches of 16 x 16. A class that merges 2 x 2 patches gets 64 x 64 pixels: 4 rows as well.
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
QWEN_VISION: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2}
Built = tuple[Any, dict[str, Any]]


def tokens(rows: int) -> dict[str, Tensor]:
    """Two samples: 2 tokens, `rows` image tokens, 5 tokens; the second sample lacks the last 2."""
    ids = torch.randint(3, 90, (2, rows + 7))
    ids[:, 2 : 2 + rows] = IMAGE
    mask = torch.ones_like(ids)
    ids[1, -2:], mask[1, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def pixels(size: int, *shape: int) -> Tensor:
    """One square image per sample."""
    return torch.randn(2, *shape, 3, size, size)


def text_only(model: type, config: type, **options: Any) -> Built:
    return model(config(**{**TEXT, **options})), tokens(rows=0)


def llava(tower: Any, strategy: Any = "full", layer: int = -2, hidden: int = D) -> Built:
    config = tf.LlavaConfig(
        vision_config=tower,
        text_config=tf.Qwen2Config(**{**TEXT, "hidden_size": hidden}),
        image_token_index=IMAGE,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
    )
    return tf.LlavaForConditionalGeneration(config), {**tokens(4), "pixel_values": pixels(32)}


def llava_onevision() -> Built:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 32]],
    )
    # Base image and one tile, 4 rows each, and the 2 newline rows of the tile's 2 x 2 grid.
    batch = {**tokens(10), "pixel_values": pixels(32, 2), "image_sizes": torch.full((2, 2), 32)}
    return tf.LlavaOnevisionForConditionalGeneration(config), batch


def qwen_vl(model: type, config: type, **vision: Any) -> Built:
    ids = {"image_token_id": IMAGE, "video_token_id": 98, "vision_start_token_id": 97}
    built = model(
        config(
            text_config={**TEXT, **MROPE},
            vision_config={**QWEN_VISION, **vision},
            vision_end_token_id=96,
            **ids,
        )
    )
    text = tokens(4)
    grid = torch.tensor([[1, 4, 4]] * 2)  # 16 patches, merged 2 x 2
    batch = {
        **text,
        "pixel_values": torch.randn(32, 3 * 2 * 8 * 8),
        "image_grid_thw": grid,
        "mm_token_type_ids": (text["input_ids"] == IMAGE).int(),
    }
    return built, batch


def qwen2_vl() -> Built:
    return qwen_vl(
        tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig, embed_dim=32, hidden_size=D
    )


def qwen2_5_vl() -> Built:
    return qwen_vl(
        tf.Qwen2_5_VLForConditionalGeneration,
        tf.Qwen2_5_VLConfig,
        hidden_size=32,
        intermediate_size=40,
        out_hidden_size=D,
        fullatt_block_indexes=[1],
        window_size=32,
    )


def qwen3_vl() -> Built:
    return qwen_vl(
        tf.Qwen3VLForConditionalGeneration,
        tf.Qwen3VLConfig,
        hidden_size=32,
        intermediate_size=40,
        out_hidden_size=D,
        deepstack_visual_indexes=[0],
        num_position_embeddings=16,
    )


def internvl() -> Built:
    config = tf.InternVLConfig(
        vision_config={**VISION, "image_size": [64, 64], "patch_size": [16, 16]},
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return tf.InternVLForConditionalGeneration(config), {**tokens(4), "pixel_values": pixels(64)}


def idefics3(model: type, config: type) -> Built:
    built = model(
        config(
            vision_config={**VISION, "image_size": 64},
            text_config=tf.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            scale_factor=2,
        )
    )
    return built, {**tokens(4), "pixel_values": pixels(64, 1)}


def gemma3() -> Built:
    config = tf.Gemma3Config(
        vision_config={**VISION, "image_size": 64},
        # Set, to show that this class does not apply it.
        text_config=tf.Gemma3TextConfig(**TEXT, final_logit_softcapping=0.5),
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    model, text = tf.Gemma3ForConditionalGeneration(config), tokens(4)
    # Zero in a fresh model: images would not reach the logits, nor gradients the tower.
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    types = (text["input_ids"] == IMAGE).long()
    return model, {**text, "pixel_values": pixels(64), "token_type_ids": types}


def paligemma2() -> Built:
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Gemma2Config(**TEXT, final_logit_softcapping=0.5),
        image_token_index=IMAGE,
        projection_dim=D,
    )
    text = tokens(4)
    types = torch.ones_like(text["input_ids"])
    types[:, :8] = 0  # the prefix: image and question
    batch = {**text, "pixel_values": pixels(32), "token_type_ids": types}
    return tf.PaliGemmaForConditionalGeneration(config), batch


# id -> (builder, image rows per sample, soft-cap). A fresh model's logits feel a soft-cap of 0.5.
MODELS: dict[str, tuple[Callable[[], Built], int, float | None]] = {
    "llama": (lambda: text_only(tf.LlamaForCausalLM, tf.LlamaConfig), 0, None),
    "qwen2-tied": (
        lambda: text_only(tf.Qwen2ForCausalLM, tf.Qwen2Config, tie_word_embeddings=True),
        0,
        None,
    ),
    "phi-bias": (lambda: text_only(tf.PhiForCausalLM, tf.PhiConfig), 0, None),
    "gemma2-softcap": (
        lambda: text_only(tf.Gemma2ForCausalLM, tf.Gemma2Config, final_logit_softcapping=0.5),
        0,
        0.5,
    ),
    "gemma3-text-softcap": (
        lambda: text_only(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, final_logit_softcapping=0.5),
        0,
        0.5,
    ),
    "llava-siglip-full": (lambda: llava(tf.SiglipVisionConfig(**VISION)), 4, None),
    "llava-clip-default": (lambda: llava(tf.CLIPVisionConfig(**VISION), "default"), 4, None),
    "llava-onevision": (llava_onevision, 10, None),
    "qwen2-vl": (qwen2_vl, 4, None),
    "qwen2.5-vl": (qwen2_5_vl, 4, None),
    "qwen3-vl": (qwen3_vl, 4, None),
    "internvl": (internvl, 4, None),
    "idefics3": (
        lambda: idefics3(tf.Idefics3ForConditionalGeneration, tf.Idefics3Config),
        4,
        None,
    ),
    "smolvlm": (
        lambda: idefics3(tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig),
        4,
        None,
    ),
    "gemma3": (gemma3, 4, None),
    "paligemma2-softcap": (paligemma2, 4, 0.5),
}
WITH_IMAGES = [name for name, (_, rows, _) in MODELS.items() if rows]
# The classes whose tower ends before their projector.


def build(name: str) -> Built:
    torch.manual_seed(0)
    model, batch = MODELS[name][0]()
    return model.eval(), batch
