"""Hugging Face models that no stock config describes: saved with their structure and a small modelling file."""

import copy
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.cut.record import config_changes, config_parts, describe, origin
from secateur.errors import SecateurError
from secateur.load.model import quiet_transformers
from secateur.load.store import held, store_of
from secateur.load.structure import FORMAT, MODELING, class_path, cut_classes, stock_class
from secateur.ship.streamed import save_streamed

_NOT_OF_THE_MODEL = ("auto_map", "model_type", "secateur", "transformers_version", "transformers_weights")


def save_cut(model: nn.Module, folder: Path, *, max_shard_size: int) -> None:
    """Write config, generation config, weights and modelling file of a model that was cut by surgery.

    What the folder gives is built first, by the loader that its users will call, and compared with the model.

    Args:
        model: of a class of transformers.
        folder: an existing one.
        max_shard_size: of a weight file, in bytes; of a streamed model each unit has a file.

    Raises:
        SecateurError: The cut cannot be recorded, or the record does not give the model back.
    """
    new, tensors = _as_loaded(model)
    store = store_of(model)
    if store is not None:
        soft = _computed_buffers(model)
        left_out = [name for name in soft if name not in tensors]
        stored = [name for name in new.config.secateur["stored"] if name in tensors]
        save_streamed(model, store, folder, shell=new, left_out=left_out, stored=stored)
        return
    with quiet_transformers():
        new.save_pretrained(folder, state_dict=tensors, max_shard_size=max_shard_size, save_original_format=False)


def stock_difference(model: Any, stock: nn.Module) -> str | None:
    """What a cut model has that its stock class, built from its own config, has not; None where they agree.

    Args:
        model: with tensors of the same names and shapes as `stock`.
        stock: on the meta device.
    """
    try:
        found = describe(model, stock, {})
    except SecateurError as error:
        return str(error)
    for path, values in {**found["modules"], **found["attributes"], **found["configs"]}.items():
        return f"{path} ({', '.join(values)})" if isinstance(values, Mapping) else path
    soft = _computed_buffers(model) | unsaved(model)
    new = _load(type(model), copy.deepcopy(model.config), _tensors(model, soft, ()), model)
    return next(iter(_other_values(model, new, soft)), None)


def unsaved(model: nn.Module) -> set[str]:
    """Tensors of the state dict that transformers leaves out of a checkpoint: it computes them from the sizes."""
    left_out: Any = getattr(model, "_keys_to_ignore_on_save", None) or ()
    own = model.state_dict(keep_vars=True)
    others = {id(tensor) for name, tensor in own.items() if name not in left_out}
    return {name for name in left_out if name in own and id(own[name]) not in others}  # tied ones are there


