"""Budgets: what the result may cost, as people write it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from secateur.errors import SecateurError, nearest

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_UNITS: dict[str, Mapping[str, float]] = {
    "params": _COUNTS,
    "active_params": _COUNTS,
    "flops": _COUNTS,
    "macs": _COUNTS,
    "memory": _BYTES,
    "latency": _SECONDS,
    "sparsity": {},
}
_NUMBER = re.compile(r"^([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-zA-Z%]*)$", re.IGNORECASE)


@dataclass(frozen=True)
class Limit:
    """An upper limit: an absolute value, or a share of what the dense model costs."""

    value: float
    share: bool = False

    def absolute(self, dense: float) -> float:
        """The limit in the measure's own unit, given the dense model's cost."""
        return self.value * dense if self.share else self.value


@dataclass(frozen=True)
class Budget:
    """Any AND of limits (params, active_params, flops, macs, memory, latency, sparsity), n:m, or exact dims."""

    limits: Mapping[str, Limit] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    """Exact sizes under the config's own names, or Minitron's."""
    n_m: tuple[int, int] | None = None

    @staticmethod
    def parse(texts: str | Sequence[str] = (), dims: str | Mapping[str, int] | None = None) -> "Budget":
        """Read ``params=70%``, ``memory=8GiB``, ``latency=12ms``, ``n:m=2:4``; several are ANDed.

        Args:
            texts: one text (limits parted by commas) or several.
            dims: exact sizes, as a JSON object or a mapping.

        Raises:
            SecateurError: for an unknown measure, unit or number, one given twice, or a limit that makes no sense.
        """
        limits: dict[str, Limit] = {}
        n_m: tuple[int, int] | None = None
        parts = [texts] if isinstance(texts, str) else list(texts)
        for part in (piece.strip() for text in parts for piece in text.split(",") if piece.strip()):
            measure, sign, amount = (piece.strip() for piece in part.partition("="))
            if not sign:
                raise SecateurError(f"budget {part!r} is not of the form MEASURE=LIMIT, such as params=70%")
            if measure == "n:m" and n_m is not None:
                raise SecateurError("budget n:m is given twice")
            if measure == "n:m":
                n_m = _parse_n_m(amount)
                continue
            if measure not in _UNITS:
                raise SecateurError(f"unknown budget measure {measure!r}{nearest(measure, [*_UNITS, 'n:m'])}")
            if measure in limits:
                raise SecateurError(f"budget {measure} is given twice")
            limits[measure] = parse_limit(measure, amount)
        return Budget(limits, _parse_dims(dims), n_m)

    def sparsity(self) -> float:
        """Share of the maskable weights that goes.

        Raises:
            SecateurError: where the budget is about something else, or contradicts itself.
        """
        others = [m for m in self.limits if m != "sparsity"] + (["exact dims"] if self.dims else [])
        if others:
            raise SecateurError(f"a budget of {others[0]} is not served by masks: they take sparsity=50% or n:m=2:4")
        asked = self.limits.get("sparsity")
        if self.n_m is not None:
            own = 1 - self.n_m[0] / self.n_m[1]
            if asked is not None and abs(asked.value - own) > 1e-9:
                text = f"n:m={self.n_m[0]}:{self.n_m[1]} is a sparsity of {100 * own:g}%"
                raise SecateurError(f"{text}, and the budget asks for {100 * asked.value:g}% too: give one of them")
            return own
        if asked is None:
            raise SecateurError("no budget is given: masks take sparsity=50% or n:m=2:4")
        if not 0 <= asked.value < 1:
            raise SecateurError(f"budget sparsity={100 * asked.value:g}%: must be in [0%, 100%)")
        return asked.value

    def __str__(self) -> str:
        """The budget as one would write it."""
        unit = {"memory": "B", "latency": "s"}
        parts = [
            f"{m}={100 * x.value:.10g}%" if x.share else f"{m}={x.value:.10g}{unit.get(m, '')}"
            for m, x in self.limits.items()
        ]
        parts += [f"n:m={self.n_m[0]}:{self.n_m[1]}"] if self.n_m else []
        parts += [json.dumps(dict(self.dims))] if self.dims else []
        return ", ".join(parts) or "no limit"


def parse_limit(measure: str, amount: str | float) -> Limit:
    """Read one limit, such as ``70%``, ``6B``, ``8GiB``, ``12ms`` or a number."""
    units = _UNITS[measure]
    match = _NUMBER.match(str(amount).strip())
    if match is None:
        raise SecateurError(f"budget {measure}={amount}: {str(amount)!r} is not a positive number with a unit")
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        limit = Limit(number / 100, share=True)
    elif unit in units:
        limit = Limit(number * units[unit])
    elif measure == "sparsity" and not unit:
        limit = Limit(number, share=True)
    else:
        known = ", ".join(["%", *(u or "no unit" for u in units)])
        raise SecateurError(f"budget {measure}={amount}: unknown unit {match[2]!r}; known for {measure}: {known}")
    if measure == "sparsity":
        if not 0 <= limit.value < 1:
            raise SecateurError(f"budget sparsity={amount}: must be in [0, 1), such as 50% or 0.5")
        return limit
    if not 0 < limit.value < float("inf") or (limit.share and limit.value > 1):
        at_most = " and at most 100%" if limit.share else ""
        raise SecateurError(f"budget {measure}={amount}: must be above 0{at_most or ' and finite'}")
    return limit


def parse_count(name: str, amount: str | float) -> int:
    """Read a whole number as people write it: ``1M``, ``250k`` or a number.

    Raises:
        SecateurError: for what is none, or is below 1.
    """
    match = _NUMBER.match(str(amount).strip())
    if match is None or match[2].lower() not in _COUNTS:
        raise SecateurError(f"{name} {amount!r} is not a number such as 250k or 1M")
    count = float(match[1]) * _COUNTS[match[2].lower()]
    if not 1 <= count < 2**63:
        raise SecateurError(f"{name} must be at least 1, not {amount}")
    return round(count)


def _parse_n_m(amount: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", amount)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise SecateurError(f"budget n:m={amount}: must be N:M with 0 < N < M, such as 2:4")
    return int(match[1]), int(match[2])


def _parse_dims(dims: str | Mapping[str, int] | None) -> dict[str, int]:
    if dims is None:
        return {}
    if isinstance(dims, str):
        try:
            dims = json.loads(dims)
        except json.JSONDecodeError as error:
            raise SecateurError(f"dims {dims!r} is not JSON: {error}") from error
    if not isinstance(dims, Mapping) or not dims:
        raise SecateurError(f'dims must be a JSON object such as {{"hidden_size": 192}}, not {dims!r}')
    for name, size in dims.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise SecateurError(f"dims: {name} must be a whole number of at least 1, not {size!r}")
    return dict(dims)
