"""What does a model write? Answers to the last question of conversations, a batch at a time.

The one generator of this trainer: `data answer`, evaluation and the demo ask by it. A prompt is the
very ids that training puts before an answer (`training.data.chat`), images by the processor.
Prompts of a batch are padded on the left, so that every answer starts where its prompt ends; an
answer does not depend on its neighbours (but for the rounding of a larger matrix product).

Decoding is transformers' own, plainly greedy: the most likely token each time, until a token that
ends an answer (the template's, the tokenizer's, those of the model's generation config) or
`max_new_tokens`. Or it is sampled by `temperature` and `top_p`, from a seed of the caller's.
Whatever else the generation config asks for (a repetition penalty) is left out, so that two runs
write the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from mllmkd_kernels.batch import BESIDES, in_eval
from mllmkd_kernels.own_answers import end_ids, seeded
from training.anatomy import positions
from training.data.collate import Collator
from training.data.encoding import Encoding, Images
from training.data.item import Item
from training.data.records import DataError
from training.data.sample import Sample
from training.models import load_vlm
from training.settings import ConfigError

IMAGES_MB = 256  # of processed images kept in memory: small sets are asked about again and again
ENDLESS = 1 << 40  # positions of a model that names no limit


class Asked(NamedTuple):
    """A conversation whose last answer is wanted (`Sample.asked`), its images, where they come
    from (`training.data.sources.Source`)."""

    sample: Sample
    images: Images
    identity: Hashable = None


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
        temperature: 0 is greedy.
        top_p: of the tokens to choose from, when sampling.

    Raises:
        ConfigError: answers may be longer than the model's positions, or the processor cannot be
            asked with (`training.data.chat.ChatEncoder`, `training.data.collate.Collator`).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        longest = (positions(model.config) or ENDLESS) - max_new_tokens
        if longest < 1:
            raise ConfigError(
                f"max_new_tokens: got {max_new_tokens}, expected less than the model's "
                f"{positions(model.config)} positions"
            )
        self.encoding = Encoding(processor, max_length=longest, cache_mb=IMAGES_MB)
        self.collator = Collator(processor, side="left")
        self.stops = self._stops()
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=bool(temperature),
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=sorted(self.stops),
            pad_token_id=self.collator.pad_id,
            bos_token_id=self.tokenizer.bos_token_id,
            **sampling,
        )

    def write(self, asked: Sequence[Asked], seed: int = 0) -> list[Answer]:
        """The answers, in order; one that cannot be asked (`Encoding.prompt`) has its fault in
        place of it, and the others are answered. `seed` decides what is sampled."""
        prompts = [self._prompt(one) for one in asked]
        items = [item for item in prompts if not isinstance(item, Answer)]
        written = iter(self._written(items, seed) if items else ())
        return [item if isinstance(item, Answer) else next(written) for item in prompts]

    def _prompt(self, one: Asked) -> Item | Answer:
        try:
            return self.encoding.prompt(*one)
        except DataError as error:
            return Answer("", True, str(error))

    def inputs(self, items: Sequence[Item]) -> dict[str, Any]:
        """Prompts as the model takes them: on its device, in its dtype."""
        batch = self.collator(items)
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in batch.items()
            if isinstance(value, torch.Tensor) and name not in (*BESIDES, "labels")
        }

    @torch.no_grad()
    def _written(self, items: Sequence[Item], seed: int) -> list[Answer]:
        inputs = self.inputs(items)
        drawn = seeded(seed, self.model.device) if self.config.do_sample else nullcontext()
        with in_eval(self.model), self._configured(), drawn:
            ids = self.model.generate(**inputs)
        written = ids[:, inputs["input_ids"].shape[1] :].tolist()  # (B, new)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        ended = [not self.stops.isdisjoint(row) for row in written]
        return [Answer(text.strip(), end) for text, end in zip(texts, ended, strict=True)]

    @contextmanager
    def _configured(self) -> Iterator[None]:
        """The model with our generation config, which it would fill up from its own."""
        own, self.model.generation_config = self.model.generation_config, self.config
        try:
            yield
        finally:
            self.model.generation_config = own

    def _stops(self) -> set[int]:
        """Ids that end an answer: the template's, the tokenizer's, the model's own."""
        ending = self.encoding.encoders[0].ending
        own = {self.tokenizer(ending, add_special_tokens=False).input_ids[-1]}
        return own | end_ids(self.tokenizer, self.model.generation_config)


def load(path: str) -> tuple[Any, Any]:
    """A saved model, on this machine's accelerator if it has one, and its processor."""
    model, processor = load_vlm(path)
    return model.to(torch.accelerator.current_accelerator() or "cpu"), processor
