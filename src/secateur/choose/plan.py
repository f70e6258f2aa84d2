"""The plan: the decision of what goes, and nothing but. JSON to read, safetensors to replay."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from secateur.errors import SecateurError, nearest
from secateur.space import Axis, Space

FORMAT = 1


@dataclass(frozen=True)
class Kept:
    """What stays of one axis."""

    kind: str
    size: int
    """Units that the axis had."""
    units: tuple[int, ...]
    """Kept units, ascending."""


@dataclass(frozen=True)
class Plan:
    """Kept units per axis, dropped blocks, masks per weight. Axes that are not named keep everything."""

    kept: Mapping[str, Kept] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    """Names of blocks: layers, attention or MLP sub-layers."""
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Weight name -> bool tensor of its shape, True = keep."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Where it comes from: model, its fingerprint, method, budget... for people, not used by `apply`."""

    @property
    def only_masks(self) -> bool:
        """Whether all sizes stay as they are; such a plan needs no Space."""
        return bool(self.masks) and not self.kept and not self.dropped

    def check(self, space: Space) -> None:
        """Raise SecateurError unless this plan can be applied to a model with that Space."""
        axes = {axis.name: axis for axis in space.axes}
        for name, kept in self.kept.items():
            if name not in axes:
                raise SecateurError(f"the plan cuts axis {name!r}, which the model does not have{nearest(name, axes)}")
            _check_units(axes[name], kept)
        blocks = {block.name: block for block in space.blocks}
        for name in self.dropped:
            if name not in blocks:
                raise SecateurError(f"the plan drops {name!r}, which is not a droppable block{nearest(name, blocks)}")
        for name, mask in self.masks.items():
            if name not in space.parameters:
                raise SecateurError(f"the plan masks {name!r}, which is not a weight{nearest(name, space.parameters)}")
            if mask.dtype != torch.bool or tuple(mask.shape) != space.parameters[name].shape:
                raise SecateurError(
                    f"the plan's mask of {name} is {mask.dtype} {list(mask.shape)}, it must be torch.bool "
                    f"{list(space.parameters[name].shape)}"
                )
        stacks = defaultdict(list)
        for layer in space.layers():
            stacks[layer.stack].append(layer.name in self.dropped)
        for stack, gone in stacks.items():
            if all(gone):
                raise SecateurError(f"the plan drops all {len(gone)} layers of {stack}: at least one must stay")

    def summary(self) -> list[str]:
        """One line for each kind of axis, then one for each kind of dropped block."""
        by_kind: dict[str, list[Kept]] = defaultdict(list)
        for kept in self.kept.values():
            by_kind[kept.kind].append(kept)
        lines = []
        for kind, all_kept in by_kind.items():
            sizes = sorted({(len(k.units), k.size) for k in all_kept})
            shown = ", ".join(f"{n} of {size}" for n, size in sizes[:4]) + (", ..." if len(sizes) > 4 else "")
            where = f" on {len(all_kept)} axes" if len(all_kept) > 1 else ""
            lines.append(f"{kind}: keep {shown}{where}")
        if self.dropped:
            lines.append(f"dropped: {', '.join(self.dropped)}")
        if self.masks:
            zeros = sum(int((~m).sum()) for m in self.masks.values())
            total = sum(m.numel() for m in self.masks.values())
            lines.append(f"masks: {zeros:,} of {total:,} weights set to zero in {len(self.masks)} tensors")
        return lines or ["nothing is cut"]

    def save(self, folder: Path) -> None:
        """Write plan.json and plan.safetensors into an existing folder."""
        axes = {n: {"kind": k.kind, "size": k.size, "kept": len(k.units)} for n, k in self.kept.items()}
        content = {
            "format": FORMAT,
            "origin": dict(self.origin),
            "axes": axes,
            "dropped": list(self.dropped),
            "masks": {name: list(mask.shape) for name, mask in self.masks.items()},
        }
        (folder / "plan.json").write_text(json.dumps(content, indent=2) + "\n")
        tensors = {f"axis:{n}": torch.tensor(k.units, dtype=torch.int32) for n, k in self.kept.items()}
        tensors |= {f"mask:{n}": m.clone(memory_format=torch.contiguous_format) for n, m in self.masks.items()}
        save_file(tensors, folder / "plan.safetensors")

    @staticmethod
    def load(folder: Path) -> "Plan":
        """Read what `save` wrote.

        Raises:
            SecateurError: where a file is missing, damaged, of another format, or the two do not agree.
        """
        try:
            content = json.loads((folder / "plan.json").read_text())
            tensors = load_file(folder / "plan.safetensors")
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: no JSON, no UTF-8
            raise SecateurError(f"no readable plan in {folder}: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise SecateurError(f"{folder / 'plan.json'} is not a plan of format {FORMAT}")
        try:
            kept = {
                name: Kept(entry["kind"], entry["size"], tuple(tensors[f"axis:{name}"].tolist()))
                for name, entry in content["axes"].items()
            }
            masks = {name: tensors[f"mask:{name}"] for name in content["masks"]}
            plan = Plan(kept, tuple(content["dropped"]), masks, content["origin"])
            counts = {name: entry["kept"] for name, entry in content["axes"].items()}
            shapes = {name: tuple(shape) for name, shape in content["masks"].items()}
        except (KeyError, AttributeError, TypeError) as error:
            raise SecateurError(f"plan.json and plan.safetensors in {folder} do not agree: {error}") from error
        same = counts == {name: len(k.units) for name, k in kept.items()}
        same = same and shapes == {name: tuple(mask.shape) for name, mask in masks.items()}
        if not same or len(tensors) != len(kept) + len(masks):
            raise SecateurError(f"plan.json and plan.safetensors in {folder} do not agree")
        return plan


def _check_units(axis: Axis, kept: Kept) -> None:
    if kept.size != axis.size:
        raise SecateurError(f"the plan is for {axis.name} of {kept.size} units, but the model has {axis.size}")
    if not kept.units:
        raise SecateurError(f"the plan leaves no unit of {axis.name}: at least one must stay")
    if list(kept.units) != sorted(set(kept.units)) or kept.units[0] < 0 or kept.units[-1] >= axis.size:
        raise SecateurError(f"the kept units of {axis.name} must be ascending and within 0..{axis.size - 1}")
    if len(kept.units) < axis.minimum:
        raise SecateurError(
            f"the plan leaves {len(kept.units)} units of {axis.name}, and a router picks {axis.minimum}: keep as many"
        )
    counts = [0] * axis.groups
    for unit in kept.units:
        counts[unit // axis.per_group] += 1
    if len(set(counts)) > 1:
        raise SecateurError(f"{axis.name} must keep the same number in each of its {axis.groups} groups, not {counts}")


def diff(a: Plan, b: Plan) -> list[str]:
    """What `b` decides otherwise than `a`, one line a difference; empty when they agree."""
    lines = []
    for name in dict.fromkeys([*a.kept, *b.kept]):
        old, new = a.kept.get(name), b.kept.get(name)
        if old == new:
            continue
        if old is None or new is None:
            only = "second" if old is None else "first"
            known = old or new
            lines.append(f"{name}: cut to {len(known.units) if known else 0} only in the {only} plan")
        else:
            gone, back = len(set(old.units) - set(new.units)), len(set(new.units) - set(old.units))
            lines.append(f"{name}: {len(old.units)} -> {len(new.units)} units ({gone} kept no more, {back} kept anew)")
    lines += [f"{name}: dropped only in the first plan" for name in a.dropped if name not in b.dropped]
    lines += [f"{name}: dropped only in the second plan" for name in b.dropped if name not in a.dropped]
    for name in dict.fromkeys([*a.masks, *b.masks]):
        x, y = a.masks.get(name), b.masks.get(name)
        if x is None or y is None:
            lines.append(f"{name}: masked only in the {'second' if x is None else 'first'} plan")
        elif x.shape != y.shape or not torch.equal(x, y):
            lines.append(f"{name}: another mask")
    return lines
