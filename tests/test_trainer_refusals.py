"""Does the mixin say so where it would ignore what was asked for, or freeze what should train?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

import mllmkd_kernels as mk
from tests import pair
from tests.test_trainer_mixin import EAGER, MixedTrainer, arguments, copied, moved, trainer
from tests.tiny_models import TEXT, VISION, build, llava


def test_what_would_be_ignored_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which torch_compile overwrites
    student, teacher = pair.models()
    with pytest.raises(ValueError, match=r"label_smoothing_factor: got 0.1, expected 0"):
        trainer(tmp_path, student, teacher, label_smoothing_factor=0.1)
    other = lambda *_, **__: 0  # noqa: E731
    with pytest.raises(ValueError, match="compute_loss_func"):
        MixedTrainer(
            model=student, args=arguments(tmp_path), compute_loss_func=other, teacher=teacher
        )
    compiled = trainer(tmp_path, student, teacher, torch_compile_backend="eager")
    with pytest.raises(TypeError, match=r"model\.model\.compile\(\)"):
        compiled.train()


def test_another_loss_of_the_model_is_refused(tmp_path: Path) -> None:
    """A mixture of experts adds the loss of its router where its config says so."""
    experts = tf.MixtralConfig(**TEXT, num_local_experts=2, output_router_logits=True)
    student, teacher = tf.MixtralForCausalLM(experts), build("llama")[0]
    with pytest.raises(ValueError, match=r"output_router_logits: got True, expected False"):
        trainer(tmp_path, student, teacher)
    student.config.output_router_logits = False
    trainer(tmp_path, student, teacher)


def test_a_teacher_that_is_the_student_is_refused(tmp_path: Path) -> None:
    student, _ = pair.models()
    with pytest.raises(ValueError, match=r"^teacher: is the student itself"):
        trainer(tmp_path, student, student)
    assert student.training and all(p.requires_grad for p in student.parameters())


def test_what_teacher_and_student_share_is_not_trained(tmp_path: Path) -> None:
    student, teacher = pair.models()
    student.model.vision_tower = teacher.model.vision_tower
    with pytest.raises(
        ValueError, match=r"teacher: has \d+ parameters that .* \(model\.vision_tow"
    ):
        trainer(tmp_path, student, teacher)
    assert all(p.requires_grad for p in student.parameters())
    student.model.vision_tower.requires_grad_(False)
    tower = copied(student.model.vision_tower)
    before = copied(student)
    trainer(tmp_path, student, teacher).train()
    assert all(torch.equal(tower[n], p) for n, p in student.model.vision_tower.named_parameters())
    assert moved(before, student)["lm_head.weight"].any()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, *pair.models(), save_strategy="steps", save_steps=1)
    run.train()
    deeper, _ = llava(tf.SiglipVisionConfig(**{**VISION, "num_hidden_layers": 3}))
    other = trainer(tmp_path / "other", deeper, None, max_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint-1 lacks .*layers\.2.* of LlavaFor"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_batches_that_do_not_fit_are_named() -> None:
    student, teacher = pair.models()
    batch = pair.collate(pair.samples()[:2])
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    with pytest.raises(ValueError, match="labels: missing"):
        mk.distill_batch(EAGER, student, teacher, unlabelled)
    teacher.config.image_token_id = 98
    with pytest.raises(ValueError, match="its image token is 98, the student's 99"):
        mk.distill_batch(EAGER, student, teacher, batch)
