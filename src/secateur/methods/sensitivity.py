"""Measure what single cuts cost: one probe for each kind of axis, and layers dropped one after the other."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.choose.plan import Plan
from secateur.choose.rank import axis_loss, lost_energy, plan_for_sizes
from secateur.choose.search import Grid, per_group
from secateur.cut.apply import apply
from secateur.errors import SecateurError
from secateur.load.store import drop_hooks
from secateur.progress import Track, quiet
from secateur.score.activation import Scores
from secateur.space import Space
from secateur.space.trace import Inputs

Ladder = Sequence[tuple[tuple[str, ...], float]]
"""For 0, 1, 2... dropped layers: which, and the KL of dropping just them, in nats per token."""

Trial = tuple[float, int, tuple[str, ...]]
"""Distance from the dense model, rank of the block that went among the proposed, and all blocks that are gone."""
PROPOSALS = 3
"""Layers of the lowest block influence that are really measured before one is dropped."""


@dataclass(frozen=True)
class Sensitivity:
    """What the proxy of the search needs, in nats of KL per token."""

    weight: Mapping[str, float]
    """Kind -> KL for each unit of lost importance energy."""
    depth: Ladder

    def loss(self, space: Space, scores: Scores, dense: Mapping[str, int]) -> Callable[[Mapping[str, int]], float]:
        """The proxy: sizes -> expected KL, the single cuts' losses added up.

        Args:
            space: the dense model's.
            scores: importance of its axes.
            dense: its sizes by kind; heads are counted over all groups.
        """

        @functools.cache
        def lost(kind: str, units: int) -> float:
            return lost_energy(space, scores.axes, kind, units)

        def expected(sizes: Mapping[str, int]) -> float:
            total = self.depth[dense["layers"] - sizes["layers"]][1] if "layers" in sizes else 0.0
            for kind, weight in self.weight.items():
                units = sizes[kind]
                if kind == "heads":  # those of the groups that go are the groups' loss
                    units = per_group(sizes) * dense.get("kv_groups", 1)
                total += weight * lost(kind, units)
            return total

        return expected


@dataclass(frozen=True)
class Influence:
    """The proxy of a search that measures nothing: how far cuts turn the stream, added up over the layers.

    A dropped layer costs its block influence, by which it turns the stream. A layer that loses a share of what one of
    its axes does loses that share of its influence. An axis that runs through several layers, the hidden size, is part
    of what each of them reads: its lost share counts once for each layer of the dense model.
    """

    kinds: Sequence[str]
    """Kinds of axes that may be cut."""
    depth: Ladder
    """With the sum of the block influences in place of the KL."""

    def loss(self, space: Space, scores: Scores, dense: Mapping[str, int]) -> Callable[[Mapping[str, int]], float]:
        """The proxy: sizes -> expected loss; arguments as for `Sensitivity.loss`."""
        layers = [layer.name for layer in space.layers()]
        inside = {a.name: next((n for n in layers if f"{a.block}.".startswith(f"{n}.")), None) for a in space.axes}

        @functools.cache
        def lost(kind: str, units: int, gone: tuple[str, ...]) -> float:
            total = 0.0
            for axis in space.of_kind(kind):
                layer = inside[axis.name]
                if layer not in gone:
                    weight = scores.blocks[layer] if layer is not None else max(1, len(layers))
                    total += weight * axis_loss(axis, scores.axes[axis.name], units)
            return total

        def expected(sizes: Mapping[str, int]) -> float:
            gone, total = self.depth[dense["layers"] - sizes["layers"]] if "layers" in sizes else ((), 0.0)
            for kind in self.kinds:
                units = sizes[kind]
                if kind == "heads":  # those of the groups that go are the groups' loss
                    units = per_group(sizes) * dense.get("kv_groups", 1)
                total += lost(kind, units, gone)
            return total

        return expected


def least_influence(model: nn.Module, space: Space, scores: Scores, count: int, track: Track = quiet) -> Ladder:
    """Drop up to `count` layers by block influence alone: the least goes first, of equal ones the earlier.

    Layers that cannot go are passed over as by `drop_layers`; nothing but meta tensors is made to find that out.

    Returns:
        For 0, 1, 2... dropped layers: their names in the model's order, and the sum of their block influences.
    """
    order = [layer.name for layer in space.layers()]
    shapes = copy.deepcopy(model, {id(p): _meta(p) for p in model.parameters()})
    drop_hooks(shapes)
    ladder: list[tuple[tuple[str, ...], float]] = [((), 0.0)]
    for _ in track(list(range(count)), f"choosing {count} layers to drop"):
        gone = ladder[-1][0]
        left = sorted((name for name in order if name not in gone), key=lambda name: scores.blocks[name])
        trials = tried_removals(shapes, space, order, gone, left, lambda _: 0.0, 1)
        if not trials:
            return ladder
        names = trials[0][2]
        ladder.append((names, sum(scores.blocks[name] for name in names)))
    return ladder


def _meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


def probe_kinds(
    model: nn.Module,
    space: Space,
    scores: Scores,
    grid: Grid,
    kl: Callable[[nn.Module], float],
    track: Track = quiet,
) -> dict[str, float]:
    """KL for each unit of lost energy, from one cut of each kind alone, to the middle of its choices.

    The importance of different kinds is not comparable (norm outputs against FFN inputs...); one measurement each
    makes it so.
    """
    weights: dict[str, float] = {}
    for kind, size in track(list(grid.probes().items()), "probing one cut of each kind"):
        sizes = {kind: size}
        if kind == "kv_groups":  # their heads go with them
            sizes["heads"] = per_group(grid.dense) * size
        plan = plan_for_sizes(space, scores.axes, sizes)
        energy = lost_energy(space, scores.axes, kind, size)
        weights[kind] = max(kl(apply(model, plan, space=space)), 0.0) / max(energy, 1e-9)
    return weights


def drop_layers(
    model: nn.Module,
    space: Space,
    scores: Scores,
    count: int,
    kl: Callable[[nn.Module], float],
    track: Track = quiet,
) -> Ladder:
    """Drop up to `count` layers greedily: block influence proposes, the KL of the real removal decides.

    A layer that the model cannot be without (some compute masks for all from the first of their type) is passed over,
    and so is the last one with a KV cache: in hybrids, generation counts its positions there.

    Returns:
        For 0, 1, 2... dropped layers, `count` where that many can go: their names in the model's order, and the KL.
    """
    order = [layer.name for layer in space.layers()]
    ladder: list[tuple[tuple[str, ...], float]] = [((), 0.0)]
    for _ in range(count):
        gone = ladder[-1][0]
        left = sorted((name for name in order if name not in gone), key=lambda name: (scores.blocks[name], name))
        shown = track(left, f"dropping layer {len(gone) + 1} of {count}")
        trials = tried_removals(model, space, order, gone, shown, kl, PROPOSALS)
        if not trials:
            return ladder
        best = min(trials)
        ladder.append((best[2], best[0]))
    return ladder


def tried_removals(
    model: nn.Module,
    space: Space,
    order: Sequence[str],
    gone: Sequence[str],
    proposed: Iterable[str],
    distance: Callable[[nn.Module], float],
    count: int,
    inputs: Inputs = None,
) -> list[Trial]:
    """Take one block more out of a model, for each of those that are proposed, and measure what is left.

    Args:
        model: the dense model.
        space: its Space.
        order: names of all blocks that may go, in the order in which they are told.
        gone: those that are gone already; parts of a proposed block are told with it no more.
        proposed: blocks, the likeliest first. One that the model cannot be without is passed over.
        distance: from the dense model.
        count: how many are measured at most; 0 = all.
        inputs: as for `apply`.

    Returns:
        (distance, rank among the proposed, names of all that is gone then), in the order of the proposals.
    """
    trials: list[Trial] = []
    for rank, name in enumerate(proposed):
        trial = tuple(b for b in order if b == name or (b in gone and not b.startswith(f"{name}.")))
        out = tuple(f"{block}." for block in trial)
        if space.caches and all(f"{cache.module}.".startswith(out) for cache in space.caches):
            continue
        try:
            trials.append((distance(apply(model, Plan(dropped=trial), space=space, inputs=inputs)), rank, trial))
        except SecateurError:
            continue
        if len(trials) == count:
            break
    return trials
