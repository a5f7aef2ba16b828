"""Which terms are there besides rows? One file each, citing where it comes from."""

from mllmkd_kernels.terms.affinity import Affinity
from mllmkd_kernels.terms.balance import Balance
from mllmkd_kernels.terms.features import Features
from mllmkd_kernels.terms.logits import LogitMse
from mllmkd_kernels.terms.preference import Preference
from mllmkd_kernels.terms.relation import Relation
from mllmkd_kernels.terms.smoothing import Smoothing

__all__ = ["Affinity", "Balance", "Features", "LogitMse", "Preference", "Relation", "Smoothing"]
