"""What is LLaVA's own chat template, and which processors are asked with it?

``USER: <image>\\n{q} ASSISTANT: {a}</s>USER: {q2} ASSISTANT: {a2}</s>``, where ``</s>`` is the
tokenizer's own end of sequence; a system message is a line before it. It is for a `LlavaProcessor`
without a chat template or with one that asks alike (the published LLaVA-1.5's does, and ends no
answer in its history); one that asks in another way keeps its own.

Training gives it whole questions, with their images where they stand: a question with one image
has it moved to its front, as LLaVA and LLaVA-KD do (half of LLaVA's captions data writes it last);
with several, they stay where they are.
"""

from __future__ import annotations

from typing import Any, Literal

from transformers import LlavaProcessor

TemplateName = Literal["chat", "pretrain"]
PROBE = "What is this?"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}"
    "{% set images, text = 0, message['content'] %}{% else %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join %}{% endif %}"
    "{% if message['role'] == 'system' %}{{ text ~ ' ' if text }}"
    "{% elif message['role'] == 'user' %}USER: {{ '<image>\n' * images }}{{ text }} ASSISTANT:"
    "{% else %} {{ text }}{{ eos_token }}{% endif %}{% endfor %}"
)


def speaks_llava(processor: Any) -> bool:
    """Whether a processor is LLaVA's, with no chat template of its own or one that asks alike."""
    if type(processor).__name__ != "LlavaProcessor":
        return False
    if not processor.chat_template:
        return True
    asked = [_rendered(processor, []), _rendered(processor, [{"type": "image"}])]
    marks = "", f"{processor.image_token}\n"
    return asked == [f"USER: {mark}{PROBE} ASSISTANT:" for mark in marks]


def _rendered(processor: LlavaProcessor, before: list[dict[str, str]], answer: str = "") -> str:
    """What the processor's own template makes of a question, or of two with an answer between."""
    user = {"role": "user", "content": [*before, {"type": "text", "text": PROBE}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    talk = [user, said, user] if answer else [user]
    text = processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(processor.tokenizer.bos_token or "")


def unused_template(processor: LlavaProcessor) -> str:
    """What is not the user's own in a conversation that LLaVA's template writes, or ""."""
    name, tokenizer = type(processor).__name__, processor.tokenizer
    if tokenizer.chat_template and tokenizer.chat_template != processor.chat_template:
        return (
            f"{name}: its tokenizer's chat template shows no images and is not used, LLaVA's is "
            "(USER: ... ASSISTANT: ...); model.processor can name a processor with another"
        )
    ours = f"USER: {PROBE} ASSISTANT: {PROBE}{tokenizer.eos_token}USER: {PROBE} ASSISTANT:"
    if processor.chat_template and (text := _rendered(processor, [], PROBE)) != ours:
        return (
            f"{name}: its chat template makes {text!r} of two questions, training {ours!r}; the "
            "first is asked alike"
        )
    return ""


def image_tokens(processor: LlavaProcessor) -> int:
    """How many tokens the processor makes of one image.

    Raises:
        ValueError: the image processor does not give every image the same size.
    """
    images = processor.image_processor
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    try:
        height, width = size["height"], size["width"]
    except (KeyError, TypeError):
        raise ValueError(
            f"processor: got image size {size}, expected a fixed height and width"
        ) from None
    patch = processor.patch_size
    tokens = (height // patch) * (width // patch) + processor.num_additional_image_tokens
    return tokens - (processor.vision_feature_select_strategy == "default")
