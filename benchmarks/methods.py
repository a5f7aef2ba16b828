"""Who computes it? Every method behind one signature.

``build(problem)`` does what a trainer does once per run (buffers, the cached Gram matrix of a
frozen head) and returns ``run``; each ``run()`` is one forward and backward: it leaves gradients in
``problem.hs.grad`` and ``problem.dw`` and returns the detached loss. All of them compute the same
loss, a mean over the N rows:

    ce+kl      mean CE(z_s, labels) + mean KL(p_t ‖ p_s)
    ce+jsd     the same with the Jensen-Shannon divergence, β = 0.5
    ce, kl     one of the two
    relation   1 − cos(R_s, R_t), R = Z Zᵀ, one image
    dpo, kto   preference losses of pairs of answers, mean over pairs; kto is `kto_pair`

"floor" is not a method but the yardstick: the matrix products alone. What plain PyTorch computes is
in `naive`, methods of other projects are in `peers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mllmkd_kernels as mk
from benchmarks import naive, peers
from benchmarks.problem import BETA, Forward, Problem, Run, with_backward
from benchmarks.shapes import PREFERENCES, Case, StepCase
from mllmkd_kernels import choose


@dataclass(frozen=True)
class Method:
    """One way to compute a loss and its gradients.

    Attributes:
        key: short name, for ``--only`` and the JSON.
        label: name in tables and plots.
        losses: which of `shapes.LOSSES` it computes.
        build: prepares a problem and returns one forward and backward.
        why_not: why it cannot run on a device, "" if it can.
        plan: arguments of `mk.explain`, of what it plans: ours.
    """

    key: str
    label: str
    losses: frozenset[str]
    build: Callable[[Problem], Run]
    why_not: Callable[[torch.device], str] = lambda device: ""
    plan: Mapping[str, Any] | None = None

    def computes(self, case: Case) -> bool:
        """Whether it is a method for it: one that adds to a `main_grad` trains the head."""
        adds = self.plan is not None and self.plan["main_grad"] is not None
        return case.loss in self.losses and (case.train_head or not adds)

    def row(self, case: Case | StepCase) -> dict[str, Any]:
        """What each of its figures begins with in a record."""
        return {"case": asdict(case), "method": self.key, "label": self.label}


def _ours(backend: str, workspace_mb: float | None = None, main_grad: bool = False) -> Method:
    how = {"backend": backend, "workspace_mb": workspace_mb}

    def build(problem: Problem) -> Run:
        if problem.case.loss == "relation":
            return with_backward(relation(problem, backend))
        if problem.case.loss in PREFERENCES:
            return with_backward(_preference(problem, how))
        return with_backward((_distill_into if main_grad else distill)(problem, **how))

    def why_not(device: torch.device) -> str:
        try:
            choose.choose_backend(backend, device)
        except (RuntimeError, ValueError) as error:
            return str(error)
        return ""

    key, label, losses = f"mk-{backend}", f"mllmkd_kernels, {backend} backend", ALL
    if workspace_mb is not None:
        key, label = f"{key}-{workspace_mb:g}mb", f"{label}, {workspace_mb:g} MiB of workspace"
        losses = LOGITS  # the relation has no workspace
    if main_grad:
        key, label, losses = f"{key}-main-grad", f"{label}, dw into main_grad", BOTH
    plan = how | {"main_grad": "forward" if main_grad else None}
    return Method(key, label, losses, build, why_not, plan)


def distill(problem: Problem, backend: str, **how: Any) -> Forward:
    """CE, a divergence, or both, as the case has it."""
    mean = 1 / problem.case.rows
    ce_weight = 0.0 if problem.case.loss == "kl" else mean
    return lambda: (
        mk.fused_linear_distill(
            problem.hs, problem.ws, problem.ht, problem.wt, problem.labels, ce_weight=ce_weight,
            kd_weight=mean, divergence=problem.case.divergence, backend=backend, **how,
        ).loss
    )  # fmt: skip


def _distill_into(problem: Problem, **how: Any) -> Forward:
    """The head's gradient goes straight into an accumulator that the trainer keeps, in forward."""
    sums = torch.zeros_like(problem.ws, dtype=torch.float32)
    forward = distill(problem, main_grad=sums, loss_gradient=1.0, **how)

    def added() -> Tensor:
        problem.main_grad = sums
        return forward()

    return added


def relation(problem: Problem, backend: str) -> Forward:
    """The Gram matrix of a head that is trained is made every time, of others once."""
    ht, wt = problem.teacher()
    vocab, ends = problem.case.vocab, problem.ends
    gram_t = mk.head_gram(wt, vocab_size=vocab)
    frozen = not problem.case.train_head
    gram_s = mk.head_gram(problem.ws, vocab_size=vocab) if frozen else None
    return lambda: mk.fused_linear_relation(
        problem.hs, problem.ws, ht, wt, ends,
        student_gram=gram_s, teacher_gram=gram_t, backend=backend,
    )  # fmt: skip


