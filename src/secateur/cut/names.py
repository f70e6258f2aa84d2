"""Names of parameters, buffers and modules before and after layers are dropped."""

from secateur.choose.plan import Plan
from secateur.space import Space


def renumbered(space: Space, plan: Plan) -> dict[str, str | None]:
    """Path prefix of every layer -> its new prefix; None for a dropped one."""
    moved: dict[str, str | None] = {}
    for stack, gone in space.gone_layers(plan.dropped).items():
        layers = [f"{stack}.{i}" for i in range(len(gone))]
        kept = [name for name, out in zip(layers, gone, strict=True) if not out]
        moved |= dict.fromkeys(layers)
        moved |= {name: f"{stack}.{i}" for i, name in enumerate(kept)}
    return moved


def new_name(name: str, moved: dict[str, str | None]) -> str | None:
    """The name that something inside the model has after the cut; None when it is gone."""
    for before, after in moved.items():
        if name == before or name.startswith(f"{before}."):
            return None if after is None else after + name[len(before) :]
    return name
