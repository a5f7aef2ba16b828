"""Which terms are there besides rows? One file each, citing where it comes from."""

from mllmkd_kernels.terms.affinity import Affinity
from mllmkd_kernels.terms.features import Features
from mllmkd_kernels.terms.logits import LogitMse
from mllmkd_kernels.terms.relation import Relation
from mllmkd_kernels.terms.smoothing import Smoothing

__all__ = ["Affinity", "Features", "LogitMse", "Relation", "Smoothing"]
