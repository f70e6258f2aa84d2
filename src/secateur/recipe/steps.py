"""The steps of a recipe: one function each, and one line each in the table."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import nn

from secateur.choose.plan import Plan
from secateur.choose.rescore import MaskScores
from secateur.errors import SecateurError
from secateur.load.batches import Batch, size_of
from secateur.load.functions import call
from secateur.measure.classify import classify, labelled
from secateur.measure.quality import perplexity
from secateur.mend import batch_norm
from secateur.methods import METHODS, verbs
from secateur.methods import iterative as in_steps
from secateur.methods.repair import MENDS
from secateur.progress import Track
from secateur.recipe.options import BudgetText, Calibration, HeldOut, at_least, names_function, one_of

SCHEDULES = ("cubic", "linear", "exponential", "constant")
Count = Annotated[int, at_least(1)]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the data of a step is read, as `verbs.batches_of` takes it: what a step may be told as ``**reading``."""

    samples: Count | None = None
    seq_len: Count | None = None
    batch_size: Count = 8
    text_field: str = "text"
    split: str = "train"


@dataclass(frozen=True)
class Work:
    """What a step gets; it leaves all of it as it is."""

    model: nn.Module
    """From the step before."""
    dense: nn.Module
    """What the recipe began with."""
    name: str
    """Of the dense model."""
    seed: int
    tokenizer: Any
    inputs: Any
    """Arguments of one forward pass; None where the recipe gives none."""
    track: Track


@dataclass(frozen=True)
class Made:
    """What a step gives back."""

    model: nn.Module
    """A new one, or that of `Work` where it only looked."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """JSON values only."""
    plan: Plan | None = None
    """What it keeps of the model that it got; of steps that prune."""
    scores: MaskScores | None = None
    trained: bool = False


# Each step: keyword arguments are what a recipe may say. `data` and `eval_data` that it does not say are those of the
# whole recipe. **reading = also the fields of Reading; **options = those, and the options of the method.


def prune(
    work: Work, *, budget: BudgetText, method: Annotated[str, one_of(METHODS)] = "minitron",
    data: Calibration | None = None, eval_data: HeldOut | None = None,
    mend: Annotated[str, one_of(MENDS)] | None = None, **options: Any,
) -> Made:  # fmt: skip
    """Cut once, as ``secateur prune`` does; with `eval_data`, measure what that cost."""
    reading, own = _parted(options)
    taken = inspect.signature(METHODS[method]).parameters
    if "seed" in taken:
        own["seed"] = work.seed
    used = data or ("self" if verbs.needs_data(method) else None)
    # As in verbs.prune, `samples` is about what is calibrated on.
    held_out = None if eval_data is None else _rows(work, "eval_data", eval_data, reading | {"samples": None})
    result = verbs.prune(
        work.model, budget, method=method, data=_rows(work, "data", used, reading), eval_data=held_out,
        inputs=work.inputs if "inputs" in taken else None, name=work.name, track=work.track, mend=mend, **own,
    )  # fmt: skip
    report = {**result.report, "data": {"calibration": used, "evaluation": eval_data}}
    report["spent"] = report.pop("seconds")  # the parts of it
    if "measured" in report:
        report["measured"] = {**report["measured"], "data": eval_data}
    del report["options"], report["secateur"]
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
    reading, own = _parted(options)
    if "seed" in inspect.signature(METHODS[method]).parameters:
        own["seed"] = work.seed
    metric = getattr(evaluate, "__name__", "evaluate")
    if evaluate is None:
        rows = _rows(work, "eval_data", eval_data, reading | {"samples": None})
        metric, evaluate = _metric(rows or [], work.track)
    found = in_steps.iterative(
        work.model, verbs.budget_of(budget), train, evaluate, method=method, steps=steps, schedule=schedule,
        epochs_per_step=epochs_per_step, higher_is_better=higher_is_better, tolerance=tolerance,
        data=_rows(work, "data", data, reading), inputs=work.inputs, track=work.track, mend=mend, **own,
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
    rows = _rows(work, "data", data, reading) or []
    count = batch_norm.adapt_batch_norm(model, rows, track=work.track)
    samples = sum(map(size_of, rows))
    return Made(model, {"batch_norms_adapted": count, "samples": samples})


def evaluate(work: Work, *, eval_data: HeldOut, **reading: Any) -> Made:
    """Measure the model beside the dense one that the recipe began with."""
    rows = _rows(work, "eval_data", eval_data, reading)
    found = verbs.evaluate(work.model, rows, against=work.dense, track=work.track)
    measured: dict[str, Any] = {}
    for name, value in found.items():
        if name in ("samples", "tokens"):
            measured[name] = int(value)
        elif f"dense_{name}" in found:
            measured[name] = {"dense": found[f"dense_{name}"], "pruned": value}
        elif not name.startswith("dense_"):
            measured[name] = value
    return Made(work.model, {"measured": {**measured, "data": eval_data}})


STEPS: Mapping[str, Callable[..., Made]] = {
    "prune": prune,
    "iterative": iterative,
    "adapt_batch_norm": adapt_batch_norm,
    "evaluate": evaluate,
}


def method_of(name: str, said: Mapping[str, Any]) -> str | None:
    """The method that a step is told, or its default; None for steps that have none."""
    parameter = inspect.signature(STEPS[name]).parameters.get("method")
    told = said.get("method")
    return None if parameter is None else told if isinstance(told, str) else str(parameter.default)


def _parted(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """How data is read, and the options of the method."""
    reading = {entry.name for entry in dataclasses.fields(Reading)}
    return {n: v for n, v in options.items() if n in reading}, {n: v for n, v in options.items() if n not in reading}


def _rows(work: Work, name: str, data: str | None, reading: Mapping[str, Any]) -> list[Batch] | None:
    """Batches of what a recipe calls data; None where it gives none."""
    if data is None:
        return None
    given: Any = data
    if names_function(data):
        given = call(data, name, "my_data:batches")
        if isinstance(given, torch.Tensor) or not hasattr(given, "__iter__"):
            raise SecateurError(
                f"{name} {data} returned a {type(given).__name__}, not batches that can be gone through"
            )
    return verbs.batches_of(
        work.model, given, tokenizer=work.tokenizer, seed=work.seed, track=work.track, **reading
    )  # fmt: skip


def _metric(rows: Sequence[Any], track: Track) -> tuple[str, in_steps.Metric]:
    """The name of the metric that goes with the batches, and the metric; higher is better."""
    classes = labelled(rows)

    def measure(model: nn.Module) -> float:
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            return math.nan  # training has diverged: that ends the steps, and the best one before stays
        return classify(model, rows, track).accuracy if classes else -perplexity(model, rows, track)

    return "accuracy" if classes else "minus perplexity", measure
