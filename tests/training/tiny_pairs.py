"""Folders of tiny models of the real classes with their real processors: what a recipe is run on.

`write_model` saves one as `save_pretrained` does, so that it is loaded like any published model.
The sizes follow `tests.training.tiny_processors`: what its processors call one row is one row here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.tiny_models import MROPE, TEXT
from tests.training import tiny_processors

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def text(processor: Any, hidden: int, **options: Any) -> dict[str, Any]:
    """A small LM's sizes: a head of more rows than tokens, as published ones have."""
    tokenizer = processor.tokenizer
    sizes = {"hidden_size": hidden, "head_dim": hidden // 4, "vocab_size": len(tokenizer) + 5}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**TEXT, **sizes, **ids, "bos_token_id": None, **options}


def onevision(processor: Any, hidden: int, **options: Any) -> Any:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Qwen2Config(**text(processor, hidden, **options)),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        vision_aspect_ratio="anyres_max_9",
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


def qwen2_5_vl(processor: Any, hidden: int, **options: Any) -> Any:
    ids = processor.tokenizer.convert_tokens_to_ids
    config = tf.Qwen2_5_VLConfig(
        text_config={
            **text(processor, hidden, **options),
            "rope_parameters": MROPE["rope_parameters"]
            | {"mrope_section": [1, 1, hidden // 8 - 2]},
        },
        vision_config={
            "depth": 2,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1],
            "window_size": 32,
        },
        image_token_id=processor.image_token_id,
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def internvl(processor: Any, hidden: int, **options: Any) -> Any:
    config = tf.InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config=tf.Qwen2Config(**text(processor, hidden, **options)),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return tf.InternVLForConditionalGeneration(config)


def smolvlm(processor: Any, hidden: int, **options: Any) -> Any:
    side = processor.image_processor.max_image_size["longest_edge"]
    config = tf.SmolVLMConfig(
        vision_config={**VISION, "image_size": side},
        text_config=tf.LlamaConfig(**text(processor, hidden, **options)),
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return tf.SmolVLMForConditionalGeneration(config)


def gemma3(processor: Any, hidden: int, **options: Any) -> Any:
    config = tf.Gemma3Config(
        vision_config={**VISION, "vision_use_head": False},
        text_config=tf.Gemma3TextConfig(**text(processor, hidden, **options)),
        image_token_index=processor.tokenizer.image_token_id,
        mm_tokens_per_image=4,
        tie_word_embeddings=False,  # tied ones of random weights repeat the last word
    )
    model = tf.Gemma3ForConditionalGeneration(config)
    # zero in a fresh model: images would not reach the logits
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model


def larger_tiles() -> Any:
    """SmolVLM's processor with tiles of 48 pixels and 9 rows; the usual one's have 32 and 4."""
    processor = tiny_processors.smolvlm()
    processor.image_processor.max_image_size = {"longest_edge": 48}
    processor.image_processor.size = {"longest_edge": 96}
    processor.image_seq_len = 9
    return processor


MODELS: dict[str, Callable[..., Any]] = {
    "llava-onevision": onevision,
    "qwen2.5-vl": qwen2_5_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
}


def build(
    name: str, hidden: int = 16, seed: int = 0, processor: Any = None, **options: Any
) -> tuple[Any, Any]:
    """A model of the class and its processor; `options` go into the LM's config."""
    processor = processor or tiny_processors.PROCESSORS[name]()
    torch.manual_seed(seed)
    return MODELS[name](processor, hidden, **options).eval(), processor


def write_model(folder: Path, *args: Any, **kwargs: Any) -> Path:
    """`build`, saved."""
    model, processor = build(*args, **kwargs)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_parts(root: Path) -> tuple[Path, Path, Path]:
    """What a LLaVA is put together from: a vision tower, a small and a larger causal LM."""
    torch.manual_seed(0)
    processor = tiny_processors.llava()
    tower, small, large = root / "siglip", root / "small", root / "large"
    tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION, vision_use_head=False)).save_pretrained(
        tower
    )
    processor.image_processor.save_pretrained(tower)
    for folder, hidden, tied in ((small, 16, True), (large, 24, False)):
        config = tf.Qwen2Config(**text(processor, hidden), tie_word_embeddings=tied)
        tf.Qwen2ForCausalLM(config).save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
    return tower, small, large
