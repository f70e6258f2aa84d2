"""Analytic costs of a model as functions of its axis lengths: parameters, bytes, KV cache, multiply-accumulates."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from secateur.choose.plan import Plan
from secateur.errors import SecateurError
from secateur.space import Polynomial, Space, evaluate

UNIFORM_KINDS = (
    *("hidden", "ffn", "heads", "kv_groups", "experts", "expert_ffn", "shared_expert_ffn"),
    *("ssm_heads", "ssm_head_dim", "ssm_channels"),
)
"""Kinds whose size one config integer sets for every layer that has them."""

MEASURES = ("params", "active_params", "memory", "macs")


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
    """Parameters that one token meets: of a mixture of experts those that it is sent to; embedding tables whole."""
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
    total: dict[str, dict[tuple[str, ...], float]] = {m: defaultdict(float) for m in MEASURES}
    active = active_sizes(space)

    def add(measure: str, size: Polynomial, factor: float) -> None:
        for names, coefficient in size.items():
            total[measure][names] += coefficient * factor

    for parameter in space.parameters.values():
        if parameter.name not in gone:
            add("params", parameter.size, 1)
            add("active_params", active.get(parameter.name, parameter.size), 1)
            add("memory", parameter.size, workload.itemsize(parameter.dtype))
    for cache in space.caches:
        if not f"{cache.module}.".startswith(out):
            per_position = workload.batch * workload.itemsize(cache_dtype(space))
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
    return Costs(**found)


def active_sizes(space: Space) -> dict[str, Polynomial]:
    """Stacked weight or bias of experts -> how many of its elements one token meets, in the lengths of the axes."""
    stacked = {router.parameter for router in space.routers}
    rows = {r.parameter for r in space.readers if r.parameter not in stacked}
    found: dict[str, Polynomial] = {}
    for router in space.routers:
        axis, home = space.axis(router.axis), router.parameter.rpartition(".")[0]
        for name in {part.parameter for part in axis.slices}:
            # Beside the stacked weights lie their biases; what a router multiplies with is met by every token.
            if name in space.parameters and name.rpartition(".")[0] == home and name not in rows:
                size: dict[tuple[str, ...], float] = defaultdict(float)
                for names, coefficient in space.parameters[name].size.items():
                    few = axis.name in names
                    rest = tuple(n for n in names if n != axis.name)
                    size[rest] += coefficient * (router.active / axis.groups if few else 1)
                found[name] = dict(size)
    return found


def cache_dtype(space: Space) -> torch.dtype:
    """The cache is kept in the type of the weights: the commonest one counts."""
    return Counter(parameter.dtype for parameter in space.parameters.values()).most_common(1)[0][0]


@dataclass(frozen=True)
class UniformCost:
    """Costs as polynomials in one size for each kind, the same in every layer that has the kind.

    ``fixed + layers * per_layer`` for each measure, the layers' mean; where they differ, `at_depth` is exact.
    """

    fixed: Mapping[str, Polynomial]
    per_layer: Mapping[str, Polynomial]
    at_depth: Mapping[int, Mapping[str, Polynomial]] = field(default_factory=dict)
    """Layers that stay -> the whole cost, where it is known which those are."""

    def __call__(self, sizes: Mapping[str, float], layers: float) -> Costs:
        """Costs at `sizes` (kind -> size; heads counts those of one KV group) and a number of layers."""
        found = {m: self.of(m, sizes, layers) for m in self.fixed}
        return Costs(**{"active_params": found["params"], "macs": 0.0, **found})

    def of(self, measure: str, sizes: Mapping[str, float], layers: float) -> float:
        """The same for one measure."""
        measure = measure if measure in self.fixed else "params"
        whole = self.at_depth.get(int(layers))
        if whole is not None:
            return evaluate(whole[measure], sizes)
        return evaluate(self.fixed[measure], sizes) + layers * evaluate(self.per_layer[measure], sizes)


def uniform_cost(
    space: Space, workload: Workload, kinds: Sequence[str] = UNIFORM_KINDS, ladder: Sequence[Sequence[str]] = ()
) -> UniformCost:
    """Polynomials in kinds, from the model's own parameters; other axes stay whole.

    Args:
        space: of the dense model.
        workload: what memory counts.
        kinds: those whose size is the same in every layer that has them.
        ladder: for 0, 1, 2... layers fewer: which ones go. Without it every layer counts as their mean.
    """
    # Of several stacks no single number of layers says what stays.
    layers = [block.name for block in space.layers()] if len(space.stacks) == 1 else []
    whole = _by_kind(space, polynomials(space, workload), kinds)
    bare = _by_kind(space, polynomials(space, workload, layers), kinds)
    count = max(1, len(layers))
    mean = {m: {n: (c - bare[m].get(n, 0.0)) / count for n, c in size.items()} for m, size in whole.items()}
    depth = {
        len(layers) - len(gone): _by_kind(space, polynomials(space, workload, gone), kinds)
        for gone in ladder
        if len(gone) == 0 or len(gone) < len(layers)
    }
    return UniformCost(bare if layers else whole, mean, depth)


def least_cost(space: Space, workload: Workload, kinds: Sequence[str] = UNIFORM_KINDS) -> UniformCost:
    """The same where the dearest layers go first, for each measure by itself: no order of layers costs less."""
    cost = uniform_cost(space, workload, kinds)
    layers = [block.name for block in space.layers()]
    dense = {axis.name: axis.per_group for axis in space.axes}
    total = {m: evaluate(size, dense) for m, size in polynomials(space, workload).items()}
    saved = {n: polynomials(space, workload, [n]) for n in layers}
    depth: dict[int, dict[str, Polynomial]] = defaultdict(dict)
    for m in MEASURES:
        share = {n: total[m] - evaluate(saved[n][m], dense) for n in layers}
        if len(set(share.values())) < 2:
            continue  # the mean is exact
        order = sorted(layers, key=lambda n: -share[n])
        for gone in range(len(layers)):
            depth[len(layers) - gone][m] = _by_kind(space, polynomials(space, workload, order[:gone]), kinds)[m]
    for left, exact in depth.items():
        for m in MEASURES:
            if m not in exact:
                exact[m] = _sum(cost.fixed[m], {n: left * c for n, c in cost.per_layer[m].items()})
    return UniformCost(cost.fixed, cost.per_layer, depth)


def _by_kind(space: Space, costs_: Mapping[str, Polynomial], kinds: Sequence[str]) -> dict[str, Polynomial]:
    """Polynomials in the lengths of axes as such in the sizes of kinds, where all axes of a kind have one size.

    Units are counted over all groups, but heads in one KV group.
    """
    axes = {axis.name: axis for axis in space.axes}
    result: dict[str, Polynomial] = {}
    for measure, size in costs_.items():
        new: dict[tuple[str, ...], float] = defaultdict(float)
        for names, coefficient in size.items():
            kept = [axes[n] for n in names if axes[n].kind in kinds]
            fixed = prod(axes[n].per_group for n in names if axes[n].kind not in kinds)
            shared = prod(axis.groups for axis in kept if axis.parent is None)
            new[tuple(sorted(axis.kind for axis in kept))] += coefficient * fixed / shared
        result[measure] = dict(new)
    return result


def _sum(a: Polynomial, b: Polynomial) -> Polynomial:
    return {names: a.get(names, 0.0) + b.get(names, 0.0) for names in {*a, *b}}


def _plain(table: Mapping[str, Mapping[tuple[str, ...], float]]) -> dict[str, Polynomial]:
    return {measure: dict(polynomial) for measure, polynomial in table.items()}
