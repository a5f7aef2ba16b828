"""What do other projects have? Their functions, called as their documentation says, if installed.

``pip install -e '.[peers]'`` brings them (``peers-cuda``: quack). Each is asked for exactly the
loss of the case: both weights 1, no temperature, a mean over rows; a more accurate way rather than
a faster one, if its project offers both. None but Liger has one call for both terms: two calls and
a sum, then. All want one vocabulary: where the heads differ in rows, both are cut to the shared
columns, as its users would have to do. Uncut, some read beyond the smaller head, which on a GPU
ends every later measurement.

Left out: functions of whole logits (torchtune, DistillKit, Model-Optimizer), which are "PyTorch,
whole logits" in other words; and unsloth_zoo's chunked JSD, which patches PyTorch for every other
method of the process.
"""

from __future__ import annotations

import functools
import importlib
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import naive
from benchmarks.machine import version
from benchmarks.problem import BETA, Forward, Problem, Run, with_backward
from benchmarks.shapes import PREFERENCES


@dataclass(frozen=True)
class Call:
    """One function, or class, of another project.

    Attributes:
        package: its distribution.
        module, function: where it lives; looked for before it is called.
        prepare: given the function and a problem, returns what computes the loss.
    """

    package: str
    module: str
    function: str
    prepare: Callable[[Any, Problem], Forward]

    def on(self, problem: Problem) -> Forward:
        """What computes the loss of the problem."""
        return self.prepare(getattr(importlib.import_module(self.module), self.function), problem)


@dataclass(frozen=True)
class Peer:
    """What another project has for a loss.

    Attributes:
        key, label, losses: as in `methods.Method`.
        calls: their sum is the loss.
        on_gpu: whether it runs nowhere else.
        capability: least compute capability of a GPU.
    """

    key: str
    label: str
    losses: frozenset[str]
    calls: tuple[Call, ...]
    on_gpu: bool = False
    capability: tuple[int, int] = (0, 0)

    def why_not(self, device: torch.device) -> str:
        """Why it cannot run on `device`, "" if it can."""
        return self.unfit(device) or self.missing()  # an import may take seconds

    def missing(self) -> str:
        """Why it cannot be called, "" if it can."""
        reasons = (_why_not_importable(call.module, call.function) for call in self.calls)
        return next(filter(None, reasons), "")

    def unfit(self, device: torch.device) -> str:
        """Why it is not for `device`, "" if it is."""
        if self.on_gpu and device.type != "cuda":
            return f"needs cuda, got {device.type}"
        if device.type == "cuda":
            pairs = self.capability, torch.cuda.get_device_capability(device)
            if pairs[0] > pairs[1]:
                least, has = (".".join(map(str, pair)) for pair in pairs)
                return f"needs compute capability {least}, this GPU has {has}"
        return ""

    def build(self, problem: Problem) -> Run:
        """One forward and backward, as `methods` wants it."""
        parts = [call.on(problem) for call in self.calls]
        return with_backward(lambda: functools.reduce(operator.add, [part() for part in parts]))


@functools.cache
def _why_not_importable(module: str, function: str) -> str:
    """Asked once: an import that fails is tried again by Python each time, seconds each."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, about what this machine lacks
            found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a peer may fail in any way while it is imported
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and (module == absent or module.startswith(f"{absent}.")):
            return f"not installed: {error}"
        return f"cannot import {module}: {type(error).__name__}: {error}"
    return "" if hasattr(found, function) else f"{module} has no {function}"


def versions() -> dict[str, str | None]:
    """distribution → version of every peer, None where it is not installed."""
    names = {call.package for peer in PEERS for call in peer.calls} - {"torch"}
    return {name: version(name) for name in sorted(names)}


def _head(problem: Problem) -> Tensor:
    """The student's, cut to the shared columns: a view, taken anew for every backward."""
    vocab = problem.case.vocab
    return problem.ws if problem.ws.shape[0] == vocab else problem.ws[:vocab]


