"""Which model is trained, and how is it loaded and saved without anything going missing?

Every model here is an ordinary `LlavaForConditionalGeneration`: a vision tower, a two-layer GELU
projector (`mlp2x_gelu`: Linear(C, D) → GELU → Linear(D, D)) and a causal LM. It is put together
from a tower and a language model (`assemble`), or loaded from a folder (`load_model`), and saved
with its processor (`save_model`) so that `AutoModelForImageTextToText` and `AutoProcessor` load it
with no help from this package.

A checkpoint of another architecture is an error that names what differs. Missing, surplus or
misshapen weights are too: several published trainers load with `strict=False` and train whatever
happened to be initialised at random.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2Config,
)

from training.config import ModelConfig, require

IMAGE_TOKEN = "<image>"


class CheckpointError(ValueError):
    """A folder that does not hold the model that was expected; the message names the folder and
    the difference."""


def build_model(
    config: ModelConfig, seed: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model and processor a `ModelConfig` describes; new weights are drawn from `seed`."""
    if config.path is not None:
        return load_model(config.path, config.processor)
    vision = require(config.vision, "model.vision", "a vision tower, or set model.path")
    processor = load_processor(config.processor, vision, config.language)
    torch.manual_seed(seed)
    tower = load_tower(vision)
    language = _language_model(config, processor)
    model = assemble(
        tower,
        language,
        image_token_id=processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        feature_layer=config.feature_layer,
        feature_strategy=config.feature_strategy,
    )
    _grow_vocabulary(model, processor)
    return model, processor


