"""What is the cluster row kernel's alone? How rows are dealt to CTAs, hostile problems in every
divergence, long vocabularies. What all row kernels share is in test_row_kernels.py.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from mllmkd_kernels.backends import cuda
from tests.problems import DIVERGENCES, PROBLEMS, Problem, near_converged, problem
from tests.row_kernels import CLUSTER, Kernel, Rows, compare, emulated, expected, library, on_gpu
from tests.tolerances import LADDER, check, ladder_bound, ladder_value_bound, relative_error


@pytest.fixture(params=CLUSTER)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return CLUSTER[request.param]


def rows_of(p: Problem, divergence: str = "forward_kl", **overrides) -> Rows:
    """What the chunk driver hands to the row kernel: up to 8 rows at once, which take an emulated
    cluster 50 ms.
    """
    p = replace(p, hs=p.hs[:8], ht=p.ht[:8], labels=p.labels[:8])
    vocab, options = p.vocab, p.options
    ce_weight, kd_weight = (w[:8].float() for w in p.weights())
    rows = Rows(
        p.hs.float() @ p.ws[:vocab].float().mT, p.ht.float() @ p.wt[:vocab].float().mT, p.labels,
        ce_weight, kd_weight, divergence, p.bs, p.bt, options.get("temperature", 1.0),
        options.get("student_softcap", 0.0), options.get("teacher_softcap", 0.0),
    )  # fmt: skip
    return rows._replace(**overrides)


def test_the_emulation_sees_a_missing_barrier():
    ring = library().ring
    assert ring(0) > 0 and ring(1) == 0 and ring(2) == -1


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "empty"])
def test_problems(kernel: Kernel, name: str, divergence: str):
    if (name, divergence) == ("masked", "reverse_kl"):
        pytest.skip("infinite: test_tokens_that_the_teacher_forbids")
    compare(kernel, rows_of(problem(name), divergence))


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


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dz_bf16", [False, True])
def test_rows_that_are_not_aligned_give_what_aligned_ones_do(
    kernel: Kernel, divergence: str, dz_bf16: bool
):
    r = rows_of(problem("ragged"), divergence, dz_bf16=dz_bf16)
    assert r.zs.shape[1] % 4
    compare(kernel, r, pad=False)


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


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("eps", LADDER)
def test_ladder_of_z_scores(kernel: Kernel, divergence: str, eps: float):
    r = rows_of(near_converged(eps, n=8), divergence, standardize=True)
    got, want = kernel(r), expected(r)
    assert relative_error(got.dz, want.dz) <= ladder_bound(torch.float32, eps)
    assert relative_error(got.kd, want.kd) <= ladder_value_bound(divergence, eps)


#: (CTAs, threads): one of everything, more than one of each, more warps than columns.
@pytest.mark.parametrize(("size", "threads"), [(1, 32), (1, 96), (2, 64), (4, 32), (16, 32)])
@pytest.mark.parametrize("name", ["ragged", "aligned", "one_token"])
def test_every_cluster_size(kernel: Kernel, name: str, size: int, threads: int):
    r = rows_of(problem(name), "skew_reverse_kl")
    compare(kernel, r, size=size, threads=threads)
    if name != "one_token":  # whose σ is 0
        compare(kernel, r._replace(standardize=True), size=size, threads=threads)


def test_the_order_in_which_threads_run_changes_no_bit():
    r = rows_of(problem("ragged"), "jsd", standardize=True)
    runs = [emulated(r, size=3, threads=64, seed=seed) for seed in (1, 20, 300)]
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


def test_the_same_bits_every_time(kernel: Kernel):
    r = rows_of(problem("ragged"), "jsd")
    assert all(torch.equal(x, y) for x, y in zip(kernel(r), kernel(r), strict=True))


@pytest.mark.parametrize("teacher", [True, False])
def test_every_vocabulary_is_dealt_whole_and_fits(teacher: bool):
    longest = cuda.max_vocab(teacher)
    assert longest > 262_144  # the largest vocabulary in use
    for vocab in (1, 97, 14_336, 32_000, 92_553, 128_256, 151_936, 262_144, longest, longest + 1):
        out = (ctypes.c_int64 * 3)()
        library().geometry(ctypes.c_int64(vocab), ctypes.c_bool(teacher), out)
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
    compare(on_gpu, r._replace(zt=r.zs + 0.1 * noise, dz_bf16=vocab % 2 == 0))


def test_a_reason_is_named_where_the_kernel_does_not_run():
    assert cuda.available() == (cuda.why_not() == "")
    if not cuda.available():
        pytest.skip(f"on a GPU nothing was run: {cuda.why_not()}")
