"""The public verbs: decide a plan, prune by it, evaluate the result."""

import importlib.metadata
import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload, costs
from secateur.choose.plan import Plan
from secateur.choose.search import DIVISORS
from secateur.cut import apply
from secateur.cut.config import sizes_of
from secateur.errors import SecateurError, nearest
from secateur.load.data import Tokenizer, load_tokens, sample_tokens
from secateur.load.model import fingerprint, sliding_window
from secateur.measure.quality import Batch, Comparison, Reference, compare, perplexity
from secateur.methods import METHODS, Decision
from secateur.methods.minitron import named
from secateur.progress import Track, quiet

Data = str | Path | torch.Tensor | Iterable[Batch] | None
"""A file, folder or hub id of text or token ids; token rows; batches; None or "self" = sampled from the model."""

_NOT_SHOWN = ("data", "tokenizer", "method", "stored_dtype", "track")
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
        samples: at most so many rows; None = 1024 of given data, 128 where the model writes them itself.
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
        rows = data if data.dim() == 2 else data.reshape(1, -1)
        return list(torch.split(rows[:samples], batch_size))
    if data is not None and not isinstance(data, str | Path):
        given = list(data)
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


_LOADING = tuple(name for name in inspect.signature(batches_of).parameters if name not in ("model", "data", "track"))
"""Options of the verbs that say how data is read."""


def budget_of(budget: Budget | str | Sequence[str] | Mapping[str, int]) -> Budget:
    """A budget from any of the forms that a user may write it in: ``"params=70%"``, or a mapping of exact dims."""
    if isinstance(budget, Budget):
        return budget
    return Budget.parse(dims=budget) if isinstance(budget, Mapping) else Budget.parse(budget)


