"""Are the operators ordinary differentiable operators: for autograd, `opcheck`, `torch.compile`?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import mllmkd_kernels as mk
from mllmkd_kernels import ops, plan, registration, relation_ops
from mllmkd_kernels.backends import cpu, products
from mllmkd_kernels.divergence import PARAMETERS
from tests.problems import DIVERGENCES, problem, run
from tests.test_layouts import READS

# 4 rows, 6 and 7 tokens, hidden sizes 2 and 3: gradcheck runs forward twice for each of 30 entries.
N, V_S, V_T, D_S, D_T = 4, 6, 7, 2, 3
LABELS = torch.tensor([1, -100, 5, 0])
CU = torch.tensor([0, 3, 4], dtype=torch.int32)
WEIGHT = torch.tensor([0.5, 0.0, 1.0, -0.3], dtype=torch.float64)


def heads(dtype: torch.dtype = torch.float64, grad: bool = True) -> dict[str, Tensor]:
    """Student hidden, weight, bias (leaves), then the teacher's."""
    shapes = {
        "hs": (N, D_S), "ws": (V_S, D_S), "bs": (V_S,),
        "ht": (N, D_T), "wt": (V_T, D_T), "bt": (V_T,),
    }  # fmt: skip
    return {
        k: torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_(grad and k[1] == "s")
        for k, s in shapes.items()
    }


FIXED = {
    "labels": LABELS, "cu": CU, "rows": torch.tensor([1, 0, 3, 2]), "ce_weight": WEIGHT.flip(0),
    "kd_weight": WEIGHT,
}  # fmt: skip


