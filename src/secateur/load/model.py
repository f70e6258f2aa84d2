"""Models from a folder or the hub, checked before and after transformers reads them; fingerprints of what was read."""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import world
from secateur.errors import SecateurError, nearest
from secateur.load.pieces import Pieces, pieces_of, plain_pieces
from secateur.load.place import DTYPES, find_device, find_dtype
from secateur.load.structure import OWN_TYPE, recorded_classes

TOKENIZER_FILES = (
    *("tokenizer*.json", "*.model", "*.tiktoken", "vocab*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*"),
)
"""File names, as patterns, of what a tokenizer consists of."""
_VOCABULARY_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab*")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the limit of the safetensors format, in bytes


@dataclass(frozen=True)
class Source:
    """Where a model came from."""

    name: str
    """The folder or hub id, as it was given."""
    folder: Path | None = None
    """The folder that was read; for a hub id, its snapshot in the hub's cache."""
    shard_bytes: int | None = None
    """Size of the largest weight file."""
    dtype: torch.dtype | None = None
    """The checkpoint's own dtype: that of its config, else of its first tensor."""
    files: tuple[Path, ...] = ()
    """The weight files."""
    hub_id: str | None = None
    """The name, where it is one of the hub."""
    unused: tuple[str, ...] = ()
    """Tensors of the files that the model has no place for."""


