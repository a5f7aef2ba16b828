"""Who computes it? Every method behind one signature.

``build(problem)`` does what a trainer does once per run (buffers, the cached Gram matrix of a
frozen head) and returns ``run``; each ``run()`` is one forward and backward: it leaves gradients in
``problem.hs.grad`` and ``problem.ws.grad`` and returns the detached loss. All of them compute the
same loss, a mean over the N rows:

    ce+kl      mean CE(z_s, labels) + mean KL(p_t ‖ p_s)
    ce, kl     one of the two
    relation   1 − cos(R_s, R_t), R = Z Zᵀ, one image

"floor" is not a method but the yardstick: the matrix products alone. Methods of other projects are
in `peers`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import mllmkd_kernels as mk
from benchmarks import peers
from benchmarks.problem import Problem
from benchmarks.shapes import Case
from mllmkd_kernels import choose

Run = Callable[[], Tensor | None]


@dataclass(frozen=True)
class Method:
    """One way to compute a loss and its gradients.

    Attributes:
        key: short name, for ``--only`` and the JSON.
        label: name in tables and plots.
        losses: which of `shapes.LOSSES` it computes.
        build: prepares a problem and returns one forward and backward.
        missing: why it cannot run here, "" if it can.
        version: of the project it comes from.
        unfit: why it cannot serve a device, "" if it can.
    """

    key: str
    label: str
    losses: frozenset[str]
    build: Callable[[Problem], Run]
    missing: Callable[[], str] = lambda: ""
    version: Callable[[], str] = lambda: f"torch {torch.__version__}"
    unfit: Callable[[torch.device], str] = lambda device: ""

    def why_not(self, device: torch.device) -> str:
        """Why it cannot run on `device`, "" if it can."""
        return self.unfit(device) or self.missing()  # an import may take seconds


# --- ours --------------------------------------------------------------------------------------


def _ours(backend: str, workspace_mb: float | None = None) -> Method:
    def build(problem: Problem) -> Run:
        if problem.case.loss == "relation":
            forward = _our_relation(problem, backend)
        else:
            forward = _our_distill(problem, backend, workspace_mb)

        def run() -> Tensor:
            value = forward()
            value.backward()
            return value.detach()

        return run

    def unfit(device: torch.device) -> str:
        try:
            choose.choose_backend(backend, device)
        except (RuntimeError, ValueError) as error:
            return str(error)
        return ""

    losses = {"ce+kl", "ce", "kl", "relation"}
    budget = "" if workspace_mb is None else f"-{workspace_mb:g}mb"
    return Method(
        f"mk-{backend}{budget}",
        f"mllmkd_kernels, {backend} backend"
        + (f", {workspace_mb:g} MiB of workspace" if budget else ""),
        frozenset(losses - {"relation"} if budget else losses),  # the relation has no workspace
        build,
        version=lambda: f"mllmkd_kernels {mk.__version__}",
        unfit=unfit,
    )


def _our_distill(
    problem: Problem, backend: str, workspace_mb: float | None
) -> Callable[[], Tensor]:
    mean = 1 / problem.case.rows
    loss = problem.case.loss

    def forward() -> Tensor:
        return mk.fused_linear_distill(
            problem.hs, problem.ws, problem.ht, problem.wt, problem.labels,
            ce_weight=0.0 if loss == "kl" else mean, kd_weight=mean, backend=backend,
            workspace_mb=workspace_mb,
        ).loss  # fmt: skip

    return forward


def _our_relation(problem: Problem, backend: str) -> Callable[[], Tensor]:
    ht, wt = problem.teacher()
    vocab, ends = problem.case.vocab, problem.ends
    gram_t = mk.head_gram(wt, vocab_size=vocab)
    frozen = not problem.case.train_head
    gram_s = mk.head_gram(problem.ws, vocab_size=vocab) if frozen else None

    def forward() -> Tensor:
        return mk.fused_linear_relation(
            problem.hs, problem.ws, ht, wt, ends,
            student_gram=gram_s, teacher_gram=gram_t, backend=backend,
        )  # fmt: skip

    return forward


# --- plain PyTorch, whole logits ---------------------------------------------------------------


def _eager(problem: Problem) -> Run:
    """What trainers do, one operator after another."""

    def run() -> Tensor:
        loss = _whole_logits(problem)
        loss.backward()
        return loss.detach()

    return run


def _compiled(problem: Problem) -> Run:
    """The same through ``torch.compile``, for exactly these shapes. Compiled here, as a trainer
    does once a run, so that neither a clock nor a memory gauge sees the compiler.
    """
    # The default, 8 versions of a function, is less than a suite has shapes. All that compile gain.
    torch._dynamo.config.recompile_limit = 64
    forward = torch.compile(_whole_logits, fullgraph=True, dynamic=False)

    def run() -> Tensor:
        loss = forward(problem)
        loss.backward()
        return loss.detach()

    with suppress(torch.OutOfMemoryError):  # raised again where it is measured, and a row there
        run()
    problem.forget_gradients()
    return run


def _whole_logits(problem: Problem) -> Tensor:
    """Logits in the model's dtype, widened by ``.float()``, autograd for the rest."""
    vocab, labels = problem.case.vocab, problem.labels

    def logits(h: Tensor, w: Tensor) -> Tensor:
        return F.linear(h, w)[:, :vocab].float()

    z_s = logits(problem.hs, problem.ws)
    if problem.case.loss == "ce":
        return F.cross_entropy(z_s, labels)
    with torch.no_grad():
        z_t = logits(*problem.teacher())
    if problem.case.loss == "relation":
        return _relation_of(z_s, z_t, problem.case)
    kl = F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="batchmean")
    return kl if problem.case.loss == "kl" else F.cross_entropy(z_s, labels) + kl