def _preference(problem: Problem, how: dict[str, Any]) -> Forward:
    ht, wt = problem.teacher()
    logprob = partial(mk.fused_linear_logprob, vocab_size=problem.case.vocab, **how)

    def answers(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return problem.answers(logprob(h, w, problem.labels))

    return lambda: mk.preference_loss(
        *answers(problem.hs, problem.ws), *answers(ht, wt),
        kind=PREFERENCES[problem.case.loss], beta=BETA,
    )  # fmt: skip


def _eager(problem: Problem) -> Run:
    """What trainers do, one operator after another."""
    return with_backward(partial(naive.loss_of, problem))


def _compiled(problem: Problem) -> Run:
    """The same through ``torch.compile``, for exactly these shapes. Compiled here, as a trainer
    does once a run, so that neither a clock nor a memory gauge sees the compiler.
    """
    # The default, 8 versions of a function, is less than a suite has shapes. All that compile gain.
    torch._dynamo.config.recompile_limit = 64
    forward = torch.compile(naive.loss_of, fullgraph=True, dynamic=False)
    run = with_backward(partial(forward, problem))
    with suppress(torch.OutOfMemoryError):  # raised again where it is measured, and a row there
        run()
    problem.forget_gradients()
    return run


def _floor(problem: Problem) -> Run:
    """The matrix products alone through ``torch.mm``, into buffers that exist already: no
    allocation, no loss, no gradient bookkeeping. Inputs of 16 bits give 16-bit logits, as
    ``torch.mm`` has it.
    """
    hs, ws = problem.hs.detach(), problem.ws.detach()[: problem.case.vocab]
    z_s = torch.empty(hs.shape[0], ws.shape[0], dtype=hs.dtype, device=hs.device)
    dh, dw = torch.empty_like(hs), torch.empty_like(ws)
    teacher = None
    if problem.case.loss != "ce":
        ht, wt = problem.teacher()
        teacher = ht, wt[: problem.case.vocab].mT, torch.empty_like(z_s)

    def run() -> None:
        torch.mm(hs, ws.mT, out=z_s)
        if teacher is not None:
            torch.mm(teacher[0], teacher[1], out=teacher[2])
        torch.mm(z_s, ws, out=dh)
        if problem.case.train_head:
            torch.mm(z_s.mT, hs, out=dw)

    return run


BOTH = frozenset({"ce+kl"})
ROWWISE = BOTH | {"ce+jsd", "ce", "kl"}
LOGITS = ROWWISE | set(PREFERENCES)  # those that need all V·N of them
ALL = LOGITS | {"relation"}
FLOOR = Method("floor", "matrix products alone (floor)", LOGITS, _floor)
EAGER = Method("torch-eager", "PyTorch, whole logits", ALL, _eager)
COMPILED = Method("torch-compile", "PyTorch, torch.compile", ROWWISE, _compiled)
OURS = tuple(_ours(backend) for backend in reversed(choose.BACKENDS))
#: The same within a tenth of the memory, for GPUs: it must still work.
TIGHT = _ours("auto", 64)
#: The same within half of it and no gradient of the head beside the trainer's own, by backend.
MAIN_GRAD = {f"mk-{backend}": _ours(backend, 600, main_grad=True) for backend in choose.BACKENDS}
#: Which methods of ours a device is asked about, if not by name.
_BY_DEVICE = {
    "cpu": {"mk-cpu", "mk-eager"},
    "cuda": {"mk-triton", "mk-cuda", "mk-eager", TIGHT.key}
    | {MAIN_GRAD[key].key for key in ("mk-triton", "mk-cuda")},
}


def _peer(peer: peers.Peer) -> Method:
    return Method(peer.key, peer.label, peer.losses, peer.build, peer.why_not)


METHODS = (
    FLOOR, EAGER, COMPILED, *OURS, TIGHT, *(_peer(peer) for peer in peers.PEERS),
    *MAIN_GRAD.values(),
)  # fmt: skip
BY_KEY = {method.key: method for method in METHODS}


def ours_by_default(device: str = "cpu") -> Method:
    """What ``backend="auto"`` means on `device`: the method the promises are about."""
    return BY_KEY[f"mk-{choose.choose_backend('auto', torch.device(device))[0]}"]


def select(
    case: Case, only: tuple[str, ...] = (), every_backend: bool = True, device: str = "cpu"
) -> list[Method]:
    """The methods that compute a case: those named by the keys `only` if any are, else all that
    are made for `device`, or all but the backends of ours that ``backend="auto"`` would not choose
    and, on a CPU, but ``torch.compile``.

    Raises:
        ValueError: a key that does not exist.
    """
    known = [method.key for method in METHODS]
    unknown = [key for key in only if key not in known]
    if unknown:
        raise ValueError(f"only: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    wanted = set(only or known)
    if not only:
        ours = {method.key for method in METHODS if method.plan}
        wanted -= ours - (_BY_DEVICE[device] if every_backend else {ours_by_default(device).key})
        if device == "cpu" and not every_backend:  # two shapes of each case, 5 to 10 s each
            wanted.discard(COMPILED.key)
    return [method for method in METHODS if method.computes(case) and method.key in wanted]
