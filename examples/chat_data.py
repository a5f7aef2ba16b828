"""What do the scripts train on? Chats of one question and one answer, with images or without.

One JSON object a line, in the form that TRL calls prompt-completion: {"images": ["a.png"],
"prompt": [{"role": "user", "content": "..."}], "completion": [{"role": "assistant", "content":
"..."}]}.
Nothing here is about distillation; it is the collator that such a script has already.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def read_chats(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file; image paths are relative to its folder."""
    folder = Path(path).parent
    chats = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [chat | {"images": [str(folder / name) for name in chat["images"]]} for chat in chats]


class ChatCollator:
    """Chats → a batch for the model, labelled where the answer stands."""

    def __init__(self, processor: Any) -> None:
        processor.tokenizer.padding_side = "right"
        self.processor = processor

    def __call__(self, chats: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels` (B, T) and what the processor makes of images."""
        prompts = [with_images(chat["prompt"], chat["images"]) for chat in chats]
        whole = [
            prompt + with_images(chat["completion"])
            for prompt, chat in zip(prompts, chats, strict=True)
        ]
        batch = self._encode(whole, padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, prompt in enumerate(prompts):
            question = self._encode([prompt], add_generation_prompt=True)
            labels[row, : question["input_ids"].shape[1]] = -100
        return {**batch, "labels": labels}

    def _encode(self, chats: list[Any], padding: bool = False, **options: Any) -> Any:
        return self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": padding, "return_tensors": "pt"},
            **options,
        )


def with_images(
    messages: list[dict[str, Any]], paths: list[str] | tuple[()] = ()
) -> list[dict[str, Any]]:
    """The messages in parts, as templates want them: images before the text of the first."""
    images = [{"type": "image", "path": path} for path in paths]
    parts = [[{"type": "text", "text": message["content"]}] for message in messages]
    parts[0] = images + parts[0]
    return [m | {"content": c} for m, c in zip(messages, parts, strict=True)]
