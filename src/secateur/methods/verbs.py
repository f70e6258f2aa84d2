"""The public verbs: decide a plan, prune by it, evaluate the result."""

import importlib.metadata
import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import world
from secateur.choose.budget import Budget
from secateur.choose.plan import Plan
from secateur.choose.rescore import MaskScores
from secateur.cut import apply
from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, size_of
from secateur.load.data import Tokenizer, load_tokens, sample_tokens
from secateur.load.megatron import closed, is_megatron, opened, token_batches, token_inputs
from secateur.load.megatron_stages import stage_count
from secateur.load.model import fingerprint
from secateur.load.shared import check_alike, check_enough
from secateur.load.store import held
from secateur.measure.classify import classify, labelled
from secateur.measure.quality import Reference, compare, perplexity
from secateur.mend.batch_norm import adapt_batch_norm as estimate_anew
from secateur.methods import MASKING, METHODS, Decision
from secateur.methods.comparing import compared
from secateur.methods.repair import check_mend, repair
from secateur.methods.reporting import report_of
from secateur.progress import Track, quiet
from secateur.space.trace import Inputs

Data = str | Path | torch.Tensor | Iterable[Batch] | None
"""A file, folder or hub id of text or token ids; token rows or other inputs as one tensor; batches; None or "self" =
sampled from the model."""

SEQ_LEN = 2048
SAMPLES = 1024
SELF_SAMPLES, SELF_SEQ_LEN = 128, 256


@dataclass(frozen=True)
class Result:
    """A pruned model, the plan that made it, and what it cost."""

    model: nn.Module
    plan: Plan
    report: Mapping[str, Any]
    """What was cut, what it cost and what it saves; JSON values only."""
    scores: MaskScores | None = None
    """What masks were chosen by, with ``keep_scores=True``: for another sparsity without another run."""


def batches_of(
    model: nn.Module,
    data: Data,
    *,
    tokenizer: Tokenizer | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 8,
    text_field: str = "text",
    split: str = "train",
    seed: int = 0,
    track: Track = quiet,
) -> list[Batch]:
    """Calibration or evaluation batches from whatever the user has.

    Args:
        model: the model that they are for.
        data: see `Data`.
        tokenizer: for text.
        samples: at most so many rows (of batches that are given, whole batches until there are so many); None = 1024
            of given data, 128 where the model writes them itself.
        seq_len: tokens in a row; None = 2048 or what the model can take, 256 where it writes them itself.
        batch_size: rows in a batch.
        text_field: the field of a record that holds the text.
        split: of a hub data set.
        seed: for sampling from the model.
        track: shows progress.

    Raises:
        SecateurError: for data that is missing, empty or not understood.
    """
    for option, value in (("batch_size", batch_size), ("samples", samples), ("seq_len", seq_len)):
        if value is not None and value < 1:
            raise SecateurError(f"{option} must be at least 1, not {value}")
    if isinstance(data, torch.Tensor):
        rows = data if data.dim() > 1 or data.is_floating_point() else data.reshape(1, -1)
        return list(torch.split(rows[:samples], batch_size))
    if data is not None and not isinstance(data, str | Path):
        given: list[Batch] = []
        rows_given = 0
        for batch in data:
            given.append(batch)
            rows_given += size_of(batch)
            if samples is not None and rows_given >= samples:
                break
        if not given:
            raise SecateurError("the data has no batch")
        return given
    config = getattr(model, "config", None)
    if config is None:
        raise SecateurError(f"{type(model).__name__} has no config to read token data for: pass batches")
    longest = getattr(config, "max_position_embeddings", None) or SEQ_LEN
    if seq_len is not None and seq_len > longest:
        raise SecateurError(f"seq_len {seq_len} is longer than the {longest} positions that the model takes")
    if data is None or str(data) == "self":
        length = seq_len or min(SELF_SEQ_LEN, longest)
        tokens = sample_tokens(model, samples=samples or SELF_SAMPLES, seq_len=length, seed=seed, track=track)
    else:
        tokens = load_tokens(
            data,
            tokenizer=tokenizer,
            vocab_size=config.vocab_size,
            seq_len=seq_len or min(SEQ_LEN, longest),
            samples=samples or SAMPLES,
            text_field=text_field,
            split=split,
        )
    return list(torch.split(tokens, batch_size))


