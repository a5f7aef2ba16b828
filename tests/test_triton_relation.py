"""Do the tiles of R on a GPU sum to the relation of whole matrices, whatever the images' sizes?"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mllmkd_kernels as mk
from mllmkd_kernels import gram, reference
from mllmkd_kernels.backends import products
from tests.tolerances import TOLERANCES, check, relative_error

pytest.importorskip("triton")

from mllmkd_kernels.backends.triton import relation

#: Blocks this small make every loop run several times. 16 is the least that tl.dot takes on a GPU.
SMALL = {"block": 16, "block_k": 16, "splits": 2, "num_warps": 1, "num_stages": 1}
SMALL_GRAD = {**SMALL, "block_d": 32}

#: Images of a tile of 16 rows: none, one row, a row less, exactly, a row more, several and a tail.
RAGGED = [0, 1, 15, 16, 0, 17, 53, 0]
IMAGES = {
    "ragged": RAGGED,
    "one image": [41],
    "one row": [1],
    "many images": [3] * 20,  # more tiles than the rows would fill
    "no rows": [0, 0],
}


class Pair(NamedTuple):
    """Operands of the two functions, on the CPU; R = K Hᵀ is symmetric to rounding."""

    hs: Tensor  # (N, D_s)
    ks: Tensor  # (N, D_s)
    ht: Tensor  # (N, D_t)
    kt: Tensor  # (N, D_t)
    cu: Tensor  # (images + 1,)


def cu_of(lens: list[int]) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(torch.int32)


def pair(lens: list[int], d_s: int = 21, d_t: int = 35) -> Pair:
    """D not a multiple of anything; K = H (WᵀW) of heads of 50 tokens."""
    hs, ht = (torch.randn(sum(lens), d) for d in (d_s, d_t))
    grams = [w.mT @ w for w in (torch.randn(50, d) / d**0.5 for d in (d_s, d_t))]
    return Pair(hs, hs @ grams[0], ht, ht @ grams[1], cu_of(lens))


def stats(p: Pair, device: torch.device, launch: dict[str, int] | None = SMALL) -> Tensor:
    hs, ks, ht, kt, cu = (x.to(device) for x in p)
    return relation.relation_stats(hs, ks, ht, kt, cu, launch).cpu()


def grad(
    p: Pair, coef: Tensor, device: torch.device, launch: dict[str, int] | None = SMALL_GRAD
) -> Tensor:
    hs, ks, ht, kt, cu = (x.to(device) for x in p)
    return relation.relation_grad(hs, ks, ht, kt, cu, coef.to(device), launch).cpu()


def whole(p: Pair, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """R_s and R_t of every image."""
    hs, ks, ht, kt = (x.to(dtype) for x in p[:4])
    rows = (slice(a, b) for a, b in pairwise(p.cu.tolist()))
    return [(ks[r] @ hs[r].mT, kt[r] @ ht[r].mT) for r in rows]


def stats_of(p: Pair, dtype: torch.dtype = torch.float64) -> Tensor:
    products = [[(s * s).sum(), (t * t).sum(), (s * t).sum()] for s, t in whole(p, dtype)]
    return torch.tensor(products, dtype=torch.float64)


def grad_of(p: Pair, coef: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = [slice(a, b) for a, b in pairwise(p.cu.tolist())]
    c = coef.to(dtype)
    parts = [
        (c[i, 0] * t + c[i, 1] * s) @ p.hs[rows[i]].to(dtype)
        for i, (s, t) in enumerate(whole(p, dtype))
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("lens", IMAGES.values(), ids=list(IMAGES))
def test_the_sums_of_every_image(lens: list[int], splits: int, device: torch.device) -> None:
    p = pair(lens)
    got = stats(p, device, {**SMALL, "splits": splits})
    assert got.dtype == torch.float64 and got.shape == (len(lens), 3)
    for image, want in enumerate(stats_of(p)):
        naive = stats_of(p, torch.float32)[image]
        check(got[image], want, "relation", naive, what=f"image {image}")
        assert lens[image] or not got[image].any()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("lens", IMAGES.values(), ids=list(IMAGES))
def test_the_product_of_every_image(lens: list[int], splits: int, device: torch.device) -> None:
    p, coef = pair(lens), torch.randn(len(lens), 2, dtype=torch.float64)
    got = grad(p, coef, device, {**SMALL_GRAD, "splits": splits})
    assert got.dtype == torch.float32 and got.is_contiguous()
    check(got, grad_of(p, coef), "relation", grad_of(p, coef, torch.float32))


def test_the_launch_parameters_of_the_tables(device: torch.device) -> None:
    p, coef = pair([70, 3]), torch.ones(2, 2, dtype=torch.float64)
    check(stats(p, device, None), stats_of(p), "relation")
    got = grad(p, coef, device, None)
    check(got, grad_of(p, coef), "relation", grad_of(p, coef, torch.float32))


def test_no_images(device: torch.device) -> None:
    p = pair([])
    assert stats(p, device).shape == (0, 3)
    coef = torch.zeros(0, 2, dtype=torch.float64)
    assert grad(p, coef, device).shape == (0, 21)


def test_sizes_that_are_multiples_of_every_block(device: torch.device) -> None:
    p, coef = pair([32, 16], 32, 64), torch.ones(2, 2, dtype=torch.float64)
    check(stats(p, device), stats_of(p), "relation")
    got = grad(p, coef, device)
    check(got, grad_of(p, coef), "relation", grad_of(p, coef, torch.float32))


def test_same_bits_every_time(device: torch.device) -> None:
    p, coef = pair(RAGGED), torch.randn(8, 2, dtype=torch.float64)
    sums, m = stats(p, device), grad(p, coef, device)
    for _ in range(2):
        assert torch.equal(sums, stats(p, device))
        assert torch.equal(m, grad(p, coef, device))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_stays_in_its_image(value: float, device: torch.device) -> None:
    """The images on either side, whose tiles end where the bad rows begin, know nothing of it."""
    p = pair([5, 20, 5])
    p.hs[7, 3] = p.ks[7, 3] = value
    sums = stats(p, device)
    assert not (1 - sums[1, 2] / (sums[1, 0] * sums[1, 1]).sqrt()).isfinite()
    check(sums[[0, 2]], stats_of(p)[[0, 2]], "relation")
    coef = torch.ones(3, 2, dtype=torch.float64)
    m = grad(p, coef, device)
    outside = [*range(5), *range(25, 30)]
    check(m[outside], grad_of(p, coef)[outside], "relation")
    assert not m[7].isfinite().any()


def test_images_of_very_different_sizes_of_numbers(device: torch.device) -> None:
    """A sum over a prefix, minus a prefix, would lose the small image beside the large one."""
    p = pair([20, 20])
    for x in (p.hs, p.ks, p.ht, p.kt):
        x[:20] *= 1e4
        x[20:] *= 1e-4
    got = stats(p, device)
    for image, want in enumerate(stats_of(p)):
        check(got[image], want, "relation", what=f"image {image}")


@pytest.mark.parametrize("eps", [0.3, 0.03])
def test_a_nearly_aligned_pair(eps: float, device: torch.device) -> None:
    """1 − cos of 2e-3 and less, of entries of R that are 1e6: loss and gradient of the logits."""
    v, lens = 400, [40, 24]
    hs, ws = torch.randn(64, 24), 50 * torch.randn(v, 24) / 24**0.5
    ht = torch.cat((hs, eps * torch.randn(64, 8)), 1)
    wt = torch.cat((ws, 50 * torch.randn(v, 8) / 8**0.5), 1)
    gs, gt = (mk.head_gram(w).to(device) for w in (ws, wt))

    def by_definition(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = hs.to(dtype).requires_grad_()
        z_s = reference.logits(leaf, ws.to(dtype), None, None, v)
        z_t = reference.logits(ht.to(dtype), wt.to(dtype), None, None, v)
        loss = reference.relation_cosine(z_s, z_t, cu_of(lens))
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    (want, want_dh), (plain, plain_dh) = by_definition(torch.float64), by_definition(torch.float32)
    assert want < 0.02
    loss, dh, dg = gram.relation(
        relation, hs.to(device), gs, ht.to(device), gt, cu_of(lens).to(device), True, False, False
    )
    check(loss.cpu(), want, "relation", plain, what="loss")
    check(dh.cpu(), want_dh, "relation", plain_dh, what="dh")
    assert dg.numel() == 0


def test_a_wrong_prefix_sum_is_refused(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a failed assertion on the device ends the process's use of it")
    p = pair([4, 4])
    for wrong in ([0, 4, 9], [1, 4, 8], [0, 9, 8]):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            stats(p._replace(cu=torch.tensor(wrong, dtype=torch.int32)), device)


def test_nothing_as_wide_as_an_image_is_made(device: torch.device) -> None:
    """The tile table and partial sums grow with N / block, not with N or P²."""
    tiles = relation._row_tiles(cu_of(RAGGED), sum(RAGGED), 16, device)
    assert tiles.count == 102 // 16 + 8
    assert tiles.starts.tolist() == [0, 0, 1, 2, 3, 3, 5, 9, 9]
    assert tiles.image.tolist() == [1, 2, 3, 5, 5, 6, 6, 6, 6] + [8] * 5


# --- through the public functions ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_relation_of_features(dtype: torch.dtype, device: torch.device) -> None:
    y_s, y_t = torch.randn(34, 21).to(dtype), torch.randn(34, 35).to(dtype)
    cu = cu_of([17, 0, 1, 16])
    leaf = y_s.to(device).detach().requires_grad_()
    loss = mk.relation_cosine(leaf, y_t.to(device), cu.to(device), backend="triton")
    loss.backward()
    exact = y_s.double().detach().requires_grad_()
    want = reference.relation_cosine(exact, y_t.double(), cu_of([17, 1, 16])) * 3 / 4
    want.backward()
    assert leaf.grad is not None and exact.grad is not None
    check(loss.cpu(), want, "relation")
    row = "relation" if dtype == torch.float32 else "16-bit gradient"
    check(leaf.grad.cpu(), exact.grad, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_relation_of_logits(with_bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    shapes = {"hs": (33, 12), "ws": (60, 12), "bs": (60,),
              "ht": (33, 20), "wt": (70, 20), "bt": (70,)}  # fmt: skip
    x = {k: torch.randn(s).to(dtype) for k, s in shapes.items()}
    lens = [17, 16]

    def run(exact: torch.dtype | None) -> tuple[Tensor, dict[str, Tensor]]:
        """By the package, or by the definition in the given dtype."""
        t = {k: v.detach().to(exact or device) for k, v in x.items()}
        trained = {k: v.requires_grad_() for k, v in t.items() if k[1] == "s"}
        bias = (t["bs"], t["bt"]) if with_bias else (None, None)
        if exact is None:
            loss = mk.fused_linear_relation(
                t["hs"], t["ws"], t["ht"], t["wt"], cu_of(lens).to(device),
                student_bias=bias[0], teacher_bias=bias[1], backend="triton",
            )  # fmt: skip
        else:
            z_s = reference.logits(t["hs"], t["ws"], bias[0], None, 60)
            z_t = reference.logits(t["ht"], t["wt"], bias[1], None, 60)
            loss = reference.relation_cosine(z_s, z_t, cu_of(lens))
        loss.backward()
        return loss.detach().cpu(), {
            k: v.grad.cpu() for k, v in trained.items() if v.grad is not None
        }

    (loss, grads), (want, wants), (plain, plains) = map(run, (None, torch.float64, torch.float32))
    check(loss, want, "relation", plain)
    assert grads.keys() == wants.keys()
    row = "relation" if dtype == torch.float32 else "16-bit gradient"
    for k in grads:
        check(grads[k], wants[k], row, plains[k], what=k)


# --- products of bf16 parts ----------------------------------------------------------------------


def test_three_parts_are_the_number() -> None:
    """Every fp32 number between the smallest normal ones of the last part and the largest bf16."""
    x = torch.randn(10_000) * torch.logspace(-25, 25, 10_000)
    parts = products._bf16_parts(x)
    assert [p.dtype for p in parts] == [torch.bfloat16] * 3
    assert torch.equal(torch.stack(parts).double().sum(0), x.double())
    assert products._bf16_parts(parts[0])[0] is parts[0]


@pytest.mark.parametrize("left", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("right", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_product_of_parts_is_as_exact_as_one_in_fp32(
    left: torch.dtype, right: torch.dtype
) -> None:
    a, b = torch.randn(37, 300).to(left), torch.randn(300, 41).to(right)
    want = a.double() @ b.double()
    got = products.product_split(a, b)
    assert got.dtype == torch.float32
    # two roundings more than a single product has, one for each order of parts
    naive = relative_error(a.float() @ b.float(), want)
    assert relative_error(got, want) <= 2 * naive + TOLERANCES["fp32 weights"].floor
    assert torch.equal(products.product_split(a.mT.contiguous().mT, b), got)


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32], ids=str)
def test_a_gram_and_its_gradient_on_tensor_cores_are_those_in_fp32(
    bias: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of 16-bit heads on a GPU, its products made by a processor."""
    split, product_split = [], products.product_split
    monkeypatch.setattr(gram, "on_tensor_cores", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(
        products, "product_split", lambda a, b: split.append(a.dtype) or product_split(a, b)
    )
    w, vocab = (torch.randn(5000, 33) / 6).bfloat16(), 4900
    b = None if bias is None else torch.randn(5000).to(bias)
    wide = w.double() if b is None else torch.cat((w.double(), b.double()[:, None]), 1)
    used, fp32 = wide[:vocab], wide[:vocab].float()
    g = gram.gram(w, b, vocab)
    check(g, used.mT @ used, "fp32 weights", fp32.mT @ fp32)
    dg = torch.randn_like(g)
    dw, db = gram.gram_backward(dg, w, b, vocab)
    want = used @ (dg + dg.mT).double()
    check(dw[:vocab], want[:, :33], "16-bit gradient")
    assert not dw[vocab:].any() and not db[vocab:].any()
    if b is not None:
        check(db[:vocab], want[:, 33], "16-bit gradient")
    # a bias that is no bf16 number is a column of an fp32 matrix
    assert set(split) == (set() if bias == torch.float32 else {torch.bfloat16})
