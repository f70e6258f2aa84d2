"""When which share of the weights is gone: pure functions of a count of batches or epochs."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.errors import SecateurError, nearest

PER = ("batch", "epoch")


@dataclass(frozen=True)
class Schedule:
    """What all schedules share; use one of its kinds.

    The time is the number of batches, or of epochs, that are over. Before `begin` the sparsity is `initial`; from `end`
    on it is the final one, which the budget gives. In between it changes every `frequency` ticks and is held.

    Attributes:
        begin: the first time of an update.
        end: the last one.
        frequency: ticks between updates.
        initial: sparsity before `begin`, in [0, 1).
        per: what is counted, ``batch`` or ``epoch``.
    """

    begin: int = 0
    end: int | None = None
    frequency: int = 1
    initial: float = 0.0
    per: str = "batch"

    def __post_init__(self) -> None:
        if self.per not in PER:
            raise SecateurError(f"{self.name}: per must be batch or epoch, not {self.per!r}{nearest(self.per, PER)}")
        if self.end is None and not isinstance(self, Constant):
            raise SecateurError(f"{self.name} needs an end: the {self.per} at which the budget is met")
        if self.begin < 0 or self.last < self.begin:
            raise SecateurError(
                f"{self.name} begins at {self.begin} and ends at {self.last}: 0 <= begin <= end is needed"
            )
        if self.frequency < 1:
            raise SecateurError(f"{self.name}: frequency {self.frequency}: updates are at least 1 {self.per} apart")
        if not 0 <= self.initial < 1:
            raise SecateurError(f"{self.name}: initial sparsity {self.initial:g} must be in [0, 1)")

    @property
    def name(self) -> str:
        """As `sparsify` takes it: the class in lower case."""
        return type(self).__name__.lower()

    @property
    def last(self) -> int:
        """The time from which on the final sparsity holds."""
        return self.begin if self.end is None else self.end

    def check(self, final: float) -> None:
        """Raise SecateurError where the schedule cannot lead to this final sparsity."""
        if self.initial > final:
            raise SecateurError(
                f"{self.name} starts at a sparsity of {100 * self.initial:g}%, and the budget ends at "
                f"{100 * final:g}%: sparsity does not fall"
            )

    def sparsity(self, t: int, final: float) -> float:
        """The sparsity at time `t`, in [initial, final], never falling.

        Args:
            t: batches or epochs that are over.
            final: sparsity of the budget.
        """
        if t < self.begin:
            return self.initial
        if t >= self.last:
            return final
        held = (t - self.begin) // self.frequency * self.frequency
        return min(max(self.between(held / (self.last - self.begin), final), self.initial), final)

    def between(self, x: float, final: float) -> float:
        """The sparsity at the share x in [0, 1) of the way."""
        raise NotImplementedError

    def due(self, t: int) -> bool:
        """Whether masks that are chosen now and then are chosen anew at time `t`."""
        within = self.begin <= t <= self.last
        return (within and ((t - self.begin) % self.frequency == 0 or t == self.last)) or (t == 0 and self.initial > 0)

    def record(self) -> dict[str, Any]:
        """Plain values that tell this schedule from any other."""
        return {"name": self.name, **{key: getattr(self, key) for key in self.__dataclass_fields__}}


@dataclass(frozen=True)
class Constant(Schedule):
    """The final sparsity from `begin` on; masks are chosen anew until `end` (``begin`` by default: once)."""

    def between(self, x: float, final: float) -> float:
        """The final sparsity."""
        del x
        return final


@dataclass(frozen=True)
class MultiStep(Schedule):
    """`values[i]` from `steps[i]` on; the last value must be the sparsity of the budget.

    Attributes:
        steps: times, increasing.
        values: sparsities, not falling; one for each time.
    """

    begin: int = field(default=0, init=False)
    end: int | None = field(default=0, init=False)
    frequency: int = field(default=1, init=False)
    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        steps, values = tuple(self.steps), tuple(self.values)
        if not steps or len(steps) != len(values):
            raise SecateurError(
                f"multistep has {len(steps)} steps and {len(values)} values: one value for each step is needed"
            )
        if any(a >= b for a, b in itertools.pairwise(steps)):
            raise SecateurError(f"multistep: steps {list(steps)} must increase")
        if any(a > b for a, b in zip((self.initial, *values), values, strict=False)) or not 0 <= values[-1] <= 1:
            raise SecateurError(f"multistep: values {[self.initial, *values]} must not fall and lie in [0, 1]")
        for key, value in {"steps": steps, "values": values, "begin": steps[0], "end": steps[-1]}.items():
            object.__setattr__(self, key, value)
        super().__post_init__()

    def check(self, final: float) -> None:
        """Raise SecateurError where the last value is not the final one."""
        super().check(final)
        if abs(self.values[-1] - final) > 1e-9:
            raise SecateurError(
                f"multistep ends at a value of {self.values[-1]:g}, and the budget at {final:g}: "
                "make the last value the same"
            )

    def sparsity(self, t: int, final: float) -> float:
        """The value of the last step that is not after `t`."""
        if t >= self.last:
            return final
        return max((v for step, v in zip(self.steps, self.values, strict=True) if step <= t), default=self.initial)

    def due(self, t: int) -> bool:
        """At the steps."""
        return t in self.steps or (t == 0 and self.initial > 0)


@dataclass(frozen=True)
class Linear(Schedule):
    """s_i + (s_f - s_i) x, where x = (t - begin) / (end - begin)."""

    def between(self, x: float, final: float) -> float:
        """On the straight line."""
        return self.initial + (final - self.initial) * x


@dataclass(frozen=True)
class Exponential(Schedule):
    """1 - (1 - s_i) ((1 - s_f) / (1 - s_i))^x: the density falls by the same factor at every update, as in NNCF."""

    def check(self, final: float) -> None:
        """Raise SecateurError for a final value of 100%, which no factor leads to."""
        super().check(final)
        if final >= 1:
            raise SecateurError(
                "exponential does not lead to 100%, where a penalty is at its full weight: take linear or cubic"
            )

    def between(self, x: float, final: float) -> float:
        """One minus the density."""
        dense = 1 - self.initial
        return 1 - dense * math.pow((1 - final) / dense, x)


@dataclass(frozen=True)
class Cubic(Schedule):
    """s_f + (s_i - s_f)(1 - x)^3: fast while there is much to spare (Zhu & Gupta 2017, arXiv:1710.01878)."""

    def between(self, x: float, final: float) -> float:
        """On the cubic curve."""
        return final + (self.initial - final) * (1 - x) ** 3


_NAMED: Mapping[str, type[Schedule]] = {kind.__name__.lower(): kind for kind in (Constant, Linear, Exponential, Cubic)}


def schedule_of(
    schedule: Schedule | str | None, begin: int | None, end: int | None, frequency: int | None
) -> Schedule | None:
    """A schedule as it is given, or by its name with begin, end and frequency.

    Raises:
        SecateurError: for an unknown name, and for begin, end or frequency beside a schedule that has its own.
    """
    given: dict[str, Any] = {"begin": begin, "end": end, "frequency": frequency}
    given = {key: value for key, value in given.items() if value is not None}
    if isinstance(schedule, str):
        if schedule not in _NAMED:
            hint = ": multistep needs its steps and values, so give MultiStep(steps=..., values=...)"
            raise SecateurError(
                f"there is no schedule {schedule!r}{hint if schedule == 'multistep' else nearest(schedule, _NAMED)}"
            )
        return _NAMED[schedule](**given)
    if given:
        first = next(iter(given))
        beside = "no schedule is given" if schedule is None else f"{schedule.name} has its own"
        raise SecateurError(
            f"{first} goes with the name of a schedule, and {beside}: say schedule='cubic', {first}=..."
        )
    return schedule
