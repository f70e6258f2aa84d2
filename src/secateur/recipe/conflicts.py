"""What does not go together in a recipe, though each option by itself is sound."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from secateur.errors import SecateurError
from secateur.load.functions import is_constructor
from secateur.methods import MASKING, METHODS
from secateur.methods.structural import FROM_DATA
from secateur.methods.verbs import budget_of
from secateur.recipe.options import names_function
from secateur.recipe.pipeline import Step
from secateur.recipe.sheet import Sheet, Where
from secateur.recipe.steps import CUTTING, LOOKING, MORE, STEPS, TRAINING, method_of
from secateur.train.options import RULES
from secateur.train.settings import Distillation, Training

DATA = ("data", "eval_data")
"""Options of steps that a recipe may give for all of them."""


@dataclass(frozen=True)
class Placed:
    """A step, and where its options stand."""

    step: Step
    where: Where


def within(name: str, arguments: Mapping[str, Any], said: Mapping[str, Any], model: str) -> Iterator[tuple[str, str]]:
    """(option, what is wrong) of the options of one step that do not go together.

    Args:
        name: of the step.
        arguments: what was sound.
        said: all of it, with what the whole recipe gives.
        model: of the recipe.
    """
    if name in CUTTING:
        yield from _cutting(name, arguments, said, model)
    if name in TRAINING:
        yield from _training(name, arguments, said)
    if name == "sparsify":
        yield from _sparsify(arguments, said)
    if name == "quantize" and arguments.get("mode") == "static" and said.get("data") is None:
        yield "mode", "mode static needs data to calibrate on, here or for the whole recipe; dynamic does without"
    if name == "quantize" and arguments.get("mode") != "static" and said.get("ranges") is not None:
        yield "ranges", "ranges are found by calibration: say mode: static, or leave them out"


def _cutting(name: str, arguments: Mapping[str, Any], said: Mapping[str, Any], model: str) -> Iterator[tuple[str, str]]:
    """Of steps with a method of pruning."""
    if name == "iterative" and said.get("evaluate") is None:
        if said.get("eval_data") is None:
            yield "evaluate", "iterative needs evaluate, a module:function, or eval_data, here or for the whole recipe"
        if said.get("higher_is_better") is False:
            yield "higher_is_better", "higher_is_better: false goes with evaluate; without it, higher is better"
    method = method_of(name, said)
    if method is None or method not in METHODS or ("method" in said and "method" not in arguments):
        return  # one that was refused
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


def _training(name: str, arguments: Mapping[str, Any], said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of steps that train: what their settings themselves refuse."""
    last = [p.name for p in inspect.signature(STEPS[name]).parameters.values() if p.kind is p.VAR_KEYWORD]
    for kind in MORE[last[0]]:
        if kind in (Training, Distillation):
            own = [field.name for field in fields(kind)]
            try:
                kind(**{n: arguments[n] for n in own if n in arguments}).check()
            except SecateurError as error:
                words = re.findall(r"\w+", str(error))
                yield next((word for word in words if word in said and word in own), own[0]), str(error)
    if said.get("evaluate") is not None and said.get("eval_data") is not None:
        yield "evaluate", "evaluate and eval_data both say how good the model is: give one of them"
    if said.get("higher_is_better") is False and said.get("evaluate") is None:
        yield "higher_is_better", "higher_is_better: false goes with evaluate; without it, it is known which is better"


def _sparsify(arguments: Mapping[str, Any], said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of training-time sparsity."""
    method = arguments.get("method", "magnitude")
    rule = RULES.get("movement soft" if method == "movement" and arguments.get("mode") == "soft" else method)
    if rule is None:
        return
    if rule.budgets and said.get("budget") is None:
        yield "budget", f"sparsify by {method} needs a budget, such as sparsity=80%"
    if "budget" in arguments and arguments["budget"] is not None:
        try:
            budget_of(arguments["budget"]).sparsity()
        except SecateurError as error:
            yield "budget", str(error)
    if rule.schedule == "none" and said.get("schedule") is not None:
        yield "schedule", f"sparsify by {method} takes no schedule: it holds masks as they are"
    begin, end = arguments.get("begin") or 0.0, arguments.get("end", 0.75)
    if not begin < end:
        yield "begin", f"the schedule begins at {begin:g} of the run and ends at {end:g}: it must begin before it ends"


def between(placed: Sequence[Placed]) -> Iterator[tuple[Where, str]]:
    """(where, what is wrong) of steps that need what is not there when their time comes.

    Args:
        placed: all steps in their order, rounds of a repeat one after the other.
    """
    exported: int | None = None
    changed = 0
    files: dict[str, int] = {}
    for number, one in enumerate(placed, start=1):
        name, where = one.step.name, one.where
        if name == "quantize" and exported is None:
            yield where, "quantize takes the file of an export, and there is none: put export before"
        elif name == "quantize" and exported is not None and changed > exported:
            step = placed[changed - 1].step.name
            text = f"quantize takes the file of step {exported}, export, and step {changed}, {step}, changes the model"
            yield where, f"{text} after it: put export behind that"
        if name == "report" and number == 1:
            yield where, "report tells of the steps before it, and there are none: put steps before"
        if name in ("export", "quantize"):
            file = one.step.arguments.get("file") or inspect.signature(STEPS[name]).parameters["file"].default
            if file in files:
                yield where, f"step {files[file]} writes {file} too: give another file, such as file: other.onnx"
            files.setdefault(file, number)
        exported = number if name == "export" else exported
        changed = changed if name in LOOKING else number


def data_of_constructor(sheet: Sheet) -> None:
    """Files and hub ids are for language models of Hugging Face; any other model takes batches of a function."""
    model = sheet.values.get("model")
    if not isinstance(model, str) or not is_constructor(model):
        return
    for where in [(), *_options_of_steps(sheet, ())]:
        for name in DATA:
            value = sheet.at(where).get(name)
            told = name == "eval_data" and value == "self"  # that never goes
            mixed = isinstance(value, dict) and name == "data"
            if mixed or (isinstance(value, str) and not names_function(value) and not told):
                text = "which returns batches (inputs, targets)"
                sheet.problem((*where, name), f"{name} {value}: for {model} give module:function, {text}")


def _options_of_steps(sheet: Sheet, above: Where) -> Iterator[Where]:
    steps = sheet.at(above).get("steps")
    for i, step in enumerate(steps if isinstance(steps, list) else []):
        for name, said in step.items() if isinstance(step, dict) else ():
            if isinstance(said, dict):
                yield (*above, "steps", i, name)
                if name == "repeat" and not above:
                    yield from _options_of_steps(sheet, (*above, "steps", i, name))
