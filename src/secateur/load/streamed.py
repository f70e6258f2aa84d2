"""Hugging Face checkpoints that are larger than memory: a model whose weights stay in the files of its folder."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError, nearest
from secateur.load.model import Source, find_source, load_tokenizer, quiet_transformers, reworded, stock_of
from secateur.load.place import find_dtype
from secateur.load.shards import Shard
from secateur.load.store import Entry, Store, from_shard, made


def load_streamed(
    name: str | Path, *, work: Path, dtype: str | torch.dtype | None = None
) -> tuple[nn.Module, Any | None, Source]:
    """As `load_model`, but the weights stay in their files until they are used.

    Args:
        name: a model folder (config.json and safetensors), or a hub id ``org/name``.
        work: folder for what is written on the way.
        dtype: of the weights; None is the checkpoint's own.

    Raises:
        SecateurError: as `load_model`; not for weights that are not finite, which are found when they are used.
    """
    source = find_source(name)
    kind = find_dtype(dtype) or source.dtype or torch.float32
    files = {path: Shard(path) for path in source.files}
    stock, config = stock_of(source)
    with quiet_transformers(), reworded(f"{source.name}: transformers cannot build this model"):
        model = skeleton(stock, config, kind)
        entries, unused = _entries(model, files)
    Store(model, entries, None, work=work)
    tokenizer = load_tokenizer(source)
    return model.eval(), tokenizer, replace(source, unused=tuple(sorted(unused)))


def skeleton(stock: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A stock model as its loader makes it, buffers and ties and all, whose parameters take no memory.

    Memory that was never written to is not there: the loader is handed such tensors, and hands them on.
    """
    with torch.device("meta"):
        empty = stock._from_config(copy.deepcopy(config), dtype=dtype)
    tied = {n for n, _ in empty.named_parameters(remove_duplicate=False)} - {n for n, _ in empty.named_parameters()}
    state = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in empty.state_dict().items() if n not in tied}
    model: nn.Module = stock.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return model.eval()


def _entries(model: nn.Module, files: Mapping[Path, Shard]) -> tuple[dict[str, Entry], list[str]]:
    """Where each parameter comes from, as transformers maps the names of a checkpoint; what has no place.

    Buffers that the checkpoint has are read at once.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    there: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    first = {id(p): name for name, p in model.named_parameters()}
    plain: dict[str, tuple[str, Shard]] = {}
    joined: dict[str, tuple[Any, list[tuple[str, str, Shard]]]] = {}
    unused: list[str] = []
    keys = [(key, shard) for shard in files.values() for key in shard.entries]
    homes: dict[str, Path] = {}
    for key, shard in keys:
        if homes.setdefault(key, shard.path) != shard.path:
            raise SecateurError(
                f"{key} is in two weight files, {homes[key].name} and {shard.path.name}: mend the checkpoint"
            )
    for key, shard in sorted(keys, key=lambda pair: dot_natural_key(pair[0])):
        prefix = getattr(model, "base_model_prefix", None)
        name, pattern = rename_source_key(key, renamings, converters, prefix, there)
        if name not in there and key in there:
            name, pattern = key, None
        if name not in there:
            unused.append(key)
        elif pattern is None:
            plain[name] = key, shard
        else:
            joined.setdefault(name, (by_pattern[pattern], []))[1].append((key, pattern, shard))
    conversions = [c for c in conversions if c.was_used()]
    vars(model)["_weight_conversions"] = conversions  # as the stock loader leaves it, for saving
    entries: dict[str, Entry] = {}
    for name, (key, shard) in plain.items():
        _place(entries, there, first, name, _reader(shard, key, there[name]))
    for name, (converter, sources) in joined.items():
        _place_converted(model, entries, there, first, name, converter, sources)
    missing = [name for name in first.values() if name not in entries]
    if missing:
        raise SecateurError(
            f"the weight files lack {len(missing)} tensors of the model, such as {missing[0]}"
            f"{nearest(missing[0], unused) if unused else ''}"
        )
    return entries, unused


def _reader(shard: Shard, key: str, like: torch.Tensor) -> Entry:
    dtype, shape, *_ = shard.entries[key]
    if tuple(like.shape) != shape:
        raise SecateurError(f"{shard.path}: {key} is {list(shape)}, and the config makes it {list(like.shape)}")
    return (
        from_shard(shard, key) if dtype == like.dtype else made(lambda: shard.read(key).to(like.dtype), like, (shard,))
    )


def _place(
    entries: dict[str, Entry],
    there: Mapping[str, torch.Tensor],
    first: Mapping[int, str],
    name: str,
    entry: Entry,
) -> None:
    """Note a parameter under its first name; fill a buffer."""
    tensor = there[name]
    if id(tensor) in first:
        before = entries.setdefault(first[id(tensor)], entry)
        if before is not entry and not torch.equal(before.load(), entry.load()):
            raise SecateurError(
                f"the config ties {name} to {first[id(tensor)]}, and in the checkpoint the two differ: set "
                "tie_word_embeddings to false in its config.json"
            )
    else:
        tensor.detach().copy_(entry.load())


def _place_converted(
    model: nn.Module,
    entries: dict[str, Entry],
    there: Mapping[str, torch.Tensor],
    first: Mapping[int, str],
    name: str,
    converter: Any,
    sources: list[tuple[str, str, Shard]],
) -> None:
    """Parameters that transformers makes of several tensors (or several of one): made anew whenever they are loaded."""

    def convert() -> dict[str, Any]:
        own = copy.deepcopy(converter)
        for key, pattern, shard in sources:
            own.add_tensor(name, key, pattern, shard.read(key))
        with quiet_transformers():
            found: dict[str, Any] = own.convert(name, model=model, config=model.config)
        return {target: x[0] if isinstance(x, list) else x for target, x in found.items()}

    shards = tuple({id(shard): shard for *_, shard in sources}.values())
    targets = [name, *_siblings(converter, name, there)]
    for target in dict.fromkeys(targets):
        like = there[target]

        def load(target: str = target, dtype: torch.dtype = like.dtype) -> torch.Tensor:
            return convert()[target].to(dtype).contiguous()  # type: ignore[no-any-return]

        _place(entries, there, first, target, made(load, like, shards))


def _siblings(converter: Any, name: str, there: Mapping[str, torch.Tensor]) -> list[str]:
    """The other parameters that a conversion makes beside the first."""
    patterns = list(converter.target_patterns)
    return [found for other in patterns[1:] if (found := name.replace(patterns[0], other)) in there]
