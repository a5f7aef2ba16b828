"""What is minimised? A weighted sum of terms. A term says what it reads, and what its mean is over.

    batch, student, teacher ─► View ─┬─► row terms: one sweep per divergence ─────┬─► Losses
                                     └─► other terms, each a function of the view ┘

A loss has this form, whatever the method. Which terms there are, under which names and weights,
only a method's file says (`methods/`).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from mllmkd_kernels import checks
from mllmkd_kernels.heads import HeadInputs
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.rows import UNITS, Batch, Counts, RowCounts, kind_of
from mllmkd_kernels.sweep import RowTerm, sweeps
from mllmkd_kernels.view import Settings, View

DIAGNOSTICS = ("student_entropy", "teacher_entropy", "agreement")


#: What a term says of itself.
SAYS = ("name", "weight", "over", "needs")


class Term(Protocol):
    """A summand of the loss that is no row term; it may be an `nn.Module` with parameters.

    One that reports on parts of the student, with diagnostics, also has `report_on(student)`, which
    gives names, and `report(view)`, by these names this micro-batch's shares of means.
    """

    @property
    def name(self) -> str:
        """Of its mean, in logs and reports."""
        ...

    @property
    def weight(self) -> float:
        """What the mean is multiplied by; with 0 the term is left out and needs nothing."""
        ...

    @property
    def over(self) -> str:
        """The row set, or the unit of `rows.UNITS`, that the mean is over."""
        ...

    @property
    def needs(self) -> Needs:
        """What it reads."""
        ...

    def __call__(self, view: View) -> Tensor:
        """This micro-batch's share of the step's mean: see `View.count` and `View.share`."""
        ...


class Losses(NamedTuple):
    """What an objective gives.

    Attributes:
        loss: scalar, differentiable.
        terms: by name the mean of each term before its weight, detached; with the counts of a whole
            optimiser step this micro-batch's share of it, so that shares add up to the step's mean.
            With diagnostics their means as well.
    """

    loss: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module):
    """A weighted sum of terms.

    Args:
        *terms: `RowTerm`s and `Term`s, of different names. Those of weight 0 are left out. Terms
            that are modules are trained and stored with the objective.
        **settings: of `Settings`: how it is computed.

    Attributes:
        terms: by name.
        needs: of all terms together.
        over: by name of a mean in `Losses.terms` the row set or unit that it is over.

    Raises:
        ValueError: a weight below 0; two terms of one name; a mean over what cannot be counted.
        TypeError: a weight that is no number; no such setting.
    """

    def __init__(self, *terms: RowTerm | Term, **settings: Any) -> None:
        super().__init__()
        for term in terms:
            if lacking := [key for key in SAYS if not hasattr(term, key)]:
                raise TypeError(f"terms: {type(term).__name__} lacks {', '.join(lacking)}")
            checks.weight(term.name, term.weight)
            if term.over not in UNITS:
                kind_of(term.over)
        self.settings = Settings(**settings)
        kept = [term for term in terms if term.weight]
        self.terms: dict[str, RowTerm | Term] = {term.name: term for term in kept}
        if len(self.terms) < len(kept):
            raise ValueError(f"terms: got {[term.name for term in kept]}, expected unlike names")
        self.needs = functools.reduce(operator.or_, (term.needs for term in kept), Needs())
        modules = {term.name: term for term in kept if isinstance(term, nn.Module)}
        self.learned = nn.ModuleDict(modules)
        rows = [term for term in kept if isinstance(term, RowTerm)]
        self._sweeps = sweeps(rows)
        answers = [term for term in rows if term.rows.startswith("response")]
        self._watched = answers[-1] if self.settings.diagnostics and answers else None
        self._reports: dict[str, list[str]] = {}
        self.over = {name: term.over for name, term in self.terms.items()}
        if watched := self._watched:
            compared = any(sweep.has(watched) and sweep.divergence for sweep in self._sweeps)
            seen = DIAGNOSTICS if compared else DIAGNOSTICS[:1]
            self.over |= dict.fromkeys(seen, watched.over)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the means that every call gives, whatever is in the batch."""
        return tuple(self.over)

    def build(self, student: int, teacher: int) -> None:
        """Make the parameters of terms that have to know both models' hidden sizes for that."""
        for term in self.learned.values():
            if build := getattr(term, "build", None):
                build(student, teacher)

    def report_on(self, student: nn.Module) -> None:
        """With diagnostics, terms that report on parts of the student name them; from then on they
        are among the means.
        """
        for name in itertools.chain(*self._reports.values()):
            del self.over[name]
        self._reports = {
            term.name: report_on(student)
            for term in self.terms.values()
            if self.settings.diagnostics and (report_on := getattr(term, "report_on", None))
        }
        for name, reported in self._reports.items():
            self.over |= dict.fromkeys(reported, self.terms[name].over)

    def forward(
        self,
        student: HeadInputs,
        teacher: HeadInputs | None,
        batch: Batch,
        counts: Counts | RowCounts | float | Tensor | None = None,
    ) -> Losses:
        """The loss of one micro-batch; the arguments are `View`'s.

        Raises:
            ValueError: as `View`; no teacher where a term compares with one.
        """
        return self.sum(self.view(student, teacher, batch, counts))

    def view(
        self, student: HeadInputs, teacher: HeadInputs | None, batch: Batch, counts: Any = None
    ) -> View:
        """What the terms see of a micro-batch."""
        self.check_teacher(teacher)
        return View(student, teacher, batch, counts, self.settings, self.needs)

    def check_teacher(self, teacher: object) -> None:
        """`ValueError` where there is none and a term compares with one."""
        if teacher is None and self.needs.teacher:
            names = [name for name, term in self.terms.items() if term.needs.teacher]
            raise ValueError(f"teacher: got None, expected one to compare with, for {names}")

    def sum(self, view: View) -> Losses:
        """All terms of a view. Without any row term its loss is a differentiable 0 all the same."""
        losses, means = [], {}
        for sweep in self._sweeps:
            loss, found = sweep(view, self._watched)
            losses.append(loss)
            means |= found
        for name, term in self.terms.items():
            if not isinstance(term, RowTerm):
                value = term(view)
                if value.ndim:
                    raise ValueError(
                        f"{name}: gave a tensor of shape {tuple(value.shape)}, expected a share of "
                        "a mean, without dimensions: a sum over its rows / view.count(over)"
                    )
                losses.append(term.weight * value)
                means[name] = value.detach()
                if name in self._reports:
                    reporter: Any = term
                    means |= reporter.report(view)
        return Losses(
            functools.reduce(operator.add, losses), {name: means[name] for name in self.over}
        )

    def weighted(self, means: Mapping[str, float]) -> float:
        """The loss that means by name make."""
        return sum(term.weight * means[name] for name, term in self.terms.items())
