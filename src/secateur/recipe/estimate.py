"""What a recipe will come to: sizes from its budgets, time from one timed forward pass. Nothing is written."""

import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.choose.budget import parse_count
from secateur.errors import SecateurError
from secateur.load.batches import Batch, run, size_of
from secateur.load.mode import evaluating
from secateur.methods import verbs
from secateur.progress import Track, quiet
from secateur.recipe.pipeline import Recipe, Step
from secateur.recipe.steps import CUTTING, LOOKING, TRAINING
from secateur.recipe.work import Reading, Work, counts, open_model, parted, rows_of

NOTE = (
    "Estimates: sizes follow the budgets; time is that of passes over the data, from one timed forward pass. Searches, "
    "solvers, writing, and training of your own functions are not in it."
)
_BACKWARD = 3.0  # a step of training, in forward passes
_READS = 3  # of calibration data by a cut: to score, to repair, to check
_EVALUATIONS = 11  # of a training: ten in the run, and the one before it
_TIMED = 3


@dataclass(frozen=True)
class Amount:
    """How much data: samples, and tokens where they are token rows."""

    samples: float = 0
    tokens: float = 0


@dataclass(frozen=True)
class Pace:
    """What one sample costs the dense model.

    Attributes:
        seconds: of a forward pass.
        tokens: in the sample; 0 where it is no token row.
        kept: bytes of what its modules give, which training keeps for the backward pass.
        logits: bytes of its outputs.
    """

    seconds: float
    tokens: int
    kept: float
    logits: float

    def time(self, amount: Amount) -> float:
        """Seconds of a forward pass over data."""
        return self.seconds * (amount.tokens / self.tokens if self.tokens and amount.tokens else amount.samples)


def estimate(recipe: Recipe, *, track: Track = quiet) -> dict[str, Any]:
    """What the steps of a recipe are expected to leave and to take.

    Data is read, and functions of data are called; one small batch goes through the dense model.

    Args:
        recipe: checked.
        track: shows progress.

    Returns:
        ``params`` of the dense model; ``forward`` (samples, tokens and seconds of what was timed); ``steps``: for each
        its ``number``, ``step``, ``round``, whether it is ``done`` already, ``params`` and ``nonzero`` after it,
        ``samples`` and ``tokens`` that it goes through, ``seconds``, ``memory`` at its peak in bytes; the sums of what
        is not done, ``seconds``, and the largest ``memory``; ``note``.

    Raises:
        SecateurError: The model or the data cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(recipe.head.seed)
        dense, tokenizer, _ = open_model(recipe.head.model)
        inputs = recipe.example(dense)
        work = Work(dense, dense, recipe.head.model, recipe.head.seed, tokenizer, inputs, track, Path(folder))
        known = _Data(work)
        pace, timed = _pace(work, _small(recipe, known))
        done = len(recipe.folders().done())
        before = counts(dense)
        params, nonzero = float(before["params"]), float(before["nonzero"])
        size = sum(p.numel() * p.element_size() for p in dense.parameters()) / max(1, before["params"])
        entries: list[dict[str, Any]] = []
        for number, step in enumerate(recipe.steps, start=1):
            share = params / max(1, before["params"])
            amount, passes = _passes(step, known, share)
            memory = _memory(step, before["params"], params, size, pace)
            params, nonzero = _after(step, dense, params, nonzero)
            entries.append(
                {
                    "number": number, "step": step.name, "round": step.round, "done": number <= done,
                    "params": round(params), "nonzero": round(nonzero), "samples": round(amount.samples),
                    "tokens": round(amount.tokens), "seconds": sum(f * pace.time(part) for f, part in passes),
                    "memory": round(memory),
                }
            )  # fmt: skip
    left = [entry for entry in entries if not entry["done"]]
    return {
        "model": recipe.head.model, **before, "forward": timed, "steps": entries,
        "seconds": sum(entry["seconds"] for entry in left), "memory": max((e["memory"] for e in left), default=0),
        "note": NOTE,
    }  # fmt: skip


# --- data ---


class _Data:
    """How much there is in the data of the steps; each source is read once."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._known: dict[str, tuple[Amount, Batch | None]] = {}

    def of(
        self, name: str, data: Any, reading: Mapping[str, Any], *, whole: bool = False
    ) -> tuple[Amount, Batch | None]:
        """How much, and the first batch of it; what the model writes itself is counted alone.

        Args:
            name: data or eval_data.
            data: a source, or several with weights.
            reading: how it is read.
            whole: all of it where the recipe does not say how many samples: training does so.
        """
        if data is None:
            return Amount(), None
        if isinstance(data, Mapping):
            parts = [self.of(name, source, reading, whole=whole) for source in data]
            return Amount(sum(a.samples for a, _ in parts), sum(a.tokens for a, _ in parts)), parts[0][1]
        if data == "self":
            rows = reading.get("samples") or verbs.SELF_SAMPLES
            return Amount(rows, rows * (reading.get("seq_len") or verbs.SELF_SEQ_LEN)), None
        if whole and reading.get("samples") is None:
            reading = {**reading, "samples": 2**31}
        key = repr((data, sorted(reading.items(), key=str)))
        if key not in self._known:
            found = rows_of(self._work, name, data, reading) or []
            tokens = sum(map(_tokens, found))
            self._known[key] = Amount(sum(map(size_of, found)), tokens), found[0] if found else None
        return self._known[key]


def _tokens(batch: Batch) -> int:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    return ids.numel() if isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point() else 0


