"""Which algorithm, how much at a time, and what will it cost? Decided here, from shapes alone, and
explained.

*chunk* holds the logits of C rows of both models. C is what the workspace budget allows, but never
so few that the weights are read more often than the products cost: a chunk below a few dozen rows
turns two matrix products into a copy of the heads.

*stream* holds no logits: it multiplies the heads once for the statistics of every row and once more
for the gradients, a slice of the vocabulary at a time. It costs more FLOPs and writes dW once. On a
GPU the cheaper one by the model below is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from mllmkd_kernels import hardware
from mllmkd_kernels.backends.products import strip_bytes
from mllmkd_kernels.choose import choose_backend
from mllmkd_kernels.divergence import sweeps

#: Default budget for the logits of a chunk: 220 rows of two fp32 blocks at V = 151,936.
WORKSPACE_MB = 256.0

#: The same on a GPU: 512 rows. There fewer make the accumulation of dW, 8 bytes of traffic per
#: entry and chunk, cost more than its products.
WORKSPACE_MB_GPU = 600.0

#: A processor takes no more rows at a time, whatever the budget: fewer read the heads too often,
#: more only take memory. Measured on two cores, bf16, V 65,536, as time over the floor's: 256, 352,
#: 512 rows 1.16, 1.14, 1.08.
CPU_CHUNK_ROWS = 512

#: A chunk never has fewer rows than this, whatever the budget: each chunk reads both heads once.
MIN_CHUNK_ROWS = 32

#: A slice of the streamed vocabulary never has fewer columns, and is a multiple of this: the width
#: of one tile of the kernels.
VOCAB_TILE = 128

#: Logit-sized tensors alive at once in plain PyTorch, where log-probabilities, ratios and terms are
#: tensors of their own, measured: with a teacher (14 to 18, JSD the most), for cross-entropy alone.
EAGER_BLOCKS, EAGER_BLOCKS_CE = 18, 4

#: Share of the vendor's rate that the products inside Triton's kernels are taken to reach
#: (assumed, not measured).
STREAM_EFFICIENCY = 0.75


@dataclass(frozen=True)
class Plan:
    """How one call will be computed. Bytes beyond inputs and returned gradients; FLOPs count
    2·m·n·k a product.

    Attributes:
        backend: "eager", "cpu", "triton" or "cuda".
        algorithm: "chunk" (logits of `chunk_rows` rows at a time) or "stream" (none; the gradient
            of `chunk_vocab` columns at a time).
        chunk_rows: C, the rows whose logits exist at the same time; all of them for "stream".
        chunk_vocab: the columns that exist at the same time; all of them for "chunk".
        workspace_bytes: the logits of one chunk, for "eager" with the strips that are made of
            them; for "stream" the gradient of one slice of the vocabulary.
        saved_bytes: unscaled gradients in fp32, summed in forward and kept until backward has
            scaled them: they are rounded once, then. In the place of dW its factors, where
            `factored` says so.
        returned_bytes: the gradients, in the dtypes of what they are for.
        peak_bytes: the most that exists at once beyond the returned gradients: in forward, where
            those saved will make room for them, or in backward. The C++ kernels keep their
            workspace for the next call, so there it exists in backward too.
        flops: matrix products of forward and backward together.
        floor_flops: the least any exact method needs.
        seconds: predicted time of forward and backward; None where there is no model (CPU).
        floor_seconds: predicted time of the least products alone.
        measured: what `explain(measure=True)` found, in words; "" before.
        reasons: why, one sentence each.
    """

    backend: str
    algorithm: str
    chunk_rows: int
    chunk_vocab: int
    workspace_bytes: int
    saved_bytes: int
    returned_bytes: int
    flops: int
    floor_flops: int
    seconds: float | None = None
    floor_seconds: float | None = None
    measured: str = ""
    reasons: tuple[str, ...] = field(default=())

    @property
    def peak_bytes(self) -> int:
        """See the attributes of the class."""
        forward = self.workspace_bytes + self.saved_bytes - self.returned_bytes
        kept = self.workspace_bytes if self.backend == "cpu" else 0
        return max(forward, kept + self.saved_bytes)

    def __str__(self) -> str:
        size = (
            f"{self.chunk_rows} rows"
            if self.algorithm == "chunk"
            else f"{self.chunk_vocab} columns"
        )
        lines = [
            f"{self.backend} backend, {self.algorithm} algorithm, {size} at a time: "
            f"{self.workspace_bytes / 2**20:.0f} MiB of workspace, at most "
            f"{self.peak_bytes / 2**20:.0f} MiB with saved gradients, {self.flops / 1e9:.1f} GFLOP "
            f"({self.flops / max(self.floor_flops, 1):.2f}x the least possible)"
        ]
        if self.seconds is not None and self.floor_seconds is not None:
            lines.append(
                f"  predicted {self.seconds * 1e3:.2f} ms, products alone "
                f"{self.floor_seconds * 1e3:.2f} ms "
                f"({self.seconds / max(self.floor_seconds, 1e-9):.2f}x)"
            )
        if self.measured:
            lines.append(f"  measured {self.measured}")
        return "\n".join([*lines, *(f"  - {reason}" for reason in self.reasons)])


@dataclass(frozen=True)
class Shapes:
    """What a plan follows from: N, V, D_s, D_t (0: no teacher), which gradients are wanted, the
    head's dtype, whether all operands share it, and the divergence.
    """

    rows: int
    vocab: int
    d_s: int
    d_t: int
    want_dh: bool
    want_dw: bool
    dtype: torch.dtype
    uniform: bool = True
    divergence: str = "forward_kl"

    @property
    def gradients(self) -> int:
        """How many gradients are products of N·V·D_s."""
        return int(self.want_dh) + int(self.want_dw)

    @property
    def sweeps(self) -> int:
        """How often the logits are gone through, see `divergence.sweeps`."""
        return sweeps(self.divergence if self.d_t else None, self.gradients > 0)

    @property
    def floor_flops(self) -> int:
        """Every product once."""
        return 2 * self.rows * self.vocab * (self.d_s * (1 + self.gradients) + self.d_t)


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
    budget = _budget(backend, workspace_mb)
    most = max(MIN_CHUNK_ROWS, int(budget // max(blocks * vocab * element_bytes, 1)))
    if backend in ("cpu", "eager"):
        most = min(most, CPU_CHUNK_ROWS)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def chunk_vocab(rows: int, vocab: int, element_bytes: int, workspace_mb: float | None) -> int:
    """The most columns, in whole tiles, whose gradient for all rows fits the budget."""
    columns = int(_budget("triton", workspace_mb) // max(rows * element_bytes, 1))
    tiles = min(columns, vocab) // VOCAB_TILE
    return max(1, tiles) * VOCAB_TILE


def _budget(backend: str, workspace_mb: float | None) -> float:
    default = WORKSPACE_MB_GPU if backend in ("triton", "cuda") else WORKSPACE_MB
    return (default if workspace_mb is None else workspace_mb) * 2**20


def factored(backend: str, rows: int, d_s: int) -> bool:
    """Does dW = dzᵀ h wait for backward, its factors dz (N, V) and h (N, D) being no larger? Then
    it is formed once, in the dtype of the head, and no fp32 dW (V, D) is summed, saved and scaled.
    The other backends' kernels never hold all of dz.
    """
    return backend == "eager" and rows <= d_s


def distill_plan(
    s: Shapes,
    device: torch.device,
    backend: str = "auto",
    workspace_mb: float | None = None,
    algorithm: str | None = None,
    gpu: hardware.Gpu | None = None,
) -> Plan:
    """The plan of `fused_linear_distill`. `algorithm` forces "chunk" or "stream" where the backend
    has both; `gpu` predicts for another GPU than the one of `device`.
    """
    name, why = choose_backend(backend, device, (s.dtype,))
    if name not in ("triton", "cuda"):
        return _host_plan(s, name, why, workspace_mb, device)
    gpu = gpu or hardware.of_device(device)
    chunk = _chunk_on_gpu(s, name, gpu, workspace_mb)
    stream = _stream_on_gpu(s, gpu, workspace_mb)
    if name == "cuda" or not s.uniform or algorithm == "chunk":
        return _because(chunk, why, "only this algorithm has these operands or was asked for")
    if algorithm == "stream":
        return _because(stream, why, "asked for by name")
    best, other = sorted((chunk, stream), key=lambda plan: plan.seconds or 0.0)
    times = f"{(best.seconds or 0) * 1e3:.2f} ms predicted for {gpu.name}, "
    return _because(best, why, times + f"{other.algorithm} {(other.seconds or 0) * 1e3:.2f} ms")


def _because(plan: Plan, *why: str) -> Plan:
    return replace(plan, reasons=(*why, *plan.reasons))


def _wanted(s: Shapes) -> str:
    names = [n for n, want in (("dh", s.want_dh), ("dw", s.want_dw)) if want]
    return f"gradients wanted: {', '.join(names) or 'none'}"


def _gradient_bytes(s: Shapes, element: int, late: bool = False) -> tuple[int, int]:
    """Of dh and dw as they are saved, `element` bytes an entry, and as they are returned; `late`:
    dz and h are saved in the place of dw.
    """
    dh, dw = s.rows * s.want_dh * s.d_s, s.vocab * s.want_dw * s.d_s
    factors = s.rows * (s.vocab * element + s.d_s * s.dtype.itemsize)
    saved = dh * element + (factors if late else dw * element)
    return saved, (dh + dw) * s.dtype.itemsize


def _host_plan(
    s: Shapes, name: str, why: str, workspace_mb: float | None, device: torch.device
) -> Plan:
    element = 8 if s.dtype == torch.float64 else 4
    blocks = 2 if s.d_t else 1
    c = chunk_rows(name, s.rows, s.vocab, blocks, element, workspace_mb)
    late = s.want_dw and factored(name, s.rows, s.d_s)
    block = c * s.vocab * element
    workspace = (blocks - late) * block  # the student's logits become the dz that is saved
    if name == "eager":
        strips = EAGER_BLOCKS if s.d_t else EAGER_BLOCKS_CE
        workspace += strips * min(strip_bytes(device), block)
    return Plan(
        name, "chunk", c, s.vocab, workspace, *_gradient_bytes(s, element, late),
        s.floor_flops, s.floor_flops,
        reasons=(
            why,
            f"{blocks} logit blocks of {c} x {s.vocab} x {element} bytes fit the workspace budget",
            _wanted(s),
            "logits are made once: gradients are formed with the loss and only scaled in backward"
            + ", but dw: it is formed there, because all of dz is smaller" * late,
        ),
    )  # fmt: skip


# --- what a GPU is predicted to need -------------------------------------------------------------


def _rates(s: Shapes, gpu: hardware.Gpu) -> tuple[float, int, int]:
    """FLOP/s of the products, bytes of an operand, bytes of an entry of the gradient block."""
    half = s.uniform and s.dtype.itemsize == 2
    bf16 = s.uniform and s.dtype == torch.bfloat16
    return (gpu.half_flops if half else gpu.single_flops), (2 if half else 4), (2 if bf16 else 4)


def _masked_rows(s: Shapes, operand: int) -> int:
    """dW multiplies a copy of the hidden states in which rows without weight are 0."""
    return s.rows * s.d_s * operand * s.want_dw


def _chunk_on_gpu(s: Shapes, name: str, gpu: hardware.Gpu, workspace_mb: float | None) -> Plan:
    """Every product is as slow as its FLOPs or its bytes, whichever is more; the row kernel between
    them is bytes alone.
    """
    rate, operand, dz = _rates(s, gpu)
    blocks = 2 if s.d_t else 1
    c = chunk_rows(name, s.rows, s.vocab, blocks, 4, workspace_mb)
    chunks = -(-s.rows // c)

    def product(d: int, moved: int) -> float:
        return max(2 * c * s.vocab * d / rate, moved / gpu.bandwidth)

    block, gradient_block = c * s.vocab * 4, c * s.vocab * dz
    head_s, head_t = s.vocab * s.d_s * operand, s.vocab * s.d_t * operand
    accumulator = s.vocab * s.d_s * 4  # read and written by every chunk
    once = product(s.d_s, head_s + block) + (product(s.d_t, head_t + block) if s.d_t else 0)
    once += s.want_dh * product(s.d_s, head_s + gradient_block)
    once += s.want_dw * product(s.d_s, gradient_block + 2 * accumulator)
    reads = 1 if name == "cuda" else s.sweeps
    moved = reads * blocks * block + gradient_block * (s.gradients > 0)
    seconds = chunks * (once + moved / gpu.bandwidth)
    workspace = blocks * block + _masked_rows(s, operand)
    return Plan(
        name, "chunk", c, s.vocab, workspace, *_gradient_bytes(s, 4), s.floor_flops,
        s.floor_flops, seconds, s.floor_flops / rate,
        reasons=(
            f"{blocks} logit blocks of {c} x {s.vocab} x 4 bytes fit the workspace budget",
            _wanted(s),
            f"the row kernel reads its block {'once' if reads == 1 else f'{reads} times'}",
        ),
    )  # fmt: skip


def _stream_on_gpu(s: Shapes, gpu: hardware.Gpu, workspace_mb: float | None) -> Plan:
    """Both heads are multiplied once for the statistics and once more for gradients or values; a
    third time where the gradient needs a mean over the whole row first.
    """
    rate, operand, dz = _rates(s, gpu)
    columns = min(chunk_vocab(s.rows, s.vocab, dz, workspace_mb), max(s.vocab, 1))
    logits = 2 * s.rows * s.vocab * (s.d_s + s.d_t)
    folded = 2 * s.rows * s.vocab * s.d_s * s.gradients
    slices = -(-s.vocab // columns)
    moved = s.rows * s.vocab * dz * (1 + s.gradients) * (s.gradients > 0)
    moved += slices * s.rows * s.d_s * 8 * s.want_dh  # dh is read and written by every slice
    seconds = s.sweeps * logits / (rate * STREAM_EFFICIENCY) + folded / rate + moved / gpu.bandwidth
    workspace = s.rows * columns * dz * (s.gradients > 0) + _masked_rows(s, operand)
    return Plan(
        "triton", "stream", s.rows, columns, workspace, *_gradient_bytes(s, 4),
        s.sweeps * logits + folded, s.floor_flops, seconds, s.floor_flops / rate,
        reasons=(
            f"a gradient slice of {s.rows} x {columns} x {dz} bytes fits the workspace budget",
            _wanted(s),
            f"both heads are multiplied {s.sweeps} times: no logits in memory",
        ),
    )  # fmt: skip
