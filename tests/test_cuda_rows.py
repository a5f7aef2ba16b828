"""Is the cluster row kernel right? Its own source against the fp64 reference, on a GPU where there
is one that it runs on, and on the CPU by emulation (tests/cuda_emulation): one fiber per CUDA
thread, a few small CTAs.

The emulation proves the logic: which thread does what, what is exchanged when, the formulas. It
proves nothing of the GPU's memory model, of PTX, or of speed.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import reference
from mllmkd_kernels.backends import cuda
from tests.problems import DIVERGENCES, PROBLEMS, Problem, near_converged, problem
from tests.tolerances import LADDER, check, ladder_bound, ladder_value_bound, relative_error

EMULATION = Path(__file__).parent / "cuda_emulation"


class Rows(NamedTuple):
    """The arguments of `cuda.rows_`, before it overwrites `zs`."""

    zs: Tensor  # (C, V) fp32
    zt: Tensor | None  # (C, V) fp32
    bs: Tensor | None
    bt: Tensor | None
    labels: Tensor | None
    ce_weight: Tensor | None
    kd_weight: Tensor | None
    broken_s: Tensor | None
    broken_t: Tensor | None
    divergence: str
    param: float
    temperature: float
    cap_s: float
    cap_t: float
    ignore_index: int
    want_dz: bool
    dz_bf16: bool


class Terms(NamedTuple):
    ce: Tensor  # (C,)
    kd: Tensor  # (C,)
    dz: Tensor  # (C, V); the logits as they were where it was not wanted


Kernel = Callable[..., Terms]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel's source compiled for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulation with")
    target = tmp_path_factory.mktemp("cuda") / "rows.so"
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command = ["g++", *flags, f"-I{include}", str(EMULATION / "rows.cpp"), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="session")
def emulated(library: ctypes.CDLL) -> Kernel:
    """The kernel on the CPU. Two CTAs of one warp by default: 300 columns are then several steps of
    every loop, and no test waits long for its fibers.
    """
    emulate = library.emulate_rows
    emulate.restype = ctypes.c_char_p
    return lambda rows, size=2, threads=32, seed=0, pad=True: _emulate(
        emulate, rows, size, threads, seed, pad
    )


@pytest.fixture(params=["emulated", "gpu"] if cuda.available() else ["emulated"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """The kernel emulated, and on a GPU where there is one."""
    return request.getfixturevalue("emulated") if request.param == "emulated" else _on_gpu


#: The numbers of csrc/cuda/rows.h.
BIAS_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _guarded(z: Tensor, pad: bool) -> tuple[Tensor, Tensor]:
    """A copy of z (C, V), if `pad` with rows that start 16 bytes apart or a multiple, and what it
    lies in: a row more before and after it.
    """
    stride = -(-z.shape[1] // 8) * 8 if pad else z.shape[1]
    guarded = z.new_full((z.shape[0] + 2, stride), 77.0)
    guarded[1:-1, : z.shape[1]] = z
    return guarded[1:-1, : z.shape[1]], guarded


def _place_of_dz(z: Tensor, bf16: bool, pad: bool) -> Tensor:
    """The logits', in both dtypes; without `pad`, where bf16 has a block of its own."""
    if not bf16:
        return z
    inside = z.view(torch.bfloat16)[:, : z.shape[1]]
    return inside if pad else inside.clone(memory_format=torch.contiguous_format)


def _emulate(function, rows: Rows, size: int, threads: int, seed: int, pad: bool) -> Terms:
    r = rows
    count, vocab = r.zs.shape
    z, guarded = _guarded(r.zs, pad)
    zt = None if r.zt is None else _guarded(r.zt, pad)[0]
    dz = None
    if r.want_dz:
        dz = _place_of_dz(z, r.dz_bf16, pad)
    ce, kd = torch.full((count,), 55.0), torch.full((count,), 55.0)
    teacher = r.zt is not None and r.kd_weight is not None
    token = r.labels is not None and r.ce_weight is not None

    def pointer(x: Tensor | None, used: bool = True) -> ctypes.c_void_p:
        assert x is None or x.stride(-1) == 1
        return ctypes.c_void_p(None if x is None or not used else x.data_ptr())

    def bias_type(b: Tensor | None) -> int:
        return 0 if b is None else BIAS_TYPES[b.dtype]

    real = ctypes.c_float
    message = function(
        pointer(z), pointer(zt, teacher), pointer(dz), ctypes.c_int64(z.stride(0)),
        ctypes.c_int64(0 if dz is None else dz.stride(0)), pointer(r.bs), pointer(r.bt, teacher),
        bias_type(r.bs), bias_type(r.bt), pointer(r.labels, token), pointer(r.ce_weight, token),
        pointer(r.kd_weight, teacher), pointer(r.broken_s), pointer(r.broken_t), pointer(ce),
        pointer(kd), ctypes.c_int64(count), ctypes.c_int64(r.ignore_index), vocab, real(r.param),
        real(1 / r.temperature), real(r.cap_s), real(r.cap_t), ctypes.c_bool(r.dz_bf16),
        DIVERGENCES.index(r.divergence) if teacher else len(DIVERGENCES),
        size, threads, seed,
    )  # fmt: skip
    assert message is None, message.decode()
    assert (guarded[0] == 77).all() and (guarded[-1] == 77).all(), "write beside the rows"
    return Terms(ce, kd, (z if dz is None else dz).clone())