def _teacher(problem: Problem) -> tuple[Tensor, Tensor]:
    """(ht, wt), the head cut to the shared columns."""
    ht, wt = problem.teacher()
    return ht, wt[: problem.case.vocab]


def _liger(function: Any, problem: Problem) -> Forward:
    """Token chunks of 1,024, ``torch.func`` per chunk. Compiled on a GPU, which is its default;
    not on a CPU, where each new shape compiles for 5 to 40 s and runs no faster.
    """
    loss = function(
        weight_hard_loss=0.0 if problem.case.loss == "kl" else 1.0, weight_soft_loss=1.0,
        beta=0.0,  # forward KL in Liger's convention
        temperature=1.0, compiled=problem.hs.is_cuda, chunk_size=1024,
    )  # fmt: skip
    ht, wt = _teacher(problem)
    return lambda: loss(problem.hs, _head(problem), ht, wt, problem.labels)


def _liger_jsd(function: Any, problem: Problem) -> Forward:
    """Token chunks through cuBLAS and a Triton kernel."""
    loss = function(jsd_beta=0.0, temperature=1.0, accum_dtype=torch.float32)
    ht, wt = _teacher(problem)
    return lambda: loss(problem.hs, _head(problem), ht, wt, problem.labels)


def _fla(function: Any, problem: Problem) -> Forward:
    """Token chunks, at most eight."""
    loss = function()  # its mean is over rows
    ht, wt = _teacher(problem)
    return lambda: loss(problem.hs, ht, _head(problem), wt)


def _trl(function: Any, problem: Problem) -> Forward:
    """Vocabulary tiles; a divergence for each row, so the mean is taken here."""
    ht, wt = _teacher(problem)
    how = (0.0, 1.0)  # beta and temperature
    apply = function.apply
    return lambda: apply(problem.hs, _head(problem), None, ht, wt, None, *how)[0].mean()


def _liger_ce(function: Any, problem: Problem) -> Forward:
    """Token chunks; the gradient of a head is summed in fp32."""
    loss = function(accum_dtype=torch.float32)
    return lambda: loss(_head(problem), problem.hs, problem.labels)


def _cce(function: Any, problem: Problem) -> Forward:
    """Vocabulary tiles that leave no logits, its default filter of small gradients included. What
    it has for a CPU is compiled PyTorch, another method.
    """
    return lambda: function(problem.hs, _head(problem), problem.labels, impl="cce")


def _answers(problem: Problem) -> list[Tensor]:
    """hs, labels and ht, answer by answer: (answers, tokens, ...)."""
    of = (problem.case.images, problem.case.rows)
    return [x.unflatten(0, of) for x in (problem.hs, problem.labels, problem.teacher()[0])]


def _liger_dpo(function: Any, problem: Problem) -> Forward:
    """Pair by pair, ``torch.func`` per pair."""
    loss, (_, wt) = function(beta=BETA, compiled=problem.hs.is_cuda), _teacher(problem)

    def forward() -> Tensor:
        hs, labels, ht = _answers(problem)
        return loss(_head(problem), hs, labels, ref_input=ht, ref_weight=wt)[0]

    return forward


def _liger_kto(function: Any, problem: Problem) -> Forward:
    """Answer by answer, once for either half: it has one baseline, which it leaves to the trainer,
    so that it is given here.
    """
    loss = function(beta=BETA, compiled=problem.hs.is_cuda, use_ref_model=True)
    with torch.no_grad():
        k_c, k_r = (r.mean().clamp(min=0) for r in naive.log_ratios(problem))
    _, wt = _teacher(problem)

    def forward() -> Tensor:
        halves = zip(
            *(x.chunk(2) for x in _answers(problem)), (k_r, k_c), (True, False), strict=True
        )
        both = [
            loss(
                hs, _head(problem), labels, ref_input=ht, ref_weight=wt, kl=k,
                preference_labels=torch.full((len(hs),), chosen, device=wt.device),
            )[0]
            for hs, labels, ht, k, chosen in halves
        ]  # fmt: skip
        return (both[0] + both[1]) / 2

    return forward


