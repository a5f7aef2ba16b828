"""Which terms are there besides rows? One file each, citing where it comes from."""

from mllmkd_kernels.terms.relation import Relation

__all__ = ["Relation"]
