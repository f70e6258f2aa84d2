"""Slots of a model: what is decided together, and to which levels it may go."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import product
from math import gcd, prod

from secateur.choose.select import divisor_of
from secateur.choose.table import Level, Slot
from secateur.errors import SecateurError
from secateur.space import Axis, Block, Space

SUBLAYERS = ("attention", "mlp")


def make_slots(
    space: Space,
    axes: Sequence[Axis],
    least: Mapping[str, int],
    *,
    levels: int,
    round_to: int | Mapping[str, int] | None = None,
    uniform: bool,
    drop: bool,
    allowed: Callable[[Mapping[str, int]], bool] | None = None,
) -> list[Slot]:
    """Find the slots, in the order of the forward pass.

    Args:
        space: of the dense model.
        axes: those that may be cut.
        least: axis -> units that must stay.
        levels: sizes that each axis may have, the whole one among them.
        round_to: of what sizes are multiples.
        uniform: axes of one kind and shape go down together in all layers.
        drop: whole layers may go where shapes are uniform, whole attention and MLP sub-layers where they are not.
        allowed: whether a stock config can have these sizes by kind (heads are counted over all groups).

    Raises:
        SecateurError: for fewer than two levels, or where nothing may go.
    """
    if levels < 2:
        raise SecateurError(f"levels must be at least 2, not {levels}")
    slots = []
    for members in _together(axes, uniform=uniform):
        found = _levels(members, least, levels, round_to, allowed if uniform else None)
        names = tuple(axis.name for group in members for axis in group)
        slots.append(Slot(_name(members, uniform=uniform), tuple(found), names))
    slots = [slot for slot in slots if len(slot.levels) > 1]
    if drop and uniform:
        slots += [Slot(block.name, (Level(), Level(dropped=(block.name,)))) for block in _spare_layers(space)]
    elif drop:
        slots = _with_sublayers(space, slots)
    if not slots:
        raise SecateurError("keep_at_least, limits and round_to leave nothing to cut: allow more")
    return slots


def _spare_layers(space: Space) -> list[Block]:
    """Layers that may go: all but the first of each stack, since one must stay."""
    layers = space.layers()
    fixed = {path for path, count in space.stacks.items() if sum(b.stack == path for b in layers) < count}
    seen = set(fixed)
    found = []
    for block in layers:
        found += [block] if block.stack in seen else []
        seen.add(block.stack)
    return found


def _together(axes: Sequence[Axis], *, uniform: bool) -> list[list[list[Axis]]]:
    """Slots as lists of groups; a group keeps one size, and a slot holds heads with the KV groups they are in."""
    groups: dict[Hashable, list[Axis]] = {}
    for axis in axes:
        alike = uniform and axis.block is not None
        key: Hashable = (axis.kind, axis.size, axis.groups, axis.minimum) if alike else axis.name
        groups.setdefault(key, []).append(axis)
    home = {axis.name: key for key, group in groups.items() for axis in group}
    slots: dict[Hashable, list[list[Axis]]] = {}
    for key, group in groups.items():
        parent = next((home[a.parent] for a in group if a.parent in home), key)
        slots.setdefault(parent, []).append(group)
    return list(slots.values())


def _name(members: Sequence[Sequence[Axis]], *, uniform: bool) -> str:
    first = members[0]
    return first[0].kind if uniform and len(first) > 1 else first[0].name


def _levels(
    members: Sequence[Sequence[Axis]],
    least: Mapping[str, int],
    levels: int,
    round_to: int | Mapping[str, int] | None,
    allowed: Callable[[Mapping[str, int]], bool] | None,
) -> list[Level]:
    """All combinations of the sizes of a slot's groups, the whole first; thinned where there are many."""
    grids = []
    names = {axis.name for group in members for axis in group}
    for group in members:
        lowest = max(least[axis.name] for axis in group) / group[0].groups
        step = 1 if group[0].parent in names else step_of(group[0], round_to)
        grids.append(_sizes(group[0], lowest, levels, step))
    shares = {
        choice: prod(size / group[0].per_group for size, group in zip(choice, members, strict=True))
        for choice in product(*grids)
        if all(size == group[0].per_group for size, group in zip(choice, members, strict=True))
        or _round(members, choice, round_to)
    }
    found = sorted(shares, key=lambda choice: (-shares[choice], choice))
    if allowed is not None:
        found = [found[0], *(c for c in found[1:] if allowed(_by_kind(members, c)))]
    if len(found) > (most := 2 * levels):
        found = [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]
    return [
        Level({a.name: n for n, group in zip(choice, members, strict=True) for a in group if n != a.per_group})
        for choice in dict.fromkeys(found)
    ]


def _round(members: Sequence[Sequence[Axis]], choice: Sequence[int], round_to: int | Mapping[str, int] | None) -> bool:
    """Whether units over all groups that stay are multiples, of what is cut."""
    lengths = {axis.name: n for n, group in zip(choice, members, strict=True) for axis in group}
    for group in members:
        axis = group[0]
        n, groups = lengths[axis.name], lengths.get(axis.parent or "", axis.groups)
        if (n, groups) != (axis.per_group, axis.groups) and n * groups % divisor_of(axis, round_to):
            return False
    return True


def _by_kind(members: Sequence[Sequence[Axis]], choice: Sequence[int]) -> dict[str, int]:
    """Sizes as a config counts them: heads over all groups that stay."""
    stay = {group[0].kind: n for n, group in zip(choice, members, strict=True)}
    found = {}
    for n, group in zip(choice, members, strict=True):
        axis = group[0]
        parents = {a.name for other in members for a in other}
        kv = stay.get("kv_groups") if axis.parent in parents else None
        found[axis.kind] = n * (axis.groups if kv is None else kv)
    return found


def step_of(axis: Axis, round_to: int | Mapping[str, int] | None) -> int:
    """Of what the units in each group must be a multiple, so that those in all groups are one of `round_to`."""
    divisor = divisor_of(axis, round_to)
    return divisor // gcd(divisor, axis.groups)


def _sizes(axis: Axis, lowest: float, levels: int, step: int) -> list[int]:
    """Units in each group, the whole first, evenly spread."""
    free = [n for n in range(axis.per_group - 1, 0, -1) if n >= lowest and n % step == 0]
    few = levels - 1
    picked = free if len(free) <= few else [free[round((i + 1) * len(free) / few) - 1] for i in range(few)]
    return [axis.per_group, *picked]


def _with_sublayers(space: Space, slots: Sequence[Slot]) -> list[Slot]:
    """Let attention and MLP sub-layers go whole: the last level of the one slot within, or else a slot of their own."""
    found = list(slots)
    for block in space.blocks:
        if block.kind not in SUBLAYERS:
            continue
        inside = [i for i, slot in enumerate(found) if slot.axes and all(_within(space, a, block) for a in slot.axes)]
        gone = Level(dropped=(block.name,))
        if len(inside) == 1:
            slot = found[inside[0]]
            found[inside[0]] = Slot(slot.name, (*slot.levels, gone), slot.axes)
        else:
            found.append(Slot(block.name, (Level(), gone)))
    order = {name: i for i, name in enumerate(space.parameters)}

    def place(slot: Slot) -> int:
        blocks = [b for level in slot.levels for name in level.dropped for b in space.blocks if b.name == name]
        names = [part.parameter for axis in slot.axes for part in space.axis(axis).slices]
        return min((order[n] for n in [*names, *(p for b in blocks for p in b.parameters)] if n in order), default=0)

    return sorted(found, key=place)


def _within(space: Space, axis: str, block: Block) -> bool:
    return all(part.parameter in block.parameters for part in space.axis(axis).slices)
