"""Is a student that writes its own answers compared on those, and on nothing else?

Sampled at a temperature near 0 it writes the likeliest token each time; the truth is the same
written out: one sample at a time, without padding or cache, a whole forward a token.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import Moment, methods, on_policy
from mllmkd_kernels.batch import counts_of, image_token_id
from tests import pair
from tests.gloo import on_ranks, pretend_fsdp
from tests.test_trainer_mixin import MixedTrainer, arguments, copied, moved
from tests.tiny_models import IMAGE, V, build

NEW = 5
LIKELIEST = on_policy(1.0, NEW, temperature=1e-6)
FORBIDDEN = [IMAGE]
# fp32 sums in another order
RTOL, ATOL = 1e-4, 1e-7


def written_out(student: Any, sample: dict[str, Any], stops: tuple[int, ...] = (2,)) -> list[int]:
    """What the student says after the prompt of a sample."""
    given = sample["labels"]
    start = max(i for i, x in enumerate(given) if x != -100 and given[i - 1] == -100)
    ids: list[int] = sample["input_ids"][:start]
    images = {k: sample[k] for k in ("pixel_values",) if k in sample}
    for _ in range(NEW):
        with torch.no_grad():
            logits = student(input_ids=torch.tensor([ids]), **images).logits[0, -1]
        logits[FORBIDDEN] = -torch.inf
        ids = [*ids, int(logits.argmax())]
        if ids[-1] in stops:
            break
    return ids[start:]


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same samples, padding first."""
    other = {name: value.clone() for name, value in batch.items()}
    for i, mask in enumerate(batch["attention_mask"].bool()):
        for name in ("input_ids", "labels", "attention_mask"):
            other[name][i] = torch.cat((batch[name][i][~mask], batch[name][i][mask]))
    return other


@pytest.mark.parametrize("laid", [dict, left_padded], ids=["right", "left"])
def test_an_answer_follows_its_own_prompt(laid: Callable[..., Any]) -> None:
    student, teacher = pair.models()
    samples = pair.samples()
    truth = [written_out(student, sample) for sample in samples]
    stop = truth[3][1]  # one ends after two tokens, maybe others somewhere
    student.generation_config.eos_token_id = [2, stop, truth[5][0]]
    stops = (2, stop, truth[5][0])
    truth = [written_out(student, sample, stops) for sample in samples]
    given = laid(pair.collate(samples))
    before = {name: value.clone() for name, value in given.items()}
    moment = Moment(student.train(), teacher)
    student.model.vision_tower.eval()
    batch = LIKELIEST(given, moment)
    assert all(torch.equal(before[name], value) for name, value in given.items())
    assert student.training and not student.model.vision_tower.training
    for i, (sample, own) in enumerate(zip(samples, truth, strict=True)):
        prompt = sample["input_ids"][: sample["labels"].count(-100)]
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][real].tolist() == prompt + own
        assert batch["labels"][i][real].tolist() == [-100] * len(prompt) + own
        assert (batch["labels"][i][~real] == -100).all()
    assert batch["on_policy"].tolist() == [True] * len(samples)
    assert moment.notes == {
        "own_answers": 8,
        "own_cut": sum(own[-1] not in stops for own in truth),
        "own_empty": sum(own[0] in stops for own in truth),
    }
    assert 0 < moment.notes["own_cut"] < 8 and moment.notes["own_empty"] > 0


@pytest.mark.parametrize(
    "name", ["llama", "qwen2.5-vl", "smolvlm", "gemma3", "gemma2-softcap", "paligemma2-softcap"]
)
def test_what_is_written_is_what_the_whole_forward_says(name: str) -> None:
    """Entries of one value a token, three positions a token, attention both ways in a prompt."""
    student, batch = build(name)
    student.lm_head.weight.data *= 1 if "softcap" in name else 20  # no two tokens alike
    answers = batch["attention_mask"].bool().clone()
    answers[:, :-3] = False
    labels = batch["input_ids"].masked_fill(~answers, -100)
    own = LIKELIEST({**batch, "labels": labels}, Moment(student))
    with torch.no_grad():
        inputs = {k: v for k, v in own.items() if k not in ("labels", "on_policy")}
        logits = student(**inputs).logits[:, :-1]
    chosen = own["labels"][:, 1:] != -100
    borders = [96, 97, 98] if name == "qwen2.5-vl" else []
    logits[..., [*borders, IMAGE] if "pixel_values" in own else []] = -torch.inf
    assert torch.equal(logits[chosen].argmax(-1), own["labels"][:, 1:][chosen])
    assert chosen.sum() > NEW


