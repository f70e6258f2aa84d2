"""Which axes, weights and blocks a sensitivity scan goes through."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from secateur.choose.select import ON_REQUEST
from secateur.choose.select import matching as matching_axes
from secateur.cut.prove import discover
from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, first_samples
from secateur.methods.masking import inputs_from
from secateur.space import Axis, Block, Space
from secateur.space.trace import Inputs
from secateur.space.weights import Weight, blocks_of, maskable
from secateur.space.weights import matching as matching_weights

Found = TypeVar("Found")


@dataclass(frozen=True)
class Chosen:
    """What is measured.

    Attributes:
        space: Of the model; None where nothing that needs a trace is measured.
        axes: In the order of the forward pass.
        weights: In the order of the model.
        blocks: That are dropped.
        inputs: That the model is traced with.
        left: What cannot be measured -> why.
    """

    space: Space | None
    axes: Sequence[Axis]
    weights: Sequence[Weight]
    blocks: Sequence[Block]
    inputs: Inputs = None
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def traced(self) -> Space:
        """The Space.

        Raises:
            ValueError: where there is none.
        """
        if self.space is None:
            raise ValueError("the model was not traced")
        return self.space

    def described(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Weight -> the block that it lies in, its name there, and its elements."""
        around = blocks_of(model, [weight.name for weight in self.weights])
        return {
            weight.name: {
                "block": around[weight.name],
                "part": weight.name.removeprefix(f"{around[weight.name]}.").removesuffix(".weight"),
                "size": weight.size,
            }
            for weight in self.weights
        }


def choose(
    model: nn.Module,
    batches: Sequence[Batch],
    inputs: Inputs,
    *,
    what: Sequence[str],
    only: Sequence[str],
    ignore: Sequence[str],
) -> Chosen:
    """Find what the user means; see `scan.sensitivity`.

    Raises:
        SecateurError: for a pattern that matches nothing, where nothing is left, and for a model that cannot be traced.
    """
    both = set(only) & set(ignore)
    if both:
        raise SecateurError(f"{both.pop()!r} is in both only and ignore")
    if inputs is None and not hasattr(getattr(model, "config", None), "to_dict"):
        inputs = inputs_from(model, first_samples(batches[:1], 2)[0])
    space = None
    if "axes" in what or "blocks" in what:
        try:
            space = discover(model, inputs)
        except SecateurError as error:
            raise SecateurError(f"{error}; single weights can be measured all the same (what: weights)") from error
    every = _Everything(model, space, inputs, what)
    wanted = [every.meant(pattern, "only") for pattern in only]
    spared = [every.meant(pattern, "ignore") for pattern in ignore]
    off = {name for meant in spared for name in meant.names}
    named = {name for meant in wanted for name in meant.named}

    def some(items: Sequence[Found], name: Callable[[Found], str]) -> list[Found]:
        on = None if not only else {name for meant in wanted for name in meant.names}
        return [item for item in items if (on is None or name(item) in on) and name(item) not in off]

    found_axes = some(every.axes, lambda axis: f"axis {axis.name}")
    found_axes = [axis for axis in found_axes if axis.kind not in ON_REQUEST or axis.name in named]
    chosen = Chosen(
        space,
        found_axes,
        some(every.weights, lambda weight: f"weight {weight.name}"),
        some(every.blocks, lambda block: f"block {block.name}"),
        inputs,
    )
    if not (chosen.axes or chosen.weights or chosen.blocks):
        part = f" by only {list(only)}" if only else ""
        less = f" without {list(ignore)}" if ignore else ""
        raise SecateurError(
            f"none of the {' and '.join(what)} of {type(model).__name__} is left{part}{less}: choose more"
        )
    return chosen


@dataclass(frozen=True)
class _Meant:
    """What one pattern means: names of what kind, and axes that it names by themselves or by their kind."""

    names: frozenset[str]
    named: frozenset[str]


class _Everything:
    """All that could be measured of a model."""

    def __init__(self, model: nn.Module, space: Space | None, inputs: Inputs, what: Sequence[str]) -> None:
        self.space = space
        self.modules = [name for name, _ in model.named_modules()]
        self.axes: Sequence[Axis] = space.axes if space is not None and "axes" in what else ()
        self.blocks: Sequence[Block] = space.blocks if space is not None and "blocks" in what else ()
        self.weights: Sequence[Weight] = maskable(model, inputs).chosen if "weights" in what else ()

    def meant(self, pattern: str, option: str) -> _Meant:
        """What a pattern means.

        Raises:
            SecateurError: It matches nothing.
        """
        axes: Mapping[str, bool] = {}
        if self.space is not None:
            space = self.space
            own = {axis.name for axis in self.axes}
            axes = _or_none(lambda: matching_axes(space, self.modules, pattern, option)) or {}
            axes = {name: named for name, named in axes.items() if name in own}
        names = [weight.name for weight in self.weights]
        weights = _or_none(lambda: matching_weights(names, pattern)) or []
        within = tuple(f"{name}." for name in self.modules if name and fnmatchcase(name, pattern)) or ("\0",)
        blocks = [b.name for b in self.blocks if b.kind == pattern or f"{b.name}.".startswith(within)]
        found = {*(f"axis {n}" for n in axes), *(f"weight {n}" for n in weights), *(f"block {n}" for n in blocks)}
        if not found:
            kinds = self.space.kinds() if self.space is not None else ()
            known = [*kinds, *(axis.name for axis in self.axes), *names, *(b.name for b in self.blocks)]
            hint = nearest(pattern, [*known, *filter(None, self.modules)])
            raise SecateurError(f"{option}: {pattern!r} matches no kind, axis, weight or block that is measured{hint}")
        return _Meant(frozenset(found), frozenset(name for name, own in axes.items() if own))


def _or_none(match: Callable[[], Found]) -> Found | None:
    """What matches, or None where the one of several searches finds nothing: `meant` says so for all together."""
    try:
        return match()
    except SecateurError:
        return None
