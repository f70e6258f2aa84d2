"""The plan: the decision of what goes, and nothing but. JSON to read, safetensors to replay."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from secateur.choose.packed import PackedMasks, bits_of, kind_of, zeros_in
from secateur.errors import SecateurError, nearest
from secateur.load.shards import Shard, write_shard
from secateur.space import Axis, Space

FORMAT = 2
"""Masks are packed, as `choose.packed` says, beside their shapes; in format 1, which is still read, they are bool."""
READ = (1, FORMAT)
"""Formats that this version reads."""


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
    """Weight name -> bool tensor of its shape, True = keep. `PackedMasks` unpacks each when it is asked for."""
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
        for name in self.masks:
            if name not in space.parameters:
                raise SecateurError(f"the plan masks {name!r}, which is not a weight{nearest(name, space.parameters)}")
            dtype, shape = kind_of(self.masks, name)
            if dtype != torch.bool or shape != space.parameters[name].shape:
                raise SecateurError(
                    f"the plan's mask of {name} is {dtype} {list(shape)}, it must be torch.bool "
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
            zeros = sum(zeros_in(self.masks, name) for name in self.masks)
            total = sum(prod(kind_of(self.masks, name)[1]) for name in self.masks)
            lines.append(f"masks: {zeros:,} of {total:,} weights set to zero in {len(self.masks)} tensors")
        return lines or ["nothing is cut"]

    def save(self, folder: Path) -> None:
        """Write plan.json and plan.safetensors into an existing folder, a tensor at a time.

        Raises:
            SecateurError: plan.safetensors cannot be written.
        """
        axes = {n: {"kind": k.kind, "size": k.size, "kept": len(k.units)} for n, k in self.kept.items()}
        content = {
            "format": FORMAT,
            "origin": dict(self.origin),
            "axes": axes,
            "dropped": list(self.dropped),
            "masks": {name: list(kind_of(self.masks, name)[1]) for name in self.masks},
        }
        (folder / "plan.json").write_text(json.dumps(content, indent=2) + "\n")
        write_shard(folder / "plan.safetensors", _Tensors(self))

    @staticmethod
    def load(folder: Path) -> "Plan":
        """Read what `save` wrote; masks stay in the file until they are asked for.

        Raises:
            SecateurError: where a file is missing, damaged, of another format, or the two do not agree.
        """
        try:
            content = json.loads((folder / "plan.json").read_text())
            file = Shard(folder / "plan.safetensors")
        except (OSError, ValueError, SecateurError) as error:  # ValueError: no JSON, no UTF-8
            raise SecateurError(f"no readable plan in {folder}: {error}") from error
        form = content.get("format") if isinstance(content, dict) else None
        if form not in READ:
            raise SecateurError(
                f"{folder / 'plan.json'} is a plan of format {form!r}, and this version reads 1 and {FORMAT}"
            )
        try:
            return _loaded(content, file)
        except (KeyError, AttributeError, TypeError, ValueError, SecateurError) as error:
            raise SecateurError(f"plan.json and plan.safetensors in {folder} do not agree: {error}") from error


class _Tensors(Mapping[str, torch.Tensor]):
    """What plan.safetensors holds of a plan, each tensor made when it is asked for."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names = [f"axis:{name}" for name in plan.kept]
        self.names += [f"{what}:{name}" for what in ("shape", "mask") for name in plan.masks]

    def __getitem__(self, name: str) -> torch.Tensor:
        what, _, key = name.partition(":")
        if what == "axis":
            return torch.tensor(self.plan.kept[key].units, dtype=torch.int32)
        if what == "shape":
            return torch.tensor(kind_of(self.plan.masks, key)[1], dtype=torch.int64)
        return bits_of(self.plan.masks, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _loaded(content: Mapping[str, Any], file: Shard) -> Plan:
    """The plan of both files.

    Raises:
        KeyError, AttributeError, TypeError, ValueError, SecateurError: They do not agree.
    """
    kept = {}
    for name, entry in content["axes"].items():
        units = tuple(_tensor(file, f"axis:{name}").tolist())
        if len(units) != entry["kept"]:
            raise ValueError(f"{name} keeps {len(units)} units, and not {entry['kept']}")
        kept[name] = Kept(entry["kind"], entry["size"], units)
    masks = PackedMasks(forget=file.forget)
    packs = content["format"] == FORMAT
    for name, found in content["masks"].items():
        tensor = _tensor(file, f"mask:{name}")
        shape = tuple(_tensor(file, f"shape:{name}").tolist() if packs else tensor.shape)
        if shape != tuple(found):
            raise ValueError(f"the mask of {name} is {list(shape)}, and not {list(found)}")
        if packs:
            masks.take(name, tensor, shape)
        else:
            masks.put(name, tensor)
            file.forget()
    if len(file.entries) != len(kept) + len(masks) * (2 if packs else 1):
        raise ValueError(f"there are {len(file.entries)} tensors for {len(kept)} axes and {len(masks)} masks")
    return Plan(kept, tuple(content["dropped"]), masks, content["origin"])


def _tensor(file: Shard, name: str) -> torch.Tensor:
    dtype, shape, _, size = file.entries[name]
    if min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} is said to be {dtype} {list(shape)}, and has {size} bytes")
    return file.mapped(name)


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
        if name not in a.masks or name not in b.masks:
            lines.append(f"{name}: masked only in the {'first' if name in a.masks else 'second'} plan")
        elif kind_of(a.masks, name) != kind_of(b.masks, name) or not torch.equal(a.masks[name], b.masks[name]):
            lines.append(f"{name}: another mask")
    return lines
