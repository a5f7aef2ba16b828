"""A stage of a method, seen in one micro-batch: what it trains, which terms it has, and whether
they are those of both models' own logits, for a tiny LLaVA and for every class of pairs.
"""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

import mllmkd_kernels as mk
from mllmkd_kernels.methods import llava_kd
from tests import tiny_models
from tests.training import tiny
from training.anatomy import anatomy, freeze, image_token_id
from training.data.collate import Collator
from training.data.dataset import LlavaDataset
from training.models import build_model
from training.trainer import DistillTrainer

PROJECTORS = {
    "tiny": "model.multi_modal_projector.",
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
TOWERS = ("model.vision_tower.", "model.vision_model.", "model.visual.")
STAGES = {stage.name: stage for stage in llava_kd.STAGES}
WHICH = ["tiny", *tiny_models.WITH_IMAGES]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    tiny.write_data(folder)
    tiny.write_tower(folder / "tower")
    return folder


def tiny_batch(root, *, images=True) -> Any:
    """Six samples: one or two images each and one without any, or those without alone."""
    processor = tiny.processor()
    data = LlavaDataset(root / "data.json", root, processor)
    chosen = [i for i, sample in enumerate(data.samples) if images or not sample.images]
    return Collator(processor)([data[i] for i in chosen[:6]])


def tiny_pair(root):
    """Models of other widths, with the same tower."""
    student, _ = build_model(tiny.model_config(root / "tower"), 0)
    teacher, _ = build_model(tiny.model_config(root / "tower", hidden=24), 1)
    return student, teacher


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


def parts(name, root) -> tuple[Any, Any, dict[str, Any]]:
    """Student, teacher and a batch of both."""
    if name == "tiny":
        return *tiny_pair(root), tiny_batch(root)
    (student, batch), (teacher, _) = built(name), built(name, seed=1)
    return student, teacher, batch


def output_of(stage, student, teacher, batch, out, **loss) -> Any:
    """What the trainer of a stage minimises of a batch."""
    freeze(student, *STAGES[stage].trains)
    objective = STAGES[stage].objective(backend="eager", **loss)
    trainer = DistillTrainer(
        student.train(),
        TrainingArguments(str(out), use_cpu=True, report_to=[]),
        teacher=teacher if objective.needs.teacher else None,
        objective=objective,
        processor=None,
        dataset=torch.utils.data.TensorDataset(torch.zeros(1)),
        collator=None,
        title=stage,
    )
    return trainer.distill(student, batch, None)


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
    terms = {
        "ce": cross_entropy(z_s, answers),
        "response_kl": kl(z_s, z_t),
        "visual_kl": kl(y_s, y_t),
        "relation": torch.stack(relations).mean(),
    }
    return {name: float(value) for name, value in terms.items()}


def check_terms(output, expected):
    for name, value in expected.items():
        # fp32 hidden states, twice; relation is 1 − cos of nearly equal models: absolute
        assert float(output.terms[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("name", WHICH)
def test_terms_are_those_of_whole_logits(name, root, tmp_path):
    student, teacher, batch = parts(name, root)
    output = output_of("dft", student, teacher, batch, tmp_path)
    check_terms(output, expected_terms(student, teacher, batch, batch))
    output.loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("stage", ["pt", "dpt", "sft", "dft"])
def test_the_loss_of_a_stage_is_its_weighted_terms(stage, root, tmp_path):
    student, teacher, batch = parts("tiny", root)
    output = output_of(stage, student, teacher, batch, tmp_path)
    weights = {"ce": 1.0}
    if stage in ("dpt", "dft"):
        weights |= {"response_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}
    assert list(output.terms) == list(weights), "and no others"
    assert all(float(value) > 0 for value in output.terms.values())
    weighted = sum(weights[name] * float(output.terms[name]) for name in weights)
    assert float(output.loss.detach()) == pytest.approx(weighted, rel=1e-6)


def check_trained(student, projector, language):
    """Gradients where a stage trains and nowhere else, and what is frozen in eval mode."""
    for name, parameter in student.named_parameters():
        vision = name.startswith(TOWERS) and not name.startswith(projector)
        expected = (language and not vision) or name.startswith(projector)
        assert (parameter.grad is not None) == expected == parameter.requires_grad, name
    modes = {name: module.training for name, module in student.named_modules()}
    parts = anatomy(student).modules
    assert not any(modes[path] for path in parts["vision"]), "frozen, whatever the stage"
    assert all(modes[path] for role in ("projector", "language") for path in parts[role])


@pytest.mark.parametrize(
    ("stage", "name"),
    [*product(["pt", "dft"], WHICH), ("dpt", "tiny"), ("sft", "tiny")],
)
def test_what_a_stage_trains(stage, name, root, tmp_path):
    student, teacher, batch = parts(name, root)
    roles = anatomy(student).roles
    assert roles.keys() == dict(student.named_parameters()).keys(), "every parameter has one"
    output_of(stage, student, teacher, batch, tmp_path).loss.backward()
    check_trained(student, PROJECTORS[name], language=stage in ("sft", "dft"))


def test_a_tower_that_trains_is_in_train_mode(root, tmp_path, monkeypatch):
    whole = dataclasses.replace(STAGES["sft"], trains=("vision", "projector", "language"))
    monkeypatch.setitem(STAGES, "whole", whole)
    student, teacher, batch = parts("tiny", root)
    output_of("whole", student, teacher, batch, tmp_path).loss.backward()
    assert student.model.vision_tower.training
    touched = {name for name, p in student.named_parameters() if p.grad is not None}
    assert any(name.startswith(TOWERS) for name in touched)
    with pytest.raises(ValueError, match="trains: got projektor, expected some of vision, pro"):
        freeze(student, "projektor", "language")


def test_text_alone(root, tmp_path):
    """Visual terms of no rows are 0, and the projector has a gradient all the same, of zeros."""
    student, teacher = tiny_pair(root)
    batch = tiny_batch(root, images=False)
    assert "pixel_values" not in batch
    output = output_of("dft", student, teacher, batch, tmp_path)
    assert float(output.terms["ce"]) > 0 and float(output.terms["response_kl"]) > 0
    assert float(output.terms["visual_kl"]) == 0 and float(output.terms["relation"]) == 0
    output.loss.backward()
    gradients = [p.grad for n, p in student.named_parameters() if n.startswith(PROJECTORS["tiny"])]
    assert gradients and all(g is not None and not g.any() for g in gradients)


def test_a_class_without_these_parts_is_refused():
    model, _ = tiny_models.build("llama")
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has no vision and no projector"):
        anatomy(model)
    with pytest.raises(TypeError, match="no image_token_id"):
        image_token_id(model)


def test_a_teacher_of_another_class(tmp_path):
    """LLaVA's image is 4 rows, OneVision's 10: response terms alone, or an error."""
    (student, batch), (teacher, own) = built("llava-siglip-full"), built("llava-onevision")
    batch["teacher"] = own
    with pytest.raises(ValueError, match=r"have \[10, 10\] rows, the student's \[4, 4\]"):
        output_of("dft", student, teacher, batch, tmp_path)
    output = output_of("dft", student, teacher, batch, tmp_path, visual=0.0, relation=0.0)
    assert list(output.terms) == ["ce", "response_kl"]
    assert float(output.terms["response_kl"]) > 0


@pytest.mark.parametrize("name", ["llava-siglip-full", "qwen2.5-vl"])
def test_batches_that_do_not_say_where_images_end(name, root, tmp_path):
    student, teacher, batch = parts(name, root)
    bare = {key: batch[key] for key in batch if key not in ("image_lens", "sample_ids")}
    said, again = (output_of("dft", student, teacher, b, tmp_path) for b in (batch, bare))
    assert all(torch.equal(again.terms[term], value) for term, value in said.terms.items())
    objective, token = llava_kd.objective(), image_token_id(student)
    counts, same = (mk.counts_of(objective, [b, b], token) for b in (batch, bare))
    assert {name: int(n) for name, n in counts.items()} == {n: int(c) for n, c in same.items()}
    labels = int((batch["labels"][:, 1:] != -100).sum())
    assert [int(counts[name]) for name in ("response", "visual", "images")] == [2 * labels, 16, 4]