LOADING = tuple(name for name in inspect.signature(batches_of).parameters if name not in ("model", "data", "track"))
"""Options of the verbs that say how data is read."""


def budget_of(budget: Budget | str | Sequence[str] | Mapping[str, int]) -> Budget:
    """A budget from any of the forms that a user may write it in: ``"params=70%"``, or a mapping of exact dims."""
    if isinstance(budget, Budget):
        return budget
    return Budget.parse(dims=budget) if isinstance(budget, Mapping) else Budget.parse(budget)


@world.splitting()
def decide(
    model: nn.Module,
    budget: Budget | str | Sequence[str] | Mapping[str, int],
    *,
    method: str = "minitron",
    data: Data = None,
    inputs: Inputs = None,
    track: Track = quiet,
    **options: Any,
) -> Decision:
    """As `plan`, with the Space and the details of how the decision came about."""
    if is_megatron(model):
        _stage_mend(model, method, None)
        model, data, inputs = opened(model), token_batches(data), token_inputs(inputs)
    own, loading = _parted(method, options, inputs)
    parsed = budget_of(budget)
    _check_clock(parsed)
    rows = _calibration(model, method, data, loading, track)
    return METHODS[method](model, parsed, rows, track=track, **own)


def _check_clock(budget: Budget) -> None:
    """Raise SecateurError where several processes would disturb each other's clocks."""
    if world.split() and "latency" in budget.limits:
        raise SecateurError("a budget of latency is measured, and several processes would slow each other: take one")


