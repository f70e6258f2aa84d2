"""Prune, fine-tune, prune more: the sparsity, or the cut, grows in steps with training in between.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks" (arXiv:1506.02626); the cubic
schedule is that of Zhu & Gupta 2017 (arXiv:1710.01878).
"""

import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.choose.budget import Budget, Limit
from secateur.choose.cost import Workload, costs
from secateur.choose.plan import Kept, Plan
from secateur.cut.prove import discover
from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch
from secateur.load.mode import evaluating
from secateur.load.model import sliding_window
from secateur.methods.ranking import MEASURES
from secateur.methods.verbs import Data, batches_of, budget_of, plan, prune
from secateur.progress import Track, quiet
from secateur.space.trace import Inputs
from secateur.train.schedule import Constant, Cubic, Exponential, Linear, Schedule
from secateur.train.sparsity import sparsify

MASKING = ("magnitude", "wanda", "sparsegpt", "alps")
METHODS = (*MASKING, "structural")
_KINDS: Mapping[str, type[Schedule]] = {kind.__name__.lower(): kind for kind in (Cubic, Linear, Exponential, Constant)}
Metric = Callable[[nn.Module], float]
Train = Callable[[nn.Module, int], object]


@dataclass(frozen=True)
class Iterative:
    """What pruning in steps came to.

    Attributes:
        model: That of the best step, in evaluation mode; a copy of the dense model where no step is good enough.
        plan: What the best step keeps of the dense model; empty where no step is good enough. Applied to the dense
            model it gives the shapes and zeros of `model`, without its training.
        history: For each step: ``step`` from 1, ``budget`` of it, ``target`` and ``sparsity``, the share that should
            be and is gone (elements of the masked weights, or the first measure of the budget), ``params`` of the
            model and ``nonzero`` of them, the metric ``before`` and ``after`` training (None where it is not finite),
            ``seconds``.
        dense: The metric of the dense model.
        best: Number of the best step; 0 where none is good enough.
        stopped: Why it ended.
    """

    model: nn.Module
    plan: Plan
    history: Sequence[Mapping[str, Any]]
    dense: float
    best: int
    stopped: str


def iterative(
    model: nn.Module,
    budget: Budget | str | Sequence[str],
    train: Train,
    evaluate: Metric,
    *,
    method: str = "magnitude",
    steps: int = 5,
    schedule: str | Schedule = "cubic",
    epochs_per_step: int = 1,
    higher_is_better: bool = True,
    tolerance: float | None = None,
    data: Data = None,
    inputs: Inputs = None,
    on_step: Callable[[nn.Module, Mapping[str, Any]], object] | None = None,
    track: Track = quiet,
    **options: Any,
) -> Iterative:
    """Prune a little, let you train, measure, and again, until the budget is met or the metric falls too far.

    Every step works on a new model, so `train` makes its optimiser anew. While it trains, masks are held: zeros stay
    zeros whatever the optimiser does. Each step chooses its masks on the weights as they are now; magnitude and wanda
    never give a zero back, sparsegpt and alps may when they repair. Without a tolerance the best step is the last
    one; with it, the last one that lies within, and the first that does not ends the run.

    Args:
        model: the dense model, or one with zeros already; it stays as it is.
        budget: sparsity=90% or n:m=2:4 for the methods that mask; limits on params, macs, flops, memory for structural.
        train: called as ``train(model, epochs)``; fine-tunes the model that it gets, in place. It is in training mode.
        evaluate: called as ``evaluate(model)``; returns one number. The model is in evaluation mode.
        method: magnitude, wanda, sparsegpt, alps or structural.
        steps: how many; one for n:m, which does not come in degrees.
        schedule: how what is gone grows: cubic, linear, exponential (the rest shrinks by equal factors) or constant
            (all at the first step); or a schedule of `secateur.train` that counts steps and ends with the last.
        epochs_per_step: what `train` is told.
        higher_is_better: of the metric.
        tolerance: how far the metric may fall behind the dense model's, in its own unit; None = it does not matter.
        data: for the methods that calibrate; read once.
        inputs: arguments of one forward pass, as for `prune`.
        on_step: called as ``on_step(model, entry)`` after every step, with its entry of the history.
        track: shows progress within a step.
        options: of the method, and of how data is read.

    Raises:
        SecateurError: for bad input, a dense model whose metric is not finite, and as `prune` does.
    """
    _check(method, steps, epochs_per_step, tolerance)
    rows = None if data is None else _read(model, data, track, options)
    fixed: dict[str, Any] = {"method": method, "data": rows, "inputs": inputs, "track": track, **options}
    way = (_Masks if method in MASKING else _Cuts)(model, budget_of(budget), steps, schedule, fixed)
    work, dense, best = model, math.nan, (model, Plan(), 0)
    history: list[dict[str, Any]] = []
    stopped = f"all {steps} steps are done"
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        work = way.prune(work, step)
        # After the first cut: bad options show before anything is measured.
        dense = _dense_metric(model, evaluate) if step == 1 else dense
        entry, after = _trained(work, way, step, train, evaluate, epochs_per_step)
        history.append(entry | {"seconds": time.perf_counter() - begin})
        if on_step is not None:
            on_step(work, history[-1])
        trouble = _trouble(after, dense, tolerance, higher_is_better)
        if trouble:
            stopped = f"step {step} of {steps}: {trouble}"
            break
        best = work, way.plan, step
    if not best[2]:
        best = copy.deepcopy(model), Plan(), 0
        stopped += "; no step is good enough, so the model is the dense one"
    return Iterative(best[0].eval(), best[1], history, dense, best[2], stopped)


