"""What a function may be told in a recipe: its keyword arguments, and what their type hints take."""

import collections.abc
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal

from secateur.errors import SecateurError, nearest
from secateur.load.built import STRUCTURE
from secateur.load.data import check_source
from secateur.load.functions import find_function, is_constructor
from secateur.load.model import find_source, is_hub_id
from secateur.measure.quality import Metric, load_metric
from secateur.methods.verbs import budget_of

Options = Mapping[str, inspect.Parameter]
"""Name -> its type hint, as ``annotation``, and its default."""
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_WORDS: Mapping[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    Metric: "module:function",
    NoneType: "null",
}


# --- options and their types ---


def options_of(function: Callable[..., Any], only: Iterable[str] | None = None, without: Iterable[str] = ()) -> Options:
    """The keyword arguments of a function, with their resolved type hints.

    Args:
        function: typed; of a class, the arguments that build it.
        only: names to take; every keyword-only one by default.
        without: names to leave out.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        name: parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(function).parameters.items()
        if (parameter.kind is parameter.KEYWORD_ONLY if only is None else name in only) and name not in without
    }


def typed(name: str, value: Any, hint: Any) -> Any:
    """A value of YAML as a type hint wants it: numbers and lists converted, functions found, annotations checked.

    Args:
        name: of the option, for errors.
        value: what the recipe says.
        hint: resolved; ``Annotated[kind, check]`` calls ``check(name, value)``.

    Raises:
        SecateurError: The value is of another type, or is refused by a check, or a function is not there.
    """
    converted = _converted(name, value, hint)
    if converted is _NOTHING:
        known = _names(hint)
        if known and isinstance(value, str):
            raise SecateurError(f"{name}: there is no {value!r}{nearest(value, known)}")
        raise SecateurError(f"{name} must be {_words(hint)}, not {value!r}")
    return converted


_NOTHING = object()


def _converted(name: str, value: Any, hint: Any) -> Any:
    """The converted value, or `_NOTHING` where it is of another type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        found = _converted(name, value, parts[0])
        for check in parts[1:] if found is not _NOTHING else ():
            check(name, found)
        return found
    if origin in (typing.Union, UnionType):
        every = (_converted(name, value, part) for part in parts)
        return next((found for found in every if found is not _NOTHING), _NOTHING)
    if origin in (collections.abc.Callable, Literal):
        return _named(name, value, origin, parts)
    if isinstance(value, list | tuple):
        return _list(name, value, origin, parts)
    if isinstance(value, dict):
        return _dict(name, value, origin, parts)
    return _scalar(name, value, hint)


def _named(name: str, value: Any, origin: Any, parts: Sequence[Any]) -> Any:
    if not isinstance(value, str):
        return _NOTHING
    if origin is Literal:
        return value if value in parts else _NOTHING
    return function(name, value)


