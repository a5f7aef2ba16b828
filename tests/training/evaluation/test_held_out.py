"""Evaluation: one forward pass says exactly what greedy decoding would have written."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

import mllmkd_kernels as mk
from tests.training import tiny
from training.anatomy import freeze
from training.data.collate import Collator
from training.data.dataset import LlavaDataset
from training.evaluation import held_out
from training.evaluation.held_out import Scores, answers, evaluate
from training.evaluation.intervals import wilson
from training.generate import Asked, Writer
from training.models import build_model


@pytest.fixture
def parts(tmp_path):
    """A student after a few steps: right on some samples, wrong on others."""
    root = tiny.write_data(tmp_path, samples=20)
    model, processor = build_model(tiny.model_config(tiny.write_tower(tmp_path / "tower")), 0)
    data = LlavaDataset(root / "data.json", root, processor)
    collator = Collator(processor)
    freeze(model, "projector", "language")
    objective = mk.methods.llava_kd.supervised(backend="eager")
    batch = collator([data[i] for i in range(len(data))])
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(12):
        mk.distill_batch(objective, model.train(), None, batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval(), processor, data, collator


def test_exact_match_is_what_greedy_decoding_writes(parts):
    model, processor, data, collator = parts
    batches = list(answers(model, data, collator, batch_size=7, title="test"))
    exact = torch.cat([hits for hits, _ in batches]).tolist()
    single = [i for i, sample in enumerate(data.samples) if len(sample.turns) == 1]
    asked = [data.samples[i].asked() for i in single]
    images = data.sources[0].images
    written = Writer(model, processor, 8).write(
        [Asked(one, lambda one=one: images(one)) for one in asked]
    )
    decoded = {i: answer.text for i, answer in zip(single, written, strict=True)}
    truth = {i: data.samples[i].turns[0][1] for i in single}
    assert {i: exact[i] for i in single} == {i: decoded[i] == truth[i] for i in single}
    hits = sum(exact[i] for i in single)
    assert 0 < hits < len(single), "a model that is always right, or never, would prove nothing"


def test_end_token_counts(parts):
    """An answer that goes on past the true one is wrong."""
    model, processor, data, collator = parts
    eos = processor.tokenizer.eos_token_id
    before = evaluate(model, data, collator)
    with torch.no_grad():
        model.lm_head.weight[eos] = 0.0
        model.lm_head.weight[processor.tokenizer.convert_tokens_to_ids("red")] *= 50
    after = evaluate(model, data, collator)
    assert max(after.kinds.values()) < max(before.kinds.values())


def test_perplexity_and_kinds(parts):
    model, _, data, collator = parts
    scores = evaluate(model, data, collator, batch_size=3)
    batch = collator([data[i] for i in range(len(data))])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        log_p = model(**batch).logits[:, :-1].double().log_softmax(-1)
    rows = labels != -100
    nll = -log_p[rows].gather(1, labels[rows][:, None]).mean()
    assert scores.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-5)
    assert scores.tokens == int(rows.sum())
    assert scores.counts == {"colour": 12, "pair": 4, "text": 4}
    assert Scores(**json.loads(json.dumps(asdict(scores)))) == scores


def test_questions_about_one_image_count_as_few(parts, monkeypatch):
    model, _, data, collator = parts
    right = torch.arange(20) // 4 % 2 == 0  # alike where four in a row share an image
    monkeypatch.setattr(held_out, "answers", lambda *_: [(right, torch.zeros(1))])
    found = []
    for images in ([i // 4 for i in range(20)], range(20)):
        monkeypatch.setattr(data, "samples", about(data, images))
        found.append(evaluate(model, data, collator).interval())
    few, many = found
    assert many == wilson(12, 20)
    assert few[0] < many[0] - 0.1 and few[1] > many[1] + 0.05


def about(data, images):
    """The samples of `data`, all questions, about these images."""
    pairs = zip(data.samples, images, strict=True)
    return [replace(sample, images=(f"{image}.png",), kind="count") for sample, image in pairs]


def test_perplexity_of_a_model_that_blew_up_is_infinite(parts):
    model, _, data, collator = parts
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert evaluate(model, data, collator).perplexity == math.inf


def test_questions_leave_captions_out():
    scores = Scores(
        {"caption": 0.1, "count": 0.5, "where": 1.0}, dict(caption=50, count=30, where=10)
    )
    assert scores.questions == pytest.approx((0.5 * 30 + 10) / 40)


def test_batch_size_does_not_matter(parts):
    model, _, data, collator = parts
    one, many = (evaluate(model, data, collator, batch_size=size) for size in (1, 20))
    assert one.kinds == many.kinds
    assert one.perplexity == pytest.approx(many.perplexity, rel=1e-5)
