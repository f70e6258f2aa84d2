"""Streamed models as checkpoints: a weight file for each unit, and never more than one unit in memory.

What rests in a file of the model's own already becomes part of the result by a link: nothing is read or written again.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.model import quiet_transformers
from secateur.load.shards import Shard, write_shard
from secateur.load.store import Store, held
from secateur.load.streamed import load_streamed

_INDEX = "model.safetensors.index.json"


def save_streamed(
    model: Any,
    store: Store,
    folder: Path,
    *,
    shell: Any | None = None,
    left_out: Iterable[str] = (),
    stored: Iterable[str] = (),
) -> None:
    """Write config, generation config and weights of a streamed model, in the order of its units.

    Args:
        model: whose weights rest.
        store: of the model.
        folder: an existing one.
        shell: a model of the same tensors that is saved as it is, but for its weights, under the model's own names;
            None = the model itself, under the names that its checkpoints have.
        left_out: names of the state dict that are not saved.
        stored: names of buffers that are no part of the state dict, and are saved.

    Raises:
        SecateurError: Stock transformers would not take every tensor of the result, or the disk is full.
    """
    with quiet_transformers():
        (shell or model).save_pretrained(folder, state_dict={})
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    plain = shell is not None or not _conversions(model)
    state: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    kept = _kept(model, {n: t for n, t in state.items() if isinstance(t, torch.Tensor)}, set(left_out))
    first = {id(parameter): name for name, parameter in store.parameters.items()}
    names = {first[id(state[name])]: name for name in kept if id(state[name]) in first}
    buffers = {name: state[name] for name in kept if id(state[name]) not in first}
    buffers |= {name: model.get_buffer(name) for name in stored}
    todo = {unit: {n: names[n] for n in part if n in names} for unit, part in store.owned.items()}
    todo = {unit: part for unit, part in todo.items() if part}
    count = len(todo) + bool(buffers)
    files = [folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    for (unit, part), path in zip(todo.items(), files, strict=False):
        as_it_is = plain and part == {name: name for name in store.owned[unit]}
        _save_unit(model, store, unit, part, path, plain=plain, as_it_is=as_it_is)
        store.forget()
    if buffers:
        tensors = {name: tensor.detach() for name, tensor in buffers.items()}
        store.written += write_shard(files[-1], tensors if plain else _reverted(model, tensors))
    _index(model, folder, files)
    _check(model, folder)


def _kept(model: Any, state: Mapping[str, torch.Tensor], left_out: set[str]) -> list[str]:
    """Names under which transformers saves: tied tensors have one, and some have none."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) | left_out
    alone: dict[int, torch.Tensor] = {}
    standing = {n: alone.setdefault(id(t), torch.empty(1)) for n, t in state.items() if n not in ignored}
    with quiet_transformers():
        return list(remove_tied_weights_from_state_dict(standing, model))


def _conversions(model: Any) -> bool:
    """Whether transformers has its own names or layouts in files for any tensor of a model."""
    own = getattr(model, "_weight_conversions", None)
    if own is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        own = get_model_conversion_mapping(model, add_legacy=False)
    return bool(own)


def _reverted(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as the files of a checkpoint have them."""
    from transformers.core_model_loading import revert_weight_conversion

    with quiet_transformers():
        found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


def _save_unit(
    model: nn.Module, store: Store, unit: str, names: Mapping[str, str], path: Path, *, plain: bool, as_it_is: bool
) -> None:
    """One weight file.

    Args:
        model: that is saved.
        store: of the model.
        unit: which.
        names: parameter -> its name in the result.
        path: of the file.
        plain: whether files have tensors under the names, and in the layout, of the state dict.
        as_it_is: whether the store's own file of the unit has all of them under these names, and nothing else.
    """
    if as_it_is and store.folder is not None:
        if not store.is_written(unit):
            store.write(unit)
        _link(store.file_of(unit), path)
        return
    with held(model, names=names):
        tensors = {new: store.parameters[name].detach() for name, new in names.items()}
        store.written += write_shard(path, tensors if plain else _reverted(model, tensors))


def _link(file: Path, path: Path) -> None:
    """The same file under another name; a copy where the two lie on different disks."""
    try:
        os.link(file, path)
    except OSError:
        shutil.copyfile(file, path)


def _index(model: Any, folder: Path, files: Iterable[Path]) -> None:
    """Say which tensor is in which file, as transformers does."""
    where: dict[str, str] = {}
    size = 0
    for path in files:
        entries = Shard(path).entries
        where |= dict.fromkeys(entries, path.name)
        size += sum(entry[3] for entry in entries.values())
    metadata = {"total_parameters": model.num_parameters(), "total_size": size}
    text = json.dumps({"metadata": metadata, "weight_map": where}, indent=2, sort_keys=True)
    (folder / _INDEX).write_text(text + "\n", encoding="utf-8")


def _check(model: nn.Module, folder: Path) -> None:
    """Raise SecateurError unless transformers finds a place for every tensor of the files, and one for every place."""
    new, _, source = load_streamed(folder, work=folder)
    for name in source.unused:
        raise SecateurError(f"{type(model).__name__}: transformers would not take {name} of the result")
    for name, parameter in new.named_parameters():
        if parameter.shape != model.get_parameter(name).shape:
            raise SecateurError(f"{type(model).__name__}: transformers would not take {name} as it is in the model")
