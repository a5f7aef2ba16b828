"""How does a conversation become ids and labels with a processor's own chat template?

The template is rendered once with marks in place of the answers, which tells the text before,
between and after them exactly. That text and the answers are tokenised apart and put together, so

* the ids before an answer are those of generation's prompt, whatever the answer begins with;
* labels are each answer and the token that ends its turn, where generation must stop;
* image tokens are the processor's own: it is called with the images and placeholders alone.

What is believed about a template is tried when an encoder is made (`training.data.trial`). One
thing differs in published templates and is not refused: an answer may open otherwise in the history
than in a prompt (LLaVA-OneVision: "assistant \\n" and "assistant\\n"). Training then uses the
prompt's opening, for that is what the first answer is generated from; `ChatEncoder.note` says so.

A LLaVA that is asked as LLaVA was is encoded with `training.data.template`'s, texts as they stand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mllmkd_kernels.models import TOKEN_TYPES
from training.data.controls import Controls, special_tokens
from training.data.item import IGNORE, Item, Seen, build_item
from training.data.records import fault
from training.data.sample import IMAGE_MARK, Sample
from training.data.template import (
    CHAT_TEMPLATE,
    TemplateName,
    image_tokens,
    speaks_llava,
    unused_template,
)
from training.data.trial import check_template, first_difference
from training.settings import ConfigError

# Stands for answer i while the template is rendered; no template changes it, no text contains it.
MARK = "\ue000answer{}\ue001"
PER_TOKEN = ("input_ids", "attention_mask", *TOKEN_TYPES)
REMEMBERED = 1 << 16  # pieces of text whose ids are kept: templated questions repeat


class ChatEncoder:
    """Turns `Sample`s into `Item`s with any image-text processor that has a chat template.

    Args:
        processor: a transformers processor with tokenizer, image processor and chat template.
        template: ``chat`` (the processor's chat template), or ``pretrain``: the images as the
            template borders them, then the caption and a line break; question and system message
            are discarded. The published recipe ends a caption without an end of sequence, so a
            model trained with this alone does not learn to stop: that is learned from ``chat``.

    Attributes:
        note: how the template's history differs from its prompts, or which template of the user's
            is not used, or "".
        tokens_per_image: where every image has as many, so that lengths need no look; else None.

    Raises:
        ConfigError: the template ends answers without a special token, rewrites earlier turns,
            or makes other ids of a whole conversation than of its pieces.
        ValueError: an unknown `template`, or a LLaVA's images are not all of one size.
    """

    def __init__(self, processor: Any, template: TemplateName = "chat") -> None:
        if template not in ("chat", "pretrain"):
            raise ValueError(f"template: got {template!r}, expected 'chat' or 'pretrain'")
        self.llava = speaks_llava(processor)
        if not self.llava and not getattr(processor, "chat_template", None):
            raise ConfigError(f"{_name(processor)}: has no chat template, expected one")
        self.processor, self.tokenizer = processor, processor.tokenizer
        if self.tokenizer.eos_token is None:
            raise ConfigError(f"{_name(processor)}: its tokenizer has no eos_token")
        self.template = template
        self.image_token: str = processor.image_token
        self.image_id = row_id(processor)
        self._controls, self._known = Controls(processor), dict[str, tuple[int, ...]]()
        self._specials = special_tokens(self.tokenizer)
        self.tokens_per_image = image_tokens(processor) if self.llava else None
        self._learn()
        if self.llava:
            self.note = unused_template(processor)
        else:
            check_template(self)

    # -- images ----------------------------------------------------------------------------------

    def see(self, images: Sequence[Image.Image]) -> Seen:
        """The processor's tokens and tensors of one sample's images.

        It is given placeholders alone, parted by end-of-sequence tokens, which no image has.
        """
        if not images:
            return Seen()
        text = self.tokenizer.eos_token.join([self.image_token] * len(images))
        made = dict(
            self.processor(
                text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=False
            )
        )
        rows = {name: made.pop(name)[0].tolist() for name in PER_TOKEN if name in made}
        at = [
            i for i, token in enumerate(rows["input_ids"]) if token == self.tokenizer.eos_token_id
        ]
        bounds = list(zip([0, *(i + 1 for i in at)], [*at, None], strict=True))
        parts = {name: [row[a:b] for a, b in bounds] for name, row in rows.items()}
        before, after = self._margins
        parts = {n: [row[before : len(row) - after] for row in part] for n, part in parts.items()}
        ids = parts["input_ids"]
        extras = {name: part for name, part in parts.items() if name in TOKEN_TYPES}
        return Seen(ids, [row.count(self.image_id) for row in ids], extras, made)

    # -- samples ---------------------------------------------------------------------------------

    def item(self, sample: Sample, seen: Seen) -> Item:
        """Ids, labels and visual tensors of one sample.

        Raises:
            DataError: a text spells out a control token, an answer is not what the template
                renders or has words that the tokenizer does not know, or ``pretrain`` meets
                anything but images and one caption.
        """
        return self._joined(sample, seen, self._pieces(sample))

    def prompt(self, sample: Sample, seen: Seen) -> Item:
        """What generation of the last answer starts from: an item of the ids before it, without
        labels of its own; faults as `item`'s."""
        return self._joined(sample, seen, self._pieces(sample, prompt=True))

    def _joined(self, sample: Sample, seen: Seen, pieces: list[tuple[str, bool]]) -> Item:
        """The item of pieces of text, with the tokens of the images at their places."""
        ids: list[int] = []
        labels: list[int] = []
        extras: dict[str, list[int]] = {name: [] for name in self._extras}
        places = sum(text.count(self.image_token) for text, _ in pieces)
        if places != len(seen.ids):
            got = f"{places} x {self.image_token!r} for {len(seen.ids)} image(s)"
            raise fault(sample.place, "conversations", got, "as many as images")
        image = -1
        for text, said in pieces:
            text = text.replace(self.image_token, self._framed)
            for k, part in enumerate(text.split(self.image_token)):
                if k:
                    image += 1
                    ids += seen.ids[image]
                    labels += [IGNORE] * len(seen.ids[image])
                    for name, row in extras.items():
                        row += seen.extras[name][image]
                tokens = self._ids(part)
                ids += tokens
                labels += tokens if said else [IGNORE] * len(tokens)
                for row in extras.values():
                    row += [0] * len(tokens)
        start = self._start
        ids, labels = [*start, *ids], [IGNORE] * len(start) + labels
        padded = {name: [0] * len(start) + row for name, row in extras.items()}
        return build_item(sample, ids, labels, seen, padded)

    def _ids(self, text: str) -> tuple[int, ...]:
        """Of a piece of text, without anything before or after it; `UnicodeEncodeError` at half a
        character."""
        ids = self._known.get(text)
        if ids is None:
            text.encode()  # a tokenizer calls a lone surrogate a wrong type
            ids = tuple(self.tokenizer(text, add_special_tokens=False).input_ids) if text else ()
            if len(self._known) < REMEMBERED:
                self._known[text] = ids
        return ids

    def length(self, sample: Sample, seen: Seen | None) -> int:
        """Tokens of the item; `seen` may be None where there are `tokens_per_image`."""
        if seen is None:
            seen = Seen([[self.image_id] * (self.tokens_per_image or 0)] * len(sample.images))
        return len(self.item(sample, seen)["input_ids"])

    def messages(self, sample: Sample, answers: Sequence[str]) -> list[dict[str, Any]]:
        """The conversation as templates want it, in parts; LLaVA's gets its questions whole."""
        talk = [] if sample.system is None else [_message("system", sample.system)]
        for (human, _), answer in zip(sample.turns, answers, strict=False):
            if self.llava:
                content: Any = _image_first(human).replace(IMAGE_MARK, self.image_token)
            else:
                content = _parts(human if sample.ordered else _image_first(human))
            talk.append({"role": "user", "content": content})
            talk.append(_message("assistant", answer))
        return talk

    def _pieces(self, sample: Sample, prompt: bool = False) -> list[tuple[str, bool]]:
        """The text in order, and whether it is learned; `prompt`: as far as the last answer."""
        self._controls.check(sample)
        answers = [answer.strip() if self._trims else answer for _, answer in sample.turns]
        if self.template == "pretrain":
            return self._caption(sample, answers)[: 1 if prompt else 2]
        marked = [MARK.format(i) for i in range(len(answers))]
        if prompt:
            answers[-1] = marked[-1]
        around = self._around(sample, self.render(self.messages(sample, marked)), marked)
        pieces = [(around[0], False)]
        for i, (answer, after) in enumerate(zip(answers, around[1:], strict=True)):
            pieces[-1] = (pieces[-1][0].removesuffix(self.opening) + self.prompt_opening, False)
            if prompt and answer == marked[-1]:
                break
            rest = after.removeprefix(self.ending)
            said = self._answer(sample, i, f"{self.lead}{answer}{self.ending}")
            pieces += [(said, True), (rest, False)]
        whole = "".join(
            f"{before}{answer}" for before, answer in zip(around, [*answers, ""], strict=True)
        )
        if answers == marked:  # a first question's prompt: nothing was said yet
            return pieces
        if (rendered := self.render(self.messages(sample, answers))) != whole:
            where = first_difference(whole, rendered)
            raise fault(sample.place, "conversations", where, "answers rendered as they are")
        return pieces

    def _around(self, sample: Sample, text: str, marked: list[str]) -> list[str]:
        """The rendered text before, between and after the answers."""
        around = re.split("|".join(map(re.escape, marked)), text)
        sound = len(around) == len(marked) + 1
        sound = sound and all(text.endswith(self.opening) for text in around[:-1])
        if not sound or not all(text.startswith(self.ending) for text in around[1:]):
            got = f"{text!r} from the chat template"
            raise fault(sample.place, "conversations", got, "every answer opened and ended alike")
        return around

    def _caption(self, sample: Sample, answers: list[str]) -> list[tuple[str, bool]]:
        if not sample.images or len(answers) != 1:
            got = f"{len(sample.images)} image(s) and {len(answers)} turn(s)"
            expected = "images and one turn (template 'pretrain')"
            raise fault(sample.place, "conversations", got, expected)
        image = f"{self._head}{self.image_token}{self._tail}"
        said = self._answer(sample, 0, f"{answers[0]}\n")
        return [(image * len(sample.images), False), (said, True)]

    def _answer(self, sample: Sample, i: int, text: str) -> str:
        """The text of answer i; what is learned must be words that the model could say."""
        unknown = self.tokenizer.unk_token_id
        if unknown != self.tokenizer.eos_token_id and unknown in self._ids(text):
            field = sample.field_of(2 * i + 1)
            raise fault(sample.place, field, repr(text), "only words the tokenizer knows")
        return text

    # -- the template ----------------------------------------------------------------------------

    def render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """The template's text; `prompt`: with the opening of the next answer."""
        ours = CHAT_TEMPLATE.replace(IMAGE_MARK, self.image_token) if self.llava else None
        return self.processor.apply_chat_template(
            messages, chat_template=ours, tokenize=False, add_generation_prompt=prompt
        )

    def _learn(self) -> None:
        """How an answer is opened and ended, and what borders an image."""
        mark = MARK.format(0)
        user = {"role": "user", "content": [{"type": "text", "text": "What is this?"}]}
        before, prompt = self.render([user]), self.render([user], prompt=True)
        whole = self.render([user, _message("assistant", mark)])
        if not prompt.startswith(before) or not whole.startswith(before) or mark not in whole:
            got = f"{before!r}, then {prompt!r} with a prompt and {whole!r} with an answer"
            raise self.refusal(got, "texts that continue each other")
        self.prompt_opening = prompt[len(before) :]
        self.opening, after = whole[len(before) :].split(mark)
        self.lead = self.note = ""
        if self.opening.startswith(self.prompt_opening):
            # the prompt stops before a space that the answer brings, as in "Assistant: {answer}"
            self.lead = self.opening[len(self.prompt_opening) :]
        else:
            self.note = (
                f"{_name(self.processor)}: its chat template opens an answer with "
                f"{self.prompt_opening!r} in a prompt and {self.opening!r} in history; "
                "training uses the former"
            )
        self.ending = self._ending(after)
        self._trims = f" {mark} " not in self.render([user, _message("assistant", f" {mark} ")])
        self._head, self._tail = ("", "") if self.llava else self._borders()
        self._margins, self._framed = (0, 0), self.image_token
        if not self.llava:
            self._learn_margins()
        bos = self.tokenizer.bos_token
        start = self.tokenizer("").input_ids[:1]
        written = self.template == "chat" and whole.startswith(bos or "\0")
        added = start == [self.tokenizer.bos_token_id] and not written
        self._start: list[int] = start if added else []
        probe = {} if self.llava else self.processor(text=["a"], return_tensors="pt")
        self._extras = [name for name in TOKEN_TYPES if name in probe]

    def _learn_margins(self) -> None:
        """The plain text that a processor puts around an image (Gemma 3: line breaks), and how many
        tokens it is alone: it is tokenised together with the text that it stands in."""
        ids = self.see([Image.new("RGB", (64, 48))]).ids[0]
        known = self.tokenizer.added_tokens_decoder
        marks = [t == self.image_id or (t in known and known[t].special) for t in ids]
        before, after = marks.index(True), marks[::-1].index(True)
        text = [self.tokenizer.decode(part) for part in (ids[:before], ids[len(ids) - after :])]
        self._margins, self._framed = (before, after), self.image_token.join(text)

    def _ending(self, after: str) -> str:
        """The text after an answer up to its first special token, where generation stops."""
        ends = [after.index(t) + len(t) for t in self._specials if t and t in after]
        if not ends:
            raise self.refusal(
                f"{after!r} after an answer", "a special token there, for generation to stop at"
            )
        return after[: min(ends)]

    def _borders(self) -> tuple[str, str]:
        """What the template writes before and after each image: special tokens only."""
        two = {"role": "user", "content": [{"type": "image"}, {"type": "image"}]}
        before, between, _ = [*self.render([two]).split(self.image_token), "", ""][:3]
        starts = [between.index(token) for token in self._specials if token in between]
        heads = [between[i:] for i in sorted(starts) if before.endswith(between[i:])]
        head = heads[0] if heads else ""
        return head, between.removesuffix(head)

    def refusal(self, got: str, expected: str) -> ConfigError:
        """The one wording of why a template cannot be trained with."""
        return ConfigError(
            f"{_name(self.processor)}: chat template: got {got}, expected {expected}"
        )


def row_id(processor: Any) -> int:
    """The id that a processor has for every row of an image; Gemma 3's calls the token before them
    its image token."""
    tokenizer, named = processor.tokenizer, processor.image_token_id
    return tokenizer.image_token_id if named == getattr(tokenizer, "boi_token_id", -1) else named


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _image_first(human: str) -> str:
    """A human turn with its image before the words, if it has one alone, as LLaVA does."""
    if human.count(IMAGE_MARK) != 1:
        return human
    return f"{IMAGE_MARK}\n{human.replace(IMAGE_MARK, '').strip()}"


def _parts(human: str) -> list[dict[str, str]]:
    """A human turn as parts; line breaks next to images are dropped: templates write their own."""
    parts = []
    texts = human.split(IMAGE_MARK)
    for i, text in enumerate(texts):
        text = text.removeprefix("\n") if i else text
        text = text.removesuffix("\n") if i + 1 < len(texts) else text
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def _name(processor: Any) -> str:
    return type(processor).__name__
