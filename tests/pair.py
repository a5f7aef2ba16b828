"""A tiny teacher-student pair and uneven samples: what the tests of trainers train on.

LLaVA with SigLIP, 4 rows an image. Samples have 0, 1 or 2 images and answers of different lengths,
so that no two micro-batches have the same number of rows. `write` puts such a pair on disk, with
chats, as a script would find it. Expected losses come from whole logits and plain PyTorch
(`naive_terms`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from PIL import Image
from torch import Tensor

from tests.tiny_models import IMAGE, TEXT, VISION, llava
from training.demo.words import build_processor

ROWS = 4  # of an image


def models(teacher_seed: int = 7) -> tuple[Any, Any]:
    """Student and wider teacher; heads scaled so that losses differ from sample to sample."""
    torch.manual_seed(0)
    student, _ = llava(tf.SiglipVisionConfig(**VISION))
    torch.manual_seed(teacher_seed)
    teacher, _ = llava(tf.SiglipVisionConfig(**VISION), hidden=48)
    for model in (student, teacher):
        model.lm_head.weight.data *= 20
    return student, teacher.eval()


def samples(images: tuple[int, ...] = (1, 2, 0, 0, 2, 1, 0, 1)) -> list[dict[str, Any]]:
    """One sample an entry, with that many images; question unlabelled, answer labelled."""
    generator = torch.Generator().manual_seed(3)

    def words(n: int) -> list[int]:
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    found = []
    for i, count in enumerate(images):
        question = [1, *([IMAGE] * ROWS + [5]) * count, *words(2)]
        answer = words(2 + i % 4)
        sample: dict[str, Any] = {"input_ids": question + answer}
        sample["labels"] = [-100] * len(question) + answer
        if count:
            sample["pixel_values"] = torch.randn(count, 3, 32, 32, generator=generator)
        found.append(sample)
    return found


def write(folder: Path) -> tuple[Path, Path, Path]:
    """Folders of a student and a teacher with their processor, and a file of 8 chats."""
    words = ["red", "green", "blue", "what", "colour", "is", "this", "say", "the", "word"]
    processor = build_processor(words, image_size=32, patch_size=16)
    for seed, name, width in ((0, "student", 32), (7, "teacher", 48)):
        torch.manual_seed(seed)
        text = {**TEXT, "hidden_size": width, "vocab_size": len(processor.tokenizer)}
        config = tf.LlavaConfig(
            vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
            text_config=tf.Qwen2Config(**text),
            image_token_index=processor.image_token_id,
            vision_feature_select_strategy="full",
        )
        model = tf.LlavaForConditionalGeneration(config)
        model.lm_head.weight.data *= 20
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    chats = []
    for i in range(8):
        colour = words[i % 3]
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
        images = [] if i % 4 == 3 else [f"{colour}.png"]
        answer = [colour, f"this is {colour}"][i % 2]
        prompt = [{"role": "user", "content": "what colour is this"}]
        completion = [{"role": "assistant", "content": answer}]
        chats.append({"images": images, "prompt": prompt, "completion": completion})
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return folder / "student", folder / "teacher", folder / "chats.jsonl"


def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Right-padded (B, T) and the images of all samples in one (I, 3, 32, 32)."""

    def padded(key: str, value: int) -> Tensor:
        rows = [torch.tensor(feature[key]) for feature in features]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    if pixels := [f["pixel_values"] for f in features if "pixel_values" in f]:
        batch["pixel_values"] = torch.cat(pixels)
    return batch


def naive_terms(student: Any, teacher: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The four terms of a batch from whole logits: shifted CE and KL on answers, KL and relation
    on the image positions themselves, one image a run."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    z_s = student(**inputs).logits.float()
    with torch.no_grad():
        z_t = teacher(**inputs).logits.float()
    labels, at_image = batch["labels"], batch["input_ids"] == student.config.image_token_id
    answers = labels[:, 1:] != -100
    relations = []
    for sample in range(len(labels)):
        at = at_image[sample].nonzero().flatten().split(ROWS)
        relations += [relation(z_s[sample, rows], z_t[sample, rows]) for rows in at if len(rows)]
    return {
        "ce": F.cross_entropy(z_s[:, :-1][answers], labels[:, 1:][answers]),
        "response_kl": kl(z_s[:, :-1][answers], z_t[:, :-1][answers]),
        "visual_kl": kl(z_s[at_image], z_t[at_image]),
        "relation": torch.stack(relations).mean(),
    }


def kl(z_s: Tensor, z_t: Tensor) -> Tensor:
    """Forward KL, mean over rows."""
    return F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="batchmean")


def relation(z_s: Tensor, z_t: Tensor) -> Tensor:
    """1 − cos of the two Gram matrices of raw logits."""
    r_s, r_t = z_s @ z_s.T, z_t @ z_t.T
    return 1 - F.cosine_similarity(r_s.reshape(1, -1), r_t.reshape(1, -1)).squeeze()


def naive_loss(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    """The terms under the paper's weights."""
    terms = naive_terms(student, teacher, batch)
    return terms["ce"] + terms["response_kl"] + terms["visual_kl"] + 0.5 * terms["relation"]
