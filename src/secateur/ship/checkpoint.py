"""Checkpoints: a pruned model as a folder, for stock transformers where it can, written whole or not at all."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from secateur.choose.plan import Plan
from secateur.choose.rescore import MaskScores
from secateur.cut.record import was_cut
from secateur.errors import SecateurError
from secateur.load.built import STRUCTURE, load_built
from secateur.load.model import TOKENIZER_FILES, Source, check_folder, load_model, quiet_transformers
from secateur.load.store import store_of
from secateur.ship.built import save_built
from secateur.ship.card import model_card
from secateur.ship.modeling import save_cut, stock_difference, unsaved
from secateur.ship.streamed import save_streamed
from secateur.space import Space

_ONE_FILE = 50_000_000_000  # bytes up to which the result of a single file stays one: transformers' own default


# --- saving and loading ---


def save(
    model: nn.Module,
    out: Path,
    *,
    plan: Plan | None = None,
    scores: MaskScores | None = None,
    space: Space | None = None,
    source: Source | None = None,
    tokenizer: Any | None = None,
    report: Mapping[str, Any] | None = None,
    card: str | None = None,
    constructor: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    files: Sequence[Path] = (),
    overwrite: bool = False,
) -> Path:
    """Write the whole result into a folder that `load` loads, or nothing.

    Stock transformers loads it too, if the model is one of Hugging Face: as it is where the model's own config
    describes it, and otherwise, because a small modelling file lies beside the weights, with
    ``trust_remote_code=True``. Any other model is saved as tensors, what was cut, and what builds the dense model.
    The folder is written beside `out` under a hidden name, checked, and renamed. What fails or is interrupted leaves
    nothing behind, and an old result as it was.

    Args:
        model: the pruned model; dtypes are kept, tied tensors are stored once.
        out: the folder to make, with its parents. An empty one that is there already is taken.
        plan: saved beside the weights.
        scores: what its masks were chosen by, saved beside it.
        space: the dense model's Space: the plan must fit it.
        source: of the dense model: its tokenizer and licence files are copied as they are, and its weight files
            say how large those of the result may be.
        tokenizer: saved where the source has no tokenizer files.
        report: saved as report.json; infinities and NaN become the texts "inf", "-inf" and "nan".
        card: README.md; None makes it from the report, where there is one.
        constructor: ``module:callable`` that builds the dense model, for what is no Hugging Face model.
        arguments: keyword arguments of the constructor, as JSON can hold them.
        files: copied into the folder, such as the metrics of a training run.
        overwrite: replace `out`, if it is a model folder.

    Returns:
        `out`.

    Raises:
        SecateurError: `out` is in the way or cannot be written; the plan does not fit; the model is of a class that
            transformers does not know, and no constructor is given; or what was cut of it cannot be recorded.
    """
    out = Path(out)
    target = check_out(out, overwrite=overwrite, source=source)
    if plan is not None and space is not None:
        plan.check(space)
    _check_model(model, constructor, arguments)
    kind = "constructor" if constructor else "stock" if why_not_stock(model) is None else "modeling"
    texts = {}
    if report is not None:
        texts["report.json"] = json.dumps(json_values(report), indent=2, allow_nan=False) + "\n"
        texts["README.md"] = model_card(report, kind=kind)
    if card is not None:
        texts["README.md"] = card
    with whole_folder(target) as partial, _as_user_error(out):
        if constructor is not None:
            save_built(model, partial, constructor, arguments or {})
        else:
            _save_model(model, partial, source, stock=kind == "stock")
        _save_tokenizer(tokenizer, partial, source)
        if plan is not None:
            plan.save(partial)
        if scores is not None:
            scores.save(partial)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        for file in files:
            shutil.copyfile(file, partial / file.name)
        if constructor is None:
            check_folder(partial)
    return out


def load(folder: str | Path, *, device: str = "cpu", dtype: str | torch.dtype | None = None) -> nn.Module:
    """Load a saved result, with the checks of `load.model.load_model`. No code of the folder is run.

    Args:
        folder: what `save` wrote, or any other model folder or hub id. If it was saved with a constructor, that is
            imported, with the current directory on the path, and called.
        device: where the weights go.
        dtype: of the weights; None is the checkpoint's own.

    Returns:
        The model in evaluation mode.

    Raises:
        SecateurError: The folder is no whole model, its constructor fails or builds another model, or the dtype or
            device is unknown.
    """
    place = Path(folder).expanduser()
    if (place / STRUCTURE).is_file():
        return load_built(place, device=device, dtype=dtype)
    return load_model(folder, device=device, dtype=dtype)[0]


def _check_model(model: nn.Module, constructor: str | None, arguments: Mapping[str, Any] | None) -> None:
    kind = type(model).__name__
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise SecateurError(f"{kind} is on the meta device: {name} has no values to save")
    if constructor is not None and store_of(model) is not None:
        raise SecateurError(f"{kind} is streamed from its files, so it is saved without a constructor")
    if constructor is not None:
        return
    if arguments is not None:
        raise SecateurError(
            "arguments are those of a constructor, and none is given; add constructor='module:callable'"
        )
    if not hasattr(type(model), "save_pretrained") or not hasattr(model, "config"):
        raise SecateurError(
            f"{kind} is no Hugging Face model; say what builds the dense model: constructor='module:callable'"
        )


def why_not_stock(model: Any) -> str | None:
    """Why the stock class, built from the model's own config, is not this model; None if it is.

    Args:
        model: the pruned Hugging Face model.

    Returns:
        In one line: what stock transformers cannot describe; the first tensor that differs, with both shapes.
    """
    kind = type(model).__name__
    if not type(model).__module__.startswith("transformers."):
        return f"stock transformers does not know {kind}, a class of {type(model).__module__}"
    cannot = "stock transformers cannot describe this result"
    try:
        with quiet_transformers(), torch.device("meta"):
            config = type(model.config).from_dict(model.config.to_dict())
            stock = type(model)(config)
    except Exception as error:  # noqa: BLE001 - config classes raise types of their own
        text = " ".join(str(error).split())
        return f"{cannot}: {kind} rejects its config ({text[:300]})"
    have, want = _shapes(model), _shapes(stock)
    for name in [*have, *(name for name in want if name not in have)]:
        if have.get(name) != want.get(name):
            there, stocks = have.get(name, "not there"), want.get(name, "not there")
            return f"{cannot}: {name} is {there} in the model, and {stocks} in a {kind} of its config"
    # Surgery leaves numbers behind that no tensor shows, such as a factor that stood for a size; and of position tables
    # that transformers computes anew, the units that stayed may be others.
    other = stock_difference(model, stock) if was_cut(model) or unsaved(model) else None
    return None if other is None else f"{cannot}: {other} is another in a {kind} of its config"


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}


def _save_model(model: Any, folder: Path, source: Source | None, *, stock: bool) -> None:
    """Config, generation config and weights; one file stays one, shards stay about as large as they were.

    Of a streamed model each unit has a file.
    """
    limit: int = _ONE_FILE
    store = store_of(model)
    if store is not None:
        save_streamed(model, store, folder) if stock else save_cut(model, folder, max_shard_size=limit)
        return
    if source is not None and source.shard_bytes is not None and len(source.files) > 1:
        limit = source.shard_bytes
    if not stock:
        save_cut(model, folder, max_shard_size=limit)
        return
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=limit)


def _save_tokenizer(tokenizer: Any | None, folder: Path, source: Source | None) -> None:
    origin = None if source is None else source.folder
    copied = False
    if origin is not None:
        for pattern in TOKENIZER_FILES:
            for file in origin.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
                    copied = True
        for file in [*origin.glob("LICENSE*"), *origin.glob("NOTICE*")]:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if tokenizer is not None and not copied:
        with quiet_transformers():
            tokenizer.save_pretrained(folder)


def json_values(value: Any) -> Any:
    """The same report with what JSON has no word for as text."""
    if isinstance(value, Mapping):
        return {str(key): json_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path | torch.dtype | torch.device) else value


# --- the folder ---


def check_out(out: Path, *, overwrite: bool, source: Source | None = None) -> Path:
    """Check that a result may be written to `out`; cheap, so ask before the work is done.

    Args:
        out: the folder to make. It may be there if it is empty, or with `overwrite` if it is a model folder.
        overwrite: whether an old result may be replaced.
        source: of the dense model, which must not be replaced.

    Returns:
        The absolute path, links followed.

    Raises:
        SecateurError: Something is in the way, and how to get around it.
    """
    target = Path(out).expanduser().resolve()
    above = next((p for p in target.parents if p.exists()), target.parent)
    if not above.is_dir():
        raise SecateurError(f"{out}: cannot be made, because {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SecateurError(f"{out}: cannot be made, because {above} is not writable")
    if not target.exists():
        return target
    if not target.is_dir():
        raise SecateurError(f"{out}: is a file, and a result is a folder; choose another name")
    if not any(target.iterdir()):
        return target
    if not overwrite:
        raise SecateurError(
            f"{out}: exists already; choose another name, or overwrite it (overwrite=True, --overwrite)"
        )
    if source is not None and source.folder is not None and source.folder.resolve().is_relative_to(target):
        raise SecateurError(f"{out}: holds the model that is being pruned; choose another name")
    why = _not_replaceable(target)
    if why is not None:
        raise SecateurError(f"{out}: will not be overwritten, because {why}; remove it yourself or choose another name")
    return target


def _not_replaceable(folder: Path) -> str | None:
    """Why a folder is not taken for an old result; None if it may be deleted."""
    for place, what in ((Path.home(), "home"), (Path.cwd(), "working")):
        if place.resolve().is_relative_to(folder):
            return f"the {what} folder is in it"
    signs = [("config.json", "model_type"), ("plan.json", "format", "axes"), (STRUCTURE, "format", "constructor")]
    signs += [("survey.json", "format", "consumers")]
    if not any(_has_keys(folder / name, *keys) for name, *keys in signs):
        return f"it is no result (it has neither a model's config.json nor a plan.json, survey.json or {STRUCTURE})"
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "additional_chat_templates")
    if inside:
        return f"it holds other folders ({', '.join(inside[:3])})"
    return None


def _has_keys(path: Path, *keys: str) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and all(key in content for key in keys)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its place at the end; nothing is left of it where that fails."""
    made = _make_parents(target.parent)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    done = False
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _swap(partial, target)
        done = True
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in [] if done else made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and what is above it; those that are new, innermost first."""
    new = [p for p in [folder, *folder.parents] if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SecateurError(f"{folder}: cannot be made ({error.strerror})") from error
    return new


def _swap(new: Path, target: Path) -> None:
    """Rename `new` to `target`. At every moment the old or the new folder is whole, under one of three names."""
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        if target.exists():
            target.rename(aside)
        new.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    if aside.exists():
        try:
            shutil.rmtree(aside)
        except OSError as error:
            raise SecateurError(f"{target} is written, but the old one, now {aside}, cannot be deleted") from error


@contextmanager
def _as_user_error(out: Path) -> Iterator[None]:
    """Full discs, missing rights, and what transformers refuses to write."""
    try:
        yield
    except SecateurError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise SecateurError(f"{out}: the result cannot be written, and nothing is left of it ({text[:300]})") from error
