"""Analytic costs of a model as functions of its axis lengths: parameters, bytes, KV cache, multiply-accumulates."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from secateur.choose.plan import Plan
from secateur.errors import SecateurError
from secateur.space import Polynomial, Space, evaluate

UNIFORM_KINDS = ("hidden", "ffn", "heads", "kv_groups")
"""Kinds whose size one config integer sets for every layer."""


@dataclass(frozen=True)
class Workload:
    """What the memory budget counts beside the weights: the KV cache of `batch` sequences of `seq_len` positions."""

    batch: int = 1
    seq_len: int = 4096
    window: Callable[[str], int | None] | None = None
    """For an attention module's path, the positions that it keeps at most; None = all."""
    stored: torch.dtype | None = None
    """Type that weights and cache will have; None = the parameters' own."""

    def __post_init__(self) -> None:
        for name, value in (("kv_batch", self.batch), ("kv_seq_len", self.seq_len)):
            if value < 1:
                raise SecateurError(f"{name} must be at least 1, not {value}")

    def itemsize(self, own: torch.dtype) -> int:
        """Bytes of one element of a tensor whose own type is given."""
        return own.itemsize if self.stored is None or not own.is_floating_point else self.stored.itemsize

    def positions(self, module: str) -> int:
        """Positions that the attention at `module` keeps for each sequence."""
        window = self.window(module) if self.window is not None else None
        return self.seq_len if window is None else min(self.seq_len, window)


@dataclass(frozen=True)
class Costs:
    """What a model costs."""

    params: float
    active_params: float
    memory: float
    """Bytes of the weights and of the KV cache."""
    macs: float
    """Multiply-accumulates of convolutions, matrix products and attention, for one sample of the example inputs."""

    @property
    def flops(self) -> float:
        """Two for each multiply-accumulate."""
        return 2 * self.macs

    def of(self, measure: str) -> float:
        """The cost by the budget's name for it."""
        return float(getattr(self, measure))


def lengths(space: Space, plan: Plan) -> dict[str, int]:
    """Length of every axis after the plan, in units of one group for grouped axes."""
    result = {}
    for axis in space.axes:
        kept = plan.kept.get(axis.name)
        result[axis.name] = (axis.size if kept is None else len(kept.units)) // axis.groups
    return result


def gone_parameters(space: Space, plan: Plan) -> set[str]:
    """Parameters that dropped blocks take along."""
    gone = set(plan.dropped)
    return {name for block in space.blocks if block.name in gone for name in block.parameters}


def polynomials(
    space: Space, workload: Workload | None = None, dropped: Sequence[str] = ()
) -> Mapping[str, Polynomial]:
    """What a model costs, by measure, as polynomials in the lengths of its axes; tied parameters count once.

    Dropped blocks take their parameters, caches and work along. `macs` are those of one sample: all work on the example
    inputs, divided by their batch.
    """
    workload = workload or Workload()
    gone = gone_parameters(space, Plan(dropped=tuple(dropped)))
    out = tuple(f"{name}." for name in dropped) or ("\0",)
    total: dict[str, dict[tuple[str, ...], float]] = {m: defaultdict(float) for m in ("params", "memory", "macs")}

    def add(measure: str, size: Polynomial, factor: float) -> None:
        for names, coefficient in size.items():
            total[measure][names] += coefficient * factor

    for parameter in space.parameters.values():
        if parameter.name not in gone:
            add("params", parameter.size, 1)
            add("memory", parameter.size, workload.itemsize(parameter.dtype))
    for cache in space.caches:
        if not f"{cache.module}.".startswith(out):
            per_position = workload.batch * workload.itemsize(_cache_dtype(space))
            add("memory", cache.size, per_position * workload.positions(cache.module))
    for work in space.work:
        if not f"{work.module}.".startswith(out):
            add("macs", work.macs, 1)
    total["macs"] = {names: count / space.batch for names, count in total["macs"].items()}
    return _plain(total)


def costs(space: Space, plan: Plan, workload: Workload | None = None) -> Costs:
    """Exact costs of the model that the plan gives; see `polynomials`."""
    at = lengths(space, plan)
    found = {m: evaluate(size, at) for m, size in polynomials(space, workload, plan.dropped).items()}
    return Costs(found["params"], found["params"], found["memory"], found["macs"])


def _cache_dtype(space: Space) -> torch.dtype:
    """The cache is kept in the type of the weights: the commonest one counts."""
    return Counter(parameter.dtype for parameter in space.parameters.values()).most_common(1)[0][0]


@dataclass(frozen=True)
class UniformCost:
    """Costs as polynomials in one length for each kind, where every layer has the same shape.

    ``fixed + layers * per_layer`` for each measure; layers are alike except that the KV cache may have windows,
    which are averaged.
    """

    fixed: Mapping[str, Polynomial]
    per_layer: Mapping[str, Polynomial]

    def __call__(self, sizes: Mapping[str, float], layers: float) -> Costs:
        """Costs at `sizes` (kind -> length; heads counts those of one KV group) and a number of layers."""
        total = {m: evaluate(self.fixed[m], sizes) + layers * evaluate(self.per_layer[m], sizes) for m in self.fixed}
        return Costs(total["params"], total["params"], total["memory"], total.get("macs", 0.0))


def uniform_cost(space: Space, workload: Workload) -> UniformCost:
    """Polynomials in the kinds of `UNIFORM_KINDS`, from the model's own parameters; other axes stay whole."""
    kind = {axis.name: axis.kind for axis in space.axes if axis.kind in UNIFORM_KINDS}
    whole = {axis.name: axis.per_group for axis in space.axes}
    layers = {block.name for block in space.layers()}
    fixed: dict[str, dict[tuple[str, ...], float]] = {m: defaultdict(float) for m in ("params", "memory", "macs")}
    layered: dict[str, dict[tuple[str, ...], float]] = {m: defaultdict(float) for m in fixed}

    def add(measure: str, block: str | None, size: Polynomial, factor: float) -> None:
        inside = block in layers
        target = layered if inside else fixed
        for names, coefficient in size.items():
            key = tuple(sorted(kind[n] for n in names if n in kind))
            rest = prod(whole[n] for n in names if n not in kind)
            target[measure][key] += coefficient * rest * factor / (len(layers) if inside else 1)

    for parameter in space.parameters.values():
        add("params", parameter.block, parameter.size, 1)
        add("memory", parameter.block, parameter.size, workload.itemsize(parameter.dtype))
    for cache in space.caches:
        per_position = workload.batch * workload.itemsize(_cache_dtype(space))
        add("memory", cache.block, cache.size, per_position * workload.positions(cache.module))
    for work in space.work:
        add("macs", work.block, work.macs, 1 / space.batch)
    return UniformCost(_plain(fixed), _plain(layered))


def _plain(table: Mapping[str, Mapping[tuple[str, ...], float]]) -> dict[str, Polynomial]:
    return {measure: dict(polynomial) for measure, polynomial in table.items()}
