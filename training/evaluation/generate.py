"""What does a saved model write? Greedy answers, a batch at a time, with transformers alone.

The prompt is what the processor's own chat template makes of one user turn: the images, then the
words. Prompts of a batch are padded on the left, so that every answer starts where its prompt ends;
an answer does not depend on its neighbours (but for the rounding of a larger matrix product).

Decoding is plainly greedy: the most likely token each time, until an end token of the tokenizer or
of the model's own generation config, or until `max_new_tokens`. Whatever else that config asks for
(sampling, a repetition penalty) is left out, so that two runs write the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from training.data.controls import Controls
from training.data.faults import Place, fault, named, shown
from training.data.images import open_image
from training.models import load_vlm
from training.settings import ConfigError

PROBE = "what is this"


class Prompt(NamedTuple):
    """What one user says: words, and the images before them; and where it stands, for messages."""

    text: str
    images: tuple[Path, ...] = ()
    place: Place = Place(Path("prompt"))


class Answer(NamedTuple):
    """What the model wrote, and whether it ended by itself or was cut at `max_new_tokens`; or why
    it could not be asked."""

    text: str
    ended: bool
    fault: str = ""


class Writer:
    """A model and its processor, ready to answer.

    Args:
        model: any AutoModelForImageTextToText, on the device where it is to run.
        processor: its AutoProcessor.
        max_new_tokens: the longest answer.

    Raises:
        ConfigError: the processor has no chat template, the template leaves out the image or the
            words, or there is no end token to stop at.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.stops, self.controls = stop_tokens(model, processor), Controls(processor)
        pad = self.tokenizer.pad_token_id
        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=sorted(self.stops),
            pad_token_id=min(self.stops) if pad is None else pad,
            bos_token_id=self.tokenizer.bos_token_id,
        )
        check_template(processor)

    def write(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers to some prompts, in order; those with and without images apart.

        Raises:
            DataError: an image is damaged, or a text is none that can be asked.
        """
        found: dict[int, Answer] = {}
        for seeing in (False, True):
            places = [i for i, prompt in enumerate(prompts) if bool(prompt.images) == seeing]
            if places:
                answers = self._batch([prompts[i] for i in places])
                found.update(zip(places, answers, strict=True))
        return [found[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _batch(self, prompts: Sequence[Prompt]) -> list[Answer]:
        inputs = self.encoded(prompts).to(self.model.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        # generate() fills what a config leaves open from the model's own
        own, was_training = self.model.generation_config, self.model.training
        self.model.generation_config = self.config
        self.model.eval()
        try:
            ids = self.model.generate(**inputs)
        finally:
            self.model.generation_config = own
            self.model.train(was_training)
        written = ids[:, inputs["input_ids"].shape[1] :].tolist()  # (B, new)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        ended = [not self.stops.isdisjoint(row) for row in written]
        return [Answer(text.strip(), end) for text, end in zip(texts, ended, strict=True)]

    def encoded(self, prompts: Sequence[Prompt]) -> Any:
        """The model's inputs for prompts that all have images, or all have none."""
        texts = [self._rendered(prompt) for prompt in prompts]
        images = [
            [open_image(one.place, f"image[{i}]", path) for i, path in enumerate(one.images)]
            for one in prompts
        ]
        bos = self.tokenizer.bos_token
        many = f"{len(prompts)} prompts from this one" if len(prompts) > 1 else ""
        with named(prompts[0].place, "question", "words and images that the processor takes", many):
            return self.processor(
                text=texts,
                images=images if images[0] else None,
                padding=True,
                padding_side="left",
                # a template that writes the start token itself needs no second one
                add_special_tokens=not (bos and texts[0].startswith(bos)),
                return_tensors="pt",
            )

    def _rendered(self, prompt: Prompt) -> str:
        """The prompt's text by the template, unless its own would be read as the template's."""
        if found := self.controls.pattern.search(prompt.text):
            got = f"{found.group()!r} in {shown(prompt.text)}"
            raise fault(prompt.place, "question", got, "text without the model's own tokens")
        with named(prompt.place, "question", "words that the chat template takes"):
            prompt.text.encode()  # a tokenizer calls a lone surrogate a wrong type
            return rendered(self.processor, prompt)


def load(path: str) -> tuple[Any, Any]:
    """A saved model, on this machine's accelerator if it has one, and its processor."""
    model, processor = load_vlm(path)
    return model.to(torch.accelerator.current_accelerator() or "cpu"), processor


def rendered(processor: Any, prompt: Prompt) -> str:
    """The text of a prompt by the processor's chat template, up to where the answer begins."""
    parts = [{"type": "image"} for _ in prompt.images]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": prompt.text}]}
    return processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)


def check_template(processor: Any) -> None:
    """Raise `ConfigError` unless the chat template shows an image and the words of a question."""
    name = type(processor).__name__
    if getattr(processor, "chat_template", None) is None:
        raise ConfigError(
            f"processor: got a {name} without chat_template, expected one: save it with the "
            "template that the model was trained with (chat_template.jinja in its folder)"
        )
    seen, blind = (rendered(processor, Prompt(PROBE, images)) for images in ((Path("image"),), ()))
    if PROBE not in seen or seen == blind:
        raise ConfigError(
            f"processor: the chat template of this {name} makes {seen!r} of an image and "
            f"{PROBE!r}, expected a mark for the image, and the words"
        )


def stop_tokens(model: Any, processor: Any) -> set[int]:
    """Ids that end an answer: the tokenizer's and those of the model's generation config."""
    found: set[int] = set()
    for ids in (processor.tokenizer.eos_token_id, model.generation_config.eos_token_id):
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    if not found:
        raise ConfigError("processor: its tokenizer has no eos_token, which ends an answer")
    return found