class _Masks:
    """The way of masks: more zeros at every step.

    Attributes:
        budgets: Of each step.
        targets: Share of the masked weights that goes, of each step.
        plan: Masks of the last step, for the dense model.
    """

    def __init__(
        self, model: nn.Module, budget: Budget, steps: int, schedule: str | Schedule, fixed: dict[str, Any]
    ) -> None:
        final = budget.sparsity()
        self.fixed, self.plan = fixed, Plan()
        if budget.n_m is not None:
            if steps > 1:
                n, m = budget.n_m
                raise SecateurError(f"n:m={n}:{m} has no degrees, and {steps} steps are asked for: say steps=1")
            self.targets, self.budgets = [final], [budget]
            return
        start = self._start(model)
        if start >= final:
            text = f"{100 * start:.4g}% of the weights are zero already, and the budget asks for {100 * final:g}%"
            raise SecateurError(f"{text}: ask for more")
        self.targets = _levels(schedule, steps, final, start)
        self.budgets = [Budget({"sparsity": Limit(level, share=True)}) for level in self.targets]

    def _start(self, model: nn.Module) -> float:
        """Share of the weights that are zero before anything is done."""
        options = {name: self.fixed[name] for name in ("only", "ignore", "data", "inputs") if name in self.fixed}
        masks = plan(model, "sparsity=0", method="magnitude", **options).masks
        return _zeros(model, masks)

    def prune(self, model: nn.Module, step: int) -> nn.Module:
        """A copy of the model with the zeros of a step."""
        done = prune(model, self.budgets[step - 1], **self.fixed)
        self.plan = _joined(self.plan, done.plan)
        return done.model

    def gone(self, model: nn.Module) -> float:
        """Share of the masked weights that is zero."""
        return _zeros(model, self.plan.masks)


class _Cuts:
    """The way of structure: a smaller model at every step, its limits shares of what the dense model costs.

    Attributes:
        budgets: Of each step, absolute.
        targets: Share of the first measure that goes, of each step.
        plan: All steps until now as one, for the dense model.
    """

    def __init__(
        self, model: nn.Module, budget: Budget, steps: int, schedule: str | Schedule, fixed: dict[str, Any]
    ) -> None:
        others = [m for m in budget.limits if m not in MEASURES]
        others += ["n:m"] * bool(budget.n_m) + ["exact dims"] * bool(budget.dims)
        if others or not budget.limits:
            what = f"a budget of {others[0]} is not served by structural" if others else "no budget is given"
            raise SecateurError(f"{what}: it takes {', '.join(MEASURES)}")
        self.fixed, self.plan, self.first = fixed, Plan(), next(iter(budget.limits))
        window = sliding_window(getattr(model, "config", None))
        sizes = fixed.get("kv_batch", 1), fixed.get("kv_seq_len", 4096)
        whole = costs(discover(model, fixed["inputs"]), Plan(), Workload(*sizes, window, fixed.get("stored_dtype")))
        self.dense = {measure: whole.of(measure) for measure in budget.limits}
        self.reached = dict(self.dense)
        last = {m: limit.absolute(self.dense[m]) for m, limit in budget.limits.items()}
        if all(self.dense[m] <= limit for m, limit in last.items()):
            raise SecateurError(f"the model keeps the budget {budget} already: nothing would be cut")
        shares = {m: max(0.0, 1 - limit / self.dense[m]) for m, limit in last.items()}
        levels = {m: _levels(schedule, steps, share, 0.0) for m, share in shares.items()}
        self.targets = levels[self.first]
        self.budgets = [
            Budget(
                {
                    m: Limit(last[m] if own[i] == shares[m] else (1 - own[i]) * self.dense[m])
                    for m, own in levels.items()
                }
            )
            for i in range(steps)
        ]

    def prune(self, model: nn.Module, step: int) -> nn.Module:
        """A model that keeps the limits of a step; a copy, where it did so already."""
        budget = self.budgets[step - 1]
        if all(self.reached[m] <= limit.value for m, limit in budget.limits.items()):
            return copy.deepcopy(model)
        done = prune(model, budget, **self.fixed)
        self.reached = {m: float(done.report["target"][m]["reached"]) for m in budget.limits}
        self.plan = _joined(self.plan, done.plan)
        return done.model

    def gone(self, model: nn.Module) -> float:
        """Share of the first measure that is gone."""
        del model
        return 1 - self.reached[self.first] / self.dense[self.first]


