"""Which backend, how many rows at a time, and what will it cost? Decided here, from shapes alone,
and explained.

The chunked algorithm holds the logits of C rows of both models. C is what the workspace budget
allows, but never so few that the weights are read more often than the products cost: a chunk below
a few dozen rows turns two matrix products into a copy of the heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mllmkd_kernels.backends import cpu

#: Default budget for the logits of a chunk: 220 rows of two fp32 blocks at V = 151,936.
WORKSPACE_MB = 256.0

#: The C++ kernels take no more rows at a time, whatever the budget: fewer read the heads too often,
#: more leave the cache. Measured on two cores, bf16, as time over the floor's: V 151,936 with 110,
#: 220, 440 rows 1.21, 1.07, 1.24; V 65,536 with 128, 256, 512 rows 1.17, 1.04 to 1.07, 1.16.
CPU_CHUNK_ROWS = 256

#: A chunk never has fewer rows than this, whatever the budget: each chunk reads both heads once.
MIN_CHUNK_ROWS = 32

#: Logit-sized tensors alive at once in plain PyTorch, where log-probabilities, ratios and terms are
#: tensors of their own: with a teacher (measured: 17 to 18), and for cross-entropy alone.
EAGER_BLOCKS, EAGER_BLOCKS_CE = 18, 4

BACKENDS = ("eager", "cpu")


@dataclass(frozen=True)
class Plan:
    """How one call will be computed. Bytes beyond inputs and returned gradients; FLOPs count
    2·m·n·k a product.

    Attributes:
        backend: "eager" or "cpu".
        algorithm: "chunk" (logits of `chunk_rows` rows at a time).
        chunk_rows: C, the rows whose logits exist at the same time.
        workspace_bytes: the logits of one chunk and the fp32 accumulator of dW.
        saved_bytes: unscaled gradients, kept from forward until backward has scaled them.
        peak_bytes: the most that exists at once beyond the returned gradients. The C++ kernels keep
            their workspace for the next call, so there the two add up.
        flops: matrix products of forward and backward together.
        floor_flops: the least any exact method needs.
        reasons: why, one sentence each.
    """

    backend: str
    algorithm: str
    chunk_rows: int
    workspace_bytes: int
    saved_bytes: int
    flops: int
    floor_flops: int
    reasons: tuple[str, ...] = field(default=())

    @property
    def peak_bytes(self) -> int:
        """See the attributes of the class."""
        kept = self.workspace_bytes if self.backend == "cpu" else 0
        return max(self.workspace_bytes, kept + self.saved_bytes)

    def __str__(self) -> str:
        head = (
            f"{self.backend} backend, {self.algorithm} algorithm, "
            f"{self.chunk_rows} rows at a time: "
            f"{self.workspace_bytes / 2**20:.0f} MiB of workspace, at most "
            f"{self.peak_bytes / 2**20:.0f} MiB with saved gradients, {self.flops / 1e9:.1f} GFLOP "
            f"({self.flops / max(self.floor_flops, 1):.2f}x the least possible)"
        )
        return "\n".join([head, *(f"  - {reason}" for reason in self.reasons)])


def choose_backend(
    backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...] = ()
) -> tuple[str, str]:
    """The backend that `backend` ("auto" or a name) means on `device`, and why.

    Raises:
        ValueError: unknown name, or a backend that cannot serve this device.
        RuntimeError: the backend was asked for by name and is not built.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend: got {backend!r}, expected one of 'auto', {', '.join(map(repr, BACKENDS))}"
        )
    if backend == "eager":
        return "eager", "asked for by name"
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend: 'cpu' was asked for, but the tensors are on {device}")
        if not cpu.available():
            raise RuntimeError(f"backend: 'cpu' was asked for, but {cpu.why_not()}")
        return "cpu", "asked for by name"
    if device.type != "cpu":
        return "eager", f"the only backend for {device.type} tensors"
    if not cpu.available():
        return "eager", f"the C++ kernels are not there: {cpu.why_not()}"
    return "cpu", "C++ kernels for CPU tensors"


def chunk_rows(
    backend: str,
    rows: int,
    vocab: int,
    blocks: int,
    element_bytes: int,
    workspace_mb: float | None,
) -> int:
    """C: the most rows whose `blocks` logit blocks of `vocab` columns fit the budget; equal
    chunks, at least one row.
    """
    budget = (WORKSPACE_MB if workspace_mb is None else workspace_mb) * 2**20
    most = max(MIN_CHUNK_ROWS, int(budget // max(blocks * vocab * element_bytes, 1)))
    if backend == "cpu":
        most = min(most, CPU_CHUNK_ROWS)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def distill_plan(
    rows: int,
    vocab: int,
    d_s: int,
    d_t: int,
    *,
    want_dh: bool,
    want_dw: bool,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
    workspace_mb: float | None = None,
) -> Plan:
    """The plan of `fused_linear_distill`; `d_t` = 0 when there is no teacher."""
    name, why = choose_backend(backend, device)
    element = 8 if dtype == torch.float64 else 4
    blocks = 2 if d_t else 1
    if name == "eager":
        blocks = EAGER_BLOCKS if d_t else EAGER_BLOCKS_CE
    c = chunk_rows(name, rows, vocab, blocks, element, workspace_mb)
    gradients = int(want_dh) + int(want_dw)
    flops = 2 * rows * vocab * (d_s + d_t + gradients * d_s)
    summed_apart = want_dw and dtype.itemsize < 4 and (name == "eager" or c < rows)
    accumulator = vocab * d_s * element if summed_apart else 0  # dW is rounded once, at the end
    saved = (rows * d_s * element if want_dh else 0) + (vocab * d_s * dtype.itemsize) * want_dw
    wanted = ", ".join(n for n, want in (("dh", want_dh), ("dw", want_dw)) if want) or "none"
    reasons = (
        why,
        f"{blocks} logit blocks of {c} x {vocab} x {element} bytes fit the workspace budget",
        f"gradients wanted: {wanted}",
        "logits are made once: gradients are formed with the loss and only scaled in backward",
    )
    workspace = blocks * c * vocab * element + accumulator
    return Plan(name, "chunk", c, workspace, saved, flops, flops, reasons)


def explain(
    rows: int,
    vocab: int,
    d_s: int,
    d_t: int = 0,
    *,
    train_hidden: bool = True,
    train_head: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    workspace_mb: float | None = None,
) -> Plan:
    """The plan of `fused_linear_distill` for these shapes; ``print(explain(...))`` says why.

    Args:
        rows, vocab, d_s, d_t: N, V and the hidden sizes of student and teacher (0: no teacher).
        train_hidden, train_head: whether the student's hidden states and head require gradients.
        dtype: of the head weights.
        device, backend, workspace_mb: as the call will have them.

    Raises:
        ValueError, RuntimeError: sizes that are not positive; a backend that is unknown or cannot
            serve the device.
    """
    for name, value, least in (
        ("rows", rows, 0),
        ("vocab", vocab, 1),
        ("d_s", d_s, 1),
        ("d_t", d_t, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    return distill_plan(
        rows, vocab, d_s, d_t, want_dh=train_hidden, want_dw=train_head, dtype=dtype,
        device=torch.device(device), backend=backend, workspace_mb=workspace_mb,
    )  # fmt: skip
