"""What do other projects have? Their functions, called as their documentation says, if installed.

``pip install mllmkd_kernels[peers]`` brings them; a missing one is a row that says so. Only peers
that run on a CPU are here. Each is asked for exactly the loss of the case: both weights 1, no
temperature, a mean over rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import Problem


@dataclass(frozen=True)
class Peer:
    """The fields of `methods.Method`, built from the module a peer lives in."""

    key: str
    label: str
    losses: frozenset[str]
    module: str
    function: str
    package: str
    build: Callable[[Problem], Callable[[], Tensor]]

    def missing(self) -> str:
        """Why it cannot be imported, "" if it can."""
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            return f"not installed: {error}"
        except Exception as error:  # a peer may fail in any way while it is imported
            return f"cannot import {self.module}: {type(error).__name__}: {error}"
        return "" if hasattr(module, self.function) else f"{self.module} has no {self.function}"

    def version(self) -> str:
        """Name and version of the distribution."""
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return f"{self.package}, not installed"


def _forward_backward(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        loss = forward()
        loss.backward()
        return loss.detach()

    return run


def _liger(problem: Problem) -> Callable[[], Tensor]:
    """Token chunks of 1,024, ``torch.func`` per chunk; uncompiled, since each new shape compiles
    for seconds on a CPU.
    """
    jsd: Any = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    loss = jsd(
        weight_hard_loss=0.0 if problem.case.loss == "kl" else 1.0,
        weight_soft_loss=1.0,
        beta=0.0,  # forward KL in Liger's convention
        temperature=1.0,
        compiled=False,
        chunk_size=1024,
    )
    ht, wt = problem.teacher()
    return _forward_backward(lambda: loss(problem.hs, problem.ws, ht, wt, problem.labels))


def _trl(problem: Problem) -> Callable[[], Tensor]:
    """Vocabulary tiles; per-row divergences, so the mean is taken here. It has no cross-entropy."""
    module: Any = importlib.import_module("trl.kernels.chunked_divergence")
    apply = module.ChunkedDivergenceFunction.apply
    ht, wt = problem.teacher()
    beta, temperature = 0.0, 1.0
    return _forward_backward(
        lambda: apply(problem.hs, problem.ws, None, ht, wt, None, beta, temperature)[0].mean()
    )


def _torch_chunked(problem: Problem) -> Callable[[], Tensor]:
    """PyTorch's own chunked cross-entropy of a linear layer."""
    options = torch.nn.LinearCrossEntropyOptions()
    return _forward_backward(
        lambda: F.linear_cross_entropy(problem.hs, problem.ws, problem.labels, options=options)
    )


PEERS = (
    Peer(
        "liger", "Liger chunked", frozenset({"ce+kl", "kl"}),
        "liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss", "liger-kernel", _liger,
    ),
    Peer(
        "trl", "TRL chunked divergence", frozenset({"kl"}),
        "trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", "trl", _trl,
    ),
    Peer(
        "torch-chunked", "F.linear_cross_entropy", frozenset({"ce"}),
        "torch.nn.functional", "linear_cross_entropy", "torch", _torch_chunked,
    ),
)  # fmt: skip