def decide(
    model: nn.Module,
    budget: Budget | str | Sequence[str] | Mapping[str, int],
    *,
    method: str = "minitron",
    data: Data = None,
    track: Track = quiet,
    **options: Any,
) -> Decision:
    """As `plan`, with the Space and the details of how the decision came about."""
    if method not in METHODS:
        raise SecateurError(f"there is no method {method!r}{nearest(method, METHODS)}")
    known = [name for name, p in inspect.signature(METHODS[method]).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known and name not in _LOADING:
            raise SecateurError(f"{method} has no option {name!r}{nearest(name, [*known, *_LOADING])}")
    parsed = budget_of(budget)
    loading = {name: options.pop(name) for name in _LOADING if name in options}
    rows = batches_of(model, data, track=track, **loading)
    return METHODS[method](model, parsed, rows, track=track, **options)


def plan(model: nn.Module, budget: Budget | str | Sequence[str] | Mapping[str, int], **options: Any) -> Plan:
    """Decide what goes, and leave the model as it is.

    Args:
        model: the dense model.
        budget: ``"params=70%"``, several limits, a `Budget`, or a mapping of exact dims.
        options: `method`, `data`, `track`, how data is read (see `batches_of`), and the options of the method.

    Raises:
        SecateurError: for bad input; see the method.
    """
    return decide(model, budget, **options).plan


def prune(
    model: nn.Module,
    budget: Budget | str | Sequence[str] | Mapping[str, int],
    *,
    eval_data: Data = None,
    name: str = "",
    track: Track = quiet,
    **options: Any,
) -> Result:
    """Decide a plan, apply it, and measure what it cost: plan + apply + evaluate.

    Args:
        model: the dense model; it stays as it is.
        budget: as for `plan`.
        eval_data: what perplexity, KL and agreement are measured on; None = nothing is measured.
        name: the model's folder or hub id, for the report.
        track: shows progress.
        options: as for `plan`.

    Raises:
        SecateurError: for bad input.
    """
    begin = time.perf_counter()
    loading = {name: options[name] for name in _LOADING if name in options and name != "samples"}
    held_out = None if eval_data is None else batches_of(model, eval_data, track=track, **loading)
    parsed = budget_of(budget)
    decision = decide(model, parsed, track=track, **options)
    pruned = apply(model, decision.plan, space=decision.space)
    measured = None if held_out is None else compare(pruned, Reference(model, held_out, track=track), track)
    origin = {
        "model": name or type(model).__name__,
        "fingerprint": fingerprint(model),
        "method": str(options.get("method", "minitron")),
        "budget": str(parsed),
        "secateur": importlib.metadata.version("secateur"),
    }
    decided = Plan(decision.plan.kept, decision.plan.dropped, decision.plan.masks, origin)
    report = report_of(model, decided, decision, options, measured)
    report["data"] = {"calibration": _data_name(options.get("data"))}
    if eval_data is not None:
        report["data"]["evaluation"] = _data_name(eval_data)
    report["seconds"] = {**report["seconds"], "total": time.perf_counter() - begin}
    return Result(pruned, decided, report)


def _data_name(data: Data) -> str:
    if data is None:
        return "self"
    return str(data) if isinstance(data, str | Path) else "given batches"


def report_of(
    model: nn.Module, plan: Plan, decision: Decision, options: Mapping[str, Any], measured: Comparison | None
) -> dict[str, Any]:
    """What was cut, what it costs now, what was measured."""
    space, config = decision.space, getattr(model, "config", None)
    workload = Workload(
        options.get("kv_batch", 1), options.get("kv_seq_len", 4096), sliding_window(config), options.get("stored_dtype")
    )
    before, after = sizes_of(space), sizes_of(space, plan)
    kinds = [kind for kind in DIVISORS if before.get(kind) is not None]
    names = {kind: next(iter(named(config, {kind: 0}))) for kind in kinds}
    whole, rest = costs(space, Plan(), workload), costs(space, plan, workload)
    report: dict[str, Any] = {
        "secateur": plan.origin["secateur"],
        "method": plan.origin["method"],
        "model": {"name": plan.origin["model"], "fingerprint": plan.origin["fingerprint"]},
        "budget": plan.origin["budget"],
        "options": {k: _plain(v) for k, v in options.items() if v is not None and k not in _NOT_SHOWN},
        "sizes": {names[kind]: {"dense": before.get(kind), "pruned": after.get(kind)} for kind in kinds},
        "dropped": list(plan.dropped),
        "costs": {
            "params": {"dense": int(whole.params), "pruned": int(rest.params)},
            "active_params": {"dense": int(whole.active_params), "pruned": int(rest.active_params)},
            "memory": {
                "dense": int(whole.memory),
                "pruned": int(rest.memory),
                "kv_batch": workload.batch,
                "kv_seq_len": workload.seq_len,
            },
        },
        **decision.details,
    }
    if measured is not None:
        report["measured"] = {
            "tokens": measured.tokens,
            "perplexity": {"dense": measured.dense_perplexity, "pruned": measured.perplexity},
            "kl": measured.kl,
            "top1": measured.top1,
        }
    return report


def _plain(value: Any) -> Any:
    """A JSON value that shows an option."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return getattr(value, "name", None) or str(value)


def evaluate(
    model: nn.Module, data: Data, *, against: nn.Module | None = None, track: Track = quiet, **loading: Any
) -> dict[str, float]:
    """Perplexity on the data, and against a dense model its perplexity, the KL to it and the top-1 agreement.

    Args:
        model: what to measure.
        data: see `Data`.
        against: the dense model.
        track: shows progress.
        loading: how data is read: `tokenizer`, `samples`, `seq_len`... (see `batches_of`).

    Returns:
        ``perplexity``; with `against` also ``dense_perplexity``, ``kl`` (nats per token), ``top1`` (share), ``tokens``.

    Raises:
        SecateurError: for bad data or an unknown option.
    """
    for name in loading:
        if name not in _LOADING:
            raise SecateurError(f"evaluate has no option {name!r}{nearest(name, _LOADING)}")
    rows = batches_of(against if against is not None else model, data, track=track, **loading)
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