def load_model(
    name: str | Path, *, device: str = "cpu", dtype: str | torch.dtype | None = None
) -> tuple[nn.Module, Any | None, Source]:
    """Load a transformers model and its tokenizer, checked.

    Args:
        name: a model folder (config.json and safetensors), or a hub id ``org/name``.
        device: where the weights go.
        dtype: of the weights; None is the checkpoint's own.

    Returns:
        The stock transformers model in evaluation mode, the tokenizer (None where there are no files of one), and
        where they came from.

    Raises:
        SecateurError: The name leads to no model; the config or a weight file is missing, damaged or cut short; the
            weights do not fit the config, or are not finite; the dtype or device is unknown or not there.
    """
    place, kind = find_device(device), find_dtype(dtype)
    source = find_source(name)
    with quiet_transformers(), reworded(f"{source.name}: transformers cannot load this model"):
        model, info = stock_of(source)[0].from_pretrained(
            source.folder,
            dtype="auto" if kind is None else kind,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `info`, and an error below
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    _check_loaded(model, info, source.name)
    with reworded(f"{source.name}: the model cannot be put on {device}"):
        model = model.to(place).eval()
    check_finite(model, source.name)
    return model, load_tokenizer(source), replace(source, unused=tuple(sorted(info["unexpected_keys"])))


def stock_of(source: Source) -> tuple[Any, Any]:
    """The class of transformers (or, of a cut model, ours) that a checkpoint is of, and its config."""
    from transformers import AutoConfig

    known = _read_config(source.folder) if source.folder is not None else {}
    cut = recorded_classes(known)
    kind: Any = AutoConfig if cut is None else cut[0]
    config = kind.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    return (_stock_class(known.get("architectures"), config) if cut is None else cut[1]), config


def _stock_class(architectures: Any, config: Any) -> Any:
    """The class that a config names, if transformers has it for it; else whatever language model it has."""
    import transformers

    named = architectures[0] if isinstance(architectures, list) and architectures else ""
    found = getattr(transformers, str(named), None)
    takes: Any = getattr(found, "config_class", None)
    return found if isinstance(takes, type) and isinstance(config, takes) else transformers.AutoModelForCausalLM


def model_config(name: str | Path) -> Any:
    """The transformers config of a model; its weights are neither needed nor looked at.

    Raises:
        SecateurError: The name leads to no config, or transformers does not take it.
    """
    folder, _ = _find_folder(name, weights=False)
    cut = recorded_classes(_read_config(folder))
    with quiet_transformers(), reworded(f"{name}: transformers does not take this config"):
        from transformers import AutoConfig

        kind: Any = AutoConfig if cut is None else cut[0]
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def meta_model(name: str | Path) -> nn.Module:
    """The model without its weights, built from the config on the meta device, in the config's dtype (or float32).

    Raises:
        SecateurError: The name leads to no config, or transformers has no model for it.
    """
    config = model_config(name)
    kind = find_dtype(getattr(config, "dtype", None)) or torch.float32
    with quiet_transformers(), reworded(f"{name}: transformers cannot build this model"), torch.device("meta"):
        cut = recorded_classes(vars(config))
        if cut is not None:
            model = cut[1]._from_config(config, dtype=kind)
        else:
            stock = _stock_class(getattr(config, "architectures", None), config)
            named = hasattr(stock, "_from_config")
            model = stock._from_config(config, dtype=kind) if named else stock.from_config(config, dtype=kind)
    built: nn.Module = model.eval()
    return built


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no report of transformers; its settings, and those of the hub, are as before afterwards.

    Raises:
        SecateurError: transformers is not installed.
    """
    try:
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
        from transformers.utils import logging
    except ImportError as error:
        raise SecateurError("Hugging Face models need transformers; pip install 'secateur[hf]'") from error
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()  # the hub's bars as well
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if hub_bars and not bars:
            enable_progress_bars()
        if bars and not hub_bars:
            disable_progress_bars()


@contextmanager
def reworded(what: str) -> Iterator[None]:
    """Say in one line what went wrong inside of transformers, whose errors have no common type."""
    try:
        yield
    except (SecateurError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise SecateurError(f"{what}: {text[:500] or type(error).__name__}") from error


def load_tokenizer(source: Source) -> Any | None:
    """The tokenizer of a model folder; None where there are no files of one."""
    folder = source.folder
    if folder is None or not any(any(folder.glob(pattern)) for pattern in _VOCABULARY_FILES):
        return None
    from transformers import AutoTokenizer

    with quiet_transformers(), reworded(f"{source.name}: transformers cannot load the tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def is_hub_id(name: str) -> bool:
    """Whether a name reads as ``org/name`` of the hub, and no local folder of that name or of ``org`` is there."""
    path = Path(name)
    return _HUB_ID.fullmatch(name) is not None and not path.exists() and not path.parent.is_dir()


def find_source(name: str | Path) -> Source:
    """Find a model and check its files, without reading a tensor. What is missing of a hub id is downloaded.

    Raises:
        SecateurError: The name leads to no model, or a file of it is missing, damaged or cut short.
    """
    folder, hub_id = _find_folder(name, weights=True)
    files, config = check_folder(folder), _read_config(folder)
    own = str(config.get("dtype") or config.get("torch_dtype") or "")
    first = next((str(entry["dtype"]) for entry in _read_header(files[0]).values()), "")
    dtype = DTYPES.get(own) or DTYPES.get(first.replace("BF", "bfloat").replace("F", "float"))
    size = max(file.stat().st_size for file in files)
    return Source(str(name), folder, shard_bytes=size, dtype=dtype, files=files, hub_id=hub_id)


def _find_folder(name: str | Path, *, weights: bool) -> tuple[Path, str | None]:
    """The folder of a model, and its hub id if it has one."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    if path.exists():
        raise SecateurError(f"{name}: a model is a folder, and this is a file; give {path.parent}")
    if isinstance(name, str) and is_hub_id(name):
        return _download(name, weights=weights), name
    beside = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
    hint = nearest(path.name, beside) if beside else ""
    if not hint.startswith("; did you mean") and len(beside) > 8:
        hint = ""
    hub = "" if _HUB_ID.fullmatch(str(name)) else "; a hub id has the form org/name"
    raise SecateurError(f"{name}: no such model folder{hint}{hub}")


def _download(name: str, *, weights: bool) -> Path:
    """The snapshot of a hub id in the cache, with the files that are read, and no others."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError as error:
        raise SecateurError(f"{name}: no such folder, and the hub needs transformers: 'secateur[hf]'") from error

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))

    with reworded(f"{name}: no such local folder, and the hub cannot be reached"):
        try:
            if not weights:
                return fetch("config.json")
            folder = fetch("*.json", *TOKENIZER_FILES, "LICENSE*", "NOTICE*")
            named = _index(folder / _INDEX) if (folder / _INDEX).exists() else {}
            fetch(*(sorted(set(named.values())) or [_WEIGHTS]))
        except GatedRepoError as error:
            raise SecateurError(f"{name}: the hub gives this model only to those who accepted its terms") from error
        except RepositoryNotFoundError as error:
            raise SecateurError(f"{name}: no such local folder, and the hub has no such public model") from error
    return folder


# --- what is in the folder ---


def check_folder(folder: Path) -> tuple[Path, ...]:
    """The weight files of a model folder, once its config is readable and each file is there and whole.

    Reads headers only, no tensor.

    Raises:
        SecateurError: What is missing or damaged, and where there is one, the way out.
    """
    config = _read_config(folder)
    if config.get("quantization_config"):
        raise SecateurError(f"{folder}: the weights are quantized; prune the model before it is quantized")
    single, index = folder / _WEIGHTS, folder / _INDEX
    if single.exists():
        _read_header(single)
        return (single,)
    if not index.exists():
        raise SecateurError(_no_weights(folder))
    where = _index(index)
    names = sorted(set(where.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise SecateurError(
            f"{folder}: {len(missing)} of the {len(names)} weight files that {_INDEX} names are missing: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    headers = {name: _read_header(folder / name) for name in names}
    for tensor, name in where.items():
        if tensor not in headers[name]:
            raise SecateurError(f"{folder}: {_INDEX} says that {tensor} is in {name}, but it is not")
    return tuple(folder / name for name in names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SecateurError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise SecateurError(f"{path}: must be a JSON object, not {type(content).__name__}")
    return content


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists() and (folder / "adapter_config.json").exists():
        raise SecateurError(f"{folder}: this is an adapter, not a model; merge it into its model first")
    if not path.exists():
        deeper = sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
        hint = f"; did you mean {deeper[0].parent}?" if deeper else ""
        raise SecateurError(f"{folder}: no config.json, so this is no transformers model{hint}")
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise SecateurError(f"{path}: has no model_type, so this is no transformers model")
    return config


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    where = _read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise SecateurError(f"{path}: has no weight_map, which must say which tensor is in which file")
    for name in where.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise SecateurError(f"{path}: {name!r} is no name of a file in this folder")
    return where


def _no_weights(folder: Path) -> str:
    others = sorted(p.name for ending in ("bin", "pt", "pth", "gguf", "h5") for p in folder.glob(f"*.{ending}"))
    if others:
        return (
            f"{folder}: only safetensors is read, and the weights are in {others[0]}; convert them with transformers: "
            f"AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    named = sorted(p.name for p in folder.glob("*.safetensors"))
    hint = f"; the folder has {', '.join(named[:3])}" if named else ""
    return f"{folder}: no weights: neither {_WEIGHTS} nor {_INDEX}{hint}"


def _read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, once its length is known to be that of the file."""
    found = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise SecateurError(f"{path}: a Git LFS pointer, not the weights; run 'git lfs pull' in that folder")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else found
        if length > _MAX_HEADER or 8 + length > found:
            raise SecateurError(f"{path}: cut short, or no safetensors: its header takes {length + 8} bytes of {found}")
        text = file.read(length)
    try:
        tensors: dict[str, Any] = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise SecateurError(f"{path}: no safetensors file: its header is damaged") from error
    if expected != found:
        state = "cut short" if found < expected else "damaged"
        raise SecateurError(f"{path}: {state}: it must have {expected} bytes, and it has {found}; copy it again")
    return tensors


def _check_loaded(model: nn.Module, info: Mapping[str, Any], name: str) -> None:
    """Raise SecateurError unless every parameter came from the files, in the model's shape."""
    for parameter, there, wanted in sorted(info["mismatched_keys"]):
        raise SecateurError(
            f"{name}: the weights do not fit config.json: {parameter} is {list(there)} in the files, "
            f"and the config asks for {list(wanted)}"
        )
    missing = set(info["missing_keys"])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    there = {id(parameter) for key, parameter in parameters.items() if key not in missing}
    alone = [key for key in parameters if key in missing and id(parameters[key]) not in there]
    alone += sorted(missing - set(parameters))
    if alone:
        more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
        raise SecateurError(f"{name}: the weight files lack {alone[0]}{more}, which config.json asks for")


def check_finite(model: nn.Module, name: str) -> None:
    """Check every parameter for NaN and infinity.

    Args:
        model: on any device.
        name: what to call it.

    Raises:
        SecateurError: Names the first bad tensor, and how many of its values are bad.
    """
    pieces = pieces_of(model)
    for key, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            continue
        nan = bad = 0
        for piece in pieces(parameter):
            values = piece.float() if piece.itemsize == 1 else piece
            # One pass without a copy; NaN wins over every number.
            if not bool(torch.stack(torch.aminmax(values)).isfinite().all()):
                nan, bad = nan + int(values.isnan().sum()), bad + int((~values.isfinite()).sum())
        if bad:
            what, of = "NaN" if nan else "infinity", parameter.numel()
            raise SecateurError(f"{name}: {what} in the weights: {key} ({bad:,} of {of:,} values are bad)")


# --- fingerprints ---


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over a model: its config, and name, dtype, shape and bytes of all that its state dict holds.

    The same on every device, and after a round trip through a checkpoint; one changed bit changes it. Left out of
    the config: versions, names and paths, and the dtype, which the tensors say themselves.

    Returns:
        64 hexadecimal digits.

    Raises:
        SecateurError: The model is on the meta device.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        content = _without_origin(json.loads(config.to_json_string(use_diff=False)))
        digest.update(json.dumps(content, sort_keys=True).encode())
    seen: dict[int, str] = {}
    pieces = pieces_of(model)
    staged = getattr(model, "stages", None) is not None
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if staged and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            continue  # another stage of the pipeline has it
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen[id(tensor)] = name
            _add(digest, name, tensor, pieces)
        elif isinstance(tensor, torch.Tensor):
            digest.update(f"\n{name} = {seen[id(tensor)]}".encode())
    own = digest.hexdigest()
    return hashlib.sha256("".join(world.gathered(own)).encode()).hexdigest() if staged else own


def fingerprint_data(batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]]) -> str:
    """SHA-256 over batches: dtype, shape and bytes of each tensor in order; in a mapping, in the order of names.

    Returns:
        64 hexadecimal digits.

    Raises:
        SecateurError: A tensor is on the meta device.
    """
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        named = {"": batch} if isinstance(batch, torch.Tensor) else batch
        for name, tensor in sorted(named.items()):
            _add(digest, f"{number}:{name}", tensor)
    return digest.hexdigest()