def _parted(method: str, options: Mapping[str, Any], inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a method, and of how data is read."""
    if method not in METHODS:
        raise SecateurError(f"there is no method {method!r}{nearest(method, METHODS)}")
    parameters = inspect.signature(METHODS[method]).parameters
    known = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    given = dict(options) if inputs is None else {**options, "inputs": inputs}
    for name in given:
        if name not in known and name not in LOADING:
            raise SecateurError(f"{method} has no option {name!r}{nearest(name, [*known, *LOADING])}")
    own = {name: value for name, value in given.items() if name in known}
    return own, {name: given[name] for name in LOADING if name in given}


def _calibration(model: nn.Module, method: str, data: Data, loading: Mapping[str, Any], track: Track) -> list[Batch]:
    """The batches that a method gets; none where it is given none and can do without."""
    if data is None and not needs_data(method):
        return []
    found = batches_of(model, data, track=track, **loading)
    check_enough(found)
    check_alike(found)
    return found


def needs_data(method: str) -> bool:
    """Whether a method cannot do without data: it then writes its own where it is given none."""
    return inspect.signature(METHODS[method]).parameters["data"].default is inspect.Parameter.empty


def plan(model: nn.Module, budget: Budget | str | Sequence[str] | Mapping[str, int], **options: Any) -> Plan:
    """Decide what goes, and leave the model as it is.

    Args:
        model: the dense model.
        budget: ``"params=70%"``, several limits, a `Budget`, or a mapping of exact dims.
        options: `method`, `data`, `inputs` (arguments of one forward pass, for what is no Hugging Face model), `track`,
            how data is read (see `batches_of`), and the options of the method.

    Raises:
        SecateurError: for bad input; see the method.
    """
    decision = decide(model, budget, **options)
    if decision.base is not None:
        raise SecateurError("a plan in another basis (rotate) means nothing without its weights: use prune")
    return decision.plan


@world.splitting()
def prune(
    model: nn.Module,
    budget: Budget | str | Sequence[str] | Mapping[str, int],
    *,
    method: str = "minitron",
    data: Data = None,
    eval_data: Data = None,
    mend: str | None = None,
    adapt_batch_norm: bool = False,
    inputs: Inputs = None,
    name: str = "",
    track: Track = quiet,
    **options: Any,
) -> Result:
    """Decide a plan, apply it, repair what is left, and measure what it cost: plan + apply + repair + evaluate.

    Args:
        model: the dense model; it stays as it is.
        budget: as for `plan`.
        method: as for `plan`.
        data: calibration data, as for `plan`; read once, for the decision and for the repair.
        eval_data: what is measured on: perplexity, KL and agreement of a language model; accuracy, loss and agreement
            of a classifier, where batches are (inputs, targets) or have one label for each sample; None = nothing is.
        mend: how a structural cut is repaired: least_squares, bias or none (see `methods.repair`). None = as the
            method says, which is least_squares, where there is data, unless it repairs by itself.
        adapt_batch_norm: estimate the statistics of batch norms anew, on the data, after the cut and the repair.
        inputs: arguments of one forward pass (a tensor, a tuple, a mapping), for what is no Hugging Face model.
        name: the model's folder or hub id, for the report.
        track: shows progress.
        options: as for `plan`.

    Raises:
        SecateurError: for bad input.
    """
    if is_megatron(model):
        given = {"mend": mend, "adapt_batch_norm": adapt_batch_norm, "inputs": inputs, "name": name, "track": track}
        return _pruned_megatron(model, budget, method, (data, eval_data), {**given, **options})
    begin = time.perf_counter()
    check_repair(mend, method, has_data=data is not None)
    if adapt_batch_norm and data is None:
        raise SecateurError("adapt_batch_norm needs data: give batches of what the model is made for")
    own, loading = _parted(method, options, inputs)
    every = {name: value for name, value in loading.items() if name != "samples"}
    held_out = None if eval_data is None else batches_of(model, eval_data, track=track, **every)
    if held_out is not None:
        check_enough(held_out, "the evaluation data")
        check_alike(held_out, "the evaluation data")
    parsed = budget_of(budget)
    _check_clock(parsed)
    statistics = batches_of(model, data, track=track, **every) if adapt_batch_norm else []
    rows = _calibration(model, method, statistics or data, loading, track)
    decision = METHODS[method](model, parsed, rows, track=track, **own)
    base = decision.base or model
    if decision.pruned is None:
        pruned = apply(base, decision.plan, space=decision.space, inputs=inputs)
        mended = _repaired(base, pruned, decision, mend, rows, track)
    else:
        pruned, mended = decision.pruned, None
    adapted = estimate_anew(pruned, statistics, track=track) if adapt_batch_norm else 0
    measured = None if held_out is None else compared(pruned, model, held_out, track)
    origin = {
        "model": name or type(model).__name__,
        "fingerprint": fingerprint(model),
        "method": method,
        "budget": str(parsed),
        "secateur": importlib.metadata.version("secateur"),
        **({"basis": "rotated"} if decision.base is not None else {}),
    }
    decided = Plan(decision.plan.kept, decision.plan.dropped, decision.plan.masks, origin)
    report = report_of(model, pruned, decided, decision, options, measured)
    if adapted:
        report["batch_norms_adapted"] = adapted
    if mended is not None:
        report["mend"] = mended
    report["data"] = {"calibration": _data_name(data) if needs_data(method) or data is not None else None}
    if eval_data is not None:
        report["data"]["evaluation"] = _data_name(eval_data)
    report["seconds"] = {**report["seconds"], "total": time.perf_counter() - begin}
    return Result(pruned, decided, report, decision.scores)


def _pruned_megatron(
    model: nn.Module,
    budget: Budget | str | Sequence[str] | Mapping[str, int],
    method: str,
    data: tuple[Data, Data],
    options: dict[str, Any],
) -> Result:
    """`prune` for a model of Megatron-Core, which is opened for it and closed again."""
    options |= {"mend": _stage_mend(model, method, options["mend"]), "inputs": token_inputs(options["inputs"])}
    options["name"] = options["name"] or type(model).__name__
    given, held_out = map(token_batches, data)
    result = prune(opened(model), budget, method=method, data=given, eval_data=held_out, **options)
    return replace(result, model=closed(result.model))


def _stage_mend(model: nn.Module, method: str, mend: str | None) -> str | None:
    """The repair of a Megatron model: under pipeline parallelism there is none, and one method."""
    if stage_count(model) == 1:
        return mend
    if method != "minitron" or mend not in (None, "none"):
        asked = f"method {method}" if method != "minitron" else f"mend {mend}"
        raise SecateurError(f"{asked} does not work over pipeline stages: use minitron, without a repair (mend none)")
    return "none"


def check_repair(mend: str | None, method: str, *, has_data: bool) -> None:
    """Raise SecateurError for a repair that there is not, or that has nothing to work on or with."""
    if mend is not None:
        check_mend(mend)
    if mend in (None, "none") or method not in METHODS:
        return
    if method in MASKING:
        raise SecateurError(f"mend {mend} repairs structural cuts, and {method} makes masks: leave it out")
    if not has_data and not needs_data(method):
        raise SecateurError(f"mend {mend} needs calibration data: give data, or mend none")


def _repaired(
    dense: nn.Module, pruned: nn.Module, decision: Decision, mend: str | None, rows: Sequence[Batch], track: Track
) -> dict[str, Any] | None:
    """Repair the pruned model, in place: with the method's own weights, then in closed form; what the report tells."""
    parameters = dict(pruned.named_parameters())
    for name, values in decision.weights.items():
        with held(pruned, names=[name]), torch.no_grad():
            parameters[name].copy_(values)
    plan = decision.plan
    if plan.only_masks or not (plan.kept or plan.dropped):
        return None
    way = mend or decision.mend or "least_squares"
    if not rows and mend is None:
        way = "none"
    return repair(dense, pruned, plan, decision.space, rows, mend=way, track=track)


def _data_name(data: Data) -> str:
    if data is None:
        return "self"
    return str(data) if isinstance(data, str | Path) else "given batches"


@world.splitting()
def evaluate(
    model: nn.Module, data: Data, *, against: nn.Module | None = None, track: Track = quiet, **loading: Any
) -> dict[str, float]:
    """Perplexity on the data, and against a dense model its perplexity, the KL to it and the top-1 agreement.

    Of a classifier (batches of (inputs, targets), or with one label for each sample): accuracy and loss.

    Args:
        model: what to measure.
        data: see `Data`.
        against: the dense model.
        track: shows progress.
        loading: how data is read: `tokenizer`, `samples`, `seq_len`... (see `batches_of`).

    Returns:
        ``perplexity``; with `against` also ``dense_perplexity``, ``kl`` (nats per token), ``top1`` (share), ``tokens``.
        Of a classifier ``accuracy``, ``loss``, ``samples``; with `against` also ``dense_accuracy``, ``dense_loss`` and
        ``top1``.

    Raises:
        SecateurError: for bad data or an unknown option.
    """
    for name in loading:
        if name not in LOADING:
            raise SecateurError(f"evaluate has no option {name!r}{nearest(name, LOADING)}")
    if is_megatron(model):
        model, against, data = opened(model), against and opened(against), token_batches(data)
    rows: list[Any] = batches_of(against if against is not None else model, data, track=track, **loading)
    if labelled(rows):
        return _classified(model, rows, against, track)
    if against is None:
        return {"perplexity": perplexity(model, rows, track)}
    found = compare(model, Reference(against, rows, track=track), track)
    return {
        "perplexity": found.perplexity,
        "dense_perplexity": found.dense_perplexity,
        "kl": found.kl,
        "top1": found.top1,
        "tokens": float(found.tokens),
    }


def _classified(model: nn.Module, batches: Sequence[Any], against: nn.Module | None, track: Track) -> dict[str, float]:
    own = classify(model, batches, track)
    values = {"accuracy": own.accuracy, "loss": own.loss, "samples": float(own.samples)}
    if against is not None:
        dense = classify(against, batches, track)
        agree = float((own.choices == dense.choices).float().mean())
        values |= {"dense_accuracy": dense.accuracy, "dense_loss": dense.loss, "top1": agree}
    return values
