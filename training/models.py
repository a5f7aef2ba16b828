"""Which model is trained, and how is it loaded and saved without anything going missing?

A model is any class that `AutoModelForImageTextToText` knows, loaded from a folder or hub name
(`load_vlm`), or a LLaVA put together here (`assemble`) from a vision tower (SigLIP, CLIP), a new
two-layer GELU projector (`mlp2x_gelu`: Linear(C, D) → GELU → Linear(D, D)) and a causal LM. It is
saved with its processor (`save_model`) so that `AutoModelForImageTextToText` and `AutoProcessor`
load it with no help from this package.

A checkpoint of another architecture is an error that names what differs. Missing, surplus or
misshapen weights are too: several published trainers load with `strict=False` and train whatever
happened to be initialised at random.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import CONFIG_NAME

from training import fingerprint
from training.anatomy import positions
from training.config import ModelConfig, require
from training.data.template import CHAT_TEMPLATE
from training.journal import whole

IMAGE_TOKEN = "<image>"
# Any class of AutoModelForImageTextToText, and of AutoProcessor: what they have in common (a
# forward, a tokenizer) is no type of transformers'.
Vlm = Any
Processor = Any
DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}


class CheckpointError(ValueError):
    """A folder that does not hold the model that was expected; the message names the folder and
    the difference."""


def build_model(config: ModelConfig, seed: int) -> tuple[Vlm, Processor]:
    """The model and processor a `ModelConfig` describes, in fp32; new weights are drawn from
    `seed`.

    fp32 whatever the checkpoint has: an update of 2e-5 is lost in a bf16 weight.
    """
    if config.path is not None:
        return load_vlm(config.path, config.processor, dtype=torch.float32)
    vision = require(config.vision, "model.vision", "a vision tower, or set model.path")
    processor = build_processor(config)
    if not isinstance(processor, LlavaProcessor):
        kind = type(processor).__name__
        raise CheckpointError(f"{config.processor}: is a {kind}, expected a LlavaProcessor")
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
    # a row for every token, `<image>` included; it may have more (padding)
    if model.lm_head.weight.shape[0] < len(processor.tokenizer):
        model.resize_token_embeddings(len(processor.tokenizer))
    return model, processor


def build_processor(config: ModelConfig) -> Processor:
    """The processor of the model that a `ModelConfig` describes, without the model."""
    known = config.processor or config.path
    if known is not None:
        return load_processor(known)
    vision = require(config.vision, "model.vision", "a vision tower, or set model.path")
    return _new_processor(config, vision)


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


def load_vlm(
    path: str | Path, processor: str | None = None, *, dtype: torch.dtype | str = "auto"
) -> tuple[Vlm, Processor]:
    """A model of any image-text-to-text class and its processor, from a folder or hub name.

    Args:
        path: where the model is.
        processor: where its processor is, if not there.
        dtype: of the weights; "auto" keeps the checkpoint's.

    Raises:
        CheckpointError: there is no such model, or a weight is missing, surplus or misshapen.
    """
    _check_kind(path)
    model = _strictly(AutoModelForImageTextToText, path, dtype=dtype)
    return model, load_processor(processor or str(path))


_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def load_tower(path: str) -> PreTrainedModel:
    """A vision tower (SigLIP or CLIP vision model) from a folder or hub name; a whole SigLIP
    gives its vision half."""
    model = _strictly(AutoModel, path)
    tower = getattr(model, "vision_model", model) if hasattr(model, "text_model") else model
    if not hasattr(tower.config, "patch_size"):
        kind = type(model).__name__
        raise CheckpointError(f"{path}: is a {kind}, expected a vision model with a patch_size")
    return tower


def load_processor(path: str) -> Processor:
    """The processor in a folder or on the hub, whole: tokenizer, image processor, chat template.

    Raises:
        CheckpointError: it is not there, or needs a package that is not installed.
    """
    processor = _read(AutoProcessor, path, "the processor")
    if not isinstance(processor, ProcessorMixin):
        kind = type(processor).__name__
        raise CheckpointError(
            f"{path}: has only a {kind}, expected a processor for text and images"
        )
    return processor


def known_positions(path: str | None) -> int | None:
    """`anatomy.positions` of the model in a folder or on the hub; None where there is no model."""
    if path is None or not PreTrainedConfig.get_config_dict(path)[0]:
        return None
    return positions(_read(AutoConfig, path, "the configuration"))


def _new_processor(config: ModelConfig, vision: str) -> LlavaProcessor:
    """A processor of the tower's image processor and the LM's tokenizer, `<image>` added."""
    language = require(
        config.language, "model.processor", "a processor, or model.language with a tokenizer"
    )
    tokenizer = _read(AutoTokenizer, language, "the tokenizer")
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tower = _read(AutoConfig, vision, "the configuration")
    tower = getattr(tower, "vision_config", tower)
    return LlavaProcessor(
        image_processor=_read(AutoImageProcessor, vision, "the image processor"),
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=config.feature_strategy,
        image_token=IMAGE_TOKEN,
        # CLIP puts a class token before its patches, which the strategy "default" drops again
        num_additional_image_tokens=int(tower.model_type == "clip_vision_model"),
        chat_template=_chat_template(tokenizer),
    )


def recompute_activations(model: Vlm) -> None:
    """Let the backward pass recompute the activations of every layer that trains.

    transformers also makes the output of each embedding require a gradient, the frozen tower's
    too, which then keeps its whole graph. Only reentrant checkpointing needs that.
    """
    # the new name for what transformers before 5.23 calls gradient_checkpointing_enable
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.disable_input_require_grads()


def _chat_template(tokenizer: Any) -> str:
    """The tokenizer's own if it shows images, else LLaVA's; `ChatEncoder.note` tells which."""
    from jinja2 import TemplateError

    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    except (TemplateError, TypeError, ValueError):  # none at all, or one of texts alone
        return CHAT_TEMPLATE
    return tokenizer.chat_template if IMAGE_TOKEN in text else CHAT_TEMPLATE


def save_model(
    model: Vlm,
    processor: Processor,
    path: str | Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write model and processor to `path`, which is then whole or absent. `state` has the weights
    where the model does not have them whole."""
    with whole(Path(path)) as staged:
        model.save_pretrained(staged, state_dict=state)
        processor.save_pretrained(staged)