def _read(model: nn.Module, data: Data, track: Track, options: Mapping[str, Any]) -> list[Batch]:
    """Calibration batches, once for all steps: what is handed in may be a generator."""
    loading = {name: options[name] for name in inspect.signature(batches_of).parameters if name in options}
    return batches_of(model, data, track=track, **loading)


def _check(method: str, steps: int, epochs: int, tolerance: float | None) -> None:
    if method not in METHODS:
        raise SecateurError(f"there is no iterative pruning with method {method!r}{nearest(method, METHODS)}")
    for name, value in (("steps", steps), ("epochs_per_step", epochs)):
        if value < 1:
            raise SecateurError(f"{name} must be at least 1, not {value}")
    if tolerance is not None and not tolerance >= 0:
        raise SecateurError(f"tolerance must not be negative, and is {tolerance:g}: it is how far the metric may fall")


def _levels(schedule: str | Schedule, steps: int, final: float, start: float) -> list[float]:
    """The share that is gone after each step; the last is the final one."""
    if isinstance(schedule, str):
        if schedule not in _KINDS:
            raise SecateurError(f"there is no schedule {schedule!r}{nearest(schedule, _KINDS)}")
        end = 0 if schedule == "constant" else steps
        schedule = _KINDS[schedule](begin=0, end=end, initial=start)
    schedule.check(final)
    levels = [schedule.sparsity(step, final) for step in range(1, steps + 1)]
    if levels[-1] != final:
        last = f"{schedule.name} ends at step {schedule.last}, and there are {steps}"
        raise SecateurError(f"{last}: the budget would not be met; end it at {steps}")
    return levels


def _joined(before: Plan, now: Plan) -> Plan:
    """Two plans, the second for what the first leaves, as one for the dense model; masks are the second's."""
    kept = dict(before.kept)
    for name, own in now.kept.items():
        old = before.kept.get(name)
        if old is not None and own.size != len(old.units):
            raise ValueError(f"{name} has {own.size} units, and {len(old.units)} were left of it")
        kept[name] = own if old is None else Kept(own.kind, old.size, tuple(old.units[u] for u in own.units))
    origin = {**now.origin, **{k: before.origin[k] for k in ("model", "fingerprint") if k in before.origin}}
    return Plan(kept, (*before.dropped, *now.dropped), now.masks, origin)


def _zeros(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> float:
    """Share of the elements of these weights that are zero."""
    parameters = dict(model.named_parameters())
    zeros = sum(parameters[name].numel() - int(parameters[name].count_nonzero()) for name in masks)
    return zeros / sum(mask.numel() for mask in masks.values())


def _trained(
    model: nn.Module, way: _Masks | _Cuts, step: int, train: Train, evaluate: Metric, epochs: int
) -> tuple[dict[str, Any], float]:
    """Train the model of a step, and measure: an entry of the history, and the metric."""
    before = _metric(model, evaluate)
    _fine_tune(model, way.plan.masks, train, epochs)
    after = _metric(model, evaluate)
    counts = [(p.numel(), int(p.count_nonzero())) for p in model.parameters()]
    entry = {
        "step": step,
        "budget": str(way.budgets[step - 1]),
        "target": way.targets[step - 1],
        "sparsity": way.gone(model),
        "params": sum(n for n, _ in counts),
        "nonzero": sum(n for _, n in counts),
        "before": _finite(before),
        "after": _finite(after),
    }
    return entry, after


def _fine_tune(model: nn.Module, masks: Mapping[str, torch.Tensor], train: Train, epochs: int) -> None:
    """Let the user train, with the masks held."""
    held = sparsify(model, method="fixed", masks=masks) if masks else None
    model.train()
    other = train(model, epochs)
    if isinstance(other, nn.Module) and other is not model:
        raise SecateurError("train returned another model: it must fine-tune the one that it gets, in place")
    if held is not None:
        held.finalize()
    model.eval()


def _metric(model: nn.Module, evaluate: Metric) -> float:
    with evaluating(model):
        value: Any = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        hint = "such as secateur.evaluate(model, data)['accuracy']"
        raise SecateurError(f"evaluate returned a {type(value).__name__}, not one number, {hint}") from error


def _dense_metric(model: nn.Module, evaluate: Metric) -> float:
    found = _metric(model, evaluate)
    if not math.isfinite(found):
        raise SecateurError(f"evaluate gives {found} for the dense model: nothing can be measured against that")
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _trouble(after: float, dense: float, tolerance: float | None, higher_is_better: bool) -> str:
    """Why a step is not good enough; empty if it is."""
    if not math.isfinite(after):
        return f"the metric is {after} after training, which has diverged"
    behind = dense - after if higher_is_better else after - dense
    if tolerance is None or behind <= tolerance + 1e-9 * max(1.0, abs(dense)):  # .9 - .88 is a little above .02
        return ""
    return (
        f"the metric is {after:.6g}, {behind:.3g} behind the dense model's {dense:.6g}; the tolerance is {tolerance:g}"
    )
