"""Where variables stand in tensors, and what kind of axis each is: read off the graph, never off names."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from secateur.space.blocks import Layer
from secateur.space.dims import Cat, Term, Var, leaves, resolve, size_of
from secateur.space.flow import Flow
from secateur.space.types import Slice


@dataclass(frozen=True)
class Place:
    """One occurrence of a variable in a tensor's dimension."""

    tensor: str
    dim: int
    offset: int
    loops: tuple[tuple[Var, int], ...]
    """Enclosing outer factors (variable, stride), outermost first."""
    inner: int


def places_in(tensor: str, dim: int, term: Term) -> Iterator[tuple[Var, Place]]:
    """Every variable of a dimension, with where it stands."""

    def walk(term: Term, offset: int, loops: tuple[tuple[Var, int], ...], inner: int) -> Iterator[tuple[Var, Place]]:
        if isinstance(term, Var):
            yield term, Place(tensor, dim, offset, loops, inner)
        elif isinstance(term, Cat):
            for segment in term.segments:
                yield from walk(segment, offset, loops, inner)
                offset += size_of(segment) * inner
        else:
            rest = inner * size_of(term)
            for factor in term.factors:
                rest //= size_of(factor)
                yield from walk(factor, offset, loops, rest)
                if isinstance(factor, Var):
                    loops = (*loops, (factor, rest))

    yield from walk(resolve(term), 0, (), 1)


def slice_of(var: Var, group: Var | None, place: Place) -> Slice:
    """The Slice of a variable at one of its places."""
    units: tuple[tuple[int, int], ...] = ((var.size, place.inner),)
    loops = place.loops
    if group is not None:
        units = ((group.size, loops[-1][1]), *units)
        loops = loops[:-1]
    outer = tuple((loop.size, stride) for loop, stride in loops)
    return Slice(place.tensor, place.dim, place.offset, units, outer, place.inner)


