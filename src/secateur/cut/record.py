"""What a cut took away, found by comparing the cut model with the dense one, module by module.

The record does not trust the plan: whatever is not as the stock class or the constructor builds it is written down,
and what cannot be written down is an error. `load.modeling_secateur.replay` makes the same model of it again.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.choose.plan import Plan
from secateur.cut.names import new_name, renumbered
from secateur.errors import SecateurError
from secateur.space import Space

_ORIGIN = "_secateur_origin"
"""Attribute of a cut model: {"config": the dense model's, or None, "layers": {list of modules: dense numbers}}."""
_NO_SIZE = frozenset(
    {
        *vars(nn.Module()),
        *("config", "generation_config", "gradient_checkpointing", "name_or_path", "all_tied_weights_keys"),
    }
)
"""Attributes that are no part of the structure."""
_NO_CONFIG_SIZE = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "model_type", "secateur"),
        *("quantization_config", "transformers_version", "transformers_weights"),
    }
)


# --- where a model came from ---


def remember(dense: nn.Module, new: nn.Module, plan: Plan, space: Space) -> None:
    """Note on a cut model what it was cut from; cuts of cuts name the first.

    Args:
        dense: the model before this cut.
        new: the model after it.
        plan: of the cut.
        space: of `dense`.
    """
    before = origin(dense)
    moved = renumbered(space, plan)
    numbers: dict[str, list[int]] = {}
    for stack, gone in space.gone_layers(plan.dropped).items():
        old = before["layers"].get(stack, range(len(gone)))
        numbers[stack] = [old[index] for index, out in enumerate(gone) if not out]
    after = {new_name(stack, moved): kept for stack, kept in {**before["layers"], **numbers}.items()}
    layers_now = {stack: kept for stack, kept in after.items() if stack is not None}
    setattr(new, _ORIGIN, {"config": before["config"], "layers": layers_now})


def origin(model: nn.Module) -> dict[str, Any]:
    """The config of the dense model (None without one), and which of its layers are left, where some are not."""
    known = getattr(model, _ORIGIN, None)
    if known is not None:
        found: dict[str, Any] = copy.deepcopy(known)
        return found
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {"config": None, "layers": {}}
    record = getattr(config, "secateur", None)
    if not isinstance(record, Mapping):
        return {"config": config.to_dict(), "layers": {}}
    with config.dense():
        values = config.to_dict()
    left_out = ("auto_map", "model_type", "secateur", "transformers_weights")
    return {
        "config": {key: value for key, value in values.items() if key not in left_out},
        "layers": {path: list(numbers) for path, numbers in record["layers"].items()},
    }


def was_cut(model: nn.Module) -> bool:
    """Whether `remember` was told of this model."""
    return hasattr(model, _ORIGIN)


# --- what is different ---