def _on_gpu(rows: Rows, size: int = 0, threads: int = 0, seed: int = 0, pad: bool = True) -> Terms:
    tensors = {name: x for name, x in rows._asdict().items() if isinstance(x, Tensor)}
    tensors |= {name: _guarded(tensors[name], pad)[0] for name in ("zs", "zt") if name in tensors}
    r = rows._replace(**{name: x.cuda() for name, x in tensors.items()})
    dz = None
    if r.want_dz:
        dz = _place_of_dz(r.zs, r.dz_bf16, pad)
    ce, kd = cuda.rows_(*r[:-2], dz, cluster=size)
    return Terms(ce.cpu(), kd.cpu(), (r.zs if dz is None else dz).cpu())


def rows_of(p: Problem, divergence: str = "forward_kl", **overrides) -> Rows:
    """What the chunk driver hands to the row kernel: up to 8 rows at once, which take an emulated
    cluster 50 ms.
    """
    p = replace(p, hs=p.hs[:8], ht=p.ht[:8], labels=p.labels[:8])
    vocab, options = p.vocab, p.options
    ce_weight, kd_weight = (w[:8].float() for w in p.weights())

    def broken(h: Tensor, cap: str) -> Tensor | None:
        return ~h.isfinite().all(1) if options.get(cap) else None

    rows = Rows(
        zs=p.hs.float() @ p.ws[:vocab].float().mT, zt=p.ht.float() @ p.wt[:vocab].float().mT,
        bs=p.bs, bt=p.bt, labels=p.labels, ce_weight=ce_weight, kd_weight=kd_weight,
        broken_s=broken(p.hs, "student_softcap"), broken_t=broken(p.ht, "teacher_softcap"),
        divergence=divergence, param=mk.Divergence(divergence).param,
        temperature=options.get("temperature", 1.0), cap_s=options.get("student_softcap", 0.0),
        cap_t=options.get("teacher_softcap", 0.0), ignore_index=options.get("ignore_index", -100),
        want_dz=True, dz_bf16=False,
    )  # fmt: skip
    return rows._replace(**overrides)


def expected(r: Rows, dtype: torch.dtype = torch.float64) -> Terms:
    """The same by the definitions; in fp32 it is the yardstick of a fair error."""
    leaf = r.zs.to(dtype).clone().requires_grad_()

    def final(z: Tensor, b: Tensor | None, cap: float) -> Tensor:
        eye = torch.eye(z.shape[1], dtype=dtype)  # the identity as a head: z are its logits
        return reference.logits(z, eye, None if b is None else b[: z.shape[1]].to(dtype), cap)

    z_t = None if r.zt is None or r.kd_weight is None else final(r.zt.to(dtype), r.bt, r.cap_t)
    labels = None if r.ce_weight is None else r.labels
    loss, ce, kd = reference.linear_distill(
        final(leaf, r.bs, r.cap_s), z_t, labels,
        ce_weight=0.0 if r.ce_weight is None else r.ce_weight.to(dtype),
        kd_weight=0.0 if r.kd_weight is None else r.kd_weight.to(dtype),
        divergence=mk.Divergence(r.divergence), temperature=r.temperature,
        ignore_index=r.ignore_index,
    )  # fmt: skip
    (dz,) = torch.autograd.grad(loss, leaf, allow_unused=True) if loss.requires_grad else (None,)
    return Terms(ce.detach(), kd.detach(), torch.zeros_like(leaf) if dz is None else dz)


def compare(kernel: Kernel, r: Rows, **launch: int) -> Terms:
    """Run and check all that comes out."""
    got, want, naive = kernel(r, **launch), expected(r), expected(r, torch.float32)
    check(got.ce, want.ce, "value", naive.ce, cancels=1.0, what="ce")
    check(got.kd, want.kd, "value", naive.kd, cancels=1.0, what="kd")
    row = "16-bit gradient" if r.dz_bf16 else "gradient"
    check(got.dz, want.dz, row, naive.dz, cancels=1.0, what="dz")
    return got