def _trl_logprob(function: Any, problem: Problem) -> Forward:
    """Vocabulary tiles as wide as its trainers take them; log-probabilities of tokens."""
    how = (None, problem.labels, 1.0, 32768, None, 1.0, ())  # no bias, T, columns, no soft-cap

    def forward() -> Tensor:
        heads = (problem.hs, _head(problem)), _teacher(problem)
        ours, theirs = (function.apply(*head, *how)[0] for head in heads)
        return naive.preference(problem, problem.answers(ours - theirs))

    return forward


def _quack(function: Any, problem: Problem) -> Forward:
    """Token chunks of 4,096 through CuTe kernels."""
    return lambda: function(problem.hs, _head(problem), problem.labels)


def _torch_chunked(function: Any, problem: Problem) -> Forward:
    """PyTorch's own chunked cross-entropy of a linear layer."""
    call = functools.partial(F.linear_cross_entropy, options=function())
    return lambda: call(problem.hs, _head(problem), problem.labels)


_LIGER, _LIGER_KERNELS = "liger_kernel.chunked_loss", "liger_kernel.transformers"
LIGER = Call("liger-kernel", _LIGER, "LigerFusedLinearJSDLoss", _liger)
LIGER_JSD = Call("liger-kernel", _LIGER_KERNELS, "LigerFusedLinearJSD", _liger_jsd)
LIGER_CE = Call("liger-kernel", _LIGER_KERNELS, "LigerFusedLinearCrossEntropyLoss", _liger_ce)
LIGER_DPO = Call("liger-kernel", _LIGER, "LigerFusedLinearDPOLoss", _liger_dpo)
LIGER_KTO = Call("liger-kernel", _LIGER, "LigerFusedLinearKTOLoss", _liger_kto)
TRL_LOGPROB = Call("trl", "trl.kernels", "ChunkedLogProbFunction", _trl_logprob)
TRL = Call("trl", "trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", _trl)
FLA = Call("flash-linear-attention", "fla.modules.fused_kl_div", "FusedKLDivLoss", _fla)
CCE = Call("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy", _cce)
QUACK = Call("quack-kernels", "quack.linear_cross_entropy", "chunked_linear_cross_entropy", _quack)
CHUNKED = Call("torch", "torch.nn", "LinearCrossEntropyOptions", _torch_chunked)

_BOTH, _CE, _KL = frozenset({"ce+kl"}), frozenset({"ce"}), frozenset({"kl"})
PEERS = (
    Peer("liger", "Liger chunked", _BOTH | _KL, (LIGER,)),
    Peer("liger-jsd", "Liger Triton JSD", _KL, (LIGER_JSD,), True),
    Peer("liger-both", "Liger Triton CE + JSD", _BOTH, (LIGER_JSD, LIGER_CE), True),
    Peer("trl", "TRL chunked divergence", _KL, (TRL,)),
    Peer("trl-both", "Liger CE + TRL divergence", _BOTH, (TRL, LIGER_CE), True),
    Peer("fla", "fla FusedKLDivLoss", _KL, (FLA,), True),
    Peer("liger-ce", "Liger fused-linear CE", _CE, (LIGER_CE,), True),
    Peer("cce", "cut-cross-entropy", _CE, (CCE,), True),
    Peer("quack", "quack chunked CE", _CE, (QUACK,), True, (9, 0)),
    Peer("liger-dpo", "Liger chunked DPO", frozenset({"dpo"}), (LIGER_DPO,)),
    Peer("liger-kto", "Liger chunked KTO", frozenset({"kto"}), (LIGER_KTO,)),
    Peer("trl-logprob", "TRL chunked log-probabilities", frozenset(PREFERENCES), (TRL_LOGPROB,)),
    Peer("torch-chunked", "F.linear_cross_entropy", _CE, (CHUNKED,)),
)
