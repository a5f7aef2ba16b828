"""Which algorithm, how much at a time, and what will it cost? Decided here, from shapes alone, and
explained.

*chunk* holds the logits of C rows of both models. C is what the workspace budget allows, but never
so few that the weights are read more often than the products cost: a chunk below a few dozen rows
turns two matrix products into a copy of the heads. On a GPU the budget also holds dz of R rows,
which are folded into the gradients at once, and C and R are what `gpu_time` finds cheapest.

*stream* holds no logits: it multiplies the heads once for the statistics of every row and once more
for the gradients, a slice of the vocabulary at a time. It costs more FLOPs and writes dW once. On a
GPU the cheaper one by that model is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from mllmkd_kernels import gpu_time, hardware
from mllmkd_kernels.backends.products import strip_bytes
from mllmkd_kernels.choose import choose_backend
from mllmkd_kernels.divergence import sweeps

#: Default budget for the logits of a chunk: 220 rows of two fp32 blocks at V = 151,936.
WORKSPACE_MB = 256.0

#: The same on a GPU: at V = 151,936 the logits of 512 rows, and dz in bf16 of 2,048. With fewer the
#: traffic of heads and dW, which is 8 bytes per entry and fold, costs more than the products.
WORKSPACE_MB_GPU = 1200.0

#: No more rows of dz are folded at once: dW's traffic is then below a quarter of its product.
MOST_FOLDED = 2048

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


@dataclass(frozen=True)
class Plan:
    """How one call will be computed. Bytes beyond inputs and returned gradients; FLOPs count
    2·m·n·k a product.

    Attributes:
        backend: "eager", "cpu", "triton" or "cuda".
        algorithm: "chunk" (logits of `chunk_rows` rows at a time) or "stream" (none; the gradient
            of `chunk_vocab` columns at a time).
        chunk_rows: C, the rows whose logits exist at the same time; all of them for "stream".
        fold_rows: R, the rows whose dz exists at the same time, a multiple of C; C where dz takes
            the place of the student's logits.
        chunk_vocab: the columns that exist at the same time; all of them for "chunk".
        beside: multiprocessors for row passes, beside the products on the others; 0: no such
            thing, all in turn.
        workspace_bytes: the logits of one chunk, for "eager" with the strips that are made of
            them; for "stream" the gradient of one slice of the vocabulary.
        saved_bytes: unscaled gradients in fp32, summed in forward and kept until backward has
            scaled them: they are rounded once, then. In the place of dW its factors, where
            `factored` says so; no dW where it goes into a `main_grad` in forward.
        returned_bytes: the gradients, in the dtypes of what they are for; no dW where there is a
            `main_grad`.
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
    fold_rows: int
    chunk_vocab: int
    workspace_bytes: int
    saved_bytes: int
    returned_bytes: int
    flops: int
    floor_flops: int
    seconds: float | None = None
    floor_seconds: float | None = None
    beside: int = 0
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
    head's dtype, whether all operands share it, the divergence, and when the head's gradient is
    added to a `main_grad` ("backward", "forward", None: there is none).
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
    main_grad: str | None = None

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
    A GPU's kernels never hold all of dz.
    """
    return backend in ("cpu", "eager") and rows <= d_s


def distill_plan(
    s: Shapes,
    device: torch.device,
    backend: str = "auto",
    workspace_mb: float | None = None,
    algorithm: str | None = None,
    gpu: hardware.Gpu | None = None,
    overlap: bool = False,
) -> Plan:
    """The plan of `fused_linear_distill`. `algorithm` forces "chunk" or "stream" where the backend
    has both; `gpu` predicts for another GPU than the one of `device`; `overlap` is never chosen.
    """
    name, why = choose_backend(backend, device, (s.dtype,))
    if name not in ("triton", "cuda"):
        if overlap:
            raise ValueError(f"overlap: expected backend 'triton' or 'cuda', got {name!r}")
        return _host_plan(s, name, why, workspace_mb, device)
    gpu = gpu or hardware.of_device(device)
    chunk = _chunk_on_gpu(s, name, gpu, workspace_mb, overlap)
    stream = _stream_on_gpu(s, gpu, workspace_mb)
    if name == "cuda" or not s.uniform or algorithm == "chunk" or overlap:
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


def _added(s: Shapes) -> tuple[str, ...]:
    return () if s.main_grad is None else (f"dw is added to main_grad in {s.main_grad}",)


def _gradient_bytes(s: Shapes, element: int, late: bool = False) -> tuple[int, int]:
    """Of dh and dw as they are saved, `element` bytes an entry, and as they are returned; `late`:
    dz and h are saved in the place of dw.
    """
    dh, dw = s.rows * s.want_dh * s.d_s, s.vocab * s.want_dw * s.d_s
    factors = s.rows * (s.vocab * element + s.d_s * s.dtype.itemsize)
    kept = factors if late else dw * element * (s.main_grad != "forward")
    returned = dh + dw * (s.main_grad is None)
    return dh * element + kept, returned * s.dtype.itemsize


def _host_plan(
    s: Shapes, name: str, why: str, workspace_mb: float | None, device: torch.device
) -> Plan:
    element = 8 if s.dtype == torch.float64 else 4
    blocks = 2 if s.d_t else 1
    c = chunk_rows(name, s.rows, s.vocab, blocks, element, workspace_mb)
    late = s.want_dw and s.main_grad != "forward" and factored(name, s.rows, s.d_s)
    block = c * s.vocab * element
    workspace = (blocks - late) * block  # the student's logits become the dz that is saved
    if name == "eager":
        strips = EAGER_BLOCKS if s.d_t else EAGER_BLOCKS_CE
        workspace += strips * min(strip_bytes(device), block)
    return Plan(
        name, "chunk", c, c, s.vocab, workspace, *_gradient_bytes(s, element, late),
        s.floor_flops, s.floor_flops,
        reasons=(
            why,
            f"{blocks} logit blocks of {c} x {s.vocab} x {element} bytes fit the workspace budget",
            _wanted(s),
            "logits are made once: gradients are formed with the loss and only scaled in backward"
            + ", but dw: it is formed there, because all of dz is smaller" * late,
            *_added(s),
        ),
    )  # fmt: skip


# --- on a GPU ------------------------------------------------------------------------------------


def _masked_rows(s: Shapes, rows: int, operand: int) -> int:
    """dW multiplies a copy of some rows' hidden states, in which those without weight are 0."""
    return rows * s.d_s * operand * s.want_dw