def assemble(
    tower: PreTrainedModel,
    language: Any,  # a causal LM of transformers
    *,
    image_token_id: int,
    feature_layer: int = -2,
    feature_strategy: Any = "full",
) -> LlavaForConditionalGeneration:
    """A LLaVA from a vision tower and a causal LM, whose weights are copied; the projector is
    new."""
    config = LlavaConfig(
        vision_config=tower.config,  # pyright: ignore[reportArgumentType]
        text_config=language.config,  # pyright: ignore[reportArgumentType]
        image_token_index=image_token_id,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=feature_strategy,
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.get_decoder().state_dict())
    model.lm_head.load_state_dict(language.get_output_embeddings().state_dict())
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def load_model(
    path: str | Path, processor: str | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A saved model and its processor.

    Raises `CheckpointError` if the folder is not a LLaVA checkpoint, or if a weight is missing,
    surplus or misshapen.
    """
    _expect_llava(path)
    try:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            path,
            output_loading_info=True,
            dtype="auto",
            ignore_mismatched_sizes=True,  # reported below, by key, instead of in a log
        )
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be loaded as a LLaVA model: {error}") from error
    model, info = loaded
    faults = {
        name: sorted(map(str, keys)) for name, keys in info.items() if name in _FAULTS and keys
    }
    if faults:
        raise CheckpointError(f"{path}: weights do not fit its config.json: {_listed(faults)}")
    return model, load_processor(processor or str(path))


_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def load_state(model: nn.Module, state: dict[str, torch.Tensor], origin: str | Path) -> None:
    """Load `state` into `model`; every key must be there and fit.

    Raises `CheckpointError` naming `origin` and the keys that are missing, surplus or misshapen.
    """
    own = model.state_dict()
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "surplus": sorted(state.keys() - own.keys()),
        "shape": [
            f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ],
    }
    faults = {name: keys for name, keys in faults.items() if keys}
    if faults:
        raise CheckpointError(f"{origin}: another architecture: {_listed(faults)}")
    model.load_state_dict(state)


def load_tower(path: str) -> PreTrainedModel:
    """A vision tower (SigLIP or CLIP vision model) from a folder or hub name; a whole SigLIP
    gives its vision half."""
    model = AutoModel.from_pretrained(path)
    tower = getattr(model, "vision_model", model) if hasattr(model, "text_model") else model
    if not hasattr(tower.config, "patch_size"):
        kind = type(model).__name__
        raise CheckpointError(f"{path}: is a {kind}, expected a vision model with a patch_size")
    return tower


def load_processor(
    path: str | None, vision: str | None = None, language: str | None = None
) -> LlavaProcessor:
    """The processor in `path`, or one put together from the tower's image processor and the LM's
    tokenizer."""
    if path is not None:
        processor = AutoProcessor.from_pretrained(path)
        if not isinstance(processor, LlavaProcessor):
            kind = type(processor).__name__
            raise CheckpointError(f"{path}: is a {kind}, expected a LlavaProcessor")
        return processor
    language = require(
        language, "model.processor", "a processor, or model.language with a tokenizer"
    )
    tokenizer = AutoTokenizer.from_pretrained(language)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tower = AutoConfig.from_pretrained(require(vision, "model.vision", "the image processor"))
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(vision),
        tokenizer=tokenizer,
        patch_size=getattr(tower, "vision_config", tower).patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
    )


def save_model(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, path: str | Path
) -> None:
    """Write model and processor to `path`: under another name first, then renamed, so `path` is
    whole or absent."""
    target = Path(path)
    staging = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    processor.save_pretrained(staging)
    if target.exists():
        shutil.rmtree(target)
    os.replace(staging, target)


def share_tower(
    student: LlavaForConditionalGeneration, teacher: LlavaForConditionalGeneration
) -> bool:
    """Let the teacher use the student's vision tower if the two are equal; say whether they are.

    Equal means weight by weight, and read at the same layer. Then the tower is in memory once and
    runs once a batch; each model applies its own projector to its output.
    """
    ours, theirs = student.model.vision_tower, teacher.model.vision_tower
    same_output = _selection(student.config) == _selection(teacher.config)
    a, b = ours.state_dict(), theirs.state_dict()
    equal = a.keys() == b.keys() and all(torch.equal(a[key], b[key].to(a[key])) for key in a)
    if equal and same_output:
        teacher.model.vision_tower = ours
    return equal and same_output


def image_features(
    model: LlavaForConditionalGeneration,
    pixel_values: torch.Tensor,  # (n_images, 3, H, W)
) -> torch.Tensor:  # (n_images, P, C)
    """The tower's hidden states that the projector reads; what `LlavaModel.get_image_features`
    projects."""
    layers, strategy = _selection(model.config)
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    return torch.cat([h[:, 1:] if strategy == "default" else h for h in chosen], dim=-1)


def same_vocabulary(student: LlavaProcessor, teacher: LlavaProcessor) -> None:
    """Raise `CheckpointError` unless both tokenizers give every word the same id: the losses
    compare column by column."""
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        odd = sorted(set(ours.items()) ^ set(theirs.items()))[:6]
        raise CheckpointError(
            f"teacher: its tokenizer ({len(theirs)} tokens) differs from the student's "
            f"({len(ours)}), for instance {odd}; distillation needs one vocabulary"
        )


def _selection(config: LlavaConfig) -> tuple[Any, str]:
    return config.vision_feature_layer, config.vision_feature_select_strategy


def _language_model(config: ModelConfig, processor: LlavaProcessor) -> Any:
    if config.language is not None:
        return AutoModelForCausalLM.from_pretrained(config.language)
    tokens = len(processor.tokenizer)
    sizes = Qwen2Config(
        vocab_size=config.vocab_size or tokens,
        hidden_size=config.hidden,
        intermediate_size=-(-8 * config.hidden // 96) * 32,  # 8/3 D, up to a multiple of 32
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=2048,
        # the usual 0.02 suits widths of thousands; at D = 192 attention starts so flat that
        # learning to count and compare took three times the steps
        initializer_range=config.hidden**-0.5,
        tie_word_embeddings=False,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(sizes)


def _grow_vocabulary(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Give the LM a row for every token, `<image>` included; it may have more rows than tokens
    (padding)."""
    tokens = len(processor.tokenizer)
    if model.lm_head.weight.shape[0] < tokens:
        model.resize_token_embeddings(tokens)


def _expect_llava(path: str | Path) -> None:
    """Look at config.json before transformers does: its own message for another architecture is
    hard to read."""
    if not Path(path).is_dir():
        return  # a hub name: transformers resolves it
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{path}: no config.json there, expected a saved LLaVA model")
    kind = json.loads(config_file.read_text()).get("model_type")
    if kind != "llava":
        raise CheckpointError(f"{path}: model_type is {kind!r}, expected 'llava'")


def _listed(faults: dict[str, list[str]], most: int = 4) -> str:
    parts = []
    for name, keys in faults.items():
        more = f" and {len(keys) - most} more" if len(keys) > most else ""
        parts.append(f"{name}: {', '.join(keys[:most])}{more}")
    return "; ".join(parts)
