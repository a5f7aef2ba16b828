"""How long will a GPU take? Seconds of each algorithm, from bytes, FLOPs and instructions: a model,
which compares algorithms and block sizes with each other and with the floor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from mllmkd_kernels.hardware import Gpu
    from mllmkd_kernels.plan import Shapes

#: Rows of a tile of a vendor's product, which is multiplied whole.
ROW_TILE = 128

#: Share of the vendor's rate that the products inside Triton's kernels are taken to reach
#: (assumed, not measured): one block a multiprocessor, whose pipeline starts anew with each tile.
STREAM_EFFICIENCY = 0.55


def rates(s: Shapes, gpu: Gpu) -> tuple[float, int, int]:
    """FLOP/s of the products, bytes of an operand, bytes of an entry of the gradient block."""
    half = s.uniform and s.dtype.itemsize == 2
    bf16 = s.uniform and s.dtype == torch.bfloat16
    return (gpu.half_flops if half else gpu.single_flops), (2 if half else 4), (2 if bf16 else 4)


def slower(a: float, b: float) -> float:
    """Seconds of two things that a GPU does side by side: the longer, and more where both are long,
    since neither then reaches its rate.
    """
    return (a**4 + b**4) ** 0.25


#: Instructions of the row kernels per logit pair, from their machine code for sm_90, in the loops
#: over a row; of the CUDA kernel those that T = 1 and no soft-cap leave. "none": without a teacher.
ROW_INSTRUCTIONS = {
    "triton": {
        "none": 22, "forward_kl": 55, "reverse_kl": 74, "jsd": 102, "skew_forward_kl": 112,
        "skew_reverse_kl": 122, "total_variation": 72, "soft_cross_entropy": 52,
    },
    "cuda": {
        "none": 19, "forward_kl": 51, "reverse_kl": 62, "jsd": 98, "skew_forward_kl": 125,
        "skew_reverse_kl": 126, "total_variation": 68, "soft_cross_entropy": 56,
    },
}  # fmt: skip


def row_instructions(s: Shapes, backend: str) -> int:
    """Of the row kernel, for an entry of the logits of one or both models."""
    return ROW_INSTRUCTIONS[backend][s.divergence if s.d_t else "none"]


class Phase(NamedTuple):
    """A part of a fold, in seconds: its FLOPs or instructions, and its bytes."""

    name: str
    times: int
    work: float
    moved: float

    @property
    def seconds(self) -> float:
        """Of all its times."""
        return self.times * slower(self.work, self.moved)


def phases(s: Shapes, name: str, gpu: Gpu, c: int, rows: int) -> list[Phase]:
    """R `rows` of chunk: their logits and row terms in chunks of C, the last of which may be less;
    then their gradient, folded into dh and dw.
    """
    rate, operand, dz = rates(s, gpu)
    blocks, reads = 2 if s.d_t else 1, 1 if name == "cuda" else s.sweeps

    def product(phase: str, times: int, m: int, d: int, moved: int, parts: int = 1) -> Phase:
        tiled = -(-m // ROW_TILE) * ROW_TILE
        work = 2 * tiled * s.vocab * d * parts / rate
        return Phase(phase, times, work, moved * parts / gpu.bandwidth)

    found = []
    for times, m in ((rows // c, c), (1, rows % c)):
        if not times * m:
            continue
        for d in (s.d_s, s.d_t) if s.d_t else (s.d_s,):
            moved = s.vocab * d * operand + m * s.vocab * 4
            found.append(product("logits", times, m, d, moved))
        moved = m * s.vocab * (4 * reads * blocks + dz * (s.gradients > 0))
        instructions = m * s.vocab * row_instructions(s, name) / gpu.instructions
        found.append(Phase("rows", times, instructions, moved / gpu.bandwidth))
    gradient = rows * s.vocab * dz
    parts = 3 if operand < dz else 1  # fp16: dz in two bf16 parts, see `products._fold`
    if s.want_dh:
        head = s.vocab * s.d_s * operand
        found.append(product("gradients", 1, rows, s.d_s, head + gradient, parts))
    if s.want_dw:  # dw is read and written
        dw = 2 * s.vocab * s.d_s * 4
        found.append(product("gradients", 1, rows, s.d_s, gradient + dw, parts))
    return found


def fold(s: Shapes, name: str, gpu: Gpu, c: int, rows: int, beside: int = 0) -> float:
    """Of the phases, one after the other: a product is as slow as its FLOPs and its bytes, a row
    pass as its bytes and its instructions. With row passes on `beside` multiprocessors and products
    on the others both move bytes at once, and the longer of the two works counts.
    """
    found = phases(s, name, gpu, c, rows)
    if not beside:
        return sum(phase.seconds for phase in found)
    passes = sum(p.times * p.work for p in found if p.name == "rows")
    multiplied = sum(p.times * p.work for p in found if p.name != "rows")
    share = beside / gpu.multiprocessors
    work = max(passes / share, multiplied / (1 - share))
    return slower(work, sum(p.times * p.moved for p in found))


def once(s: Shapes, gpu: Gpu) -> float:
    """What does not repeat: h masked for dw; saved gradients read, scaled, rounded and written, dw
    or added to `main_grad`; less the read of dw that its first fold does without. In forward every
    fold of dw reads and writes `main_grad`, and that is all.
    """
    operand = s.dtype.itemsize
    dh, masked = s.rows * (4 + operand), s.rows * 2 * operand
    dw = s.vocab * {None: 4 + operand - 4, "backward": 4 + 8 - 4, "forward": 0}[s.main_grad]
    return s.d_s * (s.want_dh * dh + s.want_dw * (masked + dw)) / gpu.bandwidth


def chunk(s: Shapes, name: str, gpu: Gpu, c: int, rows: int, beside: int = 0) -> float:
    """All N rows, R `rows` of them folded at once; the last row pass has no products beside it."""
    whole, rest = divmod(s.rows, rows)
    parts = [rows] * whole + [rest] * (rest > 0)
    seconds = sum(fold(s, name, gpu, min(c, part), part, beside) for part in parts)
    if beside and parts:
        last = phases(s, name, gpu, min(c, parts[-1]), parts[-1])
        seconds += max(p.seconds / p.times for p in last if p.name == "rows")
    return seconds + once(s, gpu)


def stream(s: Shapes, gpu: Gpu, columns: int) -> float:
    """Both heads are multiplied once for the statistics and once more for gradients or values; a
    third time where the gradient needs a mean over the whole row first. The terms are computed
    between the products of a tile, not beside them. `columns` of the gradient exist at a time.
    """
    rate, operand, dz = rates(s, gpu)
    logits = 2 * s.rows * s.vocab * (s.d_s + s.d_t)
    folded = 2 * s.rows * s.vocab * s.d_s * s.gradients
    moved = s.rows * s.vocab * dz * (1 + s.gradients) * (s.gradients > 0)
    # dh is read and written by every slice
    moved += -(-s.vocab // columns) * s.rows * s.d_s * 8 * s.want_dh
    seconds = s.sweeps * logits / (rate * STREAM_EFFICIENCY) + once(s, gpu)
    seconds += s.rows * s.vocab * row_instructions(s, "triton") / gpu.instructions
    times = 3 if operand < dz else 1
    return seconds + slower(times * folded / rate, times * moved / gpu.bandwidth)


def assumed(gpu: Gpu, rate: float) -> str:
    """What a prediction rests on, in words."""
    return (
        f"assumed of {gpu.name}: {rate / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.1f} TB/s, "
        f"{gpu.instructions / 1e12:.0f}e12 instructions/s; two of them take (a⁴ + b⁴)^¼"
    )
