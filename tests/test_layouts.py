"""Does it matter how a tensor lies in memory? Every operand in every layout gives the bits of the
contiguous one: on every backend, with either algorithm, forward and backward.

Kernels read by pointer, so an operand that is taken for contiguous gives wrong numbers, not an
error; a loss that reads its weights right and a gradient that does not look like training.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import ops, plan, registration, relation_ops
from mllmkd_kernels.backends import cpu
from mllmkd_kernels.backends.calls import Head, Options, Targets

# 40 rows are two chunks of the smallest budget, 5 are what Triton's interpreter does in a second;
# sizes are no multiples of a tile or a vector.
V_S, V_T, D_S, D_T = 50, 43, 10, 7
SMALLEST = 1e-6


def strided(x: Tensor) -> Tensor:
    """Every other entry of a larger tensor; between them lies what must not be read."""
    room = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 77).to(x.dtype)
    room[..., ::2] = x
    return room[..., ::2]


def sliced(x: Tensor) -> Tensor:
    """The middle of a larger tensor, as ``ids[:, 1:-1]`` or a padded head is."""
    room = torch.full(tuple(n + 2 for n in x.shape), 77).to(x.dtype)
    middle = room[tuple(slice(1, -1) for _ in x.shape)]
    return middle.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """Columns first; a vector is a column of a matrix."""
    if x.ndim > 1:
        return x.mT.contiguous().mT
    room = torch.full((x.numel(), 3), 77).to(x.dtype)
    room[:, 2] = x
    return room[:, 2]


def negated(x: Tensor) -> Tensor:
    """Contiguous, but the sign is a bit that kernels do not see."""
    lazy = torch.ops.aten._neg_view(-x)
    assert lazy.is_neg()
    return lazy


def expanded(x: Tensor) -> Tensor:
    """The first row for all: stride 0."""
    return x[:1].expand(x.shape)


LAYOUTS = (strided, sliced, transposed, negated, expanded)


@pytest.fixture(params=["eager", "cpu", "triton chunk", "triton stream"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend, and of Triton's algorithms each."""
    name, _, algorithm = request.param.partition(" ")
    if name == "cpu" and not cpu.available():
        pytest.skip(f"backend 'cpu': {cpu.why_not()}")
    if name == "triton":
        pytest.importorskip("triton")
        forced = functools.partial(plan.distill_plan, algorithm=algorithm)
        monkeypatch.setattr(plan, "distill_plan", forced)
    return name


def operands(backend: str) -> dict[str, Tensor]:
    """What a loss may be given, contiguous; leaves are hs, ws, bs."""
    n = 5 if backend == "triton" else 40
    shapes = {
        "hs": (n, D_S), "ws": (V_S, D_S), "bs": (V_S,), "ht": (n, D_T), "wt": (V_T, D_T),
        "bt": (V_T,), "ce_weight": (n,), "kd_weight": (n,), "grad": (n,),
    }  # fmt: skip
    found = {name: torch.rand(shape) - 0.3 for name, shape in shapes.items()}
    found["labels"] = torch.randint(V_T, (n,))
    found["labels"][2] = -100
    found["rows"] = torch.randint(n, (n,))
    found["cu"] = torch.tensor([0, 3, 3, n], dtype=torch.int32)
    return found


