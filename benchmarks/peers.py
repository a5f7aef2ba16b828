"""What do other projects have? Their functions, called as their documentation says, if installed.

``pip install -e '.[peers]'`` brings them (``peers-cuda``: quack); one that is missing, or
that cannot run on the device, is a row that says so. Each is asked for exactly the loss of the
case: both weights 1, no temperature, a mean over rows. Where a project offers a more accurate and a
faster way at the same price, its more accurate one is called.

All of them want one vocabulary. Where the heads differ in rows, both are cut to the shared columns
before a peer sees them, as its users would have to do: uncut, most give a wrong number and some
read beyond the smaller head, which on a GPU ends every later measurement.

Left out: functions of whole logits (torchtune, DistillKit, Model-Optimizer), which are
"PyTorch, whole logits" in other words.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import Problem

Forward = Callable[[], Tensor]

CUDA_ONLY = frozenset({"cuda"})
EVERYWHERE = frozenset({"cpu", "cuda"})


@dataclass(frozen=True)
class Peer:
    """One function of another project.

    Attributes:
        key, label, losses: as in `methods.Method`.
        module, function: where it lives; looked for before it is called.
        packages: its distributions, for their versions; two where two calls make the loss.
        forward: prepares a problem and returns what computes the loss.
        devices: types of device it runs on.
        capability: least compute capability of a GPU.
        refused: why it is not run although it is installed, "" if it is.
        also: (module, function) of its second call, where two make the loss.
    """

    key: str
    label: str
    losses: frozenset[str]
    module: str
    function: str
    packages: tuple[str, ...]
    forward: Callable[[Problem], Forward]
    devices: frozenset[str] = EVERYWHERE
    capability: tuple[int, int] = (0, 0)
    refused: str = ""
    also: tuple[str, str] | None = None

    def missing(self) -> str:
        """Why it cannot be called, "" if it can."""
        if self.refused:
            absent = [package for package in self.packages if _version(package) is None]
            return f"not installed: {', '.join(absent)}" if absent else self.refused
        calls = [(self.module, self.function), *([self.also] if self.also else [])]
        return next(filter(None, (_why_not_importable(*call) for call in calls)), "")

    def unfit(self, device: torch.device) -> str:
        """Why it cannot run on `device`, "" if it can."""
        if device.type not in self.devices:
            return f"needs {' or '.join(sorted(self.devices))}, got {device.type}"
        if device.type == "cuda" and self.capability > (0, 0):
            found = torch.cuda.get_device_capability(device)
            if found < self.capability:
                least, has = (".".join(map(str, pair)) for pair in (self.capability, found))
                return f"needs compute capability {least}, this GPU has {has}"
        return ""

    def version(self) -> str:
        """Names and versions of the distributions."""
        found = [(package, _version(package)) for package in self.packages]
        return ", ".join(f"{name} {v}" if v else f"{name}, not installed" for name, v in found)

    def build(self, problem: Problem) -> Callable[[], Tensor]:
        """One forward and backward, as `methods` wants it."""
        forward = self.forward(problem)

        def run() -> Tensor:
            loss = forward()
            loss.backward()
            return loss.detach()

        return run


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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """distribution → version of every peer, None where it is not installed."""
    names = {name for peer in PEERS for name in peer.packages if name != "torch"}
    return {name: _version(name) for name in sorted(names)}


def _get(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _head(problem: Problem) -> Tensor:
    """The student's, cut to the shared columns: a view, taken anew for every backward."""
    vocab = problem.case.vocab
    return problem.ws if problem.ws.shape[0] == vocab else problem.ws[:vocab]


def _teacher(problem: Problem) -> tuple[Tensor, Tensor]:
    """(ht, wt), the head cut to the shared columns."""
    ht, wt = problem.teacher()
    return ht, wt[: problem.case.vocab]


# --- divergences -------------------------------------------------------------------------------


def _liger(problem: Problem) -> Forward:
    """Token chunks of 1,024, ``torch.func`` per chunk. Compiled on a GPU, which is its default;
    not on a CPU, where each new shape compiles for 5 to 40 s and runs no faster.
    """
    loss = _get("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")(
        weight_hard_loss=0.0 if problem.case.loss == "kl" else 1.0,
        weight_soft_loss=1.0,
        beta=0.0,  # forward KL in Liger's convention
        temperature=1.0,
        compiled=problem.hs.is_cuda,
        chunk_size=1024,
    )
    ht, wt = _teacher(problem)
    return lambda: loss(problem.hs, _head(problem), ht, wt, problem.labels)


def _liger_jsd(problem: Problem) -> Forward:
    """Token chunks through cuBLAS and a Triton kernel."""
    loss = _get("liger_kernel.transformers", "LigerFusedLinearJSD")(
        jsd_beta=0.0, temperature=1.0, accum_dtype=torch.float32
    )
    ht, wt = _teacher(problem)
    return lambda: loss(problem.hs, _head(problem), ht, wt, problem.labels)


def _fla(problem: Problem) -> Forward:
    """Token chunks, at most eight."""
    loss = _get("fla.modules.fused_kl_div", "FusedKLDivLoss")()  # its mean is over rows
    ht, wt = _teacher(problem)
    return lambda: loss(problem.hs, ht, _head(problem), wt)