def test_the_emulation_sees_a_missing_barrier(library: ctypes.CDLL):
    assert library.ring(0) > 0 and library.ring(1) == 0 and library.ring(2) == -1


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "empty"])
def test_problems(kernel: Kernel, name: str, divergence: str):
    if (name, divergence) == ("masked", "reverse_kl"):
        pytest.skip("infinite: test_reverse_kl_to_a_masked_token_is_infinite")
    compare(kernel, rows_of(problem(name), divergence))


def test_reverse_kl_to_a_masked_token_is_infinite(kernel: Kernel):
    got = kernel(rows_of(problem("masked"), "reverse_kl"))
    assert (got.kd == torch.inf).all() and got.ce.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_masked_by_both_do_not_exist(kernel: Kernel, divergence: str):
    r = rows_of(problem("masked"), divergence)
    keep = torch.arange(200) % 3 != 0
    bias = torch.zeros(200).masked_fill(~keep, -torch.inf)
    assert r.zt is not None and r.labels is not None
    label = r.labels.where(keep[r.labels], -100)
    short = torch.where(label < 0, -100, keep.cumsum(0)[label] - 1)
    bare = r._replace(zs=r.zs[:, keep], zt=r.zt[:, keep], bs=None, bt=None, labels=short)
    got, want, naive = (
        kernel(r._replace(bs=bias, bt=bias, labels=label)),
        *(expected(bare, dtype) for dtype in (torch.float64, torch.float32)),
    )
    check(got.ce, want.ce, "value", naive.ce, what="ce")
    check(got.kd, want.kd, "value", naive.kd, what="kd")
    check(got.dz[:, keep], want.dz, "gradient", naive.dz, what="dz")
    assert not got.dz[:, ~keep].any()


def test_no_rows(kernel: Kernel):
    assert kernel(rows_of(problem("empty"))).dz.shape == (0, 97)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["aligned", "ragged"])
def test_a_gradient_in_16_bits(kernel: Kernel, name: str, divergence: str):
    compare(kernel, rows_of(problem(name), divergence, dz_bf16=True))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dz_bf16", [False, True])