def _scalar(name: str, value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (bool, float, str, NoneType) or (hint is int and not isinstance(value, bool)):
        return value if isinstance(value, hint) else _NOTHING
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is Metric and isinstance(value, str):
        function(name, value)
        return load_metric(value)
    return _NOTHING


def _list(name: str, value: Sequence[Any], origin: Any, parts: Sequence[Any]) -> Any:
    if origin is tuple and len(parts) == len(value):
        kinds = parts
    elif origin is collections.abc.Sequence:
        kinds = [parts[0]] * len(value)
    else:
        return _NOTHING
    found = tuple(_converted(name, one, kind) for one, kind in zip(value, kinds, strict=True))
    return _NOTHING if any(one is _NOTHING for one in found) else found


def _dict(name: str, value: Mapping[Any, Any], origin: Any, parts: Sequence[Any]) -> Any:
    if origin is not collections.abc.Mapping:
        return _NOTHING
    keys = [_converted(name, key, parts[0]) for key in value]
    values = [_converted(name, one, parts[1]) for one in value.values()]
    return _NOTHING if any(one is _NOTHING for one in (*keys, *values)) else dict(zip(keys, values, strict=True))


def _names(hint: Any) -> list[str]:
    """The texts that a hint of Literal takes, alone or with null."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, UnionType):
        kinds = [part for part in parts if part is not NoneType]
        return _names(kinds[0]) if len(kinds) == 1 else []
    return list(map(str, parts)) if typing.get_origin(hint) is Literal else []


def _words(hint: Any) -> str:
    """A type hint as people would say it; types that no YAML can be are left out."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _words(parts[0])
    if origin in (typing.Union, UnionType):
        return " or ".join(dict.fromkeys(words for part in parts if (words := _words(part))))
    match origin:
        case collections.abc.Callable:
            found = "module:function"
        case _ if origin is Literal:
            found = f"one of {', '.join(map(str, parts))}"
        case collections.abc.Sequence:
            found = f"a list (each {_words(parts[0])})"
        case collections.abc.Mapping:
            found = f"a mapping (each value {_words(parts[1])})"
        case _ if origin is tuple:
            found = f"a list of {len(parts)} (each {_words(parts[0])})"
        case _:
            found = _WORDS.get(hint, "")
    return found


# --- functions, models and data that a recipe names ---


def names_function(text: str) -> bool:
    """Whether a text is module:function; hub ids with a colon have a slash as well."""
    return _FUNCTION.fullmatch(text) is not None and not Path(text).exists()


def function(name: str, spec: str) -> Callable[..., Any]:
    """Import a function that a recipe names.

    Raises:
        SecateurError: There is none, or importing its module fails.
    """
    try:
        return find_function(spec, name, "my_training:train")
    except SecateurError:
        raise
    except Exception as error:  # a module of the user's own may raise anything
        text = " ".join(str(error).split())
        raise SecateurError(f"{name} {spec!r}: importing it raised {type(error).__name__}: {text[:500]}") from error


def one_of(known: Iterable[str]) -> Callable[[str, str], None]:
    """A check for a name among others."""
    names = tuple(known)

    def check(name: str, value: str) -> None:
        if value not in names:
            raise SecateurError(f"{name}: there is no {value!r}{nearest(value, names)}")

    return check


def at_least(least: int) -> Callable[[str, float], None]:
    """A check for a number; NaN fails it."""

    def check(name: str, value: float) -> None:
        if not value >= least:
            raise SecateurError(f"{name} must be at least {least}, not {value:g}")

    return check


def check_model(name: str, value: str) -> None:
    """Raise SecateurError for a model that is not there; hub ids are not looked up."""
    if is_constructor(value):
        module, _, path = value.partition(":")
        function(name, f"{module}:{path.partition('.')[0]}")  # the callable may be within a class
    elif (Path(value).expanduser() / STRUCTURE).is_file():
        raise SecateurError(f"{name}: {value} was saved with a constructor: give a module:callable that loads it")
    elif not is_hub_id(value):
        find_source(value)


def check_teacher(name: str, value: str) -> None:
    """As `check_model`; ``dense`` is what the recipe began with."""
    if value != "dense":
        check_model(name, value)


def check_file(name: str, value: str) -> None:
    """Raise SecateurError for what is no plain name of an .onnx file."""
    if Path(value).name != value or Path(value).suffix != ".onnx" or value.startswith("."):
        raise SecateurError(f"{name} must be the plain name of an .onnx file, such as model.onnx, not {value!r}")


def check_share(name: str, value: float) -> None:
    """Raise SecateurError for what lies outside of 0 and 1."""
    if not 0 <= value <= 1:
        raise SecateurError(f"{name} is a share of the run, between 0 and 1, not {value:g}")


def check_positive(name: str, value: float) -> None:
    """Raise SecateurError for zero, negative numbers, infinity and NaN."""
    if not 0 < value < math.inf:
        raise SecateurError(f"{name} must be above 0, not {value:g}")


def check_budget(name: str, value: Any) -> None:
    """Raise SecateurError for a budget that cannot be read."""
    del name  # the message says budget, or dims
    budget_of(dict(value) if isinstance(value, Mapping) else value)


def check_data(name: str, value: str) -> None:
    """Raise SecateurError for a file, folder or function that is not there."""
    if names_function(value):
        function(name, value)
    elif value != "self":
        check_source(value)


def check_mixed(name: str, value: str | Mapping[str, float]) -> None:
    """As `check_data`, for one source, or several with their weights."""
    if isinstance(value, str):
        check_data(name, value)
        return
    if not value:
        raise SecateurError(f"{name} must hold at least one source and its weight, such as {{my/text: 0.7}}")
    for source, weight in value.items():
        if source == "self" or names_function(source):
            raise SecateurError(f"{name}: {source} cannot be mixed with other data; give files, folders or hub ids")
        if not 0 < weight < math.inf:
            raise SecateurError(f"{name}: the weight of {source} must be above 0, not {weight:g}")
        check_source(source)


def check_held_out(name: str, value: str) -> None:
    """As `check_data`, for what quality is measured on."""
    if value == "self":
        raise SecateurError(f"{name}: self would measure the model on its own words; give held-out data")
    check_data(name, value)


def check_inputs(name: str, value: Any) -> None:
    """Raise SecateurError for a function that is not there, and for shapes that are none."""
    if isinstance(value, str):
        function(name, value)
        return
    for key in value:
        if key != "shape":
            raise SecateurError(f"{name} has no {key!r}{nearest(key, ['shape'])}")
    if not value.get("shape") or any(size < 1 for shape in value["shape"] for size in shape):
        raise SecateurError(f"{name} must hold sizes of at least 1, such as {{shape: [[1, 3, 32, 32]]}}, not {value}")


ModelName = Annotated[str, check_model]
BudgetText = Annotated[str | Sequence[str] | Mapping[str, int], check_budget]
Calibration = Annotated[str, check_data]
Mixed = Annotated[str | Mapping[str, float], check_mixed]
HeldOut = Annotated[str, check_held_out]
TeacherName = Annotated[str, check_teacher]
FileName = Annotated[str, check_file]
Share = Annotated[float, check_share]
Positive = Annotated[float, check_positive]
Inputs = Annotated[str | Mapping[str, Sequence[Sequence[int]]], check_inputs]
