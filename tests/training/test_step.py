"""The step for pairs of any class: its terms are those of both models' own logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from training.stages import STAGES, freeze, loss_of
from training.step import TERMS, DistillStep

import mllmkd_kernels as mk
from tests import tiny_models
from training.anatomy import anatomy, image_token_id
from training.config import LossConfig

PROJECTORS = {
    "llava-siglip-full": "model.multi_modal_projector.",
    "llava-clip-default": "model.multi_modal_projector.",
    "llava-onevision": ("model.multi_modal_projector.", "model.image_newline"),
    "qwen2-vl": "model.visual.merger.",
    "qwen2.5-vl": "model.visual.merger.",
    "qwen3-vl": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    "internvl": "model.multi_modal_projector.",
    "idefics3": "model.connector.",
    "smolvlm": "model.connector.",
    "gemma3": "model.multi_modal_projector.",
    "paligemma2-softcap": "model.multi_modal_projector.",
}


def built(name, seed=0):
    model, batch = tiny_models.build(name)
    if seed:  # another model of the same class
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.05 * noise
    rows = int((batch["input_ids"][0] == tiny_models.IMAGE).sum())
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    labels[:, : rows + 4] = -100
    batch |= {"labels": labels, "image_lens": torch.tensor([rows] * 2), "sample_ids": ["a", "b"]}
    return model, batch


def step_of(stage, student, teacher, **weights):
    freeze(student, STAGES[stage])
    loss = loss_of(STAGES[stage], LossConfig(backend="eager", **weights))
    return DistillStep(student, teacher if STAGES[stage].needs_teacher else None, loss).train()


def expected_terms(student, teacher, batch, batch_t):
    """The four terms from whole logits, in fp64; `batch_t` is the teacher's view."""

    def rows(model, view):
        known = ("labels", "image_lens", "sample_ids", "teacher")
        with torch.no_grad():
            logits = model(**{k: v for k, v in view.items() if k not in known}).logits.double()
        labels, images = view["labels"][:, 1:], view["input_ids"] == image_token_id(model)
        return logits[:, :-1][labels != -100], logits[images], labels[labels != -100]

    def kl(a, b):
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    z_s, y_s, answers = rows(student, batch)
    z_t, y_t, _ = rows(teacher, batch_t)
    relations = []
    lens = batch["image_lens"].tolist()
    for a, b in zip(y_s.split(lens), y_t.split(lens), strict=True):
        r_s, r_t = (a @ a.T).flatten(), (b @ b.T).flatten()
        relations.append(1 - r_s @ r_t / (r_s.norm() * r_t.norm()))
    terms = cross_entropy(z_s, answers), kl(z_s, z_t), kl(y_s, y_t), torch.stack(relations).mean()
    return dict(zip(TERMS, map(float, terms), strict=True))


@pytest.mark.parametrize("name", tiny_models.WITH_IMAGES)
def test_terms_are_those_of_the_models_own_logits(name):
    (student, batch), (teacher, _) = built(name), built(name, seed=1)
    step = step_of("dft", student, teacher)
    output = step(**batch)
    for term, value in expected_terms(student, teacher, batch, batch).items():
        # fp32 hidden states, twice; relation is 1 − cos of nearly equal models: absolute
        assert float(getattr(output, term)) == pytest.approx(value, rel=1e-4, abs=1e-6), term
    output.loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", tiny_models.WITH_IMAGES)
def test_roles(name):
    student, batch = built(name)
    parts = anatomy(student)
    assert parts.roles.keys() == dict(student.named_parameters()).keys(), "every parameter has one"
    for role in ("vision", "projector", "language"):
        assert parts.parameters(role) and parts.modules[role]
    step = step_of("pt", student, None)
    step(**batch).loss.backward()
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert trained == {n for n in parts.roles if n.startswith(PROJECTORS[name])}
    touched = {n for n, p in student.named_parameters() if p.grad is not None}
    assert touched == trained
    modes = {n: m.training for n, m in student.named_modules()}
    assert not any(modes[path] for path in parts.modules["vision"])
    assert all(modes[path] for role in ("projector", "language") for path in parts.modules[role])


def test_a_class_without_these_parts_is_refused():
    model, _ = tiny_models.build("llama")
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has no vision and no projector"):
        anatomy(model)
    with pytest.raises(TypeError, match="no image_token_id"):
        image_token_id(model)


def other_view(batch, shift=3):
    """The same samples with `shift` more tokens in front, as another template might have."""
    front = torch.full((2, shift), 5)
    own = {
        "input_ids": torch.cat([front, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(front), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(front, -100), batch["labels"]], 1),
    }
    return {key: value for key, value in batch.items() if key not in own} | own


def test_a_teacher_with_a_batch_of_its_own():
    (student, batch), (teacher, _) = built("llava-siglip-full"), built("llava-siglip-full", 1)
    own = other_view(batch)
    output = step_of("dft", student, teacher)(**batch, teacher=own)
    for term, value in expected_terms(student, teacher, batch, own).items():
        assert float(getattr(output, term)) == pytest.approx(value, rel=1e-4, abs=1e-6), term


def test_a_bf16_teacher_of_a_shared_tower():
    (student, batch), (teacher, _) = built("llava-siglip-full"), built("llava-siglip-full", 1)
    teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    full = step_of("dft", student, copy.deepcopy(teacher))(**batch)
    step = step_of("dft", student, teacher.to(torch.bfloat16))
    assert step.shared
    for term in TERMS:  # 8 bits of mantissa in each of the teacher's layers
        ours, exact = float(getattr(step(**batch), term)), float(getattr(full, term))
        assert ours == pytest.approx(exact, rel=0.1, abs=1e-4), term


def test_a_teacher_of_another_class():
    """LLaVA's image is 4 rows, OneVision's 10: response terms alone, or an error."""
    (student, batch), (teacher, own) = built("llava-siglip-full"), built("llava-onevision")
    with pytest.raises(ValueError, match=r"have \[10, 10\] rows, the student's \[4, 4\]"):
        step_of("dft", student, teacher)(**batch, teacher=own)
    output = step_of("dft", student, teacher, visual=0.0, relation=0.0)(**batch, teacher=own)
    assert float(output.response_kl) > 0 and float(output.visual_kl) == 0


@pytest.mark.parametrize("name", ["llava-siglip-full", "qwen2.5-vl"])
def test_batches_that_do_not_say_where_images_end(name):
    (student, batch), (teacher, _) = built(name), built(name, seed=1)
    step = step_of("dft", student, teacher)
    counts = mk.count_rows([batch, batch], step.image_token_id)
    assert counts[1:] == (16, 4)
    said = step(**batch)
    bare = {key: batch[key] for key in batch if key not in ("image_lens", "sample_ids")}
    assert mk.count_rows([bare, bare], step.image_token_id) == counts
    again = step(**bare)
    assert all(torch.equal(getattr(again, term), getattr(said, term)) for term in TERMS)