def test_rows_that_are_not_aligned_give_what_aligned_ones_do(
    kernel: Kernel, divergence: str, dz_bf16: bool
):
    r = rows_of(problem("ragged"), divergence, dz_bf16=dz_bf16)
    assert r.zs.shape[1] % 4
    compare(kernel, r, pad=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_of_16_bits(kernel: Kernel, dtype: torch.dtype):
    p = problem("ragged")
    assert p.bs is not None and p.bt is not None
    compare(kernel, rows_of(p, bs=p.bs.to(dtype), bt=p.bt.to(dtype)))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_on_aligned_rows(kernel: Kernel, divergence: str):
    compare(kernel, rows_of(problem("aligned"), divergence, temperature=3.0))


@pytest.mark.parametrize("name", ["aligned", "ragged", "huge"])
def test_cross_entropy_alone(kernel: Kernel, name: str):
    compare(kernel, rows_of(problem(name), zt=None, kd_weight=None))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_alone(kernel: Kernel, divergence: str):
    compare(kernel, rows_of(problem("ragged"), divergence, labels=None, ce_weight=None))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_no_gradient_leaves_the_logits_as_they_were(kernel: Kernel, divergence: str):
    r = rows_of(problem("ragged"), divergence)
    with_gradient, got = kernel(r), kernel(r._replace(want_dz=False))
    assert torch.equal(got.dz, r.zs)
    if divergence == "jsd":  # forward KL adds its values in the sweep that writes the gradient
        assert torch.equal(got.kd, with_gradient.kd)
    check(got.kd, expected(r).kd, "value", what="kd")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dz_bf16", [False, True])
def test_rows_of_zero_weight_may_hold_nan(kernel: Kernel, divergence: str, dz_bf16: bool):
    r = rows_of(problem("zero_weight_rows"), divergence)
    clean, dead = kernel(r._replace(dz_bf16=dz_bf16)), torch.tensor([2, 5])
    r.zs[dead] = torch.nan
    got = kernel(r._replace(dz_bf16=dz_bf16))
    assert (got.dz[dead] == 0).all()
    alive = torch.ones(8, dtype=torch.bool)
    alive[dead] = False
    for x, y in zip(got, clean, strict=True):
        assert torch.equal(x[alive], y[alive])
    assert got.kd[dead].isnan().all()


def test_each_weight_switches_its_own_term_off(kernel: Kernel):
    r = rows_of(problem("aligned"))
    assert r.ce_weight is not None and r.kd_weight is not None
    r.ce_weight[::2] = 0
    r.kd_weight[1::3] = 0
    compare(kernel, r)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", ["zs", "zt"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_and_inf_make_that_row_nan(kernel: Kernel, divergence: str, whose: str, bad: float):
    r = rows_of(problem("aligned"), divergence)
    clean = kernel(r)
    getattr(r, whose)[4, 100] = bad
    got, others = kernel(r), torch.arange(8) != 4
    assert got.kd[4].isnan() and got.dz[4].isnan().any()
    if whose == "zs":
        assert got.ce[4].isnan()
    assert torch.equal(got.kd[others], clean.kd[others])
    assert torch.equal(got.dz[others], clean.dz[others])


def test_soft_cap_does_not_hide_a_broken_hidden_state(kernel: Kernel):
    r = rows_of(problem("ragged"))
    assert r.broken_s is not None and r.broken_t is not None and r.zt is not None
    r.zs[2], r.broken_s[2] = torch.inf, True
    r.zt[6], r.broken_t[6] = -torch.inf, True
    got = kernel(r)
    assert got.kd[[2, 6]].isnan().all() and got.ce[2].isnan()
    assert got.kd.isnan().sum() == 2 and got.dz.isnan().any(1).nonzero().flatten().tolist() == [
        2,
        6,
    ]


def test_wrong_label_gives_nan(kernel: Kernel):
    r = rows_of(problem("aligned"))
    assert r.labels is not None
    r.labels[0], r.labels[1] = 512, -1
    got = kernel(r)
    assert got.ce[:2].isnan().all() and not got.ce[2:].isnan().any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("eps", LADDER)
def test_ladder(kernel: Kernel, divergence: str, eps: float):
    p = near_converged(eps, n=8, two_sided=divergence == "total_variation")
    r = rows_of(p, divergence)
    got, want = kernel(r), expected(r)
    assert relative_error(got.dz, want.dz) <= ladder_bound(torch.float32, eps)
    assert relative_error(got.kd, want.kd) <= ladder_value_bound(divergence, eps)


#: (CTAs, threads): one of everything, more than one of each, more warps than columns.
@pytest.mark.parametrize(("size", "threads"), [(1, 32), (1, 96), (2, 64), (4, 32), (16, 32)])
@pytest.mark.parametrize("name", ["ragged", "aligned", "one_token"])
def test_every_cluster_size(kernel: Kernel, name: str, size: int, threads: int):
    compare(kernel, rows_of(problem(name), "skew_reverse_kl"), size=size, threads=threads)


def test_the_order_in_which_threads_run_changes_no_bit(emulated: Kernel):
    r = rows_of(problem("ragged"), "jsd")
    runs = [emulated(r, size=3, threads=64, seed=seed) for seed in (1, 20, 300)]
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


def test_the_same_bits_every_time(kernel: Kernel):
    r = rows_of(problem("ragged"), "jsd")
    assert all(torch.equal(x, y) for x, y in zip(kernel(r), kernel(r), strict=True))


@pytest.mark.parametrize("teacher", [True, False])
def test_every_vocabulary_is_dealt_whole_and_fits(library: ctypes.CDLL, teacher: bool):
    longest = cuda.max_vocab(teacher)
    assert longest > 262_144  # the largest vocabulary in use
    for vocab in (1, 97, 14_336, 32_000, 92_553, 128_256, 151_936, 262_144, longest, longest + 1):
        out = (ctypes.c_int64 * 3)()
        library.geometry(ctypes.c_int64(vocab), ctypes.c_bool(teacher), out)
        size, columns, shared = out
        assert (size > 0) == (vocab <= longest)
        if size:
            assert size * columns >= vocab and columns % 4 == 0 and shared <= 227 * 1024
        if size and vocab <= 16 * 14_000:  # two CTAs and their kilobyte each on an SM
            assert 2 * (shared + 1024) <= 228 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab", [32_000, 92_553, 128_256, 151_936, 262_144])
def test_vocabularies_in_use(vocab: int, divergence: str):
    """Long rows on a GPU: four of them, since the truth is fp64."""
    if not cuda.available():
        pytest.skip(f"backend 'cuda': {cuda.why_not()}")
    noise = torch.randn(4, vocab)
    hidden, weight = torch.randn(4, 8), torch.randn(vocab, 8)
    p = Problem(hidden, weight, hidden, weight, torch.tensor([0, 5, vocab - 1, -100]))
    r = rows_of(p, divergence)
    compare(_on_gpu, r._replace(zt=r.zs + 0.1 * noise, dz_bf16=vocab % 2 == 0))


def test_a_reason_is_named_where_the_kernel_does_not_run():
    assert cuda.available() == (cuda.why_not() == "")
    if not cuda.available():
        pytest.skip(f"on a GPU nothing was run: {cuda.why_not()}")
