"""Models that a user's own code builds: ``module:callable``, and weights from one safetensors file."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from secateur.errors import SecateurError, nearest


def build(spec: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a model by calling what ``module:callable`` names.

    The module is imported with the current directory on the path, as ``python -m`` does.

    Args:
        spec: such as ``torchvision.models:resnet18`` or ``train:Net``; the callable may be within a class.
        arguments: keyword arguments of the call.

    Returns:
        What the callable returns.

    Raises:
        SecateurError: There is no such module or callable, the arguments do not fit, the call raises, or its result
            is no nn.Module.
    """
    given = dict(arguments or {})
    with _current_directory_on_path():
        function = _find(spec)
        try:
            inspect.signature(function).bind(**given)
        except TypeError as error:
            raise SecateurError(f"constructor {spec!r}: the arguments {sorted(given)} do not fit: {error}") from error
        except ValueError:
            pass  # builtins have no signature: the call itself will tell
        try:
            model = function(**given)
        except SecateurError:
            raise
        except Exception as error:  # anything may go wrong in a user's code
            text = " ".join(str(error).split())
            raise SecateurError(f"constructor {spec!r} raised {type(error).__name__}: {text[:500]}") from error
    if not isinstance(model, nn.Module):
        kind = f"a {type(model).__name__}"
        raise SecateurError(f"constructor {spec!r} returned {kind}, which is no torch.nn.Module; return the model")
    return model


def _find(spec: str) -> Callable[..., Any]:
    name, colon, path = spec.partition(":")
    if not (colon and name and path):
        raise SecateurError(f"constructor {spec!r} must have the form module:callable, such as 'train:Net'")
    found: Any = _import(spec, name)
    where = f"module {name!r}"
    for part in path.split("."):
        if not hasattr(found, part):
            known = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n, None))]
            hint = nearest(part, known)
            hint = hint if hint.startswith("; did you mean") or len(known) <= 8 else ""
            raise SecateurError(f"constructor {spec!r}: {where} has no {part!r}{hint}")
        found, where = getattr(found, part), f"{part!r} of {name!r}"
    if isinstance(found, nn.Module):
        raise SecateurError(f"constructor {spec!r} is a model already; name a function or class that builds it")
    if not callable(found):
        raise SecateurError(f"constructor {spec!r} is a {type(found).__name__}, and nothing that can be called")
    return found  # type: ignore[no-any-return]


def _import(spec: str, name: str) -> Any:
    try:
        importlib.invalidate_caches()  # the file may be younger than the last look into its folder
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            slip = "; give it without .py and with dots" if "/" in name or name.endswith(".py") else ""
            raise SecateurError(
                f"constructor {spec!r}: there is no module {error.name!r} here ({Path.cwd()}) or installed{slip}"
            ) from error
        raise SecateurError(
            f"constructor {spec!r}: module {name!r} needs {error.name!r}, which is not installed"
        ) from error
    except Exception as error:  # anything may go wrong in a user's code
        text = " ".join(str(error).split())
        what = f"{type(error).__name__}: {text[:500]}"
        raise SecateurError(f"constructor {spec!r}: importing {name!r} raised {what}") from error


@contextmanager
def _current_directory_on_path() -> Iterator[None]:
    """Only for the time of the import and the call: a library leaves the path of its host as it was."""
    here = os.getcwd()  # noqa: PTH109 - sys.path holds texts
    if "" in sys.path or here in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load all weights of a model, in place, from one safetensors file.

    Values are cast to the model's own dtypes. Of tied tensors, one is enough.

    Args:
        model: on any device.
        path: what ``safetensors.torch.save_file(model.state_dict(), path)`` or ``save_model`` wrote.

    Raises:
        SecateurError: There is no such file, it is damaged or a pickle, or a tensor is missing, left over or of
            another shape. The model is as it was.
    """
    tensors = read_tensors(Path(path))
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    shared = {id(own[name]): name for name in own if name in tensors}
    for name, tensor in own.items():
        source = tensors.get(shared.get(id(tensor), ""))
        if source is None:
            count = sum(id(t) not in shared for t in own.values())
            more = f" and {count - 1} more" if count > 1 else ""
            raise SecateurError(f"{path}: lacks {name}{more} of the {type(model).__name__}{_near(name, tensors)}")
        if source.shape != tensor.shape:
            sizes = f"{list(source.shape)} in the file and {list(tensor.shape)} in the {type(model).__name__}"
            raise SecateurError(f"{path}: {shared[id(tensor)]} is {sizes}: the weights are of another model")
        if name in tensors and tensors[name] is not source and not torch.equal(tensors[name], source):
            both = f"{name} and {shared[id(tensor)]}"
            raise SecateurError(f"{path}: {both} differ, and they are one tensor in the {type(model).__name__}")
    extra = [name for name in tensors if name not in own]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise SecateurError(f"{path}: the {type(model).__name__} has no {extra[0]}{more}{_near(extra[0], own)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Raises:
        SecateurError: There is no such file, or it is damaged or of another format.
    """
    if path.is_dir():
        raise SecateurError(f"{path}: is a folder; give the .safetensors file in it")
    if not path.exists():
        raise SecateurError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise SecateurError(
            f"{path}: no readable safetensors file ({error}); pickles are not read: write weights with "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error


def _near(name: str, known: Mapping[str, Any]) -> str:
    hint = nearest(name, known)
    return hint if hint.startswith("; did you mean") else ""
