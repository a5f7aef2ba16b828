"""Do the scripts in examples/ run, and is their first loss that of plain PyTorch?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

import mllmkd_kernels as mk
from examples import accelerate_loop, diffs, llava_patch, transformers_trainer, trl_sft
from examples.chat_data import ChatCollator, read_chats
from tests import mini_llava, pair

TINY: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "sequential",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": [],
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return pair.write(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def first_loss(files: tuple[Path, Path, Path]) -> float:
    """Of the first optimiser step of 4 chats, whole logits, before any step is made."""
    student, teacher, chats = files
    batch = ChatCollator(AutoProcessor.from_pretrained(student))(read_chats(chats)[:4])
    with torch.no_grad():
        return float(pair.naive_loss(loaded(student), loaded(teacher), batch))


def loaded(path: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(path)


def test_labels_are_the_answers(files: tuple[Path, Path, Path]) -> None:
    processor = AutoProcessor.from_pretrained(files[0])
    batch = ChatCollator(processor)(read_chats(files[2])[:4])
    answers = [processor.decode(row[row != -100]) for row in batch["labels"]]
    assert answers == ["red </s>", "this is green </s>", "blue </s>", "this is red </s>"]


def falls(losses: list[float], first: float) -> None:
    # fp32 sums in another order, through another way to the same loss
    assert losses[0] == pytest.approx(first, rel=1e-4)
    assert losses[-1] < losses[0]


def test_transformers_trainer(
    files: tuple[Path, Path, Path], first_loss: float, tmp_path: Path
) -> None:
    student, teacher, chats = files
    run = transformers_trainer.main(
        str(chats), str(tmp_path), student=str(student), teacher=str(teacher), **TINY
    )
    falls([log["loss"] for log in run.state.log_history if "loss" in log], first_loss)
    loaded(tmp_path)
    AutoProcessor.from_pretrained(tmp_path)


def test_accelerate_loop(files: tuple[Path, Path, Path], first_loss: float, tmp_path: Path) -> None:
    student, teacher, chats = files
    options: dict[str, Any] = {"epochs": 3, "accumulate": 2, "lr": 1e-2}
    losses = accelerate_loop.main(
        str(chats), str(tmp_path), student=str(student), teacher=str(teacher), **options
    )
    assert len(losses) == 6
    falls(losses, first_loss)
    loaded(tmp_path)


@pytest.fixture
def trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `trl_sft.main` is given here."""
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry then
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # said by name, because TRL's default still goes by a name that transformers warns of
    return {**TINY, "out": str(tmp_path / "out"), "activation_checkpointing": True}


def test_trl_sft(
    files: tuple[Path, Path, Path], first_loss: float, tmp_path: Path, trl: dict[str, Any]
) -> None:
    student, teacher, chats = files
    run = trl_sft.main(str(chats), student=str(student), teacher=str(teacher), **trl)
    falls([log["loss"] for log in run.state.log_history if "loss" in log], first_loss)
    loaded(tmp_path / "out")


def test_another_loss_of_trls_is_refused(
    files: tuple[Path, Path, Path], trl: dict[str, Any]
) -> None:
    student, teacher, chats = map(str, files)
    with pytest.raises(ValueError, match="loss_type: got dft, expected 'nll': the loss is kd_loss"):
        trl_sft.main(chats, student=student, teacher=teacher, **trl, loss_type="dft")


def patched(out: Path, kd_loss: mk.LlavaKDLoss, each: Any, **options: Any) -> tuple[Any, Any]:
    """Student and teacher as they were, and the losses of the patched code base's trainer."""
    student, teacher = mini_llava.MiniLlava(32, 0), mini_llava.MiniLlava(48, 7)
    run = llava_patch.main(
        mini_llava.MiniTrainer,
        copy.deepcopy(student),
        teacher,
        kd_loss,
        mini_llava.ROWS,
        args=TrainingArguments(str(out), remove_unused_columns=False, **{**TINY, **options}),
        train_dataset=each,
        data_collator=mini_llava.collate,
    )
    return (student, teacher), [log["loss"] for log in run.state.log_history if "loss" in log]


def test_llava_patch_is_the_released_loss(tmp_path: Path) -> None:
    each = mini_llava.samples((2, 2))  # images at equal places: the released loss has them right
    code = mk.LlavaKDLoss(relation=1.0, relation_batch=True)
    (student, teacher), losses = patched(tmp_path, code, each, gradient_accumulation_steps=1)
    with torch.no_grad():
        falls(losses, float(mini_llava.released_loss(student, teacher, mini_llava.collate(each))))


def test_llava_patch_where_the_released_loss_goes_wrong(tmp_path: Path) -> None:
    """Images at other places, text alone, uneven micro-batches: the paper's loss of the step."""
    each = mini_llava.samples((2, None, 4, 0))
    (student, teacher), losses = patched(tmp_path, mk.LlavaKDLoss(), each)
    with torch.no_grad():
        falls(losses, float(mini_llava.papers_loss(student, teacher, each)))


def test_the_page_shows_the_scripts() -> None:
    page = diffs.PAGE.read_text(encoding="utf-8")
    assert page == diffs.rewritten(page), "stale: run python -m examples.diffs"
    for name in ("transformers_trainer", "trl_sft", "accelerate_loop"):
        script = diffs.ROOT / "examples" / f"{name}.py"
        lines = diffs.diff(script.read_text(encoding="utf-8")).splitlines()
        changed = [line for line in lines if line[:1] in ("+", "-") and len(line) > 1]
        assert 6 <= len(changed) <= 20, name  # about a dozen
