"""Reading a recipe: everything that can be known to be wrong is told at once, before anything heavy starts."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError, nearest
from secateur.load.functions import is_constructor
from secateur.load.model import find_source, is_hub_id
from secateur.methods import METHODS
from secateur.recipe import conflicts, repeat
from secateur.recipe.conflicts import DATA, Placed
from secateur.recipe.options import options_of, typed
from secateur.recipe.pipeline import Head, Recipe, Step
from secateur.recipe.sheet import Sheet, Where, overridden
from secateur.recipe.steps import MORE, STEPS, TRAINING, method_of
from secateur.ship.checkpoint import check_out

NOT_TOLD = ("inputs", "stored_dtype", "seed", "track")
"""Options of methods that a recipe sees to for all steps."""


def load(
    source: str | Path | Mapping[str, Any],
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    overwrite: bool = False,
    fresh: bool = False,
) -> Recipe:
    """Read a recipe and check all of it; nothing heavy is done.

    Modules of functions that it names are imported. They must be importable; the command line adds the working
    directory to the path. Paths are seen from the working directory too.

    Args:
        source: a YAML file, or a mapping of the same form.
        overrides: values in place of the recipe's: texts ``steps.1.tolerance=0.1``, or path -> value. Steps are
            counted from 1, and the name of the step is left out; within a repeat, ``steps.2.steps.1.budget``.
        overwrite: whether an old result in `out` may be replaced. One that this very recipe has made is not in the way.
        fresh: whether steps that are done already, in ``<out>.steps``, are done again.

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
    placed = _steps(sheet, head, ())
    for where, text in conflicts.between(placed):
        sheet.problem(where, text)
    conflicts.data_of_constructor(sheet)
    in_the_way = None
    if "out" in head:
        try:
            model = str(head.get("model", ""))
            local = model and not is_constructor(model) and not is_hub_id(model)
            check_out(head["out"], overwrite=overwrite, source=find_source(model) if local else None)
        except SecateurError as error:
            in_the_way = str(error)
    if in_the_way is not None and not sheet.sound:
        sheet.problem(("out",), in_the_way)
    sheet.check()
    found = Recipe(Head(**head), [one.step for one in placed], overwrite, fresh)
    if in_the_way is not None and found.made() is None:  # what it made itself is not in its way
        sheet.problem(("out",), in_the_way)
        sheet.check()
    return found


def _steps(sheet: Sheet, head: Mapping[str, Any], above: Where) -> list[Placed]:
    """The steps that can be understood, of the recipe or of a repeat; the others are problems of the sheet."""
    values, what = sheet.at(above), "a repeat" if above else "a recipe"
    if "steps" not in values:
        sheet.problem(above, f"{what} needs steps: a list of {', '.join(STEPS)}{'' if above else ', repeat'}")
        return []
    written = values["steps"]
    if not isinstance(written, list) or not written:
        sheet.problem((*above, "steps"), f"steps must be a list of at least one step, not {written!r}")
        return []
    found: list[Placed] = []
    for i, entry in enumerate(written):
        if not isinstance(entry, dict) or len(entry) != 1:
            text = f"a step is a name and its options, such as 'evaluate: {{}}', not {entry!r}"
            sheet.problem((*above, "steps", i), text)
            continue
        name, said = next(iter(entry.items()))
        where: Where = (*above, "steps", i, name)
        if name not in STEPS and (name != "repeat" or above):
            nested = "a repeat holds no other repeat" if name == "repeat" else None
            sheet.problem(where, nested or f"there is no step {name!r}{nearest(str(name), [*STEPS, 'repeat'])}")
        elif said is not None and not isinstance(said, dict):
            sheet.problem(where, f"{name} takes a mapping of options, not {said!r}")
        elif name == "repeat":
            found += _repeat(sheet, head, where, said or {}, found)
        else:
            found.append(Placed(_step(sheet, head, where, name, said or {}), where))
    return found


def _repeat(
    sheet: Sheet, head: Mapping[str, Any], where: Where, said: Mapping[str, Any], before: Sequence[Placed]
) -> list[Placed]:
    """The steps of all rounds; those of one round where something is wrong."""
    known = options_of(repeat.Repeat)
    for option in said:
        if option not in known and option != "steps":
            sheet.problem((*where, option), f"repeat has no option {option!r}{nearest(str(option), [*known, 'steps'])}")
    told = _filled(sheet, where, "repeat", known, {k: v for k, v in said.items() if k != "steps"}, {})
    steps = _steps(sheet, head, where) if said else []
    if not said:
        sheet.problem(where, "repeat needs steps, and times or until")
    unsound = any(said.get(name) is not None and name not in told for name in known)
    if not steps or unsound or any(option not in known and option != "steps" for option in said):
        return steps
    wrong = list(repeat.problems(told, steps, before))
    for i, text in wrong:
        sheet.problem(where if i is None else (*steps[i].where, "budget"), text)
    return steps if wrong else repeat.unrolled(told, steps, before)


def _step(sheet: Sheet, head: Mapping[str, Any], where: Where, name: str, said: Mapping[str, Any]) -> Step:
    """One step, with what is sound of its options."""
    known = known_options(name, said)
    method = method_of(name, said)
    what = name if method is None else f"{name} by {method}"
    for option in said:
        if option not in known:
            sheet.problem((*where, option), f"{what} has no option {option!r}{nearest(str(option), known)}")
    # A step that measures by a function of its own does without the recipe's held-out data.
    own = name in TRAINING and said.get("evaluate") is not None
    whole_recipe = {key: value for key, value in head.items() if not (own and key == "eval_data")}
    arguments = _filled(sheet, where, what, known, said, whole_recipe)
    given = {key: sheet.values.get(key) for key in DATA if key in known and not (own and key == "eval_data")}
    inherited = {key: value for key, value in given.items() if value is not None}
    whole = {**inherited, **said}
    for option, text in conflicts.within(name, arguments, whole, str(sheet.values.get("model", ""))):
        sheet.problem((*where, option), text)
    return Step(name, arguments, whole)


def known_options(name: str, said: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """What a step takes: its keyword arguments; the fields that MORE says; the options of its method."""
    function = STEPS[name]
    known = options_of(function)
    rest = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
    for kind in MORE[rest[0]] if rest else ():
        known = {**options_of(kind, without=NOT_TOLD), **known}
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
        elif name in DATA and whole.get(name) is not None:
            found[name] = whole[name]
        elif name in DATA and where and sheet.values.get(name) is not None:
            pass  # it is wrong at the top, and told there
        elif parameter.default is parameter.empty:
            sheet.problem(where, f"{what} needs {name}{', here or for the whole recipe' if name in DATA else ''}")
    return found
