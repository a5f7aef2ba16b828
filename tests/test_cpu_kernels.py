"""Do the C++ kernels compute the right numbers, on every instruction set the processor has?

Sizes are chosen against the kernels' blocking: a tile has 224 vocabulary rows, a panel 16 or 32
tokens, a block 256 (bf16: 512) tokens, a slab 256 (bf16: 512) features. Hostile values have a file
of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mllmkd_kernels as mk
from mllmkd_kernels.backends import cpu
from mllmkd_kernels.backends.calls import Head, Options, Targets
from tests.cpu_cases import BOUND, DIVERGENCES, FLOATS, Case, compare, error, logits, make

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or "built")

# --- what runs again under each instruction set ---------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kernel_divergences(divergence: str, dtype: torch.dtype) -> None:
    compare(make(dtype=dtype), divergence, BOUND[dtype])
    capped = make(dtype=dtype, temperature=2.0, cap_s=5.0, cap_t=3.0, chunk=40)
    capped.bs = torch.linspace(-1, 1, 510).to(dtype)
    capped.bt = torch.linspace(-1, 1, 505).to(dtype)
    compare(capped, divergence, BOUND[dtype])


@pytest.mark.parametrize(
    ("n", "v", "d_s", "d_t"),
    [
        (1, 1, 1, 1),  # one of everything: every loop is all remainder
        (33, 224, 32, 16),  # a whole tile, whole panels of features, a token more than a panel
        (32, 225, 31, 17),  # a tile of one row, odd features: the padded half of a bf16 pair
        (300, 449, 300, 600),  # two blocks of tokens, two slabs of features, two tiles and a row
        (530, 64, 600, 513),  # two blocks and two slabs in bf16
        (150, 2700, 31, 17),  # 13 tiles in two chunks: bf16's dW moves together in four doublings
    ],
)
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=lambda d: str(d)[6:])
def test_kernel_shapes(n: int, v: int, d_s: int, d_t: int, dtype: torch.dtype) -> None:
    # rounding to bf16 averages out over rows: a single one may be off by half a unit in the last
    # place of dz and of dW, 0.39% each
    bound = 8e-3 if dtype == torch.bfloat16 and n == 1 else BOUND[dtype]
    for chunk in (1 << 20, 100):
        case = replace(make(n, v, d_s, d_t, dtype), chunk=chunk)
        compare(case, "reverse_kl", bound)


def test_kernel_products_are_sums_of_short_chains() -> None:
    """Against what one chain of fp32 sums over all features makes of the logits: near convergence
    their rounding is the error of the gradient.
    """
    generator = torch.Generator().manual_seed(0)
    hs, ws = torch.randn(16, 256, generator=generator), torch.randn(448, 256, generator=generator)
    ws, ht = ws * 0.16, hs + 0.003 * torch.randn(16, 256, generator=generator)

    def gradient(z_s: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
        return (z_s.double().softmax(1) - z_t.double().softmax(1)) @ ws.double()

    def chain(h: torch.Tensor) -> torch.Tensor:
        z = torch.zeros(len(h), len(ws))
        for a, b in zip(h.double().mT, ws.double().mT, strict=True):
            z = (z.double() + a[:, None] * b).float()
        return z

    truth = gradient(*(h.double() @ ws.double().mT for h in (hs, ht)))
    case = Case(hs, ws, ht, ws, None, None, torch.ones(16), vocab=448)
    assert error(case.run("forward_kl")[3], truth) < 0.75 * error(
        gradient(chain(hs), chain(ht)), truth
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_kernel_logprob(dtype: torch.dtype) -> None:
    case = make(300, 449, 70, dtype=dtype)
    labels, weight = case.labels, case.kd_weight
    assert labels is not None and weight is not None
    bias = torch.linspace(-1, 1, case.ws.shape[0]).to(dtype)
    h, w, b = (x.double().requires_grad_() for x in (case.hs, case.ws, bias))
    lse = (logits(h, w, b, 4.0, 449) / 0.7).logsumexp(1)
    valid = labels != -100
    z_label = logits(h, w, b, 4.0, 449).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    logp = (z_label / 0.7 - lse) * valid
    grads = torch.autograd.grad((logp * weight).sum(), (h, w, b))
    head, targets = Head(case.hs, case.ws, bias, 4.0), Targets(labels, temperature=0.7)
    options = Options(449, 90, True, True, True)
    got = cpu.logprob_rows(head, targets, options)
    assert max(error(got[0], logp), error(got[1], lse)) <= min(BOUND[dtype], 1e-6)
    dx = cpu.logprob_grad(weight, got[1], head, targets, options)
    assert [x.dtype for x in dx] == [weight.dtype, case.ws.dtype, weight.dtype]
    for x, want in zip(dx, grads, strict=True):
        assert error(x, want) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=lambda d: str(d)[6:])
def test_kernel_relation(dtype: torch.dtype) -> None:
    # images of 0, 1, 57 (a row over a tile) and 300 rows (two blocks of tokens)
    ends = torch.tensor([0, 57, 57, 58, 358], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    hs, ht = (torch.randn(358, d, generator=generator).to(dtype) for d in (70, 300))
    grams = [torch.randn(d, d, generator=generator).to(dtype) for d in (70, 300)]
    ks, kt = hs @ (grams[0] @ grams[0].T), ht @ (grams[1] @ grams[1].T)
    coef = torch.randn(4, 2, dtype=torch.float64, generator=generator)
    sums, product = (
        cpu.relation_stats(hs, ks, ht, kt, ends),
        cpu.relation_grad(hs, ks, ht, kt, ends, coef),
    )
    assert sums.shape == (4, 3) and product.dtype == dtype
    for i in range(4):
        rows = slice(int(ends[i]), int(ends[i + 1]))
        r_s, r_t = (k[rows].double() @ h[rows].double().T for k, h in ((ks, hs), (kt, ht)))
        want = torch.stack([(r_s * r_s).sum(), (r_t * r_t).sum(), (r_s * r_t).sum()])
        assert error(sums[i], want) <= BOUND[dtype]
        assert (
            error(product[rows], (coef[i, 0] * r_t + coef[i, 1] * r_s) @ hs[rows].double())
            <= BOUND[dtype]
        )


def _names(word: str) -> list[str]:
    """Instruction sets of MLLMKD_CPU_ISA that this processor has, and this process does not run."""
    found = cpu.cpu_features()
    has = {
        "default": True,
        "avx2": found["avx2"],
        "avx512": found["avx512f"],
        "amx": found["avx512_bf16"],
    }
    return [name for name, there in has.items() if there and name != word]


def test_other_instruction_sets() -> None:
    """The tests above, in a process each: the choice is made once per process."""
    ran = []
    for name in _names(os.environ.get("MLLMKD_CPU_ISA", "")):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "test_kernel",
        ]
        result = subprocess.run(
            command,
            env={**os.environ, "MLLMKD_CPU_ISA": name},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{name}:\n{result.stdout[-3000:]}\n{result.stderr[-1000:]}"
        assert re.search(r"[1-9]\d* passed", result.stdout) and "skipped" not in result.stdout, name
        ran.append(name)
    assert ran, "at least the portable kernels run everywhere"


def test_unknown_instruction_set_is_an_error() -> None:
    script = "import torch; from mllmkd_kernels.backends import cpu; cpu.cpu_features()"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MLLMKD_CPU_ISA": "mmx", "PYTHONPATH": os.getcwd()},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (
        "ValueError: MLLMKD_CPU_ISA: got mmx, expected default, avx2, avx512 or amx"
        in result.stderr
    )


# --- determinism, operators, errors ---------------------------------------------------------------


def test_values_do_not_depend_on_threads_or_chunks(threads: None) -> None:
    case = make(300, 1500)
    many = case.run("jsd")
    torch.set_num_threads(1)
    one = replace(case, chunk=64).run("jsd")
    assert torch.equal(many[1], one[1]) and torch.equal(many[2], one[2])


def test_the_memory_kept_from_a_call_is_freed_where_the_public_function_says_so() -> None:
    """Each model's logits are 40 MiB: glibc maps whatever is above 32 MiB by itself, whatever was
    freed before in this process, so that it goes back to the system when it is freed."""
    case = replace(make(160, 65536, 16, 16, torch.float32), chunk=160)
    mk.release_workspace()
    case.run("forward_kl", (True, False, False))
    kept = resident()
    mk.release_workspace()
    assert resident() < kept - (64 << 20)
    case.run("forward_kl", (True, False, False))  # and the next call has its own


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_a_gradient_keeps_its_memory_while_it_lives_and_hands_it_on_when_it_dies() -> None:
    """Of 4 MiB and more: clearing fresh pages for it was a tenth of a bf16 step, and uneven."""
    case = make(8, 9000, 128, 8, torch.float32)
    cpu.release_workspace()
    assert case.kd_weight is not None
    first = case.run("forward_kl")[4]
    assert first.nbytes >= 4 << 20
    place, bits = first.data_ptr(), first.clone()
    view = first[10:20]
    second = replace(case, kd_weight=2 * case.kd_weight).run("forward_kl")[4]
    assert second.data_ptr() != place and torch.equal(first, bits)
    del first
    third = case.run("forward_kl")[4]
    assert third.data_ptr() != place and torch.equal(view, bits[10:20]), "the view still owns it"
    del view
    fourth = case.run("forward_kl")[4]
    assert fourth.data_ptr() == place and torch.equal(fourth, bits)


def test_opcheck() -> None:
    case = make(20, 50, 8, 8)
    distill = (
        case.hs, case.ws, case.bs, case.ht, case.wt, case.bt, case.labels, case.ce_weight,
        case.kd_weight, "jsd", 0.5, 1.0, 0.0, 0.0, 50, -100, True, True, False, 16,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mllmkd_cpu.distill_rows.default, distill)
    asked = (*distill, torch.zeros(3, 20), False, True)
    torch.library.opcheck(torch.ops.mllmkd_cpu.distill_rows.default, asked)
    dz = torch.ops.mllmkd_cpu.distill_rows(*asked)[4]
    late = (dz, case.hs, torch.tensor(0.5), 59, 50, torch.float32)
    torch.library.opcheck(torch.ops.mllmkd_cpu.head_gradient.default, late)
    rows = (case.hs, case.ws, None, case.labels, 1.0, 0.0, 50, -100, 16)
    torch.library.opcheck(torch.ops.mllmkd_cpu.logprob_rows.default, rows)
    lse = torch.ops.mllmkd_cpu.logprob_rows(*rows)[1]
    grad = (
        case.kd_weight,
        case.hs,
        case.ws,
        None,
        case.labels,
        lse,
        1.0,
        0.0,
        50,
        -100,
        True,
        True,
        True,
        16,
    )
    torch.library.opcheck(torch.ops.mllmkd_cpu.logprob_grad.default, grad)
    ends = torch.tensor([0, 9, 20], dtype=torch.int32)
    relation = (case.hs, case.hs, case.ht, case.ht, ends)
    torch.library.opcheck(torch.ops.mllmkd_cpu.relation_stats.default, relation)
    torch.library.opcheck(
        torch.ops.mllmkd_cpu.relation_grad.default,
        (*relation, torch.ones(2, 2, dtype=torch.float64)),
    )


@pytest.mark.parametrize("label", [50, -1])
def test_a_label_out_of_range_is_an_error(label: int) -> None:
    case = make(20, 50, 8, 8)
    assert case.labels is not None
    case.labels[7] = label
    with pytest.raises(
        IndexError, match=rf"labels: row 7 has label {label}, expected a value in \[0, 50\)"
    ):
        case.run("forward_kl")


def test_wrong_arguments_are_named() -> None:
    case = make(20, 50, 8, 8)
    with pytest.raises(ValueError, match="student: hidden states have 8 features, the weight 7"):
        replace(case, ws=case.ws[:, :7]).run("forward_kl")
    with pytest.raises(ValueError, match="student: vocabulary 60 of a weight with 59 rows"):
        replace(case, vocab=60).run("forward_kl")
    with pytest.raises(ValueError, match="rows: student has 20, teacher 19"):
        replace(case, ht=case.ht[:19] if case.ht is not None else None).run("forward_kl")
    with pytest.raises(TypeError, match="ce_weight: got dtype Double"):
        replace(case, ce_weight=torch.ones(20, dtype=torch.float64)).run("forward_kl")
    with pytest.raises(ValueError, match="chunk_rows: got 0"):
        replace(case, chunk=0).run("forward_kl")
    ends = torch.tensor([0, 9, 8, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens"):
        cpu.relation_stats(case.hs, case.hs, case.hs, case.hs, ends)


def test_the_build_describes_itself() -> None:
    assert {"compiler", "flags", "torch"} <= cpu.build_info().keys()
    assert torch.__version__.startswith(cpu.build_info()["torch"])
    found = cpu.cpu_features()
    assert {
        "avx2",
        "avx512f",
        "avx512_bf16",
        "amx_bf16",
        "kernels",
        "gemm_fp32",
        "gemm_bf16",
        "threads",
    } == found.keys()