def describe(model: nn.Module, dense: nn.Module, layers: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The structure of a cut model, as `replay` takes it: what must be done to the dense one.

    Args:
        model: after the cut.
        dense: as its class or constructor builds it; the meta device will do.
        layers: for lists of modules that lost some, the numbers of those that stayed (`origin`).

    Returns:
        JSON values; empty sections where nothing differs.

    Raises:
        SecateurError: Something differs in a way that has no record.
    """
    structure: dict[str, Any] = {"layers": {}, "modules": {}, "tensors": {}, "attributes": {}, "configs": {}}
    seen: set[int] = {id(part) for _, part in config_parts(getattr(model, "config", None))}
    _compare("", model, dense, layers, structure, seen)
    return structure


def config_changes(config: Any, dense: Any) -> dict[str, Any]:
    """Path of each value of a config that the cut changed -> its value in the dense model's config."""
    inner = dict(config_parts(dense))
    changed: dict[str, Any] = {}
    for path, part in config_parts(config):
        if path not in inner:
            raise SecateurError(f"the config has a part {path}, and the dense model's has not")
        prefix = f"{path}." if path else ""
        now, before = _values(part), _values(inner[path])
        changed |= {f"{prefix}{name}": value for name, value in before.items() if now.get(name) != value}
    return changed


def config_parts(config: Any) -> Iterator[tuple[str, Any]]:
    """A config and the configs in it, by path; the config's own path is empty."""
    if hasattr(config, "to_dict"):
        yield "", config
        for name, part in vars(config).items():
            for path, inner in config_parts(part):
                yield f"{name}.{path}" if path else name, inner


def _values(config: Any) -> dict[str, Any]:
    inner = {name for name, part in vars(config).items() if hasattr(part, "to_dict")}
    return {name: value for name, value in config.to_dict().items() if name not in inner | _NO_CONFIG_SIZE}


def _compare(
    path: str,
    module: nn.Module,
    dense: nn.Module,
    layers: Mapping[str, Sequence[int]],
    structure: dict[str, Any],
    seen: set[int],
) -> None:
    """Write down how `module` differs from `dense`, and what is in it likewise."""
    _compare_tensors(path, module, dense, structure["tensors"])
    _compare_attributes(path, module, dense, structure["attributes"])
    prefix = f"{path}." if path else ""
    for name, part in vars(module).items():
        if hasattr(part, "to_dict") and not isinstance(part, type) and id(part) not in seen:
            seen.add(id(part))
            now, was = _values(part), _values(getattr(dense, name))
            changed = {key: encode(now[key], f"{prefix}{name}.{key}") for key in was if now.get(key) != was[key]}
            structure["configs"].update({f"{prefix}{name}": changed} if changed else {})
    ours, theirs = dict(module._modules), dict(dense._modules)
    if _numbered(ours) and _numbered(theirs) and (path in layers or len(ours) < len(theirs)):
        numbers = list(layers.get(path, range(len(ours))))
        if len(numbers) != len(ours) or max(numbers, default=-1) >= len(theirs):
            raise SecateurError(f"{path}: {len(ours)} of {len(theirs)} layers are left, and not {numbers} as recorded")
        if numbers != list(range(len(theirs))):
            structure["layers"][path] = numbers
        theirs = {str(place): theirs[str(number)] for place, number in enumerate(numbers)}
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        child, before = ours.get(name), theirs.get(name)
        if child is None:
            if before is not None or (name in ours) != (name in theirs):
                structure["modules"][f"{prefix}{name}"] = None if name in ours else "absent"
            continue
        stands_in = _stand_in(child, f"{prefix}{name}")
        if stands_in is not None and (stands_in != "identity" or not isinstance(before, nn.Identity)):
            structure["modules"][f"{prefix}{name}"] = stands_in
            continue
        if type(child).__name__ == "SizedAttention" and type(before) is nn.MultiheadAttention:
            structure["modules"][f"{prefix}{name}"] = "sized attention"
        elif before is None or not _same_class(child, before):
            kind = "nothing" if before is None else f"a {type(before).__name__}"
            raise SecateurError(
                f"{prefix}{name} is a {type(child).__name__}, and {kind} in the dense model: that cannot be recorded"
            )
        _compare(f"{prefix}{name}", child, before, layers, structure, seen)


def _numbered(children: Mapping[str, Any]) -> bool:
    return list(children) == [str(number) for number in range(len(children))]


def _same_class(module: nn.Module, dense: nn.Module) -> bool:
    """The same class by name: parametrised modules each have one of their own, and a script's may be `__main__`'s."""
    a, b = type(module), type(dense)
    places = {a.__module__, b.__module__}
    return a is b or (a.__qualname__ == b.__qualname__ and (len(places) == 1 or "__main__" in places))


def _stand_in(module: nn.Module, path: str) -> Any | None:
    if type(module) is nn.Identity:
        return "identity"
    if type(module).__name__ == "Idle":
        return "idle"
    if type(module).__name__ != "RemovedSublayer":
        return None
    output = getattr(module, "output", None)
    if hasattr(module, "leaves"):
        output = pytree.tree_unflatten(module.leaves, module.structure)  # type: ignore[arg-type]
    return {"output": encode(output, path), "layer_idx": module.layer_idx}


def _compare_tensors(path: str, module: nn.Module, dense: nn.Module, found: dict[str, Any]) -> None:
    ours, theirs = {**module._parameters, **module._buffers}, {**dense._parameters, **dense._buffers}
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        full = f"{path}.{name}" if path else name
        tensor, before = ours.get(name), theirs.get(name)
        if tensor is None:
            if before is not None:
                found[full] = None
        elif name in module._buffers and name not in dense._buffers:
            raise SecateurError(f"{full} is a buffer that the dense model has not: that cannot be recorded")
        elif before is None or tensor.dim() != before.dim():
            found[full] = list(tensor.shape)
        elif tensor.shape != before.shape:
            found[full] = [None if a == b else a for a, b in zip(tensor.shape, before.shape, strict=True)]


def _compare_attributes(path: str, module: nn.Module, dense: nn.Module, found: dict[str, Any]) -> None:
    changed = {}
    for name, value in vars(module).items():
        where = f"{path}.{name}" if path else name
        known = name in vars(dense)
        before = vars(dense).get(name)
        if isinstance(value, torch.Tensor) and (not isinstance(before, torch.Tensor) or value.shape != before.shape):
            raise SecateurError(f"{where} is a tensor that is neither parameter nor buffer: that cannot be recorded")
        if name in _NO_SIZE or not _plain(value) or (not known and name.startswith("_")):
            continue
        if not known or not _plain(before) or not _same(value, before):
            changed[name] = encode(value, where)
    if changed:
        found[path] = changed


# --- values in JSON ---


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(entry) for entry in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(entry) for key, entry in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _same(value: Any, dense: Any) -> bool:
    """Equal but for rounding, and for lists in place of tuples, which is what went through a config.json has."""
    if isinstance(value, tuple | list) and isinstance(dense, tuple | list):
        return len(value) == len(dense) and all(_same(a, b) for a, b in zip(value, dense, strict=True))
    if isinstance(value, dict) and isinstance(dense, dict):
        return value.keys() == dense.keys() and all(_same(value[key], dense[key]) for key in value)
    if isinstance(value, float) and isinstance(dense, float):
        return value == dense or math.isclose(value, dense, rel_tol=1e-6) or (math.isnan(value) and math.isnan(dense))
    return type(value) is type(dense) and bool(value == dense)


def encode(value: Any, where: str) -> Any:
    """A plain value as JSON, which knows no tuples; `modeling_secateur.decode` reads it.

    Raises:
        SecateurError: It is no plain value; names `where` it stands.
    """
    if not _plain(value):
        raise SecateurError(f"{where} is a {type(value).__name__}, which cannot be recorded")
    if isinstance(value, tuple):
        return {"tuple": [encode(entry, where) for entry in value]}
    if isinstance(value, list):
        return [encode(entry, where) for entry in value]
    if isinstance(value, dict):
        return {"dict": {key: encode(entry, where) for key, entry in value.items()}}
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value
