"""Do two processes learn what one does? DDP and FSDP2 over gloo, against one process.

One pair of processes is started and runs every case; the parent runs the same in one process and
compares. Everything is fp64, so that a wrong factor cannot hide in rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, TrainingArguments

import training.loop
from mllmkd_kernels import learned
from tests import pair
from tests.gloo import on_ranks, pretend_fsdp
from tests.test_trainer_mixin import MixedTrainer, arguments
from tests.test_trainer_objective import learning
from tests.tolerances import relative_error
from tests.training import tiny
from training import settings, sharding
from training.anatomy import Anatomy, freeze
from training.config import Config, load
from training.data.collate import Collator
from training.data.dataset import LlavaDataset
from training.loop import run
from training.models import build_model, load_vlm
from training.trainer import DistillTrainer, Policies

_OF_OTHERS = {
    **load(overrides=["method=llava-mod"]).table,
    **load(overrides=["method=llavadi"]).table,
}
STAGES = {**_OF_OTHERS, **load().table}
# Samples 4 and 9 have no image, 3, 8 and 13 two. Two processes take batches of two in turn.
ORDERS = {
    "uneven": [4, 9, 0, 1, 3, 8, 2, 13],  # the first process starts with text alone
    "no-image": [4, 9, 0, 1, 9, 4, 2, 13],  # and here never sees an image
    "images": [0, 1, 3, 8, 2, 13, 5, 6],
}
CASES = [
    ("ddp", "sft", "uneven", 1), ("ddp", "dft", "no-image", 2), ("ddp", "dpt", "no-image", 1),
    ("fsdp2", "dft", "uneven", 2), ("fsdp2", "dft", "no-image", 1), ("fsdp2", "dpt", "no-image", 2),
    ("ddp", "d2s", "uneven", 2), ("fsdp2", "d2s", "no-image", 1),
    ("fsdp2", "kd", "uneven", 2),
]  # fmt: skip
CONFIGURATIONS = Path(training.loop.__file__).parent / "accelerate"
# Row weights are fp32 beside fp64 models too: 6e-8 each, of terms whose gradients partly cancel.
FP32_WEIGHTS = 1e-6


class Keeper(DistillTrainer):
    """Keeps the whole gradients of the first optimiser step, before clipping."""

    kept: dict[str, torch.Tensor]

    def _clip_grad_norm(self, model):
        self.kept = {}
        for name, parameter in self.student.named_parameters():
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()
            if gradient is not None:
                self.kept[name] = gradient.clone()
        return super()._clip_grad_norm(model)


def one_step(root: Path, out: Path, wrapper: str, stage: str, order: str, accumulate: int) -> Any:
    """Loss, terms and gradients of one optimiser step of eight samples."""
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    student, processor = build_model(tiny.model_config(root / "tower", layers=2), 0)
    student.lm_head.weight.data *= 4  # losses that differ from sample to sample
    teacher, _ = load_vlm(root / "teacher")
    if (made := STAGES[stage].student) is not None:
        student = made(student)
        student.set_experts_implementation("eager")  # grouped_mm knows no fp64
    freeze(student, *STAGES[stage].trains)
    objective = STAGES[stage].objective(backend="eager")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=2, learning_rate=1e-2, use_cpu=True,
        per_device_train_batch_size=8 // accumulate // world,
        gradient_accumulation_steps=accumulate, train_sampling_strategy="sequential",
        remove_unused_columns=False, save_strategy="no", logging_steps=1,
        dataloader_pin_memory=False, report_to=[], ddp_find_unused_parameters=False,
    )  # fmt: skip
    if wrapper == "fsdp2":
        pretend_fsdp()
    data = LlavaDataset(root / "data.json", root, processor)
    trainer = Keeper(
        student.double(),  # pyright: ignore[reportArgumentType]
        arguments,
        teacher=teacher.double() if objective.needs.teacher else None,  # pyright: ignore
        objective=objective,
        processor=processor,
        dataset=torch.utils.data.Subset(data, ORDERS[order]),
        collator=Collator(processor),
        title="test",
    )
    trainer.train()
    return trainer.kept, trainer.state.log_history, trainer.accelerator.distributed_type.value


def as_launched(**environment: str) -> None:
    """What `accelerate launch` says to each process."""
    rank = str(dist.get_rank())
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1",
        MASTER_ADDR="localhost", **environment,
    )  # fmt: skip


def work(root: Path) -> Any:
    """Every case on this rank."""
    as_launched(
        FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT", FSDP_RESHARD_AFTER_FORWARD="true",
    )  # fmt: skip
    return {case: one_step(root, root / "out", *case) for case in CASES} | {
        "run": interrupted_run(run_config(root, root / "fsdp2"), pretend_fsdp),
        "sparse": interrupted_run(sparse_config(root, root / "sparse"), pretend_fsdp),
        "features": interrupted_run(features_config(root, root / "features"), pretend_fsdp),
        "mixin": [someone_elses(root / "mixin", resume) for resume in (None, "checkpoint-1")],
    }


def run_config(root: Path, out: Path, stages: tuple[str, ...] = ("dpt", "dft")) -> Config:
    """The samples of the second stage are uneven, some micro-batches without an image."""
    config = tiny.run_config(root, out, stages=stages)
    plan = {"steps": 4, "batch_size": 4, "micro_batch": 1}
    return settings.changed(config, stage=dict.fromkeys(stages, plan))


def sparse_config(root: Path, out: Path) -> Config:
    """A stage in which a student that has become a mixture of experts trains those."""
    more = {"loss": {"backend": "eager"}, "student": {"every": 1}}
    return config_of(root, out, "llava-mod", "d2s", more)


def features_config(root: Path, out: Path) -> Config:
    """A stage whose objective has parameters of its own."""
    return config_of(root, out, "llavadi", "kd", {})


def config_of(root: Path, out: Path, method: str, stage: str, more: dict[str, Any]) -> Config:
    """One stage of another method, otherwise as `run_config`."""
    stages = {stage: {"steps": 4, "micro_batch": 1, **more}}
    return tiny.method_config(root, out, method, stages, save_steps=2)


def someone_elses(out: Path, resume: str | None) -> Any:
    """A plain `Trainer` with the mixin: what its objective has learnt after two steps, whether it
    was in pieces, and the log."""
    os.environ.update(ACCELERATE_USE_FSDP="false", FSDP_TRANSFORMER_CLS_TO_WRAP="Qwen2DecoderLayer")
    student, teacher = pair.models()
    student.model.vision_tower.requires_grad_(False)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    made = arguments(out, **options)
    pretend_fsdp()
    trainer = MixedTrainer(
        model=student, args=made, teacher=teacher, objective=learning(),
        train_dataset=pair.samples((1, 1, 2, 1)), data_collator=pair.collate,
    )  # fmt: skip
    own = list(trainer.objective.parameters())
    for parameter in own if resume else ():
        parameter.data.zero_()
    trainer.train(resume_from_checkpoint=None if resume is None else str(out / resume))
    pieces = all(isinstance(p, DTensor) for p in trainer.objective.parameters())
    trainer.save_model(str(out / "model"))
    return learned.state(student), pieces, trainer.state.log_history[1]["loss"]


def interrupted_run(config: Config, select: Callable[[], None]) -> Any:
    """The whole flow, stopped after the third step of the last stage and started again: what was
    said, the files of the checkpoint between, the loss curves. `select` chooses the wrapper."""
    real_arguments, real_step_end = training.loop._arguments, Policies.on_step_end

    def arguments(*args: Any) -> TrainingArguments:
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        made = real_arguments(*args)
        select()
        return made

    last = f"{len(config.stages)}-{config.stages[-1]}"

    def stop(self: Policies, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real_step_end(self, args, state, control, **kwargs)
        if state.global_step == 3 and last in args.output_dir:
            raise KeyboardInterrupt

    training.loop._arguments = arguments
    Policies.on_step_end = stop
    said = []
    with pytest.raises(KeyboardInterrupt):
        run(config, said.append)
    files = sorted(path.name for path in Path(config.out).glob(f"{last}/checkpoint-2/*"))
    Policies.on_step_end = real_step_end
    results = run(config, said.append)
    training.loop._arguments = real_arguments
    return said, files, [result.history for result in results]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    tiny.run_config(root, root / "unused")
    return root


@pytest.fixture(scope="module")
def ranks(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(2, work, tmp_path_factory.mktemp("ranks"), root)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_one_process(ranks, root: Path, case: Any) -> None:
    wrapper, stage, order, accumulate = case
    # a balance is of a micro-batch: there the same ones are compared
    parts = 2 * accumulate if "balance" in STAGES[stage].objective().names else 1
    want, history, _ = one_step(root, root / "out", "none", stage, order, parts)
    for rank in ranks:
        got, _, kind = rank[case]
        assert kind == ("FSDP" if wrapper == "fsdp2" else "MULTI_CPU")
        assert got.keys() == want.keys()
        for name in want:
            assert relative_error(got[name], want[name]) <= FP32_WEIGHTS, name
    for entry, its in zip(history[:2], ranks[0][case][1], strict=False):
        for term in ("loss", "grad_norm", *STAGES[stage].objective().names):
            assert its[term] == pytest.approx(entry[term], rel=1e-6, abs=1e-9), term


@pytest.mark.parametrize("stage", ["sft", "dft"])
def test_accumulated_gradients_are_those_of_one_batch(root: Path, stage: str) -> None:
    """Of uneven micro-batches, the first without an image."""
    want, history, _ = one_step(root, root / "out", "none", stage, "uneven", 1)
    for parts in (4, 8):
        got, its, _ = one_step(root, root / "out", "none", stage, "uneven", parts)
        assert got.keys() == want.keys()
        for name in want:
            assert relative_error(got[name], want[name]) <= FP32_WEIGHTS, name
        for term in ("loss", *STAGES[stage].objective().names):
            assert its[0][term] == pytest.approx(history[0][term], rel=1e-6, abs=1e-9), term


def test_a_stopped_fsdp2_run_goes_on_and_leaves_ordinary_folders(ranks, root: Path) -> None:
    (said, files, curves), (quiet, _, same) = (rank["run"] for rank in ranks)
    # FSDP's own form of the optimizer's state, and no second copy of the weights beside it
    assert "optimizer.bin" in files and "model.safetensors" in files
    assert "pytorch_model_fsdp.bin" not in files
    assert curves == same and quiet == []
    check_run(root, run_config(root, root / "fsdp2"), said, curves)


def test_a_stopped_fsdp2_run_of_experts_does_too(ranks, root: Path) -> None:
    said, _, curves = ranks[0]["sparse"]
    check_run(root, sparse_config(root, root / "sparse"), said, curves)
    assert any("parameters train (experts, projector, router)" in line for line in said)


def test_what_an_objective_learns_is_sharded_kept_and_in_no_student(ranks, root: Path) -> None:
    (said, files, curves), (_, _, same) = (rank["features"] for rank in ranks)
    assert learned.FILE in files and curves == same
    config = features_config(root, root / "features")
    check_run(root, config, said, curves)
    model = Path(config.out) / "1-kd" / "model" / "model.safetensors"
    assert not any(learned.PLACE in name for name in load_file(model))


def test_what_an_objective_learns_goes_on_in_any_trainer(ranks, root: Path) -> None:
    for (whole, pieces, loss), (again, _, same) in (rank["mixin"] for rank in ranks):
        assert len(whole) == 4 and pieces and loss == same
        assert all(torch.equal(again[name], whole[name]) for name in whole)
    kept = load_file(root / "mixin" / "checkpoint-2" / learned.FILE)
    assert all(torch.equal(kept[name], ranks[0]["mixin"][0][0][name]) for name in kept)
    saved = load_file(root / "mixin" / "model" / "model.safetensors")
    assert not any(learned.PLACE in name for name in saved)


def check_run(root: Path, config: Config, said: list[str], curves: Any) -> None:
    """Curves and models of an interrupted run are those of one process."""
    assert any("resuming from checkpoint-2" in line for line in said)
    alone = settings.changed(config, out=f"{config.out}-alone")
    for result, curve in zip(run(alone, print), curves, strict=True):
        assert [entry["step"] for entry in curve] == [1, 2, 3, 4]
        for its, entry in zip(curve, result.history, strict=True):
            for term in ("loss", "grad_norm", *config.objective(result.name).names):
                # fp32 sums in another order, through Adam, which divides by their size
                assert its[term] == pytest.approx(entry[term], rel=1e-3, abs=1e-4), term
        folder = Path(config.out) / result.model.parent.name
        ours, theirs = (
            AutoModelForImageTextToText.from_pretrained(path).state_dict()
            for path in (folder / "model", result.model)
        )
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert relative_error(ours[name], theirs[name]) < 1e-2, name
        assert not list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize("file", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_accelerates(file: Path) -> None:
    config: Any = load_config_from_file(str(file))  # refuses unknown names
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert str(config.distributed_type).endswith(kinds[file.stem])
    if file.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(file.stem[-1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fsdp_version", 1),
        ("state_dict_type", StateDictType.SHARDED_STATE_DICT),
        ("cpu_ram_efficient_loading", True),
    ],
)
def test_what_fsdp_cannot_do_is_refused_by_name(name: str, value: Any) -> None:
    fits = {
        "fsdp_version": 2,
        "state_dict_type": StateDictType.FULL_STATE_DICT,
        "cpu_ram_efficient_loading": False,
        "mixed_precision_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16),
    }
    kind, nothing = DistributedType.FSDP, torch.nn.Module()
    no_parts = Anatomy({}, {"vision": (), "projector": (), "language": ()})
    plugin = SimpleNamespace(**fits)
    accelerator: Any = SimpleNamespace(
        distributed_type=kind, state=SimpleNamespace(fsdp_plugin=plugin)
    )
    sharding.prepare(accelerator, nothing, no_parts)
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32
    assert plugin.mixed_precision_policy.output_dtype == torch.float32
    setattr(plugin, name, value)
    with pytest.raises(settings.ConfigError, match=f"{name}: got .*expected"):
        sharding.prepare(accelerator, nothing, no_parts)


def test_a_weight_without_numbers_is_refused_by_the_third_stage() -> None:
    """Which stops at it with an error that names no weight; FSDP leaves such weights alone."""
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    student = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))
    student[1].weight = torch.nn.Parameter(torch.empty(0, 2))
    with pytest.raises(settings.ConfigError, match=r"zero_stage: 3 cannot gather .* as 1 of the"):
        sharding.prepare(accelerator, student, Anatomy({}, {}))