class Kinds:
    """The kind of every variable; what no method may cut is frozen on the way."""

    def __init__(self, flow: Flow, layers: Sequence[Layer]) -> None:
        self.flow = flow
        self.layers = layers
        self.vars: dict[int, Var] = {}
        self.places: dict[int, list[Place]] = defaultdict(list)
        for name, value in [*flow.parameters.items(), *flow.buffers.items()]:
            for dim, term in enumerate(value.dims):
                for var, place in places_in(name, dim, term):
                    self.places[id(var)].append(place)
                    self.vars[id(var)] = var
        self.residuals = {id(leaf) for layer in layers for leaf in leaves(layer.residual) if leaf.frozen is None}
        self.outputs = {(r.parameter, r.out_dim): r.module for r in flow.reads}
        self.experts = {p.tensor for k, v in self.vars.items() if "experts" in v.roles for p in self.places[k]}
        self.experts = {name for name in self.experts if self._rank(name) > 2}
        self.mixtures = {_parent(_parent(name)) for name in self.experts}
        self.attentions = {attention.module for attention in flow.attentions}
        self.stepped = self._stepped()
        scanned = [k for k, v in self.vars.items() if "ssm_heads" in v.roles]
        self.scans = {self.owner(self.places[k]) for k in [*scanned, *self.stepped.values()]}
        self.reads = {(r.parameter, r.in_dim) for r in flow.reads}
        routed = {"experts", "ssm_heads"}
        inner = [p for k, v in self.vars.items() if v.roles & routed for p in self.places[k] if p.loops]
        self.outer = {id(p.loops[-1][0]) for p in inner if p.loops[-1][0].roles & routed}
        for key, var in self.vars.items():
            self._freeze(var, self.places[key])
        self.groups = {key: self._group_of(var, self.places[key]) for key, var in self.vars.items()}
        self.counting = {id(g) for key, g in self.groups.items() if g is not None and self.vars[key].frozen is None}

    def _rank(self, name: str) -> int:
        value = self.flow.parameters.get(name) or self.flow.buffers[name]
        return len(value.dims)

    def owner(self, places: Sequence[Place]) -> str:
        """The module that makes the units: the parent of the first projection that has them as outputs."""
        made = [p for p in places if (p.tensor, p.dim) in self.outputs]
        module = self.outputs[made[0].tensor, made[0].dim] if made else _parent(places[0].tensor)
        return _parent(module) or module or "root"

    def _stepped(self) -> dict[int, int]:
        """State variable -> channel variable of scans that step through time.

        The state is contracted, and has a decay rate of its own for each channel: a matrix that multiplies nothing.
        """
        weights = {r.parameter for r in self.flow.reads}
        found: dict[int, int] = {}
        for name, value in self.flow.parameters.items():
            live = [leaf for term in value.dims for leaf in leaves(term) if leaf.frozen is None and leaf.size > 1]
            states = [leaf for leaf in live if leaf.roles & {"head_dim", "contracted"}]
            if name not in weights and len(live) == len(value.dims) == 2 and len(states) == 1:
                (channel,) = (leaf for leaf in live if leaf is not states[0])
                found[id(states[0])] = id(channel)
        return found

    def _freeze(self, var: Var, places: Sequence[Place]) -> None:
        """Groups of experts and of state-space heads stay whole, and so does the state of a scan."""
        if var.frozen is not None:
            return
        if id(var) in self.outer:
            var.frozen = "a group of heads or experts: the same number of each group is cut instead"
        scanned = "contracted" in var.roles and self.owner(places) in self.scans
        if (scanned or id(var) in self.stepped) and not var.roles & {"heads", "ssm_heads"}:
            var.frozen = "the state of a scan"

    def _group_of(self, var: Var, places: Sequence[Place]) -> Var | None:
        """The variable that `var` always stands directly inside of, where each of its units may choose for itself.

        Query heads that share a key-value head (the tile of the keys says so), experts of a group, heads of a group
        in a state-space layer, and channels of a group norm's group are such.
        """
        free = (var.tile and "heads" in var.roles) or var.roles & {"experts", "ssm_heads", "grouped"}
        if not free or not places:
            return None
        outers = {id(place.loops[-1][0]) if place.loops else None for place in places}
        # A group's keys and values may stand beside its queries in one tensor.
        steps = [place.loops[-1][1] - var.size * place.inner if place.loops else -1 for place in places]
        adjacent = all(step >= 0 if var.tile else step == 0 for step in steps)
        return places[0].loops[-1][0] if len(outers) == 1 and adjacent else None

    def of(self, var: Var) -> str:
        """The kind, by the plan's name for it."""
        key, places, roles = id(var), self.places[id(var)], var.roles
        group = self.groups[key]
        loops = {role for place in places for loop, _ in place.loops for role in loop.roles}
        found = [
            ("channels", key in self.residuals and self._is_spatial(places)),
            ("hidden", key in self.residuals),
            ("experts", "experts" in roles),
            ("ssm_heads", "ssm_heads" in roles),
            ("ssm_channels", key in self.stepped.values()),
            ("kv_groups", "heads" in roles and group is None and key in self.counting),
            ("heads", "heads" in roles),
            ("ssm_head_dim", "ssm_heads" in loops),
            ("head_dim", "head_dim" in roles or ("contracted" in roles and "heads" in loops)),
            ("expert_ffn", any(place.tensor in self.experts for place in places)),
        ]
        return next((kind for kind, holds in found if holds), None) or self._plain(var, places)

    def _plain(self, var: Var, places: Sequence[Place]) -> str:
        owner = self.owner(places)
        if "channels" in var.roles and self._is_spatial(places):
            return "channels"
        if owner in self.attentions or owner in self.scans:
            return "rank"
        if any(mixture and f"{owner}.".startswith(f"{mixture}.") for mixture in self.mixtures):
            return "shared_expert_ffn"
        return "ffn"

    def _is_spatial(self, places: Sequence[Place]) -> bool:
        """Whether convolutions, more than linear layers, make and read the units (in the layers, where they do)."""
        weights = [p for p in places if (p.tensor, p.dim) in self.outputs or (p.tensor, p.dim) in self.reads]
        names = tuple(f"{layer.name}." for layer in self.layers)
        within = [p for p in weights if p.tensor.startswith(names or ("\0",))] or weights
        wide = sum(1 if self._rank(p.tensor) > 2 and p.tensor not in self.experts else -1 for p in within)
        return wide >= 0 and any(self._rank(p.tensor) > 2 for p in within)

    def minimum(self, var: Var) -> int:
        """Units of the whole axis that must stay: as many as a router picks, of each group and of all."""
        group = self.groups[id(var)]
        each = group.size if group is not None else 1
        return max(1, *(least * each if alone else least for alone, least in self._picks(var)), 1)

    def active(self, var: Var) -> int:
        """Experts that each token meets: as many as a router picks of all."""
        return max((least for alone, least in self._picks(var) if not alone), default=self.minimum(var))

    def _picks(self, var: Var) -> Iterator[tuple[bool, int]]:
        """(Whether within one group, how many units) of every choice among the units."""
        for held in self.flow.deferred:
            found = list(leaves(held.term))
            if "experts" in var.roles and any(leaf is var for leaf in found):
                yield len(found) == 1 and self.groups[id(var)] is not None, held.at_least


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
