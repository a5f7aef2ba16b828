"""How does a conversation become ids and labels with a processor's own chat template?

The template is rendered once with marks in place of the answers, which tells the text before,
between and after them exactly. That text and the answers are tokenised apart and put together, so

* the ids before an answer are those of generation's prompt, whatever the answer begins with;
* labels are each answer and the token that ends its turn, where generation must stop;
* image tokens are the processor's own: it is called with the images and placeholders alone.

What is believed about a template is tried on a conversation when an encoder is made: pieces against
the whole, prompts against the template's generation prompt, and, where the template marks answers
itself (`generation` blocks), against its marks. One thing differs in published templates and is
not refused: an answer may open otherwise in the history than in a prompt (LLaVA-OneVision:
"assistant \\n" and "assistant\\n"). Training then uses the prompt's opening, for that is what the
first answer is generated from; `ChatEncoder.note` says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from training.data.controls import Controls, special_tokens
from training.data.item import IGNORE, TOKEN_EXTRAS, Item, Seen, build_item
from training.data.pieces import Pieces
from training.data.records import IMAGE_MARK, DataError, Place, Sample, fault
from training.data.template import Encoder, TemplateName, speaks_llava
from training.settings import ConfigError

# Stands for answer i while the template is rendered; no template changes it, no text contains it.
MARK = "\ue000answer{}\ue001"
PER_TOKEN = ("input_ids", "attention_mask", *TOKEN_EXTRAS)


def encoder_for(
    processor: Any, template: TemplateName = "chat", system: str = ""
) -> Encoder | ChatEncoder:
    """The encoder of the processor's own chat template; LLaVA's, where a `LlavaProcessor` has none
    or one that asks alike (`speaks_llava`).

    Raises:
        ConfigError: `ChatEncoder` refuses the processor.
        ValueError: `Encoder` does, or the template is unknown.
    """
    if type(processor).__name__ == "LlavaProcessor" and speaks_llava(processor):
        return Encoder(processor, template, system)
    return ChatEncoder(processor, template, system)


class ChatEncoder:
    """Turns `Sample`s into `Item`s with any image-text processor that has a chat template.

    Args:
        processor: a transformers processor with tokenizer, image processor and chat template.
        template: ``chat`` (the processor's chat template), or ``pretrain``: the images as the
            template borders them, then the caption and a line break; the question is discarded.
        system: a system message for samples that have none of their own.

    Attributes:
        note: how the template's history differs from its prompts, or "".

    Raises:
        ConfigError: the template ends answers without a special token, rewrites earlier turns,
            or makes other ids of a whole conversation than of its pieces.
    """

    fixed_image_tokens = False

    def __init__(self, processor: Any, template: TemplateName = "chat", system: str = "") -> None:
        if template not in ("chat", "pretrain"):
            raise ValueError(f"template: got {template!r}, expected 'chat' or 'pretrain'")
        if not getattr(processor, "chat_template", None):
            raise ConfigError(f"{_name(processor)}: has no chat template, expected one")
        self.processor, self.tokenizer = processor, processor.tokenizer
        if self.tokenizer.eos_token is None:
            raise ConfigError(f"{_name(processor)}: its tokenizer has no eos_token")
        self.template, self.system = template, system
        self.image_token: str = processor.image_token
        self.image_id: int = processor.image_token_id
        self._text, self._controls = Pieces(self.tokenizer), Controls(processor)
        self._specials = special_tokens(self.tokenizer)
        self._learn()
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
        ids = parts["input_ids"]
        extras = {name: part for name, part in parts.items() if name in TOKEN_EXTRAS}
        return Seen(ids, [row.count(self.image_id) for row in ids], extras, made)

    # -- samples ---------------------------------------------------------------------------------

    def item(self, sample: Sample, seen: Seen) -> Item:
        """Ids, labels and visual tensors of one sample.

        Raises:
            DataError: a text spells out a control token, an answer is not what the template
                renders, or ``pretrain`` meets anything but images and one caption.
        """
        ids: list[int] = []
        labels: list[int] = []
        extras: dict[str, list[int]] = {name: [] for name in self._extras}
        pieces = self._pieces(sample)
        places = sum(text.count(self.image_token) for text, _ in pieces)
        if places != len(seen.ids):
            got = f"{places} x {self.image_token!r} for {len(seen.ids)} image(s)"
            raise fault(sample.place, "conversations", got, "as many as images")
        image = -1
        for text, said in pieces:
            for k, part in enumerate(text.split(self.image_token)):
                if k:
                    image += 1
                    ids += seen.ids[image]
                    labels += [IGNORE] * len(seen.ids[image])
                    for name, row in extras.items():
                        row += seen.extras[name][image]
                tokens = self._text.ids(part)
                ids += tokens
                labels += tokens if said else [IGNORE] * len(tokens)
                for row in extras.values():
                    row += [0] * len(tokens)
        start = self._start
        ids, labels = [*start, *ids], [IGNORE] * len(start) + labels
        padded = {name: [0] * len(start) + row for name, row in extras.items()}
        return build_item(sample, ids, labels, seen, padded)

    def length(self, sample: Sample, seen: Seen | None) -> int:
        """Tokens of the item."""
        if seen is None:
            raise ValueError("seen: got None, expected the images: their size decides the tokens")
        return len(self.item(sample, seen)["input_ids"])

    def prompt(self, sample: Sample, seen: Seen) -> list[int]:
        """Ids that generation of the first answer starts from."""
        item = self.item(sample, seen)
        first = int((item["labels"] != IGNORE).nonzero()[0])
        return item["input_ids"][:first].tolist()

    def messages(self, sample: Sample, answers: Sequence[str]) -> list[dict[str, Any]]:
        """The conversation as templates want it: a list of parts for every message."""
        system = sample.system if sample.system is not None else self.system or None
        talk = [] if system is None else [_message("system", system)]
        for (human, _), answer in zip(sample.turns, answers, strict=False):
            talk.append({"role": "user", "content": _parts(human, sample.ordered)})
            talk.append(_message("assistant", answer))
        return talk

    def _pieces(self, sample: Sample) -> list[tuple[str, bool]]:
        """The text in order, and whether it is learned."""
        self._controls.check(sample)
        answers = [answer.strip() if self._trims else answer for _, answer in sample.turns]
        if self.template == "pretrain":
            return self._caption(sample, answers)
        marked = [MARK.format(i) for i in range(len(answers))]
        around = self._around(sample, self.render(self.messages(sample, marked)), marked)
        pieces = [(around[0], False)]
        for answer, after in zip(answers, around[1:], strict=True):
            pieces[-1] = (pieces[-1][0].removesuffix(self.opening) + self.prompt_opening, False)
            rest = after.removeprefix(self.ending)
            pieces += [(f"{self.lead}{answer}{self.ending}", True), (rest, False)]
        whole = "".join(
            f"{before}{answer}" for before, answer in zip(around, [*answers, ""], strict=True)
        )
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
        return [(image * len(sample.images), False), (f"{answers[0]}\n", True)]

    # -- the template ----------------------------------------------------------------------------

    def render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """The template's text; `prompt`: with the opening of the next answer."""
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
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
        self._head, self._tail = self._borders()
        bos = self.tokenizer.bos_token
        start = self.tokenizer("").input_ids[:1]
        added = start == [self.tokenizer.bos_token_id] and not whole.startswith(bos or "\0")
        self._start: list[int] = start if added else []
        probe = self.processor(text=["a"], return_tensors="pt")
        self._extras = [name for name in TOKEN_EXTRAS if name in probe]

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


def check_template(encoder: ChatEncoder) -> None:
    """Compare an encoder's ids with the processor's own on a conversation with two images.

    Raises:
        ConfigError: they differ; the message shows where.
    """
    images = [Image.new("RGB", (64, 48), (200, 30, 30)), Image.new("RGB", (40, 60), (30, 30, 200))]
    human = f"{IMAGE_MARK}{IMAGE_MARK}What is this?"
    turns = ((human, "A red square, and a blue one."), ("How many are there?", "There are 2."))
    for shown, opening in ((images, human), ([], "What is this?")):
        sample = Sample(
            Place(Path("probe")),
            ("",) * len(shown),
            ((opening, turns[0][1]), turns[1]),
            ordered=True,
        )
        try:
            _compare(encoder, sample, shown)
        except DataError as error:
            raise encoder.refusal(
                str(error), "a template that renders a plain conversation"
            ) from error


def _compare(encoder: ChatEncoder, sample: Sample, images: list[Image.Image]) -> None:
    if encoder.template == "pretrain":
        return  # no conversation: nothing of it is rendered
    item: dict[str, Any] = dict(encoder.item(sample, encoder.see(images)))
    talk = encoder.messages(sample, [answer for _, answer in sample.turns])
    shown = iter(images)
    for part in (part for message in talk for part in message["content"]):
        if part["type"] == "image":
            part["image"] = next(shown)
    whole = partial(
        encoder.processor.apply_chat_template, tokenize=True, return_dict=True, return_tensors="pt"
    )
    starts = [i for i in range(1, len(item["labels"])) if _opens(item["labels"], i)]
    ends = [(talk[:-1], starts[1]), (talk[:-3], starts[0])]
    if encoder.note:  # its history differs from its prompts: only the first prompt can agree
        ends = ends[1:]
    else:
        _same(encoder, item, whole(talk), len(item["input_ids"]), "a whole conversation")
    for messages, length in ends:
        made = whole(messages, add_generation_prompt=True)
        _same(encoder, item, made, length, "a prompt for generation")
    if re.search(r"\{%-?\s*generation\s", encoder.processor.chat_template):
        made = whole(talk, return_assistant_tokens_mask=True)
        marked = made["input_ids"][0][made["assistant_masks"][0].bool()]
        text = encoder.tokenizer.decode(marked)
        if not all(
            answer in text and human.split(">")[-1] not in text for human, answer in sample.turns
        ):
            raise encoder.refusal(f"{text!r} marked as generation", "the answers, and only them")


def _same(encoder: ChatEncoder, item: dict[str, Any], made: Any, length: int, what: str) -> None:
    """Refuse the template unless the first `length` tokens of the item are the processor's."""
    for name in ("input_ids", *encoder._extras):
        ours, theirs = item[name][:length].tolist(), made[name][0].tolist()
        if ours != theirs:
            decode = encoder.tokenizer.decode
            where = first_difference(ours, theirs, decode if name == "input_ids" else str)
            raise encoder.refusal(f"in {what}, {name}: {where}", "pieces that make up the whole")


def _opens(labels: Any, i: int) -> bool:
    return bool(labels[i] != IGNORE and labels[i - 1] == IGNORE)


def first_difference(ours: Any, theirs: Any, show: Any = str) -> str:
    """Where two texts or lists of ids part, and how each goes on."""
    pairs = zip(ours, theirs, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    shown = [show(side[at : at + 12]) for side in (ours, theirs)]
    return f"{shown[0]!r} at {at} in place of {shown[1]!r}"


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _parts(human: str, ordered: bool) -> list[dict[str, str]]:
    """A human turn as parts. Unless `ordered`, one image comes first, as LLaVA does; a line break
    next to an image is dropped, because templates write their own."""
    if not ordered and human.count(IMAGE_MARK) == 1:
        human = f"{IMAGE_MARK}\n{human.replace(IMAGE_MARK, '').strip()}"
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
