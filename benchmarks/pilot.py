"""Does the suite end in its time? What a step will cost, and how often each method may take it.

Without bf16 arithmetic, on a processor with AVX2 alone, PyTorch's bf16 product is 40 times slower
than its fp32 one, and the suite would take hours. So a short timing of every method on small
tensors (`Pilot`) predicts what a step costs at full size, and where all that was asked for does not
fit, a level is found (`level`): no method gets more seconds in a case than that. One whose step
alone is beyond it is a row that says so. Where everything fits, nothing is changed. The level is
found anew before each case, from the time that is left.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import median
from typing import Any

import torch

from benchmarks.methods import COMPILED, EAGER, Method
from benchmarks.problem import Problem, make
from benchmarks.session import Allowance, Session, few
from benchmarks.shapes import Case, Ladder, StepCase
from benchmarks.speed import once

#: The pilot's rows and vocabularies (the last for a GPU alone, whose launches hide the others),
#: until a step takes so many seconds; and its share of the time, beyond which a method's
#: median rate so far, or PyTorch's, is taken for what it has not timed.
SIZES = ((8, 2048), (64, 2048), (512, 2048), (4096, 32768))
ENOUGH, SHARE = 0.1, 0.1
#: Share of the time that is planned: inputs, fp64 and child processes need some too.
PLANNED = 0.8
#: Seconds that any case may take, where there is time; those not worth leaving a method out for.
MOMENT, TRIFLE = 5.0, 1.0
#: Seconds kept for a whole training step's case, all methods and batches.
STEP_CASE = 45.0


@dataclass(frozen=True)
class Item:
    """What one method may do in one case: `fixed` seconds, and `unit` seconds for each of at most
    `most` turns.
    """

    fixed: float
    unit: float
    most: int

    def turns(self, level: float) -> int:
        """How many fit into `level` seconds."""
        if self.seconds(self.most) <= level:
            return self.most
        return max(0, int((level - self.fixed) / self.unit + 1e-6))

    def seconds(self, turns: int) -> float:
        """Of that many turns; nothing is free but nothing."""
        return self.fixed + turns * self.unit if turns else 0.0


def level(items: Iterable[Item], left: float) -> float:
    """The most seconds for any item with which all fit into `left`; infinite if all are whole."""
    items = list(items)

    def total(most: float) -> float:
        return sum(item.seconds(item.turns(most)) for item in items)

    if total(math.inf) <= left:
        return math.inf
    levels = sorted({i.seconds(turn) for i in items for turn in range(1, i.most + 1)})
    fitting = bisect_right(levels, left, key=total)
    return levels[fitting - 1] if fitting else 0.0


@lru_cache(maxsize=len(SIZES))
def _tensors(case: Case, device: str) -> Problem:
    """The same for every method."""
    return make(case, device=device)


def timed(method: Method, problem: Problem) -> float:
    """Seconds of a step, the faster of two after one of warm-up: others may use the machine too."""
    step = method.build(problem)
    spent = []
    for _ in range(3):
        spent.append(once(step, problem.hs.device.type))
        problem.forget_gradients()
    return min(spent[1:])


@dataclass
class Pilot:
    """Allowances of a run, by the predicted cost of all that has not been measured yet.

    Attributes:
        session: whose methods and cases.
        minutes: for everything, the pilot included.
        clock: seconds.
        once: seconds of one step of a method on the tensors of a problem.
    """

    session: Session
    minutes: float
    clock: Callable[[], float] = time.monotonic
    once: Callable[[Method, Problem], float] = timed
    _rates: dict[tuple[str, Case], float] = field(default_factory=dict)
    _waiting: dict[tuple[str, Any], dict[str, Item]] = field(default_factory=dict)

    def start(self, cases: Mapping[str, Iterable[Any]]) -> None:
        """Begin the time, and predict every case of the sections."""
        self._ends = self.clock() + 60 * self.minutes
        self._waiting = {
            (section, case): self._items(section, case)
            for section, all_of_it in cases.items()
            for case in all_of_it
        }
        _tensors.cache_clear()

    def allow(self, section: str, case: Any) -> Allowance:
        """What its methods may do; it does not wait any longer."""
        everything = [item for items in self._waiting.values() for item in items.values()]
        left = PLANNED * (self._ends - self.clock())
        most, mine = level(everything, left), self._waiting.pop((section, case))
        turns = {
            key: item.most if item.seconds(item.most) <= TRIFLE else item.turns(most)
            for key, item in mine.items()
        }
        why = {
            key: f"needs about {mine[key].seconds(1):,.0f} s, more than the {self.minutes:g} "
            "minutes of the run leave for it"
            for key, allowed in turns.items()
            if not allowed
        }
        planned = sum(mine[key].seconds(allowed) for key, allowed in turns.items())
        # Twice what was predicted, where there is time: a prediction is not a measurement, and one
        # of milliseconds says nothing of the moment in which another process had the core.
        return Allowance(turns, why, max(planned, min(max(2 * planned, MOMENT), left)))

    def _items(self, section: str, case: Any) -> dict[str, Item]:
        if isinstance(case, StepCase):
            return {"": Item(0.0, STEP_CASE / 5, 5)}  # its rounds and batches end with its seconds
        if isinstance(case, Ladder):
            rungs, case = len(case.epsilons), case.case
            methods = self.session.everything(case.loss)
            return self._of(methods, case, lambda check, step: Item(0.0, step, rungs))
        methods = self.session.methods(case)
        if section == "memory":
            return self._of(methods, case, lambda check, step: Item(check, step, 1))
        rounds = self.session.rounds  # after one of warm-up
        return self._of(methods, case, lambda check, step: Item(check + step, step, rounds))

    def _of(
        self, methods: Iterable[Method], case: Case, item: Callable[[float, float], Item]
    ) -> dict[str, Item]:
        """An item of the seconds of the check and of a step, for each method that can run."""
        found, threads = {}, torch.get_num_threads()
        slower = threads / (case.threads or threads)
        for method in methods:
            if rate := self._rate(method, case):
                flops = (slower * c.floor_flops for c in (few(case), case))
                found[method.key] = item(*(rate * count for count in flops))
        return found

    def _rate(self, method: Method, case: Case) -> float:
        """Seconds a FLOP of the products; 0 for what cannot run, which is a row without figures.
        Compiling takes more than a pilot may: PyTorch's own rate is taken for it.
        """
        method = EAGER if method.key == COMPILED.key else method
        small = Case(
            "pilot", 0, 1024, 512, 0, 0, case.dtype, case.train_head, case.loss,
            min(case.images, 2),
        )  # fmt: skip
        if (method.key, small) not in self._rates:
            late = self.clock() > self._ends - 60 * self.minutes * (1 - SHARE)
            found = self._guess(method, case.dtype) if late else self._timed(method, small)
            self._rates[method.key, small] = found
        return self._rates[method.key, small]

    def _guess(self, method: Method, dtype: str) -> float:
        if method.why_not(torch.device(self.session.suite.device)):
            return 0.0
        known = [(key, case.dtype, rate) for (key, case), rate in self._rates.items() if rate]
        for key in (method.key, EAGER.key):
            if rates := [rate for of, its, rate in known if (of, its) == (key, dtype)]:
                return median(rates)
        return median([rate for *_, rate in known] or [0.0])

    def _timed(self, method: Method, case: Case) -> float:
        self.session.tell(f"how fast is {method.label}? {case.loss}, {case.dtype}")
        spent, first = 0.0, math.inf
        device = self.session.suite.device
        for rows, vocab in SIZES if device == "cuda" else SIZES[:-1]:
            case = replace(case, rows=rows, vocab_t=vocab, vocab_s=vocab)
            problem = _tensors(case, device)
            if method.why_not(problem.hs.device):
                return 0.0
            try:
                spent = self.once(method, problem)
            except (Exception, SystemExit):  # other people's code: its check says what it is
                return 0.0
            # Eight times the work that takes hardly longer is threads waiting for a core.
            if ENOUGH <= spent >= 4 * first or spent >= 10 * ENOUGH:
                break
            first = min(first, spent)
        return spent / case.floor_flops
