"""What a run reports: what was cut, what it costs now, how it was decided, what was measured."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from secateur.choose.cost import Workload, costs, gone_parameters, lengths
from secateur.choose.packed import kind_of, zeros_in
from secateur.choose.plan import Plan
from secateur.choose.search import DIVISORS
from secateur.cut.config import sizes_of
from secateur.load.model import Source, sliding_window
from secateur.load.pieces import pieces_of
from secateur.methods.base import Decision
from secateur.methods.minitron import named
from secateur.space import Axis, Space
from secateur.space.types import evaluate

FORMAT = 1
"""Of report.json."""
_NOT_SHOWN = ("data", "inputs", "loss", "tokenizer", "method", "stored_dtype", "track")


def provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """How to make a result again: the format of its report, the command, and the versions of what it was made with.

    Args:
        command: words as they were typed; None where no command was.

    Returns:
        ``format`` and ``made`` of a report: no dates, so that the same run gives the same report.
    """
    versions = {"secateur": importlib.metadata.version("secateur"), "torch": str(torch.__version__)}
    for name in ("transformers", "onnxruntime"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions |= {"python": platform.python_version(), "platform": platform.platform()}
    return {"format": FORMAT, "made": {"command": None if command is None else list(command), "versions": versions}}


def weight_bytes(model: nn.Module, source: Source | None) -> int:
    """Bytes of the files that a model's weights came from; of what came from no files, those of its tensors."""
    if source is not None and source.files:
        return sum(file.stat().st_size for file in source.files)
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def report_of(
    model: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    decision: Decision,
    options: Mapping[str, Any],
    measured: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What was cut, what it costs now, what was measured; JSON values only.

    Args:
        model: the dense model.
        pruned: what it was made into.
        plan: that was applied, with its origin.
        decision: how it came about.
        options: of the method and of how data was read.
        measured: quality before and after; None = nothing was.
    """
    report: dict[str, Any] = {
        "secateur": plan.origin["secateur"],
        **provenance(),
        "method": plan.origin["method"],
        "model": {"name": plan.origin["model"], "fingerprint": plan.origin["fingerprint"]},
        "budget": plan.origin["budget"],
        "options": {k: _plain(v) for k, v in options.items() if v is not None and k not in _NOT_SHOWN},
        **(_masked(pruned, plan) if plan.only_masks else _cut(model, plan, decision.space, options)),
        **decision.details,
    }
    if measured is not None:
        report["measured"] = dict(measured)
    return report


def _masked(pruned: nn.Module, plan: Plan) -> dict[str, Any]:
    """Zeros of a model that only masks thin out; all its sizes are as they were."""
    pieces = pieces_of(pruned)
    every = [(p.numel(), sum(int(x.count_nonzero()) for x in pieces(p))) for p in pruned.parameters()]
    total = sum(count for count, _ in every)
    return {
        "sizes": {},
        "units": {},
        "dropped": [],
        "costs": {
            "params": {"dense": total, "pruned": total},
            "nonzero": {"dense": total, "pruned": sum(nonzero for _, nonzero in every)},
        },
        "sparsity": zeros_of(plan),
    }


def zeros_of(plan: Plan) -> dict[str, Any]:
    """How many elements its masks make zero: of each tensor, and of all that are masked."""
    masks = plan.masks
    tensors = {n: {"elements": prod(kind_of(masks, n)[1]), "zeros": zeros_in(masks, n)} for n in masks}
    elements, zeros = (sum(t[key] for t in tensors.values()) for key in ("elements", "zeros"))
    return {"masked": {"elements": elements, "zeros": zeros}, "tensors": tensors}


def _cut(model: nn.Module, plan: Plan, space: Space, options: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and costs before and after a structural cut."""
    config = getattr(model, "config", None)
    workload = Workload(
        options.get("kv_batch", 1), options.get("kv_seq_len", 4096), sliding_window(config), options.get("stored_dtype")
    )
    before, after = sizes_of(space), sizes_of(space, plan)
    kinds = [kind for kind in DIVISORS if before.get(kind) is not None]
    dense = {kind: before.get(kind) or 0 for kind in kinds}
    names = {kind: kind if config is None else next(iter(named(config, {kind: 0}, dense))) for kind in kinds}
    whole, rest = costs(space, Plan(), workload), costs(space, plan, workload)
    return {
        "sizes": {names[kind]: {"dense": before.get(kind), "pruned": after.get(kind)} for kind in kinds},
        "units": _units(space, plan),
        "dropped": list(plan.dropped),
        "where": where(space, plan),
        "costs": {
            "params": {"dense": int(whole.params), "pruned": int(rest.params)},
            "active_params": {"dense": int(whole.active_params), "pruned": int(rest.active_params)},
            "memory": {
                "dense": int(whole.memory),
                "pruned": int(rest.memory),
                "kv_batch": workload.batch,
                "kv_seq_len": workload.seq_len,
                "kv_cache": bool(space.caches),
            },
            "macs": {"dense": int(whole.macs), "pruned": int(rest.macs)},
        },
    }


def where(space: Space, plan: Plan) -> list[dict[str, Any]]:
    """What was cut where: an entry for each layer, and one for each axis that lies in none, such as channels.

    Args:
        space: of the dense model.
        plan: of a structural cut.

    Returns:
        Of each: ``name``; ``dropped``, the blocks in it that are gone (its own name: all of it); ``axes``, kind ->
        units ``dense`` and ``pruned``, of the kinds that are cut anywhere; of layers ``params``, likewise.
    """
    kinds = {kept.kind for kept in plan.kept.values()}
    whole, left, gone = lengths(space, Plan()), lengths(space, plan), gone_parameters(space, plan)
    rows: dict[str, dict[str, Any]] = {}
    for layer in space.layers():
        inside = [p for p in space.parameters.values() if p.block == layer.name]
        rows[layer.name] = {
            "name": layer.name,
            "dropped": [name for name in plan.dropped if f"{name}.".startswith(f"{layer.name}.")],
            "axes": {},
            "params": {
                "dense": round(sum(evaluate(p.size, whole) for p in inside)),
                "pruned": round(sum(evaluate(p.size, left) for p in inside if p.name not in gone)),
            },
        }
    for axis in space.axes:
        if axis.kind not in kinds:
            continue
        home = next((name for name in rows if axis.block and f"{axis.block}.".startswith(f"{name}.")), axis.name)
        row = rows.setdefault(home, {"name": home, "dropped": [], "axes": {}})
        size = row["axes"].setdefault(axis.kind, {"dense": 0, "pruned": 0})
        out = any(f"{axis.name}.".startswith(f"{name}.") or axis.block == name for name in plan.dropped)
        kept = plan.kept.get(axis.name)
        size["dense"] += axis.size
        size["pruned"] += 0 if out else axis.size if kept is None else len(kept.units)
    return list(rows.values())


def _units(space: Space, plan: Plan) -> dict[str, dict[str, int]]:
    """Units of all axes of each kind that is cut, the axes of dropped layers left out after the cut."""
    found: dict[str, dict[str, int]] = {}
    for kind in dict.fromkeys(kept.kind for kept in plan.kept.values()):
        axes = space.of_kind(kind)
        left = [len(plan.kept[a.name].units) if a.name in plan.kept else a.size for a in axes if not _gone(a, plan)]
        found[kind] = {"axes": len(axes), "dense": sum(a.size for a in axes), "pruned": sum(left)}
    return found


def _gone(axis: Axis, plan: Plan) -> bool:
    return axis.block in plan.dropped


def _plain(value: Any) -> Any:
    """A JSON value that shows an option."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return getattr(value, "name", None) or str(value)