def test_the_last_of_several_answers_is_written() -> None:
    student, teacher = pair.models()
    sample = pair.samples()[4]
    whole = sample["input_ids"]
    first = [*sample["labels"], *[-100] * 3, 7, 8, -100]
    ids = [*whole, 30, 31, 32, 7, 8, 40]
    both = {**sample, "input_ids": ids, "labels": first}
    none = {"input_ids": [1, 5, 6], "labels": [-100] * 3}
    batch = LIKELIEST(pair.collate([both, none]), Moment(student, teacher))
    own = written_out(student, both)
    assert batch["input_ids"][0].tolist() == [*ids[:-3], *own]
    assert batch["labels"][0].tolist() == [-100] * (len(ids) - 3) + own
    assert (batch["labels"][1] == -100).all()


def test_what_the_teacher_lacks_or_is_no_text_is_never_written() -> None:
    student, _ = pair.models()
    student.lm_head.weight.data.zero_()  # all tokens alike
    teacher = mk.methods  # no model at all
    small: Any = torch.nn.Module()
    small.get_input_embeddings = lambda: torch.nn.Embedding(60, 4)
    batch = pair.collate(pair.samples())
    for other, below in ((small, 60), (teacher, V)):
        seen = {int(t) for seed in range(8) for t in _labels(batch, student, other, seed)}
        assert seen.isdisjoint(FORBIDDEN) and max(seen) < below and len(seen) > 30
    assert max(seen) > 60


def _labels(batch: Any, student: Any, teacher: Any, seed: int) -> Tensor:
    labels = on_policy(1.0, NEW)(batch, Moment(student, teacher, seed=seed))["labels"]
    return labels[labels != -100]


def test_the_global_generator_and_the_place_in_a_run() -> None:
    """Same place, same answers; another rank's are others, and so are another step's."""
    student, teacher = pair.models()
    batch = pair.collate(pair.samples()[:2])
    state = torch.get_rng_state()
    here = Moment(student, teacher, step=3, part=1)
    ids = [
        on_policy(1.0, NEW, 3.0)(batch, moment)["input_ids"].tolist()
        for moment in (
            here, Moment(student, teacher, step=3, part=1),
            Moment(student, teacher, step=3, part=1, rank=1), Moment(student, teacher, step=4),
        )
    ]  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert ids[0] == ids[1] and ids[2] != ids[0] != ids[3]
    half = on_policy(0.5, NEW)
    chosen = [
        [half(batch, Moment(student, teacher, step=s, rank=r)) is batch for s in range(16)]
        for r in (0, 1)
    ]
    assert chosen[0] == chosen[1] and 0 < sum(chosen[0]) < 16
    assert LIKELIEST(batch, Moment(student, teacher, training=False)) is batch


@pytest.mark.parametrize(
    ("change", "moment", "message"),
    [
        ({}, {"whole": False}, r"^student: on_policy got weights in pieces .*expected DDP, FSDP2"),
        ({"teacher": {"labels": 1}}, {}, r"^teacher: on_policy got a batch of its own"),
        ({"teacher_hidden": torch.ones(2, 2)}, {}, r"^teacher_hidden: on_policy got stored rows"),
        ({"position_ids": torch.ones(1, 9)}, {}, r"^position_ids: on_policy got packed rows"),
        ({"weights": None}, {}, r"^weights: on_policy got values of tokens"),
        ({"labels": None}, {}, r"^labels: the answer of sample 0 has no prompt"),
        ({"input_ids": None}, {}, r"^input_ids: sample 0 has an image after its last answer"),
    ],
)
def test_what_cannot_be_written_is_refused(change: Any, moment: Any, message: str) -> None:
    student, teacher = pair.models()
    batch = pair.collate(pair.samples()[:2])
    if "weights" in change:
        change = {"weights": torch.ones_like(batch["labels"])}
    if "labels" in change:
        change = {"labels": batch["input_ids"]}
    if "input_ids" in change:
        change = {"input_ids": batch["input_ids"].clone(), "labels": batch["labels"].clone()}
        change["input_ids"][0, -2], change["labels"][0, -2:] = IMAGE, -100
        change["attention_mask"] = torch.ones_like(batch["labels"])
    with pytest.raises(ValueError, match=message):
        LIKELIEST({**batch, **change}, Moment(student, teacher, **moment))