def _small(recipe: Recipe, known: _Data) -> Batch | None:
    """A few samples of the first data that there is."""
    for step in recipe.steps:
        reading, _ = parted(step.arguments, Reading)
        for name in ("data", "eval_data"):
            data = step.arguments.get(name)
            if isinstance(data, str) and data != "self":
                return known.of(
                    name, data, {**reading, "samples": None if name == "eval_data" else reading.get("samples")}
                )[1]
    return None


def _pace(work: Work, batch: Batch | None) -> tuple[Pace, dict[str, Any]]:
    """Time a forward pass, and weigh what its modules give."""
    model = work.model
    if batch is None and work.inputs is not None:
        batch = (
            work.inputs if isinstance(work.inputs, Mapping) else (tuple(pytree.tree_leaves(work.inputs)) or (None,))[0]
        )
    if batch is None:
        if not hasattr(getattr(model, "config", None), "vocab_size"):
            raise SecateurError(f"nothing to time {work.name} on: give the recipe data or inputs")
        batch = torch.zeros((1, 128), dtype=torch.int64)
    sizes: list[int] = []

    def weigh(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        sizes.append(
            sum(x.numel() * x.element_size() for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor))
        )

    leaves = [module for module in model.modules() if not list(module.children())]
    with evaluating(model), torch.inference_mode():
        hooks = [leaf.register_forward_hook(weigh) for leaf in leaves]
        try:
            run(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        times = []
        for _ in range(_TIMED):
            begin = time.perf_counter()
            run(model, batch)
            times.append(time.perf_counter() - begin)
    samples, seconds = max(1, size_of(batch)), statistics.median(times)
    tokens = _tokens(batch)
    pace = Pace(seconds / samples, tokens // samples, sum(sizes) / samples, (sizes or [0])[-1] / samples)
    return pace, {"samples": samples, "tokens": tokens, "seconds": seconds}


# --- one step ---


def _passes(step: Step, known: _Data, share: float) -> tuple[Amount, list[tuple[float, Amount]]]:
    """Data that a step goes through, and in how many forward passes of the dense model; `share` is the model's size."""
    told = step.arguments
    reading, own = parted(told, Reading)
    held = known.of("eval_data", told.get("eval_data"), {**reading, "samples": None})[0]
    if step.name in TRAINING:
        amount = _trained(own, reading, known)
        teacher = 1.0 if step.name == "distill" else 0.0
        times = math.ceil(_EVALUATIONS if held.samples else 0)
        return amount, [(_BACKWARD * share + teacher, amount), (times * share + teacher, held)]
    data = told.get("data")
    if step.name == "prune" and data is None and verbs.needs_data(told.get("method", "minitron")):
        data = "self"
    amount = known.of("data", data, reading)[0]
    if step.name == "prune":
        return amount, [(_READS * share, amount), (2 * share, held)]
    if step.name == "iterative":
        rounds = told.get("steps", 5)
        return amount, [(rounds * share, amount), ((rounds + 1) * share, held)]
    if step.name == "evaluate":
        return held, [(1 + share, held)]
    if step.name == "quantize":
        return held, [(share, amount if told.get("mode") == "static" else Amount()), (2 * share, held)]
    return amount, [(share, amount)]


def _trained(own: Mapping[str, Any], reading: Mapping[str, Any], known: _Data) -> Amount:
    """Data that a training goes through."""
    every, first = known.of("data", own.get("data"), reading, whole=True)
    samples, tokens = max(1, every.samples), every.tokens
    if own.get("tokens") is not None:
        asked = parse_count("tokens", own["tokens"])
        return Amount(asked / tokens * samples if tokens else 0, asked)
    if own.get("steps") is not None:
        given = first is not None and not isinstance(first, torch.Tensor)
        rows = size_of(first) if given and first is not None else reading.get("batch_size", 8)
        share = own["steps"] * own.get("accumulate", 1) * rows / samples
    else:
        share = own.get("epochs") or 1
    return Amount(samples * share, tokens * share)


def _memory(step: Step, dense: float, params: float, size: float, pace: Pace) -> float:
    """Bytes at the peak: the dense model, that of the step, and what it works with."""
    batch = int(step.arguments.get("batch_size", 8))
    weights = size * (dense + params)
    if step.name in TRAINING:
        states = 3 if step.arguments.get("optimizer") == "sgd" else 4  # float32 weights, gradients, moments
        kept = pace.kept * batch * params / max(1.0, dense)
        logits = pace.logits * batch * (3 if step.name == "distill" else 2)
        return weights + 4.0 * states * params + kept + logits
    return weights + (size * params if step.name not in LOOKING else 0) + pace.logits * batch * 2


def _after(step: Step, dense: nn.Module, params: float, nonzero: float) -> tuple[float, float]:
    """Parameters, and those that are not zero, that a budget leaves of a model."""
    budget = step.arguments.get("budget")
    if budget is None or step.name not in (*CUTTING, "sparsify"):
        return params, nonzero
    if step.lands is not None:
        whole = step.lands[1] * sum(p.numel() for p in dense.parameters())
        return whole, min(nonzero, whole)
    asked = verbs.budget_of(budget)
    if "sparsity" in asked.limits or asked.n_m is not None:
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        maskable = sum(module.weight.numel() for module in dense.modules() if isinstance(module, kinds))
        whole = sum(p.numel() for p in dense.parameters())
        return params, min(nonzero, params - asked.sparsity() * maskable * params / max(1, whole))
    left = params
    for measure, limit in asked.limits.items():
        if limit.share:
            left = min(left, limit.value * params)
        elif measure == "params":
            left = min(left, limit.value)
    return left, nonzero * left / max(1.0, params)