def _without_origin(config: Any) -> Any:
    if isinstance(config, list):
        return [_without_origin(entry) for entry in config]
    if not isinstance(config, dict):
        return config
    left_out = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
    left_out |= {"auto_map", "secateur", "transformers_weights"}
    content = {key: _without_origin(value) for key, value in config.items() if key not in left_out}
    return {key: value.removeprefix(OWN_TYPE) if key == "model_type" else value for key, value in content.items()}


def _add(digest: Any, name: str, tensor: torch.Tensor, pieces: Pieces = plain_pieces) -> None:
    if tensor.is_meta:
        raise SecateurError(f"{name or 'a tensor'} is on the meta device and has no values: no fingerprint of it")
    digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} ".encode())
    for piece in pieces(tensor):
        digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())


def sliding_window(config: Any) -> Callable[[str], int | None]:
    """How many positions the key/value cache of an attention keeps.

    Args:
        config: of a transformers model.

    Returns:
        A function of the path of an attention module, such as ``model.layers.3.self_attn``: its window in tokens,
        None where it keeps all.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    slides, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    windows = {"sliding_attention": slides, "hybrid_sliding": slides, "chunked_attention": chunk}
    types = getattr(text, "layer_types", None)

    def window(module: str) -> int | None:
        if types is None:
            # As in transformers' own cache: a window in the config, without types, is for all layers.
            return slides or chunk
        number = next((int(part) for part in module.split(".") if part.isdecimal()), None)
        return windows.get(types[number]) if number is not None and number < len(types) else None

    return window
