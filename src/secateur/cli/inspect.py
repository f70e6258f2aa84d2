"""``secateur inspect MODEL``: what can be cut, what is frozen and why."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console

from secateur.choose import Plan, Workload, costs
from secateur.cli.models import Making, inputs_of, open_model
from secateur.cli.options import Common, Group, parse
from secateur.cli.tables import bytes_text, table
from secateur.cut.config import FIELDS, field_of
from secateur.cut.prove import discover
from secateur.load.model import sliding_window
from secateur.space import Space


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Show what can be cut of a model, and what is frozen and why. No weight is read."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a Hugging Face model, or module:callable that builds any model."""
    axes: bool = False
    """List every axis, not just the kinds."""
    kv_batch: int = 1
    """Sequences whose KV cache the memory counts."""
    kv_seq_len: int = 4096
    """Positions of each."""
    json: bool = False
    """Print one JSON object and nothing else."""
    making: Annotated[Making, Group] = dataclasses.field(default_factory=Making)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments = parse(Arguments, "inspect", words)
    model, _, _ = open_model(arguments.model, arguments.making, weights=False)
    space = discover(model, inputs_of(model, arguments.making, arguments.model))
    window = sliding_window(getattr(model, "config", None))
    whole = costs(space, Plan(), Workload(arguments.kv_batch, arguments.kv_seq_len, window))
    values = _values(space, model, arguments)
    values["costs"] = {
        "params": int(whole.params),
        "active_params": int(whole.active_params),
        "memory": int(whole.memory),
        "macs": int(whole.macs),
    }
    Common(json=arguments.json).show(values, lambda console: _draw(console, values, arguments))


def _values(space: Space, model: Any, arguments: Arguments) -> dict[str, Any]:
    kinds = []
    for kind in space.kinds():
        axes, blocks = space.of_kind(kind), [b for b in space.blocks if b.kind == kind]
        sizes = sorted({axis.size for axis in axes}) or [len(blocks)]
        name = field_of(getattr(model, "config", None), kind, sizes[-1]) if kind in FIELDS else None
        groups = sorted({axis.groups for axis in axes})
        entry = {"kind": kind, "config": name, "axes": len(axes) or 1, "sizes": sizes, "groups": groups}
        kinds.append(entry)
    frozen: dict[str, list[str]] = defaultdict(list)
    for entry_ in space.frozen:
        frozen[entry_.reason].append(f"{entry_.parameter}[{entry_.dim}]")
    values: dict[str, Any] = {
        "model": arguments.model,
        "class": type(model).__name__,
        "kinds": kinds,
        "blocks": dict(Counter(block.kind for block in space.blocks)),
        "frozen": dict(frozen),
        "unused_parameters": list(space.idle_parameters),
    }
    if arguments.axes:
        values["axes"] = [
            {"name": a.name, "kind": a.kind, "size": a.size, "groups": a.groups, "tensors": len(a.slices)}
            for a in space.axes
        ]
    return values


def _draw(console: Console, values: dict[str, Any], arguments: Arguments) -> None:
    cost = values["costs"]
    held = f"weights and KV cache of {arguments.kv_batch} x {arguments.kv_seq_len} positions"
    console.print(f"{values['class']}: {cost['params']:,} parameters; {held}: {bytes_text(cost['memory'])}")
    if cost["active_params"] != cost["params"]:
        console.print(f"{cost['active_params']:,} of the parameters meet each token")
    console.print(f"one sample of the example inputs: {cost['macs']:,} multiply-accumulates")
    rows = []
    for entry in values["kinds"]:
        sizes = ", ".join(map(str, entry["sizes"]))
        grouped = [g for g in entry["groups"] if g > 1]
        note = f"in {grouped[0]} groups" if grouped else ""
        rows.append((entry["kind"], entry["config"] or "-", str(entry["axes"]), sizes, note))
    table(console, "What can be cut", ("kind", "config", "axes", "units", ""), rows)
    if arguments.axes:
        rows = [(a["name"], a["kind"], str(a["size"]), str(a["groups"]), str(a["tensors"])) for a in values["axes"]]
        table(console, "Axes", ("axis", "kind", "units", "groups", "slices"), rows)
    if values["frozen"]:
        console.print("Frozen", style="bold")
        for reason, places in values["frozen"].items():
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            console.print(f"  {places[0]}{more}: {reason}", markup=False)
    if values["unused_parameters"]:
        console.print(f"not used in the forward pass: {', '.join(values['unused_parameters'][:5])}")
