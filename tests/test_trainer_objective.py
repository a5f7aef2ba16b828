"""Does any objective go through a batch and through a trainer, by its own names?"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mllmkd_kernels as mk
from mllmkd_kernels import Objective, RowTerm, hf_trainer, learned
from mllmkd_kernels.batch import counts_of, image_token_id
from mllmkd_kernels.methods import llava_kd
from mllmkd_kernels.terms import Features
from tests import pair
from tests.test_trainer_mixin import MixedTrainer, Shifted, arguments, copied, moved

# fp32 sums in another order
RTOL, ATOL = 1e-4, 1e-7


class Samples:
    """A collator that also brings what kind each sample is."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        kinds = ["cot" if len(f["labels"]) % 2 else "pot" for f in features]
        return {**pair.collate(features), "kind": kinds}


def mixed() -> Objective:
    """Terms that LLaVA-KD does not have, over rows that no other test has."""
    return Objective(
        RowTerm("cot", 1.0, "response:cot"),
        RowTerm("pot", 0.5, "response:pot", "jsd"),
        RowTerm("everywhere", 0.2, "valid", "forward_kl", 2.0),
        backend="eager", diagnostics=True,
    )  # fmt: skip


def trained(out: Path, objective: Any = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The trainer after one step of the 8 samples, and by how much the student moved."""
    student, teacher = pair.models()
    kd_loss = options.pop("kd_loss", None)
    run = MixedTrainer(
        model=student, teacher=teacher, objective=objective, kd_loss=kd_loss,
        args=arguments(out, **options), train_dataset=pair.samples(),
        eval_dataset=pair.samples(), data_collator=options.pop("collator", Samples()),
    )  # fmt: skip
    before = copied(student)
    run.train()
    return run, moved(before, student)


def test_the_objective_of_llava_kd_is_its_loss(tmp_path: Path) -> None:
    whole = {"per_device_train_batch_size": 8}
    one, step = trained(tmp_path, llava_kd.objective(backend="eager"), **whole)
    other, same = trained(tmp_path, kd_loss=mk.LlavaKDLoss(backend="eager"), **whole)
    assert all(torch.equal(step[name], same[name]) for name in step)
    logged, expected = one.state.log_history[0], other.state.log_history[0]
    assert {k: logged[k] for k in ("loss", *one.objective.names)} == {
        k: expected[k] for k in ("loss", "ce", "response_kl", "visual_kl", "relation")
    }
    keys = [f"eval_{name}" for name in ("loss", *one.objective.names)]
    a, b = one.evaluate(), other.evaluate()
    assert [a[key] for key in keys] == [b[key] for key in keys]


@pytest.mark.parametrize("accumulate", [2, 8])
def test_a_step_is_the_big_batchs_whatever_the_terms(accumulate: int, tmp_path: Path) -> None:
    size = {"per_device_train_batch_size": 8 // accumulate}
    whole, expected = trained(tmp_path, mixed(), per_device_train_batch_size=8)
    parts, step = trained(tmp_path, mixed(), gradient_accumulation_steps=accumulate, **size)
    for name, value in expected.items():
        torch.testing.assert_close(step[name], value, rtol=RTOL, atol=ATOL, msg=name)
    first, second = whole.state.log_history[0], parts.state.log_history[0]
    assert first["cot"] > 0 and first["pot"] > 0 and first["everywhere"] > 0
    for name in ("loss", "student_entropy", *mixed().names):
        assert second[name] == pytest.approx(first[name], rel=1e-4), name
    metrics = parts.evaluate()
    total = sum(term.weight * metrics[f"eval_{name}"] for name, term in mixed().terms.items())
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-6)


def test_the_objectives_means_are_counted_by_name() -> None:
    student, _ = pair.models()
    batches = [Samples()(pair.samples()[i : i + 4]) for i in (0, 4)]
    counts = counts_of(mixed(), batches, image_token_id(student))
    assert list(counts) == ["response:cot", "response:pot", "valid"]
    rows = mk.count_rows(batches, image_token_id(student))
    assert counts["response:cot"] + counts["response:pot"] == rows.response
    assert counts["valid"] == sum(batch["attention_mask"].sum() for batch in batches)
    named = counts_of(llava_kd.objective(), batches, image_token_id(student))
    assert named == rows._asdict()


def test_a_teacher_runs_only_where_a_term_needs_it() -> None:
    student, teacher = pair.models()
    calls: list[int] = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    teacher.model.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = pair.collate(pair.samples()[:2])
    alone = mk.distill_batch(llava_kd.supervised(), student, None, batch)
    beside = mk.distill_batch(llava_kd.supervised(), student, teacher, batch)
    assert torch.equal(alone.loss, beside.loss) and not calls
    mk.distill_batch(llava_kd.objective(), student, teacher, batch)
    assert calls


def test_a_batch_of_the_teachers_own_for_an_objective() -> None:
    student, teacher = pair.models()
    batch = Shifted()(pair.samples()[:2])
    got = mk.distill_batch(llava_kd.objective(backend="eager"), student, teacher, batch)
    old = mk.distill_batch(mk.LlavaKDLoss(backend="eager"), student, teacher, batch)
    assert torch.equal(got.loss, old.loss) and got.terms == old.terms
    batch["teacher"]["image_lens"] = torch.tensor([4, 8])
    batch["image_lens"] = torch.tensor([8, 4])
    with pytest.raises(ValueError, match=r"teacher.image_lens: .*\[4, 8\] rows.*\[8, 4\]"):
        mk.distill_batch(llava_kd.objective(), student, teacher, batch)
    text = llava_kd.objective(visual=0.0, relation=0.0, backend="eager")
    assert mk.distill_batch(text, student, teacher, batch).loss > 0


def test_an_objective_that_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    student, teacher = pair.models()

    def run(**given: Any) -> MixedTrainer:
        return MixedTrainer(model=student, args=arguments(tmp_path), **given)

    with pytest.raises(ValueError, match="kd_loss: got one beside an objective"):
        run(teacher=teacher, objective=llava_kd.objective(), kd_loss=mk.LlavaKDLoss())
    with pytest.raises(ValueError, match=r"teacher: got None, .*\['response_kl', 'visual_kl'"):
        run(teacher=None, objective=llava_kd.objective())
    with pytest.raises(ValueError, match=r"teacher: is no model .*terms \['features'\]"):
        run(teacher=lambda batch: None, objective=learning())


@pytest.mark.parametrize("shards", ["FSDP1", "ZeRO-3"])
def test_parameters_that_would_be_sharded_are_refused(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair.models()
    make = MixedTrainer._refuse_what_would_be_ignored

    def launched(self: Any) -> None:
        make(self)
        self.is_fsdp_enabled = shards == "FSDP1"
        first = SimpleNamespace(fsdp_version=1)
        monkeypatch.setattr(self.accelerator.state, "fsdp_plugin", first, raising=False)
        monkeypatch.setattr(hf_trainer, "zero_stage", lambda _: 3 if shards == "ZeRO-3" else 0)

    monkeypatch.setattr(MixedTrainer, "_refuse_what_would_be_ignored", launched)
    with pytest.raises(ValueError, match=r"objective: its terms \['features'\] have parameters"):
        MixedTrainer(model=student, teacher=teacher, objective=learning(), args=arguments(tmp_path))


def learning() -> Objective:
    """A term with parameters of its own, beside one without."""
    return Objective(RowTerm("ce", 1.0, "response"), Features("features", 2.0), backend="eager")


def test_the_objectives_own_parameters_are_trained_and_not_saved(tmp_path: Path) -> None:
    run, step = trained(tmp_path, learning(), save_strategy="steps", save_steps=1)
    own = [name for name in step if name.startswith(learned.PLACE)]
    assert len(own) == 4 and all(step[name].any() for name in own)
    optimised = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    parameters = list(run.objective.parameters())
    assert len(parameters) == 4 and {id(p) for p in parameters} <= optimised
    checkpoint = tmp_path / "checkpoint-1"
    kept = load_file(checkpoint / learned.FILE)
    assert [k for k in load_file(checkpoint / "model.safetensors") if learned.PLACE in k] == []
    run.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / learned.FILE).exists()
    plain, info = type(run.model).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {n.removeprefix(f"{learned.PLACE}.") for n in kept} == {
        f"features.map.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    learned.detach(run.model)
    assert [n for n, _ in run.model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not run.model._keys_to_ignore_on_save


def test_the_objectives_own_parameters_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1}
    torch.manual_seed(1)
    objective = learning()
    objective.build(32, 48)
    start = copied(objective)
    run, _ = trained(tmp_path / "whole", objective, max_steps=2, **whole)
    assert all((p != start[n]).any() for n, p in run.objective.named_parameters())
    first = tmp_path / "whole" / "checkpoint-1"
    student, teacher = pair.models()
    again = MixedTrainer(
        model=student, teacher=teacher, objective=learning(), data_collator=Samples(),
        args=arguments(tmp_path / "again", max_steps=2, **whole), train_dataset=pair.samples(),
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(first))
    for a, b in zip(run.objective.parameters(), again.objective.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    (first / learned.FILE).unlink()
    with pytest.raises(ValueError, match=r"objective_terms.safetensors: has \[\], expected \['obj"):
        again.train(resume_from_checkpoint=str(first))


def test_a_step_with_parameters_of_its_own_is_the_big_batchs(tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 4):
        objective = learning()
        torch.manual_seed(1)
        objective.build(32, 48)
        sizes = {"per_device_train_batch_size": 8 // accumulate}
        _, step = trained(tmp_path, objective, gradient_accumulation_steps=accumulate, **sizes)
        found.append(step | dict(objective.named_parameters()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=RTOL, atol=ATOL, msg=name)
