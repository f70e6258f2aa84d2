"""Functions of the user's own: ``module:function``."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError, nearest


def find_function(spec: str, what: str, example: str) -> Callable[..., Any]:
    """Import a function of the user's own.

    Args:
        spec: ``module:function``; the module must be importable.
        what: what to call it in errors, such as "metric".
        example: a spec that would do.

    Raises:
        SecateurError: There is no such module or function.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise SecateurError(f"{what} {spec!r} must read module:function, such as {example}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise SecateurError(f"{what} {spec!r}: {module_name} needs a module {error.name!r}") from error
        raise SecateurError(
            f"{what} {spec!r}: no module {error.name!r}; is its folder in PYTHONPATH or the working directory?"
        ) from error
    if not hasattr(module, attribute):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        hint = nearest(attribute, known) if known else "; it defines no functions"
        raise SecateurError(f"{what} {spec!r}: module {module_name!r} has no {attribute!r}{hint}")
    function: Any = getattr(module, attribute)
    if not callable(function):
        raise SecateurError(f"{what} {spec!r}: {attribute!r} is {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def call(spec: str, what: str, example: str) -> Any:
    """What a function of the user's own returns when it is called without arguments.

    Raises:
        SecateurError: There is no such function, or it raises.
    """
    function = find_function(spec, what, example)
    try:
        return function()
    except SecateurError:
        raise
    except Exception as error:  # whatever the user's own code raises
        text = " ".join(str(error).split())
        raise SecateurError(f"{what} {spec!r} raised {type(error).__name__}: {text[:500]}") from error


def is_constructor(name: str) -> bool:
    """Whether MODEL is module:callable; folders and hub ids have no colon."""
    return ":" in name and not Path(name).expanduser().exists()


def names_function(text: str | None) -> bool:
    """Whether --data is module:function: its module is there, and no file of that name. Hub ids may have colons too."""
    module, colon, name = (text or "").partition(":")
    if not colon or Path(text or "").exists() or not all(p.isidentifier() for p in f"{module}.{name}".split(".")):
        return False
    return importlib.util.find_spec(module.partition(".")[0]) is not None
