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
        off = z - z.mean(-1, keepdim=True)
        return cls.of_deviations(off, off.square().mean(-1, keepdim=True), z.shape[1], temperature)

    @classmethod
    def of_deviations(
        cls,
        off: Tensor,  # (C, V) or some columns of it: z − μ, overwritten
        variance: Tensor,  # (C, 1): σ²
        vocab: int,
        temperature: float,
    ) -> Score:
        """Of logits of which the mean is already taken."""
        std = variance.sqrt()
        spread = std + EPS
        through = (temperature**2 / vocab) * spread / std
        scale = 1 / (temperature * spread)
        return cls(off.mul_(scale), scale, through.masked_fill_(std == 0, 0))

    def along(self, slope: Tensor) -> Tensor:
        """Σ_k G_k a_k (C,) of G (C, V), whose columns are those of `a`."""
        return (slope * self.a).sum(-1)

    def gradient(self, slope: Tensor, along: Tensor) -> Tensor:
        """∂D/∂z of G = ∂D/∂a (C, V), but for the factor `scale`, given Σ G a over all columns."""
        return torch.addcmul(slope, self.a, self.through * along[:, None], value=-1)
