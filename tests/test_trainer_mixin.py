"""Does a `transformers.Trainer` with the mixin train on the loss it should, however it is cut up?

The truth is the gradient of plain PyTorch on whole logits over the whole optimiser step at once.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

import mllmkd_kernels as mk
from mllmkd_kernels.batch import count_rows, image_token_id
from mllmkd_kernels.pieces import whole
from mllmkd_kernels.rows import image_seqlens
from tests import pair
from tests.tiny_models import IMAGE, build

EAGER = mk.LlavaKDLoss(backend="eager")
# fp32 sums in another order; a factor of the micro-batches or the ranks, or an unweighted mean of
# micro-batches, is off by tens of per cent
RTOL, ATOL = 1e-3, 1e-5


class MixedTrainer(mk.DistillMixin, Trainer):
    """As a user writes it."""


def arguments(out: Path, **options: Any) -> TrainingArguments:
    """Plain SGD of step 1 without clipping: the weights move by the gradient."""
    plain: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
    }
    return TrainingArguments(**{**plain, **options})


def trainer(out: Path, student: Any, teacher: Any, **options: Any) -> MixedTrainer:
    return MixedTrainer(
        model=student,
        args=arguments(out, **options),
        train_dataset=pair.samples(),
        eval_dataset=pair.samples()[:4],
        data_collator=pair.collate,
        teacher=teacher,
        kd_loss=EAGER,
    )


def moved(before: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: before[name] - whole(p.detach()) for name, p in model.named_parameters()}


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def naive_gradients(student: Any, teacher: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    pair.naive_loss(student, teacher, batch).backward()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in student.named_parameters()
    }
    student.zero_grad()
    return found


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_the_big_batchs(accumulate: int, tmp_path: Path) -> None:
    student, teacher = pair.models()
    batch = pair.collate(pair.samples())
    expected = naive_gradients(student, teacher, batch)
    with torch.no_grad():
        terms = pair.naive_terms(student, teacher, batch)
        loss = pair.naive_loss(student, teacher, batch)
    before = copied(student)
    options = {"per_device_train_batch_size": 8 // accumulate}
    run = trainer(tmp_path, student, teacher, gradient_accumulation_steps=accumulate, **options)
    run.train()
    for name, step in moved(before, student).items():
        torch.testing.assert_close(step, 1e-2 * expected[name], rtol=1e-3, atol=1e-6, msg=name)
    logged = run.state.log_history[0]
    assert logged["loss"] == pytest.approx(float(loss), rel=1e-4)
    for term, value in terms.items():
        assert logged[term] == pytest.approx(float(value), rel=1e-4), term


def test_logged_terms_are_means_over_steps(tmp_path: Path) -> None:
    student, teacher = pair.models()
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.0}
    run = trainer(tmp_path, student, teacher, logging_steps=2, **options)
    run.train()
    (logged,) = (entry for entry in run.state.log_history if "ce" in entry)
    with torch.no_grad():
        steps = [
            pair.naive_terms(student, teacher, pair.collate(pair.samples()[i : i + 4]))
            for i in (0, 4)
        ]
    for term in steps[0]:
        expected = sum(float(step[term]) for step in steps) / 2
        assert logged[term] == pytest.approx(expected, rel=1e-4), term


def test_evaluation_makes_logits_only_for_metrics(tmp_path: Path) -> None:
    student, teacher = pair.models()
    run = trainer(tmp_path, student, teacher, per_device_eval_batch_size=4)
    calls: list[int] = []
    hook = student.lm_head.register_forward_hook(lambda *_: calls.append(1))
    run.evaluate()
    assert calls == []
    run.compute_metrics = lambda given: {"width": given.predictions.shape[-1]}
    assert run.evaluate()["eval_width"] == student.lm_head.out_features and calls
    hook.remove()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_evaluation_is_a_mean_over_the_rows_of_the_whole_set(size: int, tmp_path: Path) -> None:
    """Samples have other numbers of images and answer tokens, so a mean of batches is another."""
    student, teacher = pair.models()
    run = trainer(tmp_path, student, teacher, per_device_eval_batch_size=size)
    run.kd_loss = mk.LlavaKDLoss(0.5, 2.0, 0.7, 3.0, diagnostics=True, backend="eager")
    data: Any = pair.samples()
    metrics = run.evaluate(data)
    with torch.no_grad():
        terms = pair.naive_terms(student, teacher, pair.collate(pair.samples()))
    for term, value in terms.items():
        assert metrics[f"eval_{term}"] == pytest.approx(float(value), rel=1e-4), term
    weights = (0.5, 2.0, 0.7, 3.0)
    loss = sum(w * float(terms[name]) for w, name in zip(weights, terms, strict=True))
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
    predicted = run.predict(data).metrics or {}
    assert predicted["test_loss"] == metrics["eval_loss"]
    assert 0 < metrics["eval_student_entropy"] < math.log(student.lm_head.out_features)


def test_the_teacher_is_nowhere_but_in_the_loss(tmp_path: Path) -> None:
    student, teacher = pair.models()
    teacher.train()
    run = trainer(tmp_path, student, teacher)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    before = copied(teacher)
    run.train()
    optimizer: Any = run.optimizer
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in student.parameters()}
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())
    run.save_model(str(tmp_path / "saved"))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert again.state_dict().keys() == student.state_dict().keys()
    assert "forward" not in vars(student)


def test_bf16_autocast_and_a_bf16_teacher(tmp_path: Path) -> None:
    student, teacher = pair.models()
    with torch.no_grad():
        expected = pair.naive_loss(student, teacher, pair.collate(pair.samples()[:2]))
    run = trainer(tmp_path, student, teacher.bfloat16(), bf16=True)
    run.train()
    # bf16 has 8 bits, and the hidden states have been rounded to them in every layer
    assert run.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=0.05)
    assert teacher.lm_head.weight.dtype is torch.bfloat16


class Shifted:
    """A collator whose teacher reads one token more: another tokenizer, another template."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        longer = [
            {**f, "input_ids": [2, *f["input_ids"]], "labels": [-100, *f["labels"]]}
            for f in features
        ]
        return {**pair.collate(features), "teacher": pair.collate(longer)}