def callers(backend: str) -> dict[str, Callable[..., Tensor]]:
    """Every public loss as a scalar function of (hs, ws, bs, ht, wt, bt)."""

    def of(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(hs, ws, bs, ht, wt, bt):
            given = {"hs": hs, "ws": ws, "bs": bs, "ht": ht, "wt": wt, "bt": bt}
            return loss(given | FIXED, backend).sin().sum()

        return call

    return {name: of(loss) for name, (loss, _) in READS.items()}


NAMES = tuple(callers("eager"))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, backend: str) -> None:
    t = heads()
    f, teacher = callers(backend)[name], (t["ht"], t["wt"], t["bt"])
    student = (t["hs"], t["ws"], t["bs"])
    assert torch.autograd.gradcheck(lambda *s: f(*s, *teacher), student)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_of_every_divergence_and_of_the_row_weights(
    divergence: str, backend: str
) -> None:
    t = heads()
    ce_weight, kd_weight = torch.rand(2, N, dtype=torch.float64).requires_grad_().unbind(0)

    def loss(hs, ws, bs, ce_weight, kd_weight):
        return mk.fused_linear_distill(
            hs, ws, t["ht"], t["wt"], LABELS, ce_weight=ce_weight, kd_weight=kd_weight,
            divergence=divergence, temperature=0.8, student_bias=bs, backend=backend,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (t["hs"], t["ws"], t["bs"], ce_weight, kd_weight))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_backward_gives_the_same_bits(name: str, backend: str) -> None:
    t = heads(torch.float32)
    loss = callers(backend)[name](**t)
    leaves = [t["hs"], t["ws"], t["bs"]]
    kept: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    first = torch.autograd.grad(loss, leaves, **kept)
    half = torch.autograd.grad(loss, leaves, grad_outputs=torch.tensor(0.5), **kept)
    again = torch.autograd.grad(loss, leaves, allow_unused=True)
    for a, b, c in zip(first, half, again, strict=True):
        assert (a is None) == (c is None)
        if a is not None and b is not None and c is not None:
            assert torch.equal(a, c) and torch.equal(b, a / 2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpointed_loss_has_the_same_gradients(
    name: str, reentrant: bool, backend: str
) -> None:
    """Checkpointing computes saved tensors again where they are looked at, and lets nobody look
    twice.
    """
    t = heads(torch.float32)
    f, leaves = callers(backend)[name], [t["hs"], t["ws"], t["bs"]]
    want = torch.autograd.grad(f(**t), leaves, allow_unused=True)
    loss = checkpoint(f, *t.values(), use_reentrant=reentrant)
    loss.backward()
    assert all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip((x.grad for x in leaves), want, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_cannot_be_differentiated(name: str, backend: str) -> None:
    t = heads()
    # what is made of a Gram outside of operators may be, and is right
    x = t["ws"] if name in ("gram", "logit_std") else t["hs"]
    (dx,) = torch.autograd.grad(callers(backend)[name](**t), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a gradient of this loss was differentiated again"):
        dx.square().sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(name: str) -> None:
    """torch drops the tangents of an operator without a formula, and says that all is constant."""
    t = heads(grad=False)
    x = "ws" if name == "gram" else "hs"

    def loss(value: Tensor) -> Tensor:
        return callers("eager")[name](**(t | {x: value}))

    along = torch.randn_like(t[x])
    refused = pytest.raises(RuntimeError, match="forward-mode differentiation is not supported")
    with refused:
        torch.func.jvp(loss, (t[x],), (along,))
    with refused, forward_ad.dual_level():
        loss(forward_ad.make_dual(t[x], along))


@pytest.mark.parametrize("name", NAMES)
def test_no_grad_gives_the_same_loss_and_no_graph(name: str, backend: str) -> None:
    t = heads(torch.float32)
    loss = callers(backend)[name](**t)
    with torch.no_grad():
        bare = callers(backend)[name](**t)
    assert bare.grad_fn is None and torch.equal(bare, loss)
    with torch.inference_mode():
        assert torch.equal(callers(backend)[name](**t), loss)


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_never_gets_a_gradient(name: str, backend: str) -> None:
    t = heads(torch.float32)
    for k in ("ht", "wt", "bt"):
        t[k].requires_grad_()
    callers(backend)[name](**t).backward()
    assert all(t[k].grad is None for k in ("ht", "wt", "bt"))
    student_only = heads(torch.float32, grad=False)
    for k in ("ht", "wt", "bt"):
        student_only[k].requires_grad_()
    assert not callers(backend)[name](**student_only).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_as_linear_would(name: str, dtype: torch.dtype, backend: str) -> None:
    t = heads(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        loss = callers(backend)[name](**t)
    loss.backward()
    narrow = {k: x.detach().to(dtype).float().requires_grad_(x.requires_grad) for k, x in t.items()}
    want = callers(backend)[name](**(narrow if name not in ("features", "gram", "affinity") else t))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=1e-6)
    gradient = t["ws" if name == "gram" else "hs"].grad
    assert gradient is not None and gradient.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_compile_of_a_caller(name: str, dynamic: bool) -> None:
    """A backend is chosen inside the operator, so that tracing is the same for all."""
    torch._dynamo.reset()
    f = callers("auto")[name]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seed in range(2):
        torch.manual_seed(seed)
        t = heads(torch.float32)
        leaves = [t["hs"], t["ws"], t["bs"]]
        want = f(**t)
        got = compiled(**t)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got, leaves, allow_unused=True),
            torch.autograd.grad(want, leaves, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_dynamic_shapes_compile_once() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, labels: Tensor) -> Tensor:
        return mk.fused_linear_distill(hs, ws, ht, wt, labels, ce_weight=1.0).loss

    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for n in (3, 5, 40):
        hs, ws = torch.randn(n, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
        arguments = hs, ws, torch.randn(n, 4), torch.randn(9, 4), torch.randint(0, 9, (n,))
        got = compiled(*arguments)
        got.backward()
        torch.testing.assert_close(got, loss(*arguments))
        frames.append(counter.frame_count)
    assert frames[0] > 0 and len(set(frames)) == 1


# Importing inductor runs TorchScript decorators that torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_inductor_compiles_the_step_around_the_loss() -> None:
    """The whole compiler once: a projector before the loss, its gradient after."""
    torch._dynamo.reset()
    t, projector = heads(torch.float32), torch.randn(D_S, D_S, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return callers("auto")["distill"](x.tanh() @ projector, *list(t.values())[1:])

    want = step(t["hs"])
    (wanted,) = torch.autograd.grad(want, projector)
    got = torch.compile(step, fullgraph=True)(t["hs"])
    (gradient,) = torch.autograd.grad(got, projector)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient, wanted)


# --- opcheck: schema, fake implementation and autograd registration of every operator ------------


def operator_calls(backend: str, dtype: torch.dtype, grad: bool) -> dict[str, tuple[Any, tuple]]:
    t = heads(dtype, grad)
    weight, bare = torch.rand(N), [x.detach() for x in t.values()]
    g_s, g_t = torch.randn(D_S, D_S), torch.randn(D_T, D_T)
    options = (1.5, 0.0, V_S, -100, True, True, True, backend, -1.0)
    return {
        "linear_distill": (ops.linear_distill, (
            *t.values(), LABELS, weight, weight, "jsd", PARAMETERS["jsd"][1], 1.5, 2.0, 0.0, V_S,
            -100, grad, grad, grad, backend, -1.0, True, False, True)),
        "linear_distill_": (ops.linear_distill_, (
            *bare, LABELS, weight, weight, "jsd", PARAMETERS["jsd"][1], 1.5, 2.0, 0.0, V_S, -100,
            grad, True, grad, backend, -1.0, True, False, True, torch.randn(V_S, D_S), False, 0.5)),
        "linear_logit_mse": (ops.linear_logit_mse, (
            *t.values(), weight, V_S, grad, grad, grad, -1.0)),
        "linear_logit_mse_": (ops.linear_logit_mse_, (
            *bare, weight, V_S, grad, True, grad, -1.0, torch.randn(V_S, D_S), 0.5)),
        "promised_loss": (registration.promised_loss, (
            torch.randn(()), t["ws"], [t["hs"], t["bs"]], [torch.randn(N, D_S), torch.randn(V_S)],
            0.5)),
        "linear_logprob": (ops.linear_logprob, (t["hs"], t["ws"], t["bs"], LABELS, *options)),
        "linear_logprob_backward": (ops.linear_logprob_backward, (
            torch.randn(N), *(t[k].detach() for k in ("hs", "ws", "bs")), LABELS, torch.randn(N),
            *options)),
        "head_gram": (relation_ops.head_gram, (t["ws"], t["bs"], 5)),
        "head_gram_backward": (relation_ops.head_gram_backward, (
            torch.randn(D_S + 1, D_S + 1), t["ws"].detach(), t["bs"].detach(), 5)),
        "affinity": (relation_ops.affinity, (
            t["hs"], t["hs"].detach().clone().requires_grad_(grad), t["ht"], t["ht"], CU, CU, False,
            grad, grad)),
        "relation": (relation_ops.relation, (
            t["hs"], g_s, t["ht"], g_t, CU, grad, grad, backend, False)),
        "relation_softcapped": (relation_ops.relation_softcapped, (
            *t.values(), CU, 2.0, 3.0, V_S, grad, grad, grad, True)),
        "scale_gradient": (registration.scale_gradient, (
            torch.randn(3, 2), torch.tensor(0.5), dtype)),
        "head_gradient": (registration.head_gradient, (
            torch.randn(N, 5), torch.randn(N, D_S).to(dtype), torch.tensor(0.5), V_S, 5, dtype)),
        "add_gradient_": (registration.add_gradient_, (
            torch.randn(V_S, D_S), torch.randn(N, 5), torch.randn(N, D_S).to(dtype),
            torch.tensor(0.5), 5)),
    }  # fmt: skip


OPERATORS = tuple(operator_calls("eager", torch.float32, False))


def test_the_list_of_operators_is_complete() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("mllmkd_kernels::")}  # fmt: skip
    assert registered == set(OPERATORS)


@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", [*OPERATORS, "linear_distill, factored"])
def test_opcheck(name: str, grad: bool, backend: str) -> None:
    # bf16 inputs: outputs come in both dtypes, the inputs' and fp32.
    name, _, factored = name.partition(", ")
    if factored and backend not in ("eager", "cpu"):  # which alone can save dz in the place of dW
        backend = "eager"
    op, arguments = operator_calls(backend, torch.bfloat16, grad)[name]
    if factored:
        arguments = (*arguments[:17], True, *arguments[18:-2], True, True)
    # The dispatch test differentiates the sum of *all* outputs; these refuse to differentiate a
    # gradient. test_compile_of_a_caller differentiates what may be differentiated.
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not grad:
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """dW is formed in backward, however many rows there are."""
    monkeypatch.setattr(plan, "factored", lambda *_: True)


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("where", ["eager", "cpu"])
@pytest.mark.parametrize("name", ["distill", "cross_entropy"])
def test_autograd_of_a_head_gradient_formed_in_backward(name: str, where: str) -> None:
    """Gradients, the same bits from a second backward and through checkpoints, no third."""
    if where == "cpu" and not cpu.available():
        pytest.skip(cpu.why_not())
    test_gradcheck(name, where)
    test_a_second_backward_gives_the_same_bits(name, where)
    test_a_checkpointed_loss_has_the_same_gradients(name, False, where)
    t = heads()
    (dw,) = torch.autograd.grad(callers(where)[name](**t), t["ws"], create_graph=True)
    with pytest.raises(RuntimeError, match="a gradient of this loss was differentiated again"):
        dw.square().sum().backward()


@pytest.mark.parametrize("wanted", range(8))
def test_fakes_of_unwanted_gradients_are_empty(wanted: int, backend: str) -> None:
    flags = [bool(wanted & bit) for bit in (1, 2, 4)]
    for name in ("linear_distill", "relation_softcapped"):
        op, arguments = operator_calls(backend, torch.bfloat16, False)[name]
        first = 16 if name == "linear_distill" else 10
        arguments = (*arguments[:first], *flags, *arguments[first + 3 :])
        torch.library.opcheck(op, arguments, test_utils=["test_schema", "test_faketensor"])
        gradients = op(*arguments)[3:6] if name == "linear_distill" else op(*arguments)[-3:]
        assert [bool(g.numel()) for g in gradients] == flags


def test_every_operator_computes_on_the_device_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton launches on the current GPU. No machine here has two, so the guard is asked."""
    entered: list[torch.device] = []

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.append(torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "device", guard)
    other = torch.device("cuda", 1)
    with registration.computing(other):
        assert entered == [other]
    assert entered == [other, torch.device("cpu")]

    inside: list[torch.device] = []

    @contextmanager
    def computing(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield

    monkeypatch.setattr(registration, "computing", computing)
    for op, arguments in operator_calls("eager", torch.float32, False).values():
        op(*arguments)
    assert len(inside) == len(OPERATORS)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_faster_matmuls_elsewhere_do_not_round_the_logits(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 and bf16 products of fp32 operands are a setting of the process; here they are off, and
    as the caller left them afterwards.
    """
    mkldnn: Any = torch.backends.mkldnn  # its stubs lack `matmul`
    libraries = torch.backends.cuda.matmul, mkldnn.matmul
    seen, original = [], products.product

    def spy(a: Tensor, b: Tensor, out: Tensor) -> None:
        seen.append([library.fp32_precision for library in libraries])
        original(a, b, out)

    monkeypatch.setattr(products, "product", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        run(problem("aligned"), "eager")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen and all(found == ["ieee", "ieee"] for found in seen)