def _relation_of(z_s: Tensor, z_t: Tensor, case: Case) -> Tensor:
    """Image by image: 1 − cos of the two relation matrices, averaged."""
    losses = []
    for s, t in zip(z_s.split(case.rows), z_t.split(case.rows), strict=True):
        r_s, r_t = s @ s.mT, t @ t.mT
        losses.append(1 - F.cosine_similarity(r_s.flatten(), r_t.flatten(), dim=0))
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


# --- the floor ---------------------------------------------------------------------------------


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


FLOOR = Method("floor", "matrix products alone (floor)", frozenset({"ce+kl", "ce", "kl"}), _floor)
EAGER = Method(
    "torch-eager",
    "PyTorch, whole logits",
    frozenset({"ce+kl", "ce", "kl", "relation"}),
    _eager,
)
COMPILED = Method(
    "torch-compile", "PyTorch, torch.compile", frozenset({"ce+kl", "ce", "kl"}), _compiled
)
OURS = tuple(_ours(backend) for backend in reversed(choose.BACKENDS))
#: The same within a tenth of the memory, for GPUs: it must still work.
TIGHT = _ours("auto", 64)
#: Which methods of ours a device is asked about, if not by name.
_BY_DEVICE = {
    "cpu": {"mk-cpu", "mk-eager"},
    "cuda": {"mk-triton", "mk-cuda", "mk-eager", TIGHT.key},
}


def _peer(peer: peers.Peer) -> Method:
    return Method(
        peer.key, peer.label, peer.losses, peer.build, peer.missing, peer.version, peer.unfit
    )


METHODS = (FLOOR, EAGER, COMPILED, *OURS, TIGHT, *(_peer(peer) for peer in peers.PEERS))


def ours_by_default(device: str = "cpu") -> Method:
    """What ``backend="auto"`` means on `device`: the method the promises are about."""
    chosen, _ = choose.choose_backend("auto", torch.device(device))
    return next(method for method in OURS if method.key == f"mk-{chosen}")


def select(
    loss: str, only: tuple[str, ...] = (), every_backend: bool = True, device: str = "cpu"
) -> list[Method]:
    """The methods that compute `loss`: those named by the keys `only` if any are, else all that
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
        ours = {method.key for method in (*OURS, TIGHT)}
        kept = _BY_DEVICE[device] if every_backend else {ours_by_default(device).key}
        wanted -= ours - kept
        if device == "cpu" and not every_backend:
            # Two shapes of each case are compiled, the few rows that are checked and the measured
            # ones, 5 to 10 s each on two cores: a quarter of an hour for the whole suite, which
            # promises ten minutes. A GPU's suite has it everywhere.
            wanted.discard(COMPILED.key)
    return [method for method in METHODS if loss in method.losses and method.key in wanted]
