"""Does the suite end in its time? What a case will cost, how large it is made, and how many rounds.

Without bf16 arithmetic, on a processor with AVX2 alone, PyTorch's bf16 product is 40 times slower
than its fp32 one, and the suite would take hours. So a short timing of every method, of inputs, of
checks and of a child process (`Pilot`) predicts what each case costs at full size, and where all
that was asked for does not fit, a level is found (`level`): no case gets more seconds than that
times its weight. One that needs more has fewer rounds, then half the rows, half the vocabulary, and
so on, for all of its methods alike: nobody is left out. Where everything fits, nothing is changed.
The level is found anew before each case, from the time that is left and from what those before it
took.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from benchmarks import memory, truth
from benchmarks.methods import COMPILED, EAGER, FLOOR, Method
from benchmarks.problem import Problem, make
from benchmarks.session import Session, few, vet
from benchmarks.shapes import Case, Ladder, StepCase
from benchmarks.speed import once

#: The pilot's rows and vocabularies (the last for a GPU alone, whose launches hide the others),
#: until a step takes so many seconds; and its share of the time, beyond which a method's
#: median rate so far, or PyTorch's, is taken for what it has not timed.
SIZES = ((8, 2048), (64, 2048), (512, 2048), (4096, 32768))
ENOUGH, SHARE = 0.1, 0.1
#: Share of the time that is planned: tables, plots and Python's own start need some too.
PLANNED = 0.95
#: Fewer rounds than that only where the time is over; a case is made smaller instead, so often.
LEAST, HALVINGS = 2, 10
#: A step of so many seconds is not warmed up: what is done once does not show in it.
LONG = 1.0
#: Seconds that `torch.compile` needs for a shape, which are too many for a pilot to try.
COMPILE = 6.0
#: Seconds of a whole training step's case, all methods and batches, where there is time for it.
STEP_CASE = 30.0


@dataclass(frozen=True)
class Option:
    """A way to measure a case: as it is or halved, in so many rounds, without warming up those that
    are `cold`, in so many seconds all told.
    """

    case: Any
    rounds: int
    seconds: float
    cold: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Costs:
    """Seconds for an input's element: to make it, the truth of few rows, a comparison with that;
    and for a child process.
    """

    make: float = 0.0
    truth: float = 0.0
    check: float = 0.0
    child: float = 0.0


def fitting(options: Sequence[Option], most: float) -> Option:
    """The first that takes at most so many seconds more than the last, and least."""
    return next(o for o in options if o.seconds - options[-1].seconds <= most)


def level(waiting: Sequence[tuple[float, Sequence[Option]]], left: float) -> float:
    """The most seconds beyond the least for a case of weight 1, with which all, weights and
    options, fit into `left`; 0 if nothing but the least does.
    """

    def total(most: float) -> float:
        return sum(fitting(options, weight * most).seconds for weight, options in waiting)

    beyond = {(o.seconds - of[-1].seconds) / weight for weight, of in waiting for o in of}
    levels = [level * (1 + 1e-9) for level in sorted(beyond)]
    return levels[max(0, bisect_right(levels, left, key=total) - 1)]


@lru_cache(maxsize=len(SIZES))
def _tensors(case: Case, device: str) -> Problem:
    """The same for every method."""
    return make(case, device=device)


def timed(method: Method, problem: Problem) -> float:
    """Seconds of a step, the fastest of two or three: the first warms up, and others may use the
    machine too.
    """
    step = method.build(problem)
    spent = []
    while len(spent) < 2 or (len(spent) < 3 and sum(spent) < 2 * ENOUGH):
        spent.append(once(step, problem.hs.device.type))
        problem.forget_gradients()
    return min(spent)


def measured_costs(device: str, children: bool) -> Costs:
    """Of this machine; of `children` where there are some."""
    case = Case("pilot", 32, 1024, 512, 8192, 8192)
    begun = [time.monotonic()]
    problem = make(case, device=device)
    begun.append(time.monotonic())
    expected = truth.truth(problem)
    begun.append(time.monotonic())
    vet(EAGER, problem, expected)
    begun.append(time.monotonic())
    made, known, compared = ((b - a) / case.elements for a, b in pairwise(begun))
    child = 0.0
    for _ in range(2 * children):  # the first starts the server of the others
        begun.append(time.monotonic())
        memory.apart(device, dict)
        child = time.monotonic() - begun[-1]
    return Costs(made, known, compared, child)


@dataclass
class Pilot:
    """What there is time for, by the predicted cost of all that has not been measured yet.

    Attributes:
        session: whose methods and cases.
        minutes: for everything, the pilot included.
        clock: seconds.
        once: seconds of one step of a method on the tensors of a problem.
        costs: of all that is not a step, given a device and whether there are child processes.
    """

    session: Session
    minutes: float
    clock: Callable[[], float] = time.monotonic
    once: Callable[[Method, Problem], float] = timed
    costs: Callable[[str, bool], Costs] = measured_costs
    _rates: dict[tuple[str, Case], float] = field(default_factory=dict)
    _planned: float = 0.0

    def start(self, cases: Mapping[Any, Sequence[str]]) -> None:
        """Begin the time, and predict every case of the sections that have it."""
        self._ends = self.clock() + 60 * PLANNED * self.minutes
        self._late = self.clock() + 60 * SHARE * self.minutes
        children = any("memory" in parts for parts in cases.values())
        self._costs = self.costs(self.session.suite.device, children)
        self._waiting = {case: self._options(case, parts) for case, parts in cases.items()}
        _tensors.cache_clear()
        self._begun = self.clock()

    def choose(self, case: Any) -> Option:
        """What of it there is time for; it does not wait any longer."""
        slower = max(0.5, (self.clock() - self._begun) / self._planned) if self._planned else 1.0
        left = (self._ends - self.clock()) / slower
        weights = {case: self.session.suite.weights.get(case, 1.0) for case in self._waiting}
        most = level([(weights[case], options) for case, options in self._waiting.items()], left)
        option = fitting(self._waiting.pop(case), weights[case] * most)
        self._planned += option.seconds
        return option

    def _options(self, case: Any, parts: Sequence[str]) -> list[Option]:
        """From all that was asked for to the least."""
        if isinstance(case, StepCase):  # its rounds and batches end with its seconds
            return [Option(case, self.session.rounds, STEP_CASE / 2**n) for n in range(2)]
        if isinstance(case, Ladder):
            rates = self._rates_of(self.session.methods(case.case, True), case.case)
            return [self._ladder(case.halved(times), rates) for times in range(HALVINGS)]
        rates, most = self._rates_of(self.session.methods(case), case), self.session.rounds
        return [
            self._option(case.halved(times), rounds, parts, rates)
            for times in range(HALVINGS)
            for rounds in range(most, min(most, LEAST) - 1, -1)
        ]

    def _option(
        self, case: Case, rounds: int, parts: Sequence[str], rates: Mapping[str, float]
    ) -> Option:
        threads = torch.get_num_threads()
        slower = threads / (case.threads or threads)
        steps = {key: slower * rate * case.floor_flops for key, rate in rates.items()}
        cold = frozenset(key for key, step in steps.items() if step > LONG)
        made = self._costs.make * case.elements
        spent = made + self._checks(few(case), case.elements, rates)
        compiled = COMPILE * (COMPILED.key in rates)
        if "speed" in parts:
            turns = (step * (rounds + (key not in cold)) for key, step in steps.items())
            spent += made + 2 * compiled + sum(turns)  # few rows, and all
        if "memory" in parts:
            children = [step for key, step in steps.items() if key != FLOOR.key]
            spent += compiled + sum(children) + len(children) * (self._costs.child + made)
        return Option(case, rounds, spent, cold)

    def _ladder(self, ladder: Ladder, rates: Mapping[str, float]) -> Option:
        elements = ladder.case.elements // 2  # both models have one head
        rung = self._costs.make * elements + self._checks(ladder.case, elements, rates)
        compiled = COMPILE * (COMPILED.key in rates)
        return Option(ladder, 1, len(ladder.epsilons) * rung + compiled)

    def _checks(self, case: Case, elements: int, rates: Mapping[str, float]) -> float:
        """The truth, and every method compared with it."""
        each = self._costs.truth + self._costs.check * len(rates)
        return each * elements + sum(rates.values()) * case.floor_flops

    def _rates_of(self, methods: Iterable[Method], case: Case) -> dict[str, float]:
        """Seconds a FLOP of the products, of those that can run: others are a row that says so."""
        found = {method.key: self._rate(method, case) for method in methods}
        return {key: rate for key, rate in found.items() if rate}

    def _rate(self, method: Method, case: Case) -> float:
        """0 for what cannot run. PyTorch's own for what would be compiled."""
        method = EAGER if method.key == COMPILED.key else method
        images = min(case.images, 2)
        small = Case("pilot", 0, 1024, 512, 0, 0, case.dtype, loss=case.loss, images=images)
        if (method.key, small) not in self._rates:
            late = self.clock() > self._late
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
