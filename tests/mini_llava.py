"""A code base in the style of LLaVA and TinyLLaVA, in small: what examples/llava_patch.py is for.

Only the contract is theirs: the image token −200, `prepare_inputs_labels_for_multimodal` with its
arguments and results, a forward that calls it, a dummy image for a text-only sample, a trainer
that overrides `compute_loss`. `released_loss` is that of the published LLaVA-KD trainer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from tests.pair import kl, relation
from tests.tiny_models import TEXT

IMAGE, IGNORE, ROWS = -200, -100, 4


class MiniLlava(tf.Qwen2ForCausalLM):
    """A language model with an eye: 4 patches of 16 × 16 pixels."""

    def __init__(self, hidden: int, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(tf.Qwen2Config(**{**TEXT, "hidden_size": hidden}))
        self.eye = nn.Linear(3 * 16 * 16, hidden)
        self.lm_head.weight.data *= 20

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Any,
        position_ids: Any,
        attention_mask: Any,
        past_key_values: Any,
        labels: Any,
        images: Any,
        image_sizes: Any = None,
    ) -> tuple[Any, ...]:
        patches = F.unfold(images, 16, stride=16).transpose(1, 2)  # (I, 4, 768)
        seen = iter(self.eye(patches))
        rows, their_labels = [], []
        for ids, row_labels, keep in zip(input_ids, labels, attention_mask.bool(), strict=True):
            ids, row_labels = ids[keep], row_labels[keep]
            at = (ids == IMAGE).nonzero().flatten().tolist()
            if not at:
                next(seen)  # the dummy
            parts, part_labels, start = [], [], 0
            for stop in [*at, len(ids)]:
                parts.append(self.get_input_embeddings()(ids[start:stop]))
                part_labels.append(row_labels[start:stop])
                if stop < len(ids):
                    parts.append(next(seen))
                    part_labels.append(row_labels.new_full((ROWS,), IGNORE))
                start = stop + 1
            rows.append(torch.cat(parts))
            their_labels.append(torch.cat(part_labels))
        length = max(map(len, rows))
        mask = torch.stack([torch.arange(length) < len(row) for row in rows])
        pad = nn.utils.rnn.pad_sequence
        embeds, expanded = pad(rows, True), pad(their_labels, True, IGNORE)
        return None, None, mask.to(attention_mask.dtype), past_key_values, embeds, expanded

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        images: Any = None,
    ) -> Any:
        if inputs_embeds is None:
            found = self.prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, past_key_values, labels, images
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = found
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
        )


class MiniTrainer(tf.Trainer):
    """The code base's own."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this loss is to be replaced")


def samples(befores: tuple[int | None, ...]) -> list[dict[str, Tensor]]:
    """One sample an entry: that many tokens before its image, or None for text alone."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for i, before in enumerate(befores):
        words = torch.randint(3, 90, (12 - i,), generator=generator)
        question, answer = words[: before or 3], words[before or 3 :]
        image = torch.tensor([IMAGE] if before is not None else [], dtype=torch.long)
        ids = torch.cat((question, image, answer))
        labels = torch.cat((torch.full((len(ids) - len(answer),), IGNORE), answer))
        pixels = torch.randn(3, 32, 32, generator=generator)
        found.append({"input_ids": ids, "labels": labels, "images": pixels})
    return found


def collate(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    ids = pad([f["input_ids"] for f in features], True)
    return {
        "input_ids": ids,
        "labels": pad([f["labels"] for f in features], True, IGNORE),
        "attention_mask": (ids != 0).long(),
        "images": torch.stack([f["images"] for f in features]),
    }


def logits_and_labels(model: MiniLlava, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Whole logits and labels, both over the expanded positions."""
    found = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
    )
    return model(attention_mask=found[2], inputs_embeds=found[4]).logits.float(), found[5]


def released_loss(student: MiniLlava, teacher: MiniLlava, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, KL of the answers and of the rows of the images, one cosine for the batch; the
    rows are where the *first* sample has them. All weights 1."""
    (z_s, labels), (z_t, _) = logits_and_labels(student, batch), logits_and_labels(teacher, batch)
    answers = labels[:, 1:] != IGNORE
    ours, theirs = z_s[:, :-1][answers], z_t[:, :-1][answers]
    start = int((batch["input_ids"][0] == IMAGE).nonzero())
    v_s, v_t = z_s[:, start : start + ROWS], z_t[:, start : start + ROWS]
    r_s, r_t = v_s @ v_s.transpose(1, 2), v_t @ v_t.transpose(1, 2)
    cosine = F.cosine_similarity(r_t.reshape(1, -1), r_s.reshape(1, -1)).squeeze()
    visual = kl(v_s.flatten(0, 1), v_t.flatten(0, 1))
    return F.cross_entropy(ours, labels[:, 1:][answers]) + kl(ours, theirs) + visual + 1 - cosine


def papers_loss(student: MiniLlava, teacher: MiniLlava, each: list[dict[str, Tensor]]) -> Tensor:
    """Sample by sample, unpadded, each image where it is; the paper's weights."""
    answers, following, images = [], [], []
    for sample in each:
        batch = collate([sample])
        (z_s, labels), (z_t, _) = (logits_and_labels(m, batch) for m in (student, teacher))
        rows = labels[0, 1:] != IGNORE
        answers.append((z_s[0, :-1][rows], z_t[0, :-1][rows]))
        following.append(labels[0, 1:][rows])
        for start in (sample["input_ids"] == IMAGE).nonzero().flatten().tolist():
            images.append((z_s[0, start : start + ROWS], z_t[0, start : start + ROWS]))
    ours, theirs = (torch.cat(z) for z in zip(*answers, strict=True))
    visual = kl(*(torch.cat(z) for z in zip(*images, strict=True)))
    relations = torch.stack([relation(*z) for z in images]).mean()
    return F.cross_entropy(ours, torch.cat(following)) + kl(ours, theirs) + visual + relations / 2
