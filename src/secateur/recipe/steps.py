"""The steps of a recipe: one function each, here or beside, and one line each in the table."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import nn

from secateur.choose.plan import Plan
from secateur.load.batches import size_of
from secateur.measure.classify import classify, labelled
from secateur.measure.quality import perplexity
from secateur.mend import batch_norm
from secateur.methods import METHODS, verbs
from secateur.methods import iterative as in_steps
from secateur.methods.repair import MENDS
from secateur.progress import Track
from secateur.recipe.options import BudgetText, Calibration, HeldOut, at_least, one_of
from secateur.recipe.shipping import export, quantize, report
from secateur.recipe.training import distill, finetune, sparsify
from secateur.recipe.work import Made, Reading, Work, parted, rows_of, shown
from secateur.train.settings import Distillation, Training

SCHEDULES = ("cubic", "linear", "exponential", "constant")
MORE: Mapping[str, tuple[type, ...]] = {
    "reading": (Reading,),
    "options": (Reading,),
    "training": (Reading, Training),
    "distilling": (Reading, Training, Distillation),
}
"""What a step takes beside its keyword arguments, by the name of its last one: fields of these dataclasses."""


# Each step: keyword arguments are what a recipe may say. `data` and `eval_data` that it does not say are those of the
# whole recipe. **reading, **training... = also the fields that MORE says; **options = also those of the method.


def prune(
    work: Work, *, budget: BudgetText, method: Annotated[str, one_of(METHODS)] = "minitron",
    data: Calibration | None = None, eval_data: HeldOut | None = None,
    mend: Annotated[str, one_of(MENDS)] | None = None, **options: Any,
) -> Made:  # fmt: skip
    """Cut once, as ``secateur prune`` does; with `eval_data`, measure what that cost."""
    reading, own = parted(options, Reading)
    taken = inspect.signature(METHODS[method]).parameters
    if "seed" in taken:
        own["seed"] = work.seed
    used = data or ("self" if verbs.needs_data(method) else None)
    # As in verbs.prune, `samples` is about what is calibrated on.
    held_out = None if eval_data is None else rows_of(work, "eval_data", eval_data, reading | {"samples": None})
    result = verbs.prune(
        work.model, budget, method=method, data=rows_of(work, "data", used, reading), eval_data=held_out,
        inputs=work.inputs if "inputs" in taken else None, name=work.name, track=work.track, mend=mend, **own,
    )  # fmt: skip
    report = {**result.report, "data": {"calibration": shown(used), "evaluation": shown(eval_data)}}
    report["spent"] = report.pop("seconds")  # the parts of it
    if "measured" in report:
        report["measured"] = {**report["measured"], "data": shown(eval_data)}
    for told_once in ("options", "secateur", "format", "made"):  # by the whole recipe
        del report[told_once]
    return Made(result.model, report, result.plan, result.scores)


def iterative(
    work: Work, *, budget: BudgetText, train: in_steps.Train,
    method: Annotated[str, one_of(in_steps.METHODS)] = "magnitude",
    steps: Annotated[int, at_least(1)] = 5, schedule: Annotated[str, one_of(SCHEDULES)] = "cubic",
    epochs_per_step: Annotated[int, at_least(1)] = 1, evaluate: in_steps.Metric | None = None,
    higher_is_better: bool = True, tolerance: Annotated[float, at_least(0)] | None = None,
    data: Calibration | None = None, eval_data: HeldOut | None = None,
    mend: Annotated[str, one_of(MENDS)] | None = None, **options: Any,
) -> Made:  # fmt: skip
    """Prune and fine-tune in steps; without `evaluate`, by the accuracy or minus the perplexity on `eval_data`."""
    reading, own = parted(options, Reading)
    if "seed" in inspect.signature(METHODS[method]).parameters:
        own["seed"] = work.seed
    metric = getattr(evaluate, "__name__", "evaluate")
    if evaluate is None:
        rows = rows_of(work, "eval_data", eval_data, reading | {"samples": None})
        metric, evaluate = _metric(rows or [], work.track)
    found = in_steps.iterative(
        work.model, verbs.budget_of(budget), train, evaluate, method=method, steps=steps, schedule=schedule,
        epochs_per_step=epochs_per_step, higher_is_better=higher_is_better, tolerance=tolerance,
        data=rows_of(work, "data", data, reading), inputs=work.inputs, track=work.track, mend=mend, **own,
    )  # fmt: skip
    asked = str(verbs.budget_of(budget))
    report = {
        "method": method,
        "budget": asked,
        "metric": metric,
        "dense": found.dense,
        "best": found.best,
        "stopped": found.stopped,
        "history": list(found.history),
    }
    origin = {**found.plan.origin, "model": work.name, "method": f"iterative {method}", "budget": asked}
    plan = dataclasses.replace(found.plan, origin=origin) if found.best else Plan()
    return Made(found.model, report, plan, trained=found.best > 0)


def adapt_batch_norm(work: Work, *, data: Calibration, **reading: Any) -> Made:
    """Estimate the running statistics of all batch norms anew."""
    model = copy.deepcopy(work.model)
    rows = rows_of(work, "data", data, reading) or []
    count = batch_norm.adapt_batch_norm(model, rows, track=work.track)
    samples = sum(map(size_of, rows))
    return Made(model, {"batch_norms_adapted": count, "samples": samples})


def evaluate(work: Work, *, eval_data: HeldOut, **reading: Any) -> Made:
    """Measure the model beside the dense one that the recipe began with."""
    rows = rows_of(work, "eval_data", eval_data, reading)
    found = verbs.evaluate(work.model, rows, against=work.dense, track=work.track)
    measured: dict[str, Any] = {}
    for name, value in found.items():
        if name in ("samples", "tokens"):
            measured[name] = int(value)
        elif f"dense_{name}" in found:
            measured[name] = {"dense": found[f"dense_{name}"], "pruned": value}
        elif not name.startswith("dense_"):
            measured[name] = value
    return Made(work.model, {"measured": {**measured, "data": shown(eval_data)}})


STEPS: Mapping[str, Callable[..., Made]] = {
    "prune": prune,
    "iterative": iterative,
    "distill": distill,
    "finetune": finetune,
    "sparsify": sparsify,
    "adapt_batch_norm": adapt_batch_norm,
    "evaluate": evaluate,
    "export": export,
    "quantize": quantize,
    "report": report,
}
LOOKING = ("evaluate", "export", "quantize", "report")
"""Steps that leave the model as it is."""
TRAINING = ("distill", "finetune", "sparsify")
"""Steps that train by `methods.healing`."""
CUTTING = ("prune", "iterative")
"""Steps that decide by a method of the table of methods."""


def method_of(name: str, said: Mapping[str, Any]) -> str | None:
    """The method of pruning that a step is told, or its default; None for steps that have none."""
    if name not in CUTTING:
        return None
    told = said.get("method")
    return told if isinstance(told, str) else str(inspect.signature(STEPS[name]).parameters["method"].default)


def _metric(rows: Sequence[Any], track: Track) -> tuple[str, in_steps.Metric]:
    """The name of the metric that goes with the batches, and the metric; higher is better."""
    classes = labelled(rows)

    def measure(model: nn.Module) -> float:
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            return math.nan  # training has diverged: that ends the steps, and the best one before stays
        return classify(model, rows, track).accuracy if classes else -perplexity(model, rows, track)

    return "accuracy" if classes else "minus perplexity", measure