def test_a_batch_of_the_teachers_own(tmp_path: Path) -> None:
    student, teacher = pair.models()
    run = trainer(tmp_path, student, teacher, learning_rate=0.0)
    run.data_collator = Shifted()
    run.train()
    batch = Shifted()(pair.samples()[:2])
    own, z = batch.pop("teacher"), []
    with torch.no_grad():
        for model, given in ((student, batch), (teacher, own)):
            logits = model(**{k: v for k, v in given.items() if k != "labels"}).logits
            z.append(logits[:, :-1][given["labels"][:, 1:] != -100])
    logged = run.state.log_history[0]
    assert logged["response_kl"] == pytest.approx(float(pair.kl(*z)), rel=1e-4)
    assert logged["visual_kl"] > 0 and logged["relation"] > 0


def test_without_teacher_it_is_cross_entropy(tmp_path: Path) -> None:
    student, teacher = pair.models()
    batch = pair.collate(pair.samples()[:2])
    with torch.no_grad():
        expected = pair.naive_terms(student, teacher, batch)["ce"]
    run = trainer(tmp_path, student, None)
    run.train()
    logged = run.state.log_history[0]
    assert logged["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert logged["response_kl"] == logged["visual_kl"] == logged["relation"] == 0


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """Same terms in the log, over the right number of steps, and the same weights."""
    options = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 2}
    student, teacher = pair.models()
    whole = trainer(tmp_path, student, teacher, **options)
    whole.train()
    again = trainer(tmp_path, pair.models()[0], teacher, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logs = [[e for e in run.state.log_history if "ce" in e] for run in (whole, again)]
    for ours, theirs in zip(*logs, strict=True):
        for key in ("step", "loss", "ce", "response_kl", "visual_kl", "relation"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    weights = zip(student.parameters(), again.model.parameters(), strict=True)  # pyright: ignore[reportOptionalMemberAccess]
    assert all(torch.equal(one, other) for one, other in weights)


def test_text_alone_with_a_tied_head(tmp_path: Path) -> None:
    (student, _), (teacher, _) = build("qwen2-tied"), build("llama")
    each = [sample for sample in pair.samples() if "pixel_values" not in sample]
    batch = pair.collate(each)
    answers = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        z_s, z_t = (model(**inputs).logits[:, :-1][answers] for model in (student, teacher))
        ce = torch.nn.functional.cross_entropy(z_s, batch["labels"][:, 1:][answers])
    run = MixedTrainer(
        model=student,
        args=arguments(tmp_path, per_device_train_batch_size=4),
        train_dataset=each,
        data_collator=pair.collate,
        teacher=teacher,
    )
    run.train()
    logged = run.state.log_history[0]
    assert logged["loss"] == pytest.approx(float(ce + pair.kl(z_s, z_t)), rel=1e-4)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_a_teacher_in_train_mode_answers_as_in_eval() -> None:
    """And goes back to it: as a part of a module that trains it is put there again and again."""
    student, teacher = pair.models()
    batch = pair.collate(pair.samples()[:2])
    expected = mk.distill_batch(EAGER, student, teacher, batch).loss
    embeddings = teacher.get_input_embeddings()
    embeddings.register_forward_hook(lambda m, _, x: nn.functional.dropout(x, 0.5, m.training))
    teacher.train().model.vision_tower.eval()
    for given in (batch, batch | {"teacher": batch}):
        assert torch.equal(mk.distill_batch(EAGER, student, teacher, given).loss, expected)
    assert student.training and embeddings.training and not teacher.model.vision_tower.training


def test_a_wrappers_forward_is_entered() -> None:
    student, teacher = pair.models()
    batch = pair.collate(pair.samples()[:2])

    class Wrapper(nn.Module):
        """What DDP does, as far as it matters here."""

        entered = 0

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.entered += 1
            return self.module(*args, **kwargs)

    wrapper = Wrapper(student)
    out = mk.forward_through(
        wrapper, student, lambda b: mk.distill_batch(EAGER, student, teacher, b), batch
    )
    assert wrapper.entered == 1 and "forward" not in vars(student)
    with torch.no_grad():
        torch.testing.assert_close(
            out.loss, pair.naive_loss(student, teacher, batch), rtol=RTOL, atol=ATOL
        )
    with pytest.raises(TypeError, match="did not call the forward"):
        mk.forward_through(nn.Identity(), student, lambda b: b, 1)


def test_counts_are_those_of_the_loss() -> None:
    batches = [pair.collate(pair.samples()[i : i + 2]) for i in range(0, 8, 2)]
    counts = count_rows(batches, IMAGE)
    images = sum(image_seqlens(b["input_ids"] == IMAGE).numel() - 1 for b in batches)
    assert [int(c) for c in counts] == [sum(2 + i % 4 for i in range(8)), 7 * pair.ROWS, images]
    assert images == 7
    lens = {**batches[0], "image_lens": torch.tensor([4, 8])}
    assert int(count_rows([lens], IMAGE).images) == 2
    assert [int(c) for c in count_rows(batches[1:2], None)] == [9, 0, 0]


def test_rows_are_counted_by_the_losses_own_ignore_index(tmp_path: Path) -> None:
    """0 is a token of padding here, and no answer's."""

    def relabelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch | {"labels": batch["labels"].masked_fill(batch["labels"] == -100, 0)}

    batches = [pair.collate(pair.samples()[i : i + 2]) for i in range(0, 8, 2)]
    assert count_rows(map(relabelled, batches), IMAGE, 0) == count_rows(batches, IMAGE)
    student, teacher = pair.models()
    with torch.no_grad():
        expected = pair.naive_terms(student, teacher, pair.collate(pair.samples()))
    run = trainer(tmp_path, student, teacher, gradient_accumulation_steps=4, learning_rate=0.0)
    run.kd_loss = mk.LlavaKDLoss(ignore_index=0, backend="eager")
    run.data_collator = lambda features: relabelled(pair.collate(features))
    run.train()
    for term, value in expected.items():
        assert run.state.log_history[0][term] == pytest.approx(float(value), rel=1e-4), term


@pytest.mark.parametrize("name", ["qwen2.5-vl", "smolvlm", "gemma3", "paligemma2-softcap", "llama"])
def test_image_token_of_a_class(name: str) -> None:
    assert image_token_id(build(name)[0]) == (None if name == "llama" else IMAGE)


def _rank(rank: int, port: int, out: Path) -> None:
    """One of two processes: a step of 2 × 2 micro-batches; rank 0 writes what it ends with."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    student, teacher = pair.models()
    run = trainer(out, student, teacher, gradient_accumulation_steps=2)
    run.train()
    assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    if rank == 0:
        torch.save((copied(student), run.state.log_history[0], run.evaluate()), out / "ended.pt")
    else:
        run.evaluate()


def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    """Over two ranks, accumulated, with a micro-batch that has no image on one of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_trainer_mixin"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
    assert [process.exitcode for process in ranks] == [0, 0]
    weights, logged, evaluated = torch.load(tmp_path / "ended.pt", weights_only=False)
    student, teacher = pair.models()
    one = trainer(tmp_path, student, teacher, per_device_train_batch_size=8)
    one.train()
    for name, p in student.named_parameters():
        torch.testing.assert_close(weights[name], p.detach(), rtol=RTOL, atol=ATOL, msg=name)
    for key in ("loss", "ce", "response_kl", "visual_kl", "relation"):
        assert logged[key] == pytest.approx(one.state.log_history[0][key], rel=1e-4), key
        assert evaluated[f"eval_{key}"] == pytest.approx(one.evaluate()[f"eval_{key}"], rel=1e-3)
