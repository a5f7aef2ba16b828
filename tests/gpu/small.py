"""Every kernel once, on problems so small that a sanitizer gets through them.

Run by ``python -m tests.gpu`` under compute-sanitizer, which finds what a right answer hides: reads
and writes outside a tensor. Sizes are primes, so that every masked tail runs.
"""

from __future__ import annotations

import functools
import sys

import torch

import mllmkd_kernels as mk
from mllmkd_kernels import plan
from mllmkd_kernels.backends import cuda
from tests.problems import Problem, problem, run

DIVERGENCES = ("forward_kl", "jsd")  # in one sweep and in two


def added(p: Problem, backend: str) -> None:
    """The head's gradient into an accumulator, in forward."""
    w, sums = p.ws.clone().requires_grad_(), torch.zeros_like(p.ws, dtype=torch.float32)
    mk.fused_linear_distill(
        p.hs, w, p.ht, p.wt, backend=backend, main_grad=sums, loss_gradient=1.0
    ).loss.backward()
    print(f"{backend} main_grad", flush=True)


def main(device: str = "cuda") -> int:
    """Run everything, in the interpreter on one row; an exception or the sanitizer says what is
    wrong.
    """
    decide = plan.distill_plan
    names, dtypes = ("ragged", "aligned"), (torch.float32, torch.bfloat16)
    if device == "cpu":
        names, dtypes = ("one_row",), dtypes[:1]
    for algorithm in ("chunk", "stream"):
        plan.distill_plan = functools.partial(decide, algorithm=algorithm)
        for name in names:
            for dtype in dtypes:
                for divergence in DIVERGENCES:
                    run(problem(name, dtype).on(device), "triton", divergence)
                    print(f"{algorithm} {name} {dtype} {divergence}", flush=True)
        added(problem(names[0]).on(device), "triton")
    plan.distill_plan = decide
    if device == "cuda" and cuda.available():
        for divergence in DIVERGENCES:
            run(problem("ragged").on(device), "cuda", divergence)
            print(f"cuda ragged {divergence}", flush=True)
        added(problem("ragged").on(device), "cuda")
    p = problem(names[0]).on(device)
    h, w = p.hs.clone().requires_grad_(), p.ws.clone().requires_grad_()
    mk.fused_linear_logprob(h, w, p.labels, backend="triton").sum().backward()
    print("log-probabilities", flush=True)
    n = p.hs.shape[0]
    ends = torch.tensor([0, n // 4, n // 4, n], dtype=torch.int32, device=device)
    h.grad = None
    mk.relation_cosine(h, p.ht, ends, backend="triton").backward()
    print("relation", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