def _trl(problem: Problem) -> Forward:
    """Vocabulary tiles; a divergence for each row, so the mean is taken here."""
    apply = _get("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction").apply
    ht, wt = _teacher(problem)
    beta, temperature = 0.0, 1.0

    def forward() -> Tensor:
        rows, _ = apply(problem.hs, _head(problem), None, ht, wt, None, beta, temperature)
        return rows.mean()

    return forward


# --- cross-entropies ---------------------------------------------------------------------------


def _liger_ce(problem: Problem) -> Forward:
    """Token chunks; the gradient of a head is summed in fp32."""
    loss = _get("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(
        accum_dtype=torch.float32
    )
    return lambda: loss(_head(problem), problem.hs, problem.labels)


def _cce(problem: Problem) -> Forward:
    """Vocabulary tiles that leave no logits on a GPU, its default filter of small gradients
    included; compiled PyTorch on a CPU.
    """
    call = _get("cut_cross_entropy", "linear_cross_entropy")
    impl = "cce" if problem.hs.is_cuda else "torch_compile"
    return lambda: call(problem.hs, _head(problem), problem.labels, impl=impl)


def _quack(problem: Problem) -> Forward:
    """Token chunks of 4,096 through CuTe kernels."""
    call = _get("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda: call(problem.hs, _head(problem), problem.labels)


def _torch_chunked(problem: Problem) -> Forward:
    """PyTorch's own chunked cross-entropy of a linear layer."""
    options = _get("torch.nn", "LinearCrossEntropyOptions")()
    return lambda: F.linear_cross_entropy(
        problem.hs, _head(problem), problem.labels, options=options
    )


# --- both: no other project than Liger has one call for them --------------------------------------


def _both(
    cross_entropy: Callable[[Problem], Forward], divergence: Callable[[Problem], Forward]
) -> Callable[[Problem], Forward]:
    """Two calls and a sum, which is what a trainer would write; one backward."""

    def forward(problem: Problem) -> Forward:
        ce, kl = cross_entropy(problem), divergence(problem)
        return lambda: ce() + kl()

    return forward


def _never(problem: Problem) -> Forward:
    raise RuntimeError(f"peers: a refused peer was asked for {problem.case.loss!r}")


#: Of version 2026.10.9. Its module can be imported only after `unsloth`; on the way the environment
#: gets settings of PyTorch's allocator and of Triton, and patches for some fifty model families are
#: loaded. Measured here were then every other method under those. It also asks for trl ≤ 1.15.0,
#: which is not the version that is compared.
_UNSLOTH = (
    "not run: its module imports only after unsloth, which changes settings of the allocator and "
    "of Triton, and patches PyTorch, for every other method of the process"
)

PEERS = (
    Peer(
        "liger", "Liger chunked", frozenset({"ce+kl", "kl"}),
        "liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss", ("liger-kernel",), _liger,
    ),
    Peer(
        "liger-jsd", "Liger Triton JSD", frozenset({"kl"}),
        "liger_kernel.transformers", "LigerFusedLinearJSD", ("liger-kernel",), _liger_jsd,
        CUDA_ONLY,
    ),
    Peer(
        "liger-both", "Liger Triton CE + JSD", frozenset({"ce+kl"}),
        "liger_kernel.transformers", "LigerFusedLinearJSD", ("liger-kernel",),
        _both(_liger_ce, _liger_jsd), CUDA_ONLY,
        also=("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"),
    ),
    Peer(
        "trl", "TRL chunked divergence", frozenset({"kl"}),
        "trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", ("trl",), _trl,
    ),
    Peer(
        "trl-both", "Liger CE + TRL divergence", frozenset({"ce+kl"}),
        "trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", ("trl", "liger-kernel"),
        _both(_liger_ce, _trl), CUDA_ONLY,
        also=("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"),
    ),
    Peer(
        "fla", "fla FusedKLDivLoss", frozenset({"kl"}),
        "fla.modules.fused_kl_div", "FusedKLDivLoss", ("flash-linear-attention",), _fla,
        CUDA_ONLY,
    ),
    Peer(
        "unsloth", "unsloth chunked JSD", frozenset({"kl"}),
        "unsloth_zoo.rl_replacements", "distillation_chunked_jsd", ("unsloth_zoo",), _never,
        refused=_UNSLOTH,
    ),
    Peer(
        "liger-ce", "Liger fused-linear CE", frozenset({"ce"}),
        "liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", ("liger-kernel",),
        _liger_ce, CUDA_ONLY,
    ),
    Peer(
        "cce", "cut-cross-entropy", frozenset({"ce"}),
        "cut_cross_entropy", "linear_cross_entropy", ("cut-cross-entropy",), _cce,
    ),
    Peer(
        "quack", "quack chunked CE", frozenset({"ce"}),
        "quack.linear_cross_entropy", "chunked_linear_cross_entropy", ("quack-kernels",), _quack,
        CUDA_ONLY, (9, 0),
    ),
    Peer(
        "torch-chunked", "F.linear_cross_entropy", frozenset({"ce"}),
        "torch.nn", "LinearCrossEntropyOptions", ("torch",), _torch_chunked,
    ),
)  # fmt: skip
