"""Reading a recipe: everything that can be known to be wrong is told at once, before anything heavy starts."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError, nearest
from secateur.load.functions import is_constructor
from secateur.load.model import find_source, is_hub_id
from secateur.methods import MASKING, METHODS
from secateur.methods.structural import FROM_DATA
from secateur.methods.verbs import budget_of
from secateur.recipe.options import names_function, options_of, typed
from secateur.recipe.pipeline import Head, Recipe, Step
from secateur.recipe.sheet import Sheet, Where, overridden
from secateur.recipe.steps import STEPS, Reading, method_of
from secateur.ship.checkpoint import check_out

NOT_TOLD = ("inputs", "stored_dtype", "seed", "track")
"""Options of methods that a recipe sees to for all steps."""
_DATA = ("data", "eval_data")
"""Options of steps that a recipe may give for all of them."""


def load(
    source: str | Path | Mapping[str, Any],
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    overwrite: bool = False,
) -> Recipe:
    """Read a recipe and check all of it; nothing heavy is done.

    Modules of functions that it names are imported. They must be importable; the command line adds the working
    directory to the path. Paths are seen from the working directory too.

    Args:
        source: a YAML file, or a mapping of the same form.
        overrides: values in place of the recipe's: texts ``steps.1.tolerance=0.1``, or path -> value. Steps are
            counted from 1, and the name of the step is left out.
        overwrite: whether an old result in `out` may be replaced.

    Raises:
        SecateurError: for all that is wrong with it at once, each with its line: unknown keys, steps and options,
            missing ones, values of the wrong type; data, models and functions that are not there; what contradicts
            each other; a folder in the way.
    """
    sheet = Sheet(source)
    overridden(sheet, overrides)
    known = options_of(Head)
    said = {key: value for key, value in sheet.values.items() if key != "steps"}
    for key in said:
        if key not in known:
            sheet.problem((key,), f"a recipe has no {key!r}{nearest(str(key), [*known, 'steps'])}")
    head = _filled(sheet, (), "a recipe", known, said, {})
    steps = list(_steps(sheet, head))
    _check_data_of_constructor(sheet)
    if "out" in head:
        try:
            model = str(head.get("model", ""))
            local = model and not is_constructor(model) and not is_hub_id(model)
            check_out(head["out"], overwrite=overwrite, source=find_source(model) if local else None)
        except SecateurError as error:
            sheet.problem(("out",), str(error))
    sheet.check()
    return Recipe(Head(**head), steps, overwrite)


def _steps(sheet: Sheet, head: Mapping[str, Any]) -> Iterator[Step]:
    """The steps that can be understood; the others are problems of the sheet."""
    if "steps" not in sheet.values:
        sheet.problem((), f"a recipe needs steps: a list of {', '.join(STEPS)}")
        return
    written = sheet.values["steps"]
    if not isinstance(written, list) or not written:
        sheet.problem(("steps",), f"steps must be a list of at least one step, not {written!r}")
        return
    for i, entry in enumerate(written):
        if not isinstance(entry, dict) or len(entry) != 1:
            sheet.problem(("steps", i), f"a step is a name and its options, such as 'evaluate: {{}}', not {entry!r}")
            continue
        name, said = next(iter(entry.items()))
        where: Where = ("steps", i, name)
        if name not in STEPS:
            sheet.problem(where, f"there is no step {name!r}{nearest(str(name), STEPS)}")
            continue
        if said is not None and not isinstance(said, dict):
            sheet.problem(where, f"{name} takes a mapping of options, not {said!r}")
            continue
        said = said or {}
        known = _options(name, said)
        method = method_of(name, said)
        what = name if method is None else f"{name} by {method}"
        for option in said:
            if option not in known:
                sheet.problem((*where, option), f"{what} has no option {option!r}{nearest(str(option), known)}")
        arguments = _filled(sheet, where, what, known, said, head)
        inherited = {key: sheet.values[key] for key in _DATA if key in known and sheet.values.get(key) is not None}
        whole = {**inherited, **said}
        for option, text in _conflicts(name, arguments, whole, str(sheet.values.get("model", ""))):
            sheet.problem((*where, option), text)
        yield Step(name, arguments, whole)


def _options(name: str, said: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """What a step takes: its keyword arguments; how data is read; the options of the method that it is told."""
    function = STEPS[name]
    known = options_of(function)
    rest = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
    if rest:
        known = {**options_of(Reading), **known}
    if rest == ["options"]:
        # Of a method that there is not, the name is the mistake, and not the options.
        named = METHODS.get(method_of(name, said) or "")
        for algorithm in [named] if named is not None else METHODS.values():
            known = {**options_of(algorithm, without=NOT_TOLD), **known}
    return dict(known)


def _filled(
    sheet: Sheet,
    where: Where,
    what: str,
    known: Mapping[str, inspect.Parameter],
    said: Mapping[str, Any],
    whole: Mapping[str, Any],
) -> dict[str, Any]:
    """What is said, typed and checked, with what the whole recipe gives; what is wrong becomes a problem of the sheet.

    Args:
        sheet: that it stands in.
        where: it stands there.
        what: it is about, for errors.
        known: options and their types.
        said: option -> value.
        whole: the recipe's own ``data`` and ``eval_data``, for options of that name.
    """
    found: dict[str, Any] = {}
    for name, parameter in known.items():
        if name in said:
            try:
                found[name] = typed(name, said[name], parameter.annotation)
            except SecateurError as error:
                sheet.problem((*where, name), str(error))
        elif name in _DATA and whole.get(name) is not None:
            found[name] = whole[name]
        elif name in _DATA and where and sheet.values.get(name) is not None:
            pass  # it is wrong at the top, and told there
        elif parameter.default is parameter.empty:
            sheet.problem(where, f"{what} needs {name}{', here or for the whole recipe' if name in _DATA else ''}")
    return found


def _conflicts(
    name: str, arguments: Mapping[str, Any], said: Mapping[str, Any], model: str
) -> Iterator[tuple[str, str]]:
    """(option, what is wrong) of options that do not go together; each by itself is told elsewhere.

    Args:
        name: of the step.
        arguments: what was sound.
        said: all of it, with what the whole recipe gives.
        model: of the recipe.
    """
    if name == "iterative" and said.get("evaluate") is None:
        if said.get("eval_data") is None:
            yield "evaluate", "iterative needs evaluate, a module:function, or eval_data, here or for the whole recipe"
        if said.get("higher_is_better") is False:
            yield "higher_is_better", "higher_is_better: false goes with evaluate; without it, higher is better"
    method = method_of(name, said)
    if method is None or method not in METHODS or ("method" in said and "method" not in arguments):
        return  # it has none, or one that was refused
    if is_constructor(model) and "inputs" not in inspect.signature(METHODS[method]).parameters:
        yield "method", f"{method} prunes Hugging Face language models; for {model} say method: structural"
    criterion = said.get("criterion")
    if said.get("data") is None and (criterion in FROM_DATA or (method in MASKING and method != "magnitude")):
        what = f"criterion {criterion}" if criterion in FROM_DATA else method
        yield "data", f"{what} needs data, here or for the whole recipe"
    if "budget" in arguments:
        try:
            asked = budget_of(arguments["budget"])
            if method in MASKING:
                asked.sparsity()
            elif "sparsity" in asked.limits or asked.n_m is not None:
                yield "budget", f"budget {asked} is for methods that mask ({', '.join(MASKING)}), and {method} cuts"
        except SecateurError as error:
            yield "budget", str(error)


def _check_data_of_constructor(sheet: Sheet) -> None:
    """Files and hub ids are for language models of Hugging Face; any other model takes batches of a function."""
    model = sheet.values.get("model")
    if not isinstance(model, str) or not is_constructor(model):
        return
    places: list[Where] = [()]
    steps = sheet.values.get("steps")
    for i, step in enumerate(steps if isinstance(steps, list) else []):
        if isinstance(step, dict):
            places += [("steps", i, name) for name, said in step.items() if isinstance(said, dict)]
    for where in places:
        for name in _DATA:
            value = sheet.at(where).get(name)
            told = name == "eval_data" and value == "self"  # that never goes
            if isinstance(value, str) and not names_function(value) and not told:
                text = "which returns batches (inputs, targets)"
                sheet.problem((*where, name), f"{name} {value}: for {model} give module:function, {text}")