def distill(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.fused_linear_distill(
        x["hs"], x["ws"], x["ht"], x["wt"], x["labels"], ce_weight=x["ce_weight"],
        kd_weight=x["kd_weight"], divergence="jsd", temperature=1.5, student_bias=x["bs"],
        teacher_bias=x["bt"], student_softcap=3.0, backend=backend, workspace_mb=SMALLEST,
    ).loss  # fmt: skip


def cross_entropy(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.fused_linear_distill(
        x["hs"], x["ws"], labels=x["labels"], ce_weight=1.0, student_bias=x["bs"], backend=backend
    ).loss


def logprob(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.fused_linear_logprob(
        x["hs"], x["ws"], x["labels"], bias=x["bs"], backend=backend, workspace_mb=SMALLEST
    )


def relation(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.fused_linear_relation(
        x["hs"], x["ws"], x["ht"], x["wt"], x["cu"], student_bias=x["bs"], teacher_bias=x["bt"],
        backend=backend,
    )  # fmt: skip


def features(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.relation_cosine(x["hs"], x["ht"], x["cu"], backend=backend)


def softcapped(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.fused_linear_relation(
        x["hs"], x["ws"], x["ht"], x["wt"], x["cu"], student_bias=x["bs"], teacher_bias=x["bt"],
        student_softcap=3.0, backend=backend,
    )  # fmt: skip


def gram(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.head_gram(x["ws"], x["bs"])


def logit_mse(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.fused_linear_logit_mse(
        x["hs"], x["ws"], x["ht"], x["wt"], row_weight=x["kd_weight"], student_bias=x["bs"],
        teacher_bias=x["bt"],
    )[0]  # fmt: skip


def logit_std(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.logit_std(x["hs"], x["ws"], x["bs"])


def z_scored(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.fused_linear_distill(
        x["hs"], x["ws"], x["ht"], x["wt"], x["labels"], ce_weight=x["ce_weight"],
        kd_weight=x["kd_weight"], standardize=True, student_bias=x["bs"], teacher_bias=x["bt"],
        student_softcap=3.0, backend=backend,
    ).loss  # fmt: skip


def affinity(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.affinity_loss(x["hs"], x["ht"], x["labels"].abs() % 5, x["rows"], x["cu"], x["cu"])


READS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "distill": (
        distill,
        ("hs", "ws", "bs", "ht", "wt", "bt", "labels", "ce_weight", "kd_weight"),
    ),
    "cross_entropy": (cross_entropy, ("hs", "ws", "bs", "labels")),
    "logprob": (logprob, ("hs", "ws", "bs", "labels")),
    "relation": (relation, ("hs", "ws", "bs", "ht", "wt", "bt", "cu")),
    "features": (features, ("hs", "ht", "cu")),
    "softcapped": (softcapped, ("hs", "ws", "bs", "ht", "wt", "bt", "cu")),
    "gram": (gram, ("ws", "bs")),
    "logit_mse": (logit_mse, ("hs", "ws", "bs", "ht", "wt", "bt", "kd_weight")),
    "logit_std": (logit_std, ("hs", "ws", "bs")),
    "z_scored": (
        z_scored,
        ("hs", "ws", "bs", "ht", "wt", "bt", "labels", "ce_weight", "kd_weight"),
    ),
    "affinity": (affinity, ("hs", "ht", "rows", "cu")),
}


def outcome(
    loss: Callable[..., Tensor], x: dict[str, Tensor], backend: str, incoming: Tensor | None = None
) -> list[Tensor]:
    """The value and the gradients of hs, ws, bs where there are any."""
    leaves = {k: x[k].detach().requires_grad_() for k in ("hs", "ws", "bs")}
    value = loss(x | leaves, backend)
    incoming = torch.ones_like(value) if incoming is None else incoming
    found = torch.autograd.grad(value, list(leaves.values()), incoming, allow_unused=True)
    return [value.detach(), *(g for g in found if g is not None)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def plain(x: Tensor) -> Tensor:
    """The same numbers, contiguous, in memory of their own."""
    return torch.empty(x.shape, dtype=x.dtype).copy_(x)


def check_layouts(
    loss: Callable[..., Tensor], names: tuple[str, ...], backend: str, together: bool
) -> None:
    """The bits of `loss` with operands in each layout, one by one or all `together`, are those of
    the same numbers contiguous.
    """
    x = operands(backend)
    groups = [names] if together else [(name,) for name in names]
    for layout, group in itertools.product(LAYOUTS, groups):
        # an expanded prefix sum would be none
        other = {k: layout(x[k]) for k in group if not (k == "cu" and layout is expanded)}
        want = outcome(loss, x | {k: plain(t) for k, t in other.items()}, backend)
        assert same(outcome(loss, x | other, backend), want), (layout.__name__, group)


@pytest.mark.parametrize("name", READS)
def test_every_layout_of_every_operand(name: str, backend: str) -> None:
    loss, names = READS[name]
    check_layouts(loss, names, backend, together=backend == "triton")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["logprob", "gram"])
def test_every_layout_of_an_incoming_gradient(
    name: str, layout: Callable[[Tensor], Tensor], backend: str
) -> None:
    """(N,) of the log-probabilities, (D + 1, D + 1) of a Gram."""
    x, (loss, _) = operands(backend), READS[name]
    incoming = layout(torch.rand_like(loss(x, backend)))
    want = outcome(loss, x, backend, plain(incoming))
    assert same(outcome(loss, x, backend, incoming), want)


def test_the_numbers_of_a_row_weight_that_is_a_view(backend: str) -> None:
    """``(1 / n).expand(N)``, as a mean over tokens is written, is the number 1/n."""
    x = operands(backend)
    n = x["hs"].shape[0]
    view, even = torch.tensor(1 / n).expand(n), torch.full((n,), 1 / n)
    a, b = (outcome(distill, x | {"ce_weight": w, "kd_weight": w}, backend) for w in (view, even))
    assert same(a, b)


def test_gradients_come_contiguous_for_any_layout(backend: str) -> None:
    """As the fake implementations promise to a compiler."""
    x = operands(backend)
    for f in (strided, transposed):
        hs, ws, bs = (f(x[k]) for k in ("hs", "ws", "bs"))
        dw, db = relation_ops.head_gram_backward(torch.randn(D_S + 1, D_S + 1).mT, ws, bs, V_S)
        options = (1.0, 0.0, V_S, -100, True, True, True, backend, -1.0)
        lse = f(torch.rand_like(x["grad"]))
        found = ops.linear_logprob_backward(f(x["grad"]), hs, ws, bs, x["labels"], lse, *options)
        scaled = registration.scale_gradient(ws, torch.tensor(0.3), torch.bfloat16)
        assert torch.equal(scaled, (ws * 0.3).bfloat16())
        assert all(t.is_contiguous() for t in (dw, db, *found, scaled))
        torch.library.opcheck(
            relation_ops.head_gram_backward, (torch.randn(D_S + 1, D_S + 1).mT, ws, bs, V_S),
            test_utils=["test_schema", "test_faketensor"],
        )  # fmt: skip
        torch.library.opcheck(
            registration.scale_gradient, (ws, torch.tensor(0.3), torch.bfloat16),
            test_utils=["test_schema", "test_faketensor"],
        )  # fmt: skip


@pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or "built")
def test_the_cpp_kernels_check_the_labels_that_they_read() -> None:
    """Called past the operators: a strided label out of range is found, and what lies between
    labels is nobody's.
    """
    h, w = torch.randn(4, 3), torch.randn(7, 3)
    wrong, right = strided(torch.tensor([0, 1, 9, 2])), strided(torch.tensor([0, 1, 6, 2]))
    head, options = Head(h, w), Options(vocab=7, chunk=4)
    with pytest.raises(IndexError, match="row 2 has label 9"):
        cpu.logprob_rows(head, Targets(wrong), options)
    want = cpu.logprob_rows(head, Targets(right.contiguous()), options)
    assert same([*cpu.logprob_rows(head, Targets(right), options)], [*want])


@pytest.fixture(scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank, which holds whole heads."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def vocab_parallel_distill(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.vocab_parallel_distill(
        x["hs"], x["ws"], x["ht"], x["wt"], x["labels"], ce_weight=x["ce_weight"],
        kd_weight=x["kd_weight"], divergence="jsd", temperature=1.5, student_bias=x["bs"],
        teacher_bias=x["bt"], workspace_mb=SMALLEST,
    ).loss  # fmt: skip


def vocab_parallel_relation(x: dict[str, Tensor], backend: str) -> Tensor:
    return mk.vocab_parallel_relation(
        x["hs"], x["ws"], x["ht"], x["wt"], x["cu"], student_bias=x["bs"], teacher_bias=x["bt"],
        backend="eager",
    )  # fmt: skip


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("loss", [vocab_parallel_distill, vocab_parallel_relation])
def test_every_layout_of_heads_that_are_cut(loss: Callable[..., Tensor]) -> None:
    names = READS[loss.__name__.removeprefix("vocab_parallel_")][1]
    check_layouts(loss, names, "", together=False)
