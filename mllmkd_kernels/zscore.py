"""What is different where a divergence sees z-scored logits? (LLAVADI's `norm_logits`)

    a = (z − μ)/(T(σ + ε)),   σ = the population standard deviation of the row

σ is a function of the same logits, so with G = ∂D/∂a a part of the gradient goes back through it:

    ∂D/∂z = (G − κ·a·Σ_k G_k a_k)/(T(σ + ε)),   κ = T²(σ + ε)/(σV), 0 where σ is 0

for Σ_k G_k = 0. The row kernels know the formula too: they gather μ and σ with the maxima of the
logits they have at hand, so that nothing is multiplied twice. (Through h/σ and the Gram matrix of
the head, which also gives σ, the same costs V·D² products, and hidden states in fp32.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Beside σ, as LLAVADI's released code has it; C++ and Triton have the same.
EPS = 1e-7


@dataclass(frozen=True)
class Score:
    """Z-scored logits, and what leads back."""

    a: Tensor  # (C, V)
    scale: Tensor  # (C, 1): 1/(T(σ + ε))
    through: Tensor  # (C, 1): κ

    @classmethod
    def of(cls, z: Tensor, temperature: float) -> Score:
        """Of logits (C, V), which stay as they are."""
        a = z - z.mean(-1, keepdim=True)
        std = a.square().mean(-1, keepdim=True).sqrt()
        spread = std + EPS
        through = (temperature**2 / z.shape[1]) * spread / std
        scale = 1 / (temperature * spread)
        return cls(a.mul_(scale), scale, through.masked_fill_(std == 0, 0))

    def gradient(self, slope: Tensor) -> Tensor:
        """∂D/∂z of ∂D/∂a (C, V), but for the factor `scale`."""
        along = (slope * self.a).sum(-1, keepdim=True)
        return torch.addcmul(slope, self.a, self.through * along, value=-1)