def _gpu_blocks(
    s: Shapes, name: str, gpu: hardware.Gpu, budget: float, overlap: bool = False
) -> tuple[int, int, int]:
    """(C, R, multiprocessors for row passes): within the budget what takes the least time a row,
    once all is under way. They do not depend on N, so that steps of different N run the same
    kernels.
    """
    _, _, dz = gpu_time.rates(s, gpu)
    apart = dz == 2 and s.gradients > 0
    tiles = range(gpu_time.ROW_TILE, MOST_FOLDED + 1, gpu_time.ROW_TILE)
    settings = [
        (c, fold, beside)
        for c in (MIN_CHUNK_ROWS, 2 * MIN_CHUNK_ROWS, *tiles)
        for fold in (range(c, MOST_FOLDED + 1, c) if apart else (c,))
        if _block_bytes(s, name, c, fold, overlap) <= budget
        for beside in (range(8, gpu.multiprocessors // 2, 8) if overlap else (0,))
    ]

    def seconds_a_row(setting: tuple[int, int, int]) -> float:
        return gpu_time.fold(s, name, gpu, *setting) / setting[1]

    least = MIN_CHUNK_ROWS, MIN_CHUNK_ROWS, 8 * overlap
    return min(settings, key=seconds_a_row, default=least)


def _apart(s: Shapes, name: str, c: int, fold: int) -> bool:
    """Has dz a block of its own? In bf16, but where a kernel can put it in the logits' place."""
    bf16 = s.uniform and s.dtype == torch.bfloat16
    return bf16 and s.gradients > 0 and (name != "cuda" or fold > c)


def _block_bytes(s: Shapes, name: str, c: int, fold: int, overlap: bool) -> int:
    """Logits of C rows in fp32, and dz of R where it is apart; two of each with `overlap`."""
    dz = 2 * fold * _apart(s, name, c, fold)
    return s.vocab * (4 * c * (2 if s.d_t else 1) + dz) * (1 + overlap)


def _chunk_on_gpu(
    s: Shapes, name: str, gpu: hardware.Gpu, workspace_mb: float | None, overlap: bool = False
) -> Plan:
    rate, operand, _ = gpu_time.rates(s, gpu)
    c, fold, beside = _gpu_blocks(s, name, gpu, _budget(name, workspace_mb), overlap)
    chunks, blocks, held = -(-s.rows // c), 2 if s.d_t else 1, max(1, min(c, s.rows))
    folded = max(held, min(fold, s.rows))
    workspace = _block_bytes(s, name, held, folded, overlap) + _masked_rows(s, folded, operand)
    reads = 1 if name == "cuda" else s.sweeps
    dz_block = f", and dz of {folded} x {s.vocab} x 2 bytes, folded at once"
    return Plan(
        name, "chunk", held, folded, s.vocab, workspace, *_gradient_bytes(s, 4), s.floor_flops,
        s.floor_flops, gpu_time.chunk(s, name, gpu, c, fold, beside), s.floor_flops / rate, beside,
        reasons=(
            f"{blocks} logit blocks of {held} x {s.vocab} x 4 bytes fit the workspace budget"
            + dz_block * _apart(s, name, held, folded) + ", two of each" * overlap,
            _wanted(s),
            f"the row kernel reads its block {'once' if reads == 1 else f'{reads} times'}, "
            f"{gpu_time.row_instructions(s, name)} instructions an entry; {chunks} chunks",
            *_added(s),
            _beside(beside, gpu) if overlap else _in_turn(s, name, gpu, c, fold),
            gpu_time.assumed(gpu, rate),
        ),
    )  # fmt: skip


def _in_turn(s: Shapes, name: str, gpu: hardware.Gpu, c: int, fold: int) -> str:
    """What each phase takes, in words."""
    found = gpu_time.phases(s, name, gpu, c, fold)
    spent = dict.fromkeys((phase.name for phase in found), 0.0)
    for phase in found:
        spent[phase.name] += phase.seconds * s.rows / fold
    told = ", ".join(f"{phase} {seconds * 1e3:.2f} ms" for phase, seconds in spent.items())
    return f"one after the other: {told}"


def _beside(beside: int, gpu: hardware.Gpu) -> str:
    return (
        f"row passes on {beside} of {gpu.multiprocessors} multiprocessors, beside the products on "
        "the others"
    )


def _stream_on_gpu(s: Shapes, gpu: hardware.Gpu, workspace_mb: float | None) -> Plan:
    rate, operand, dz = gpu_time.rates(s, gpu)
    columns = min(chunk_vocab(s.rows, s.vocab, dz, workspace_mb), max(s.vocab, 1))
    flops = 2 * s.rows * s.vocab * (s.sweeps * (s.d_s + s.d_t) + s.d_s * s.gradients)
    workspace = s.rows * columns * dz * (s.gradients > 0) + _masked_rows(s, s.rows, operand)
    return Plan(
        "triton", "stream", s.rows, s.rows, columns, workspace, *_gradient_bytes(s, 4), flops,
        s.floor_flops, gpu_time.stream(s, gpu, columns), s.floor_flops / rate,
        reasons=(
            f"a gradient slice of {s.rows} x {columns} x {dz} bytes fits the workspace budget",
            _wanted(s),
            f"both heads are multiplied {s.sweeps} times: no logits in memory",
            *_added(s),
            f"{gpu_time.assumed(gpu, rate)}; {gpu_time.STREAM_EFFICIENCY:.0%} of the rate inside "
            "kernels",
        ),
    )  # fmt: skip