def _language_model(config: ModelConfig, processor: LlavaProcessor) -> Any:
    if config.language is not None:
        return _strictly(AutoModelForCausalLM, config.language)
    tokens = len(processor.tokenizer)
    sizes = Qwen2Config(
        vocab_size=config.vocab_size or tokens,
        hidden_size=config.hidden,
        intermediate_size=-(-8 * config.hidden // 96) * 32,  # 8/3 D, up to a multiple of 32
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=2048,
        attention_dropout=config.dropout,
        # the usual 0.02 suits widths of thousands; at D = 192 attention starts so flat that
        # learning to count and compare took three times the steps
        initializer_range=config.hidden**-0.5,
        tie_word_embeddings=False,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(sizes)


def _read(auto: Any, path: str | Path, what: str, **options: Any) -> Any:
    """`auto.from_pretrained`; what the user can mend is a `CheckpointError`."""
    _check_there(path)
    try:
        return auto.from_pretrained(path, **options)
    except (RuntimeError, OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: {what} cannot be loaded: {reason}") from error


def _strictly(auto: Any, path: str | Path, **options: Any) -> Any:
    """A model of which no weight is missing, surplus or misshapen, or a `CheckpointError`."""
    model, info = _read(
        auto,
        path,
        "the model",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, by key, instead of in a log
        **options,
    )
    faults = {name: sorted(map(str, info[name])) for name in _FAULTS if info.get(name)}
    if faults:
        raise CheckpointError(f"{path}: weights do not fit its config.json: {_listed(faults)}")
    return model


@cache
def commit_of(name: str | Path) -> str:
    """The commit of a model or processor on the hub, from the hub or its cache.

    One question, where transformers asks for one file after the other; none for what can only be a
    folder.

    Raises:
        CheckpointError: there is no such name, or no way to the hub.
    """
    if is_missing_folder(name):
        raise CheckpointError(f"{name}: no such folder")
    try:
        return Path(hf_hub_download(str(name), CONFIG_NAME)).parent.name
    except (OSError, ValueError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return "without config.json"  # as that of a processor alone
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{name}: neither a folder nor on the hub: {reason}") from error


def marks_of(name: str) -> dict[str, str]:
    """Fingerprints of a model's files, or the commit that a hub has under its name."""
    if Path(name).is_dir():
        return fingerprint.of_folder(Path(name), fingerprint.MODEL_FILES)
    return {"commit": commit_of(name)}


def is_missing_folder(name: str | Path) -> bool:
    """Whether `name` is not there and cannot be a name on a hub, ``NAME`` or ``OWNER/NAME``. What
    can only be a folder is never looked up there: each of its files would be, again and again."""
    text = str(name)
    local = isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1
    return local and not Path(text).exists()


def _check_there(path: str | Path) -> None:
    """`CheckpointError` unless it is a folder or a name on the hub."""
    if not Path(path).exists():
        commit_of(path)


def _check_kind(path: str | Path) -> None:
    """Look at the model_type before transformers does: its own message is hard to read."""
    _check_there(path)
    values, _ = PreTrainedConfig.get_config_dict(path)
    if not values:
        raise CheckpointError(f"{path}: no config.json there, expected a saved model")
    kind = values.get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise CheckpointError(f"{path}: model_type is {kind!r}, expected an image-text-to-text one")


def _listed(faults: dict[str, list[str]], most: int = 4) -> str:
    parts = []
    for name, keys in faults.items():
        more = f" and {len(keys) - most} more" if len(keys) > most else ""
        parts.append(f"{name}: {', '.join(keys[:most])}{more}")
    return "; ".join(parts)
