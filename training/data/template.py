"""How does a conversation become token ids, and which of them are labels?

Two templates, as LLaVA's stages use them (``</s>`` is the tokenizer's own end of sequence):

* ``chat``: ``USER: <image>\\n{q} ASSISTANT: {a}</s>USER: {q2} ASSISTANT: {a2}</s>``; labels are
  each answer, with the space before it, and its ``</s>``. A system message is a line before it.
* ``pretrain``: ``<image>{caption}``, question and system message discarded; labels are all after
  the images. The published recipe ends a caption with a line break and **no end of sequence**, so a
  model trained with this template alone does not learn to stop: stopping is learned in the chat
  stages. A tokenizer that drops white space (`training.demo.words`'s does) drops that line break
  too.

Ids are built piece by piece, never by tokenising a whole string and measuring prefixes: the
boundary between prompt and answer is then exact for every tokenizer, and the prompt used for
generation is the same ids that training saw. Each ``<image>`` becomes as many image tokens as the
processor makes of one image. A human turn with one image has it moved to its front, as LLaVA and
LLaVA-KD do (half of LLaVA's captions data writes it last); with several, they stay where they are.

A processor whose chat template asks in another way keeps it: `training.data.chat` encodes for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from PIL import Image
from transformers import LlavaProcessor

from training.data.controls import Controls
from training.data.item import IGNORE, Item, Seen, build_item
from training.data.pieces import Pieces
from training.data.records import IMAGE_MARK, Sample, fault

TemplateName = Literal["chat", "pretrain"]
PROBE = "What is this?"


class Encoded(NamedTuple):
    """Token ids of one sample and, at the same positions, its labels (-100: no label)."""

    input_ids: list[int]
    labels: list[int]


class Encoder:
    """Turns `Sample`s into ids and labels with one processor and one template.

    Args:
        processor: its tokenizer, image token and image size decide the ids.
        template: ``chat`` or ``pretrain``, as the module describes them.
        system: the system message of samples that have none of their own; none by default.

    Attributes:
        note: where a chat template that the user has is not what is trained with, or "".

    Raises:
        ValueError: an unknown template, a tokenizer without an end-of-sequence token, or an
            image processor whose number of tokens per image is not fixed.
    """

    fixed_image_tokens = True

    def __init__(
        self, processor: LlavaProcessor, template: TemplateName = "chat", system: str = ""
    ) -> None:
        if template not in ("chat", "pretrain"):
            raise ValueError(f"template: got {template!r}, expected 'chat' or 'pretrain'")
        self.tokenizer = processor.tokenizer
        if self.tokenizer.eos_token_id is None:
            raise ValueError("processor: its tokenizer has no eos_token, which ends every answer")
        self.template, self.system = template, system
        self.image_id: int = processor.image_token_id
        self.tokens_per_image = image_tokens(processor)
        self.image_processor = processor.image_processor
        self._text, self._controls = Pieces(self.tokenizer), Controls(processor)
        start = self.tokenizer("").input_ids[:1]  # what the tokenizer itself puts before any text
        self._start = start if start == [self.tokenizer.bos_token_id] else []
        self.note = _note(processor)

    def see(self, images: Sequence[Image.Image]) -> Seen:
        """The pixels of one sample's images, (n_images, 3, H, W), and their tokens."""
        if not images:
            return Seen()
        pixels = self.image_processor(images=list(images), return_tensors="pt").pixel_values
        ids = [[self.image_id] * self.tokens_per_image for _ in images]
        return Seen(ids, [len(row) for row in ids], inputs={"pixel_values": pixels})

    def item(self, sample: Sample, seen: Seen) -> Item:
        """Ids, labels and pixels of one sample; raises as `encode` does."""
        return build_item(sample, *self.encode(sample), seen, {})

    def length(self, sample: Sample, seen: Seen | None = None) -> int:
        """Tokens of the item; raises as `encode` does."""
        return len(self.encode(sample).input_ids)

    def encode(self, sample: Sample) -> Encoded:
        """Ids and labels of a whole sample.

        Raises:
            DataError: an answer holds a word the tokenizer does not know, a text spells out a
                control token, or ``pretrain`` meets a sample that is not images and one caption.
        """
        self._controls.check(sample)
        if self.template == "pretrain":
            return self._caption(sample)
        ids: list[int] = []
        labels: list[int] = []
        for i, (_, answer) in enumerate(sample.turns):
            prompt = self.prompt(sample, i)
            said = [*self._answer(sample, i, f" {answer}"), self.tokenizer.eos_token_id]
            ids += prompt + said
            labels += [IGNORE] * len(prompt) + said
        return Encoded(ids, labels)

    def prompt(self, sample: Sample, turn: int = 0) -> list[int]:
        """Ids of one human turn up to and including ``ASSISTANT:``, or of the images alone.

        ``prompt(sample)`` is what generation of the first answer starts from.
        """
        if self.template == "pretrain":
            return [*self._start, *[self.image_id] * (len(sample.images) * self.tokens_per_image)]
        human = sample.turns[turn][0]
        if human.count(IMAGE_MARK) == 1:
            human = f"{IMAGE_MARK}\n{human.replace(IMAGE_MARK, '').strip()}"
        system = sample.system if sample.system is not None else self.system
        opening, start = (f"{system} " * bool(system), self._start) if turn == 0 else ("", [])
        ids = list(start)
        for i, text in enumerate(f"{opening}USER: {human} ASSISTANT:".split(IMAGE_MARK)):
            if i:
                ids += [self.image_id] * self.tokens_per_image
            ids += self._text.ids(text)
        return ids

    def _caption(self, sample: Sample) -> Encoded:
        if not sample.images or len(sample.turns) != 1:
            got = f"{len(sample.images)} image(s) and {len(sample.turns)} turn(s)"
            expected = "images and one turn (template 'pretrain')"
            raise fault(sample.place, "conversations", got, expected)
        prompt, caption = self.prompt(sample), self._answer(sample, 0, f"{sample.turns[0][1]}\n")
        return Encoded([*prompt, *caption], [IGNORE] * len(prompt) + [*caption])

    def _answer(self, sample: Sample, turn: int, text: str) -> tuple[int, ...]:
        """Ids of what gpt says; a label must be a word the model could say."""
        ids = self._text.ids(text)
        unknown = self.tokenizer.unk_token_id
        if not ids or (unknown is not None and unknown in ids):
            field = sample.field.format(sample.first + 2 * turn + 1)
            raise fault(sample.place, field, repr(text), "only words the tokenizer knows")
        return ids


def speaks_llava(processor: LlavaProcessor) -> bool:
    """Whether a processor has no chat template of its own, or one that asks as ``chat`` does."""
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


def _note(processor: LlavaProcessor) -> str:
    """What is not the user's own in a conversation of ``chat``."""
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
