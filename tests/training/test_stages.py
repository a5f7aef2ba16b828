"""Stages: what trains and which terms count, stage by stage, seen in one optimiser step."""

from __future__ import annotations

import pytest
import torch
from training.stages import STAGES, freeze, loss_of
from training.step import TERMS, DistillStep

import mllmkd_kernels as mk
from tests.training import tiny
from training.config import LossConfig
from training.data.collate import Collator
from training.data.dataset import LlavaDataset
from training.models import build_model

PROJECTOR = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}


@pytest.fixture
def parts(tmp_path):
    root = tiny.write_data(tmp_path)
    tower = tiny.write_tower(tmp_path / "tower")
    student, processor = build_model(tiny.model_config(tower), 0)
    teacher, _ = build_model(tiny.model_config(tower, hidden=24), 1)
    data = LlavaDataset(root / "data.json", root, processor)
    batch = Collator(processor)([data[i] for i in range(6)])
    return student, teacher, batch


def step_of(stage, student, teacher, **weights):
    freeze(student, STAGES[stage])
    loss = loss_of(STAGES[stage], LossConfig(backend="eager", **weights))
    return DistillStep(student, teacher if STAGES[stage].needs_teacher else None, loss).train()


@pytest.mark.parametrize("stage", ["pt", "dpt"])
def test_projector_stages_train_the_projector_only(stage, parts):
    student, teacher, batch = parts
    step = step_of(stage, student, teacher)
    step(**batch).loss.backward()
    touched = {name for name, p in step.named_parameters() if p.grad is not None}
    assert touched == {f"student.model.multi_modal_projector.{name}" for name in PROJECTOR}


@pytest.mark.parametrize("stage", ["sft", "dft"])
def test_full_stages_train_all_but_the_tower(stage, parts):
    student, teacher, batch = parts
    step = step_of(stage, student, teacher)
    step(**batch).loss.backward()
    for name, parameter in step.named_parameters():
        frozen = name.startswith("student.model.vision_tower.")
        assert (parameter.grad is None) == frozen, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("stage", ["pt", "sft", "dpt", "dft"])
def test_terms_of_a_stage(stage, parts):
    student, teacher, batch = parts
    output = step_of(stage, student, teacher)(**batch)
    terms = {term: float(getattr(output, term)) for term in TERMS}
    assert terms["ce"] > 0
    for term in ("response_kl", "visual_kl", "relation"):
        assert (terms[term] > 0) == (stage in ("dpt", "dft")), terms
    weighted = terms["ce"]
    if stage in ("dpt", "dft"):
        weighted += terms["response_kl"] + terms["visual_kl"] + 0.5 * terms["relation"]
    assert float(output.loss.detach()) == pytest.approx(weighted, rel=1e-5)


def test_loss_against_whole_logits(parts):
    """The four terms from the models' own logits, each model run by itself, tower and all."""
    student, teacher, batch = parts
    output = step_of("dft", student, teacher)(**batch)
    labels = batch["labels"]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        z_s = student(**inputs).logits.double()
        z_t = teacher(**inputs).logits.double()
    rows = labels[:, 1:] != -100
    images = batch["input_ids"] == student.config.image_token_id

    def kl(a, b):
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    answers = labels[:, 1:][rows]
    ce = torch.nn.functional.cross_entropy(z_s[:, :-1][rows], answers)
    assert float(output.ce) == pytest.approx(float(ce), rel=1e-5)
    response = kl(z_s[:, :-1][rows], z_t[:, :-1][rows])
    assert float(output.response_kl) == pytest.approx(float(response), rel=1e-4)
    assert float(output.visual_kl) == pytest.approx(float(kl(z_s[images], z_t[images])), rel=1e-4)
    relations = []
    for y_s, y_t in zip(z_s[images].split(4), z_t[images].split(4), strict=True):  # 4 rows an image
        r_s, r_t = (y_s @ y_s.T).flatten(), (y_t @ y_t.T).flatten()
        relations.append(1 - r_s @ r_t / (r_s.norm() * r_t.norm()))
    expected = float(torch.stack(relations).mean())
    assert float(output.relation) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_tower_runs_once_for_both_models(parts):
    student, teacher, batch = parts
    step = step_of("dft", student, teacher)
    calls = []
    student.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    step(**batch)
    assert step.shared and len(calls) == 1


def test_teacher_stays_out_of_parameters_and_state(parts):
    student, teacher, _ = parts
    step = step_of("dft", student, teacher)
    assert len(step.state_dict()) == len(student.state_dict())
    assert {id(p) for p in step.parameters()} == {id(p) for p in student.parameters()}


def test_text_only_batch(parts, tmp_path):
    student, teacher, _ = parts
    processor = tiny.processor()
    data = LlavaDataset(tmp_path / "data.json", tmp_path, processor)
    texts = [i for i, sample in enumerate(data.samples) if not sample.images]
    batch = Collator(processor)([data[i] for i in texts])
    output = step_of("dft", student, teacher)(**batch)
    assert "pixel_values" not in batch
    assert float(output.ce) > 0 and float(output.response_kl) > 0
    assert float(output.visual_kl) == 0 and float(output.relation) == 0
    output.loss.backward()


def test_row_counts(parts):
    student, _, batch = parts
    counts = mk.count_rows([batch, batch], student.config.image_token_id)
    assert counts.response == 2 * int((batch["labels"][:, 1:] != -100).sum())
    assert counts.visual == 2 * 4 * len(batch["pixel_values"])
    assert counts.images == 2 * len(batch["pixel_values"])
