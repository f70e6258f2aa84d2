"""Names of parameters, buffers and modules before and after layers are dropped."""

from collections import defaultdict

from secateur.choose.plan import Plan
from secateur.space import Space


def renumbered(space: Space, plan: Plan) -> dict[str, str | None]:
    """Path prefix of every layer -> its new prefix; None for a dropped one."""
    stacks: dict[str, list[str]] = defaultdict(list)
    for layer in space.layers():
        stacks[layer.stack].append(layer.name)
    moved: dict[str, str | None] = {}
    for stack, layers in stacks.items():
        kept = [name for name in layers if name not in plan.dropped]
        moved |= dict.fromkeys(layers)
        moved |= {name: f"{stack}.{i}" for i, name in enumerate(kept)}
    return moved


def new_name(name: str, moved: dict[str, str | None]) -> str | None:
    """The name that something inside the model has after the cut; None when it is gone."""
    for before, after in moved.items():
        if name == before or name.startswith(f"{before}."):
            return None if after is None else after + name[len(before) :]
    return name