def _as_loaded(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model that the folder will give, and the tensors to save."""
    stock, stock_config = (stock_class(type(part)) for part in (model, model.config))
    if stock is None or stock_config is None:
        raise SecateurError(
            f"stock transformers does not know {type(model).__name__}, a class of {type(model).__module__}"
        )
    before = origin(model)
    dense = _dense(stock, stock_config, before["config"], model.config)
    structure = describe(model, dense, before["layers"])
    soft = _computed_buffers(model)
    record = {
        "format": FORMAT,
        "model": class_path(stock),
        "config_class": class_path(stock_config),
        "config": config_changes(model.config, dense.config),
        **structure,
        "stored": [name for name in structure["tensors"] if name in soft],
    }
    config_class, model_class = cut_classes(stock, stock_config)
    values = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    values["auto_map"] = _auto_map(stock, stock_config, config_class, model_class)
    values["secateur"] = record
    new = _load(
        model_class, _config(config_class, values, model.config), _tensors(model, soft, record["stored"]), model
    )
    other = _other_values(model, new, soft)
    if other:
        record["stored"] = sorted({*record["stored"], *other})
        tensors = _tensors(model, soft, record["stored"])
        new = _load(model_class, _config(config_class, values, model.config), tensors, model)
    again = {**describe(new, dense, before["layers"]), "config": config_changes(new.config, dense.config)}
    wrong = [
        f"{path or 'model'} ({part})"
        for part, content in again.items()
        for path in {**record[part], **content}
        if content.get(path) != record[part].get(path)
    ]
    for path in [*wrong, *_other_values(model, new, soft)]:
        raise SecateurError(f"{stock.__name__}: a saved folder would not give {path} back as it is")
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)
    return new, _tensors(model, soft, record["stored"])


def _dense(stock: Any, stock_config: Any, values: Mapping[str, Any], like: Any) -> Any:
    """The dense model on the meta device."""
    try:
        with quiet_transformers(), torch.device("meta"):
            return stock(_config(stock_config, values, like))
    except Exception as error:  # config classes raise types of their own
        text = " ".join(str(error).split())
        raise SecateurError(f"{stock.__name__} rejects the config of the dense model ({text[:300]})") from error


def _config(kind: Any, values: Mapping[str, Any], like: Any) -> Any:
    """A config with the attention and expert implementations of another, which are never saved."""
    with quiet_transformers():
        config = kind.from_dict(copy.deepcopy(dict(values)))
    parts = dict(config_parts(config))
    for path, part in config_parts(like):
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if path in parts and hasattr(part, name):
                setattr(parts[path], name, getattr(part, name))
    return config


def _load(kind: Any, config: Any, tensors: Mapping[str, torch.Tensor], like: nn.Module) -> Any:
    """What `from_pretrained` makes of a config and tensors, which it shares where dtype and device allow it."""
    floats = [t.dtype for t in tensors.values() if t.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, floats, torch.float32 if not floats else floats[0])
    with quiet_transformers():
        new, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `info`, and an error below
        )
    ignored = {name for name, _ in like.named_parameters()} | set(tensors)
    missing = [name for name in info["missing_keys"] if name in ignored]
    for problem in (missing, info["unexpected_keys"], info["mismatched_keys"]):
        for name in problem:
            raise SecateurError(f"{kind.__name__}: transformers does not take {name} as it is in the model")
    return new


def _computed_buffers(model: nn.Module) -> set[str]:
    """Names of buffers that are no part of a checkpoint."""
    record = getattr(getattr(model, "config", None), "secateur", None) or {}
    names = set(record.get("stored", []))
    for path, module in model.named_modules():
        names |= {f"{path}.{name}" if path else name for name in module._non_persistent_buffers_set}
    return names


def _tensors(model: nn.Module, soft: set[str], stored: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, with those computed buffers that must be stored.

    In place of the parameters of a streamed model, which rest on disk, there is NaN that takes no memory.
    """
    tensors = {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor) and n not in soft}
    if store_of(model) is not None:
        own = dict(model.named_parameters(remove_duplicate=False))
        nothing = {id(p): torch.full((), torch.nan, dtype=p.dtype).expand(p.shape) for p in own.values()}
        tensors |= {name: nothing[id(own[name])] for name in tensors if name in own}
    return {**tensors, **{name: model.get_buffer(name).detach() for name in stored}}


def _other_values(model: nn.Module, new: nn.Module, soft: set[str]) -> list[str]:
    """Computed tensors that are not computed as they are in the model, but for rounding to the model's dtype."""
    ours, theirs = _all_tensors(model), _all_tensors(new)
    other = []
    with held(model, names=[name for name, _ in model.named_parameters() if name in soft]):
        for name in sorted(soft):
            a, b = ours.get(name), theirs.get(name)
            if a is None and b is None:
                continue
            if a is None or b is None or a.shape != b.shape or not torch.equal(b.to(a.device, a.dtype), a):
                other.append(name)
    return other


def _all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def _auto_map(stock: Any, stock_config: Any, config_class: type, model_class: type) -> dict[str, str]:
    """Auto classes of transformers that know the stock class -> the class in the modelling file."""
    with quiet_transformers():
        from transformers.models.auto import modeling_auto
    module = MODELING.removesuffix(".py")
    found = {"AutoConfig": f"{module}.{config_class.__name__}"}
    for name, kind in vars(modeling_auto).items():
        if not (isinstance(kind, type) and getattr(kind, "_model_mapping", None)):
            continue
        names = kind._model_mapping._model_mapping.get(stock_config.model_type, ())  # type: ignore[attr-defined]
        if stock.__name__ in ((names,) if isinstance(names, str) else names):
            found[name] = f"{module}.{model_class.__name__}"
    return found if len(found) > 1 else {**found, "AutoModel": f"{module}.{model_class.__name__}"}