def test_arguments_out_of_range_and_no_end_token() -> None:
    for given, message in (
        ({"probability": 1.5}, "probability: got 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            on_policy(**cast(Any, given))
    student, teacher = pair.models()
    student.generation_config.eos_token_id = None
    batch = pair.collate(pair.samples()[:2])
    with pytest.raises(ValueError, match="neither its generation_config nor the processing_class"):
        LIKELIEST(batch, Moment(student, teacher))
    tokenizer: Any = type("Tokenizer", (), {"eos_token_id": 2})
    assert LIKELIEST(batch, Moment(student, teacher, tokenizer))["on_policy"].all()
    own = LIKELIEST(batch, Moment(student, teacher, tokenizer))
    with pytest.raises(ValueError, match=r"^on_policy: .*LlavaKDLoss"):
        mk.distill_batch(mk.LlavaKDLoss(), student, teacher, own)


# --- the loss -------------------------------------------------------------------------------------


def naive(student: Any, teacher: Any, batches: list[dict[str, Tensor]], ce: float) -> Tensor:
    """JSD of all answers, and cross-entropy of those that were given: means over the step."""
    jsd, entropies = [], []
    for batch in batches:
        z = [
            m(**{k: v for k, v in batch.items() if k not in ("labels", "on_policy")}).logits
            for m in (student, teacher)
        ]
        chosen = batch["labels"][:, 1:] != -100
        log_q, log_p = (x[:, :-1][chosen].log_softmax(-1) for x in z)
        log_p = log_p.detach()
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        pairs = (log_p, log_q)
        jsd.append(sum((0.5 * x.exp() * (x - log_m)).sum(-1) for x in pairs))
        if "on_policy" not in batch:
            labels = batch["labels"][:, 1:][chosen]
            entropies.append(F.cross_entropy(log_q, labels, reduction="none"))
    return torch.cat(jsd).mean() + (ce * torch.cat(entropies).mean() if entropies else 0.0)


def objective(ce: float) -> mk.Objective:
    return methods.on_policy.objective(ce=ce, backend="eager")


@pytest.mark.parametrize("own", [(True,), (True, False)], ids=["own", "own and given"])
def test_cross_entropy_leaves_own_answers_out(own: tuple[bool, ...]) -> None:
    student, teacher = pair.models()
    given = [pair.collate(pair.samples()[i : i + 4]) for i in (0, 4)][: len(own)]
    batches = [
        LIKELIEST(batch, Moment(student, teacher)) if is_own else batch
        for batch, is_own in zip(given, own, strict=True)
    ]
    naive(student, teacher, batches, ce=0.7).backward()
    expected = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    made = objective(0.7)
    counts = counts_of(made, batches, image_token_id(student))
    assert int(counts["response:given"]) == sum(
        int((b["labels"][:, 1:] != -100).sum()) for b in batches if "on_policy" not in b
    )
    for batch in batches:
        mk.distill_batch(made, student, teacher, batch, counts).loss.backward()
    for name, p in student.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=RTOL, atol=ATOL, msg=name)


# --- a trainer ------------------------------------------------------------------------------------


def models() -> tuple[Any, Any]:
    """Of a student that ends its first two answers early, so that no rank ends with another."""
    student, teacher = pair.models()
    student.generation_config.eos_token_id = [2, 73, 86]
    return student, teacher


def trainer(
    out: Path, view: Any = LIKELIEST, ce: float = 0.7, *, in_pieces: bool = False, **options: Any
) -> MixedTrainer:
    student, teacher = models()
    args = arguments(out, **options)
    if in_pieces:
        pretend_fsdp()
    return MixedTrainer(
        model=student, teacher=teacher, objective=objective(ce), view=view,
        args=args, train_dataset=pair.samples(),
        eval_dataset=pair.samples(), data_collator=pair.collate,
    )  # fmt: skip


def alternately(batch: Any, moment: Moment) -> Any:
    """Every other micro-batch is of the student's."""
    return LIKELIEST(batch, moment) if moment.part % 2 == 0 else batch


def stepped(run: MixedTrainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model: Any = run.model
    before = copied(model)
    run.train()
    return moved(before, model), run.state.log_history[0]


def assert_steps(step: dict[str, Tensor], student: Any) -> None:
    """The weights have moved by the gradients."""
    for name, p in student.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(step[name], 1e-2 * gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_over_the_rows_that_the_view_made(accumulate: int, tmp_path: Path) -> None:
    size = 8 // accumulate
    options: dict[str, Any] = {"per_device_train_batch_size": size}
    run = trainer(tmp_path, alternately, gradient_accumulation_steps=accumulate, **options)
    student, teacher = models()
    parts = [pair.collate(pair.samples()[i : i + size]) for i in range(0, 8, size)]
    parts = [alternately(b, Moment(student, teacher, part=i)) for i, b in enumerate(parts)]
    loss = naive(student, teacher, parts, ce=0.7)
    loss.backward()
    step, logged = stepped(run)
    assert_steps(step, student)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert logged["own_answers"] == (8 if accumulate == 1 else 4)
    assert (logged["ce"] == 0) == (accumulate == 1)
    metrics = run.evaluate()
    assert metrics["eval_ce"] > 0 and "eval_own_answers" not in metrics


def test_a_run_that_goes_on_writes_as_one_that_did_not_stop(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2
    }  # fmt: skip
    half = on_policy(0.5, NEW, 2.0)
    whole = trainer(tmp_path, half, **options)
    whole.train()
    torch.manual_seed(99)
    again = trainer(tmp_path, half, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logs = [[e for e in run.state.log_history if "loss" in e][2:] for run in (whole, again)]
    for ours, theirs in zip(*logs, strict=True):
        for key in ("step", "loss", "response", "ce", "own_answers", "own_cut", "own_empty"):
            assert ours.get(key) == theirs.get(key), key
    assert any("own_answers" in entry for entry in logs[0])


WRAPPERS = ("DistributedDataParallel", "FSDPLlavaForConditionalGeneration")


def on_a_rank(out: Path) -> Any:
    """What a coin says in 8 steps; a step of 2 × 2 micro-batches, and the own ones of them."""
    rank = str(dist.get_rank())
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost",
        FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="Qwen2DecoderLayer", FSDP_RESHARD_AFTER_FORWARD="true",
    )  # fmt: skip
    coins = trainer(out, on_policy(0.5, 2), max_steps=8, learning_rate=0.0)
    coins.train()
    found: dict[str, Any] = {
        "coins": [e.get("own_answers", 0) for e in coins.state.log_history[:8]]
    }
    for wrapper in WRAPPERS:
        drawn = []

        def view(batch: Any, moment: Moment, kept: list[Tensor] = drawn) -> Any:
            seen = alternately(batch, moment)
            kept += [seen["input_ids"]] if seen is not batch else []
            return seen

        in_pieces = wrapper.startswith("FSDP")
        run = trainer(out, view, in_pieces=in_pieces, gradient_accumulation_steps=2)
        found[wrapper] = (*stepped(run), drawn)
        assert type(run.model_wrapped).__name__ == wrapper
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, on_a_rank, folder, folder)


@pytest.mark.parametrize(
    "wrapper", ["DistributedDataParallel", "FSDPLlavaForConditionalGeneration"]
)
def test_two_processes_make_the_step_of_one(wrapper: str, ranks: list[Any]) -> None:
    """In pieces, too, where no process could write alone."""
    student, teacher = models()
    parts = [pair.collate(pair.samples()[i : i + 2]) for i in range(0, 8, 2)]
    parts = [  # the ranks take batches in turn: 0 and 1 are the first of each
        alternately(b, Moment(student, teacher, part=i // 2)) for i, b in enumerate(parts)
    ]
    loss = naive(student, teacher, parts, ce=0.7)
    loss.backward()
    for rank, found in enumerate(ranks):
        step, logged, (drawn,) = found[wrapper]
        assert torch.equal(drawn, parts[rank]["input_ids"])
        assert logged["own_cut"] == 2  # of the second rank alone
        assert_steps(step, student)
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert logged["own_answers"] == 4


def test_a_coin_falls_alike_in_all_processes(ranks: list[Any]) -> None:
    coins = [found["coins"] for found in ranks]
    assert coins[0] == coins[1] and set(coins[0]) == {0, 4}
