"""How do all terms over rows become one call?

A row term gives the rows of a row set a weight, for cross-entropy or for a divergence from the
teacher. Whatever rows they are over, all that agree on divergence and temperature are one call of
`fused_linear_distill`, in which each row set is a segment; cross-entropy rides along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllmkd_kernels import checks
from mllmkd_kernels.distill import DistillOutput
from mllmkd_kernels.divergence import Divergence
from mllmkd_kernels.heads import take_rows
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.rows import kind_of
from mllmkd_kernels.view import View

Key = tuple[Divergence | None, float, bool]  # and temperature, and whether z-scored


@dataclass(frozen=True)
class RowTerm:
    """Cross-entropy, or a divergence from the teacher, of the rows of a row set.

    Attributes:
        name, weight: as of a `Term`.
        rows: name of the row set, see `rows.py`.
        divergence: a name or a `Divergence`; None for cross-entropy.
        temperature: T of both softmaxes in a divergence.
        over: what the mean is over, by default the rows.
        standardize: a divergence of z-scored logits, as in `fused_linear_distill`.

    Raises:
        ValueError, TypeError: no such row set or divergence, no such temperature.
    """

    name: str
    weight: float
    rows: str
    divergence: str | Divergence | None = None
    temperature: float = 1.0
    over: str = ""
    standardize: bool = False

    def __post_init__(self) -> None:
        kind_of(self.rows)
        object.__setattr__(self, "over", self.over or self.rows)
        if self.divergence is not None:
            object.__setattr__(self, "divergence", Divergence.of(self.divergence))
            checks.temperature(self.temperature)

    @property
    def key(self) -> Key:
        """Terms that are one call if this is equal; all of it is the divergence's alone."""
        if self.divergence is None:
            return None, 1.0, False
        return Divergence.of(self.divergence), self.temperature, self.standardize

    @property
    def needs(self) -> Needs:
        """The teacher's rows, for a divergence."""
        kind = {"kind"} if kind_of(self.rows)[1] else ()
        return Needs(rows=frozenset({self.rows} if self.divergence else ()), views=frozenset(kind))


@dataclass(frozen=True)
class Sweep:
    """One call of `fused_linear_distill`: row sets, each with the terms that its rows feed."""

    divergence: Divergence | None
    temperature: float
    standardize: bool
    segments: Mapping[str, Sequence[RowTerm]]

    def has(self, term: RowTerm) -> bool:
        """Whether a term is computed here."""
        return any(term in terms for terms in self.segments.values())

    def __call__(self, view: View, watched: RowTerm | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of its terms, and their means; of `watched` also the diagnostics."""
        seen = watched is not None and self.has(watched)
        out = self._distill(view, diagnostics=seen)
        means: dict[str, Tensor] = {}
        start = 0
        for name, terms in self.segments.items():
            part = slice(start, start + len(view.rows(name).labels))
            start = part.stop
            for term in terms:
                rows, total = out.kd if term.divergence else out.ce, view.count(term.over)
                means[term.name] = rows[part].sum() / total
                if term == watched:
                    means |= {key: x[part].sum() / total for key, x in out.diagnostics.items()}
        return out.loss, means

    def _distill(self, view: View, diagnostics: bool) -> DistillOutput:
        s, t, settings = view.student, view.teacher, view.settings
        student, teacher, labels, ce, kd = self._columns(view)
        has_ce = any(t.divergence is None for terms in self.segments.values() for t in terms)
        hidden_t = weight_t = bias_t = softcap_t = None
        if self.divergence is not None and t is not None:
            hidden_t = take_rows(t.hidden, teacher)
            weight_t, bias_t, softcap_t = t.weight, t.bias, t.softcap
        asked = {"standardize": self.standardize, "overlap": settings.overlap}
        more = {name: True for name, wanted in asked.items() if wanted}
        return settings.functions.distill(
            take_rows(s.hidden, student), s.weight, hidden_t, weight_t, labels,
            ce_weight=ce if has_ce else 0.0, kd_weight=kd,
            divergence=self.divergence or Divergence(), temperature=self.temperature,
            ignore_index=settings.ignore_index, student_bias=s.bias, teacher_bias=bias_t,
            student_softcap=s.softcap, teacher_softcap=softcap_t, vocab_size=settings.vocab_size,
            backend=settings.backend, workspace_mb=settings.workspace_mb, diagnostics=diagnostics,
            **more,
        )  # fmt: skip

    def _columns(self, view: View) -> list[Tensor]:
        """Of all rows, segment after segment: their indices in both models, next tokens, and the
        weights of cross-entropy and divergence, (N,) each.
        """
        device = view.student.hidden.device
        none = torch.empty(0, dtype=torch.int64, device=device)
        columns = [(none, none, none, none.float(), none.float())]
        for name, terms in self.segments.items():
            rows = view.rows(name)
            zero = torch.zeros(len(rows.labels), dtype=torch.float32, device=device)
            ce, kd = zero, zero
            labels = torch.full_like(rows.labels, view.settings.ignore_index)
            for term in terms:
                weight = term.weight / view.count(term.over)
                if term.divergence is None:
                    ce, labels = ce + weight, rows.labels
                else:
                    kd = kd + weight
            columns.append((rows.student, rows.teacher, labels, ce, kd))
        return [torch.cat(parts) for parts in zip(*columns, strict=True)]


def sweeps(terms: Sequence[RowTerm]) -> list[Sweep]:
    """The fewest that compute all terms, at least one, each with its row sets in the order of the
    terms. Cross-entropy, which has no temperature, joins one that has its rows anyway, else any.
    """
    compared = [term for term in terms if term.divergence]
    found: dict[Key, dict[str, list[RowTerm]]] = {}
    found |= {term.key: {} for term in compared} or {(None, 1.0, False): {}}
    home = {term.rows: term.key for term in reversed(compared)}
    for term in terms:
        key = term.key if term.divergence else home.get(term.rows, next(iter(found)))
        found[key].setdefault(term.rows, []).append(term)
    return [Sweep(*key, segments) for key, segments in found.items()]
