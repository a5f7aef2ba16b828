"""Does bad input raise an error that names the argument, what came and what was expected?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import mllmkd_kernels as mk
from mllmkd_kernels.backends import cpu

N, V_S, V_T, D_S, D_T = 4, 7, 9, 3, 5
META = torch.device("meta")  # another device that any machine has


def good() -> dict[str, Any]:
    return {
        "student_hidden": torch.randn(N, D_S), "student_weight": torch.randn(V_S, D_S),
        "teacher_hidden": torch.randn(N, D_T), "teacher_weight": torch.randn(V_T, D_T),
        "labels": torch.tensor([0, 1, -100, 6]), "ce_weight": 1.0, "kd_weight": 1.0,
    }  # fmt: skip


BAD_DISTILL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_hidden": [[1.0]]}, TypeError, "student_hidden: expected a tensor, got list"),
    ({"student_hidden": torch.zeros(N, D_S, dtype=torch.int64)}, TypeError,
     "student_hidden: expected float32, bfloat16, float16 or float64, got torch.int64"),
    ({"student_hidden": torch.zeros(2, N, D_S)}, ValueError,
     r"student_hidden: expected 2 dimensions, got shape \(2, 4, 3\)"),
    ({"student_weight": torch.zeros(V_S, D_S, dtype=torch.complex64)}, TypeError,
     "student_weight: expected float32.* got torch.complex64"),
    ({"student_hidden": torch.zeros(N, 0), "student_weight": torch.zeros(V_S, 0)}, ValueError,
     r"student_hidden: expected at least one feature, got \(4, 0\)"),
    ({"teacher_hidden": torch.zeros(N, 0), "teacher_weight": torch.zeros(V_T, 0)}, ValueError,
     r"teacher_hidden: expected at least one feature, got \(4, 0\)"),
    ({"student_weight": torch.zeros(V_S, 8)}, ValueError,
     "student_weight: its rows have 8 entries, but student_hidden has size 3"),
    ({"teacher_weight": torch.zeros(V_T, 8)}, ValueError,
     "teacher_weight: its rows have 8 entries, but teacher_hidden has size 5"),
    ({"student_weight": torch.zeros(V_S, D_S, device=META)}, ValueError,
     "student_weight: is on meta, but student_hidden is on cpu"),
    ({"teacher_hidden": torch.zeros(6, D_T)}, ValueError,
     "teacher_hidden: has 6 rows, but student_hidden has 4"),
    ({"teacher_hidden": torch.zeros(N, D_T, device=META),
      "teacher_weight": torch.zeros(V_T, D_T, device=META)}, ValueError,
     "teacher_hidden: is on meta, but student_hidden is on cpu"),
    ({"teacher_hidden": None}, ValueError, "teacher_hidden: got None, but teacher_weight"),
    ({"teacher_weight": None}, ValueError, "teacher_weight: got None, but teacher_hidden"),
    ({"student_bias": torch.zeros(6)}, ValueError,
     "student_bias: got 6 entries for a head of 7 tokens"),
    ({"teacher_bias": torch.zeros(V_T, 1)}, ValueError, "teacher_bias: expected 1 dimensions"),
    ({"student_bias": torch.zeros(V_S, device=META)}, ValueError, "student_bias: is on meta"),
    ({"labels": None}, ValueError, "labels: expected next tokens, because ce_weight is not 0"),
    ({"labels": torch.zeros(N, dtype=torch.int32)}, TypeError,
     "labels: expected an int64 tensor, got torch.int32"),
    ({"labels": [0, 1, 2, 3]}, TypeError, "labels: expected an int64 tensor, got list"),
    ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError,
     r"labels: expected shape \(4,\), got \(5,\)"),
    ({"labels": torch.zeros(N, dtype=torch.int64, device=META)}, ValueError, "labels: is on meta"),
    ({"labels": torch.tensor([0, 7, 1, 2])}, IndexError, r"labels.* 7\b.*\[0, 7\)"),
    ({"labels": torch.tensor([0, 1, -1, 2])}, IndexError, r"labels.* -1\b.*\[0, 7\)"),
    ({"labels": torch.tensor([0, 1, 5, 2]), "vocab_size": 5}, IndexError,
     r"labels.* 5\b.*\[0, 5\)"),
    ({"ce_weight": torch.ones(5)}, ValueError,
     r"ce_weight: expected a number or shape \(4,\), got \(5,\)"),
    ({"kd_weight": torch.ones(N, 1)}, ValueError, r"kd_weight: expected .* got \(4, 1\)"),
    ({"kd_weight": "mean"}, TypeError, "kd_weight: expected a number or a tensor .* got str"),
    ({"kd_weight": torch.ones(N, device=META)}, ValueError, "kd_weight: is on meta"),
    ({"divergence": "kl"}, ValueError, "divergence: got 'kl', expected one of forward_kl"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
    ({"temperature": -1.0}, ValueError, "temperature: expected a positive number, got -1.0"),
    ({"temperature": float("nan")}, ValueError, "temperature: expected .* got nan"),
    ({"student_softcap": 0.0}, ValueError, "student_softcap: expected None or a positive number"),
    ({"teacher_softcap": -5.0}, ValueError, "teacher_softcap: expected .* got -5.0"),
    ({"vocab_size": 8}, ValueError, r"vocab_size: got 8, expected 1 to 7 \(heads of \(7, 9\)"),
    ({"vocab_size": 0}, ValueError, "vocab_size: got 0, expected 1 to 7"),
    ({"backend": "gpu"}, ValueError, "backend: got 'gpu', expected one of 'auto', 'eager', 'cpu'"),
    ({"workspace_mb": 0}, ValueError, "workspace_mb: expected None or a positive number of MiB"),
    ({"ce_weight": torch.ones(N, dtype=torch.complex64)}, TypeError,
     "ce_weight: expected real numbers, got torch.complex64"),
    ({"student_weight": torch.eye(V_S, D_S).to_sparse()}, TypeError,
     "student_weight: expected a dense tensor, got one of layout torch.sparse_coo"),
    ({"main_grad": torch.zeros(V_S, D_S)}, ValueError, "main_grad: expected None for a frozen"),
]  # fmt: skip


def id_of(value: Any) -> str | None:
    return "-".join(value) if isinstance(value, dict) else None


#: Numbers by name, and what each expects.
NUMBERS = {
    "temperature": "a positive number", "student_softcap": "None or a positive number",
    "teacher_softcap": "None or a positive number", "ce_weight": "a number or a tensor",
    "kd_weight": "a number or a tensor", "workspace_mb": "None or a positive number of MiB",
    "vocab_size": "an integer", "ignore_index": "an integer", "backend": "a name",
}  # fmt: skip


#: Of those, what may be None, a tensor (of N numbers) or a str.
OPTIONAL = ("student_softcap", "teacher_softcap", "workspace_mb", "vocab_size")
NOT_NUMBERS = (
    [(name, [1.0]) for name in NUMBERS]
    + [(name, None) for name in NUMBERS if name not in OPTIONAL]
    + [(name, "0.5") for name in NUMBERS if name != "backend"]
    + [(name, torch.ones(())) for name in NUMBERS if name not in ("ce_weight", "kd_weight")]
)


@pytest.mark.parametrize(("name", "value"), NOT_NUMBERS, ids=lambda x: repr(x)[:12])
def test_what_is_no_number_is_named(name: str, value: Any) -> None:
    """Not even a tensor of one entry will do: its gradient would be dropped, and nobody may look at
    its value.
    """
    message = f"{name}: expected {NUMBERS[name]}.* got {type(value).__name__}"
    with pytest.raises(TypeError, match=message):
        mk.fused_linear_distill(**{**good(), name: value})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0, -1.0])
@pytest.mark.parametrize("name", ["temperature", "student_softcap", "workspace_mb"])
def test_a_number_out_of_range_is_refused_by_every_function(name: str, value: float) -> None:
    x = good()
    student, head = x["student_hidden"], x["student_weight"]
    teacher = x["teacher_hidden"], x["teacher_weight"]
    losses: list[Callable[..., Any]] = [
        lambda **o: mk.fused_linear_distill(student, head, *teacher, **o),
        lambda **o: mk.fused_linear_distill(student, head, **o),
    ]
    if name != "student_softcap":
        losses.append(lambda **o: mk.fused_linear_logprob(student, head, x["labels"], **o))
    if name == "student_softcap":
        losses.append(lambda **o: mk.fused_linear_relation(student, head, *teacher, **o))
    for loss in losses:
        with pytest.raises(ValueError, match=f"{name}: expected .*positive number.* got {value}"):
            loss(**{name: value})


@pytest.mark.parametrize(
    "number", [2, 2.0, np.float32(2), np.float64(2), np.int64(2)], ids=lambda n: type(n).__name__
)
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    x, names = good(), ("temperature", "student_softcap", "kd_weight")
    got, want = (
        mk.fused_linear_distill(**{**x, **dict.fromkeys(names, n)}).loss for n in (number, 2.0)
    )
    assert torch.equal(got, want)


def test_tensors_without_numbers_are_refused() -> None:
    """All on meta: an offloaded model, or one that was not loaded."""
    x: dict[str, Any] = {k: v.to(META) if isinstance(v, Tensor) else v for k, v in good().items()}
    hidden, head, labels = x["student_hidden"], x["student_weight"], x["labels"]
    teacher = x["teacher_hidden"], x["teacher_weight"]
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("student_hidden", lambda: mk.fused_linear_distill(**x)),
        ("hidden", lambda: mk.fused_linear_logprob(hidden, head, labels)),
        ("student_hidden", lambda: mk.fused_linear_relation(hidden, head, *teacher)),
        ("student", lambda: mk.relation_cosine(hidden, teacher[0])),
        ("weight", lambda: mk.head_gram(head)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=f"^{name}: is on meta, .* no numbers"):
            call()


def test_a_head_that_is_a_part_of_one_is_refused(tmp_path: Path) -> None:
    """A DTensor, as FSDP2 and tensor parallelism leave it."""
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        head = distribute_tensor(torch.randn(V_S, D_S), mesh, [Shard(0)])
        with pytest.raises(TypeError, match=r"^student_weight: expected a whole .* got a DTensor"):
            mk.fused_linear_distill(**{**good(), "student_weight": head})
        with pytest.raises(TypeError, match=r"^weight: expected a whole tensor, got a DTensor"):
            mk.head_gram(head)
    finally:
        dist.destroy_process_group()


def test_the_good_input_is_good() -> None:
    assert mk.fused_linear_distill(**good()).loss.isfinite()


def test_a_label_out_of_range_in_every_backend_and_function(backend: str) -> None:
    x = good()
    labels = torch.tensor([0, 1, -100, 7])
    with pytest.raises(IndexError, match=r"labels.* 7\b"):
        mk.fused_linear_distill(**{**x, "labels": labels}, backend=backend)
    with pytest.raises(IndexError, match=r"labels.* 7\b"):
        mk.fused_linear_logprob(x["student_hidden"], x["student_weight"], labels, backend=backend)
    # Where the cross-entropy has no weight the labels are not read.
    mk.fused_linear_distill(**{**x, "labels": labels, "ce_weight": 0.0}, backend=backend)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(value: float) -> None:
    """A number is refused at once; in a tensor nobody may look, and the loss comes out NaN."""
    with pytest.raises(ValueError, match=f"kd_weight: expected a finite number .* got {value}"):
        mk.fused_linear_distill(**{**good(), "kd_weight": value})
    rows = torch.ones(N)
    rows[1] = torch.nan
    assert mk.fused_linear_distill(**{**good(), "kd_weight": rows}).loss.isnan()


def test_the_cpu_backend_on_another_device() -> None:
    with pytest.raises(
        ValueError, match="backend: 'cpu' was asked for, but the tensors are on cuda"
    ):
        mk.explain(N, V_S, D_S, D_T, device="cuda", backend="cpu")


def test_the_cpu_backend_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "why_not", lambda: "there was no compiler")
    with pytest.raises(RuntimeError, match="'cpu' was asked for, but there was no compiler"):
        mk.fused_linear_distill(**good(), backend="cpu")
    auto, eager = (mk.fused_linear_distill(**{**good(), "student_hidden": torch.ones(N, D_S),
                   "student_weight": torch.eye(V_S, D_S), "kd_weight": 0.0}, backend=b).loss
                   for b in ("auto", "eager"))  # fmt: skip
    assert torch.equal(auto, eager)


def test_falling_back_to_eager_is_said_once_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "why_not", lambda: "the compiler was on holiday")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mk.fused_linear_distill(**good(), backend="eager")
        assert not said
        for _ in range(2):
            mk.fused_linear_distill(**good())
    (only,) = said
    assert "eager backend" in str(only.message) and "was on holiday" in str(only.message)


BAD_LOGPROB: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": torch.zeros(N)}, ValueError, "hidden: expected 2 dimensions"),
    ({"weight": torch.zeros(V_S, 9)}, ValueError, "weight: its rows have 9 entries"),
    ({"bias": torch.zeros(2)}, ValueError, "bias: got 2 entries for a head of 7"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels: expected shape \(4,\)"),
    ({"softcap": -1.0}, ValueError, "softcap: expected None or a positive"),
    ({"vocab_size": 9}, ValueError, "vocab_size: got 9, expected 1 to 7"),
    ({"temperature": 0}, ValueError, "temperature: expected a positive number, got 0"),
]


def cu(*ends: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(ends, dtype=dtype)


BAD_RELATION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens": cu(0, 4, dtype=torch.int64)}, ValueError,
     r"cu_seqlens: expected int32 .* got torch.int64 \(2,\)"),
    ({"cu_seqlens": [0, 4]}, ValueError, "cu_seqlens: expected int32 .* got list"),
    ({"cu_seqlens": cu()}, ValueError, "cu_seqlens: expected int32 of shape"),
    ({"cu_seqlens": cu(0, 3)}, ValueError, r"prefix sum from 0 to 4, got \[0, 3\]"),
    ({"cu_seqlens": cu(1, 4)}, ValueError, r"prefix sum from 0 to 4, got \[1, 4\]"),
    ({"cu_seqlens": cu(0, 3, 2, 4)}, ValueError, r"non-decreasing .* got \[0, 3, 2, 4\]"),
    ({"teacher_hidden": torch.zeros(5, D_T)}, ValueError, "teacher_hidden: has 5 rows, but"),
    ({"student_gram": torch.zeros(2, 2)}, ValueError,
     r"student_gram: expected shape \(3, 3\), got \(2, 2\)"),
    ({"teacher_gram": torch.zeros(D_S, D_S)}, ValueError, r"teacher_gram: expected shape \(5, 5\)"),
    ({"teacher_gram": torch.zeros(D_T, D_T, dtype=torch.bfloat16)}, TypeError,
     "teacher_gram: expected float32, as `head_gram` gives it, got torch.bfloat16"),
    ({"teacher_gram": torch.zeros(D_T, D_T, device=META)}, ValueError, "teacher_gram: is on meta"),
    ({"student_bias": torch.zeros(V_S), "student_gram": torch.zeros(D_S, D_S)}, ValueError,
     r"student_gram: expected shape \(4, 4\)"),  # a bias makes the Gram one larger
    ({"student_softcap": 2.0, "teacher_gram": torch.zeros(D_T, D_T)}, ValueError,
     "student_gram, teacher_gram: a soft-capped pair has no Gram"),
    ({"student_weight": torch.zeros(V_S, D_S, requires_grad=True),
      "student_gram": torch.zeros(D_S, D_S)}, ValueError,
     "student_gram: a cached Gram would cut the gradient of student_weight"),
    ({"student_hidden": torch.zeros(N)}, ValueError, "student_hidden: expected 2 dim"),
    ({"vocab_size": 8}, ValueError, "vocab_size: got 8, expected 1 to 7"),
    ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
]  # fmt: skip


BAD = {
    "fused_linear_distill": BAD_DISTILL, "fused_linear_logprob": BAD_LOGPROB,
    "fused_linear_relation": BAD_RELATION,
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "change", "error", "message"),
    [(name, *case) for name, cases in BAD.items() for case in cases], ids=id_of,
)  # fmt: skip
def test_bad_input(
    function: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    x = good()
    if function == "fused_linear_relation":
        x = {k: v for k, v in x.items() if k[:7] in ("student", "teacher")}
    if function == "fused_linear_logprob":
        x = {k: x[f"student_{k}"] for k in ("hidden", "weight")} | {"labels": x["labels"]}
    with pytest.raises(error, match=message):
        getattr(mk, function)(**{**x, **change})


def test_relation_of_features() -> None:
    y = torch.zeros(2, 6, 3)
    with pytest.raises(ValueError, match=r"student of shape \(2, 6, 3\) is already B images"):
        mk.relation_cosine(y, y, cu(0, 12))
    with pytest.raises(ValueError, match=r"teacher: .*\(3, 4, 3\).*\(2, 6, 3\)"):
        mk.relation_cosine(y, torch.zeros(3, 4, 3))  # 12 rows too, but of other images
    with pytest.raises(ValueError, match="teacher: has 11 rows, but student has 12"):
        mk.relation_cosine(y[0].repeat(2, 1), y[0].repeat(2, 1)[1:])
    with pytest.raises(TypeError, match="student: expected a tensor, got NoneType"):
        mk.relation_cosine(None, y)  # pyright: ignore[reportArgumentType]


def test_gram() -> None:
    with pytest.raises(ValueError, match="bias: got 3 entries for a head of 7 tokens"):
        mk.head_gram(torch.zeros(V_S, D_S), torch.zeros(3))
    with pytest.raises(ValueError, match="vocab_size: got 8, expected 1 to 7"):
        mk.head_gram(torch.zeros(V_S, D_S), vocab_size=8)
    with pytest.raises(ValueError, match="weight: expected 2 dimensions"):
        mk.head_gram(torch.zeros(V_S))
