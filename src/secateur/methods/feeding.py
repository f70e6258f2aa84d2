"""What a training run reads: rows of one source or of several, and how many steps they make."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.choose.budget import parse_count
from secateur.errors import SecateurError
from secateur.load.batches import Batch, size_of
from secateur.load.data import load_tokens
from secateur.load.feed import Feed, Given, Loader, Rows, feed_of
from secateur.load.model import fingerprint_data
from secateur.methods.verbs import SEQ_LEN, Data, batches_of
from secateur.progress import Track
from secateur.train.settings import Training

TrainingData = Data | Mapping[str, Any] | Feed
"""`verbs.Data`; sources with their weights, ``{"a.jsonl": 0.7, "b/": 0.3}``; name -> (rows, weight); or a feed."""


def training_feed(model: nn.Module, data: Any, settings: Training, loading: Mapping[str, Any]) -> Feed:
    """Batches of training from whatever the user has; a feed as it is.

    Raises:
        SecateurError: for data that is missing, empty or not understood.
    """
    if isinstance(data, Rows | Given | Loader):
        return data
    size, seed = int(loading.get("batch_size", 8)), settings.seed
    if size < 1:
        raise SecateurError(f"batch_size must be at least 1, not {size}")
    if data is None:
        raise SecateurError("there is no data to train on: give data")
    if isinstance(data, str | Path) and str(data) == "self":
        return feed_of(torch.cat(batches_of(model, "self", **loading)), batch_size=size, seed=seed)  # type: ignore[arg-type]
    if isinstance(data, str | Path):
        return feed_of(_tokens(model, data, 1.0, settings, loading), batch_size=size, seed=seed)
    if isinstance(data, Mapping):
        return feed_of(_mixed(model, data, settings, loading), batch_size=size, seed=seed)
    if isinstance(data, torch.Tensor):
        rows = data if data.dim() > 1 or data.is_floating_point() else data.reshape(1, -1)
        _known_tokens(model, rows, "data")
        return feed_of(rows[: loading.get("samples")], batch_size=size, seed=seed)
    return feed_of(data, batch_size=size, seed=seed)


def _mixed(
    model: nn.Module, data: Mapping[str, Any], settings: Training, loading: Mapping[str, Any]
) -> dict[str, tuple[torch.Tensor, float]]:
    """Rows and weight of each source."""
    if not data:
        raise SecateurError("there is no data to train on: the mapping of sources is empty")
    weights = {name: entry[1] if isinstance(entry, tuple) else entry for name, entry in data.items()}
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            what = weight if isinstance(weight, int | float | str) else type(weight).__name__
            raise SecateurError(f"data: the weight of {name} must be a number above 0, not {what!r}")
    for name, entry in data.items():
        if isinstance(entry, tuple) and isinstance(entry[0], torch.Tensor):
            _known_tokens(model, entry[0], name)
    total = sum(weights.values())
    return {
        name: (
            entry[0] if isinstance(entry, tuple) else _tokens(model, name, weights[name] / total, settings, loading),
            float(weights[name]),
        )
        for name, entry in data.items()
    }


def vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens a Hugging Face model knows."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def _known_tokens(model: nn.Module, rows: torch.Tensor, name: str) -> None:
    size = vocabulary_of(model)
    whole = rows.dtype in (torch.int32, torch.int64) and rows.dim() == 2 and rows.numel()
    if size is not None and whole and not 0 <= int(rows.min()) <= int(rows.max()) < size:
        raise SecateurError(
            f"{name}: its tokens are {int(rows.min())} to {int(rows.max())}, and the model knows 0 to {size - 1}: "
            "it is of another tokenizer"
        )


def _tokens(
    model: nn.Module, source: str | Path, share: float, settings: Training, loading: Mapping[str, Any]
) -> torch.Tensor:
    """Rows of one source: as many as the run needs of it, where that is known."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise SecateurError(f"{type(model).__name__} has no config to read token data for: pass batches or a loader")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None) or SEQ_LEN
    seq_len = loading.get("seq_len") or min(SEQ_LEN, longest)
    if seq_len > longest:
        raise SecateurError(f"seq_len {seq_len} is longer than the {longest} positions that the model takes")
    samples = loading.get("samples")
    rows = None
    if settings.tokens is not None:
        rows = math.ceil(parse_count("tokens", settings.tokens) * share / seq_len) + 1
    elif settings.steps is not None:
        rows = math.ceil(settings.steps * settings.accumulate * loading.get("batch_size", 8) * share) + 1
    # Rows of a file that are shorter than seq_len make more of them needed: then all are read.
    return load_tokens(
        source, tokenizer=loading.get("tokenizer"), vocab_size=text.vocab_size, seq_len=seq_len,
        samples=samples if samples is not None else rows if _is_stream(source) else None,
        text_field=loading.get("text_field", "text"), split=loading.get("split", "train"),
    )  # fmt: skip


def _is_stream(source: str | Path) -> bool:
    """Whether rows are cut from a stream, so that the first ones are no choice among them."""
    return Path(source).suffix.lower() != ".npy"


def held_out_batches(model: nn.Module, data: Data, loading: Mapping[str, Any], track: Track) -> list[Batch] | None:
    """Batches to evaluate on; None where there is no data."""
    if data is None:
        return None
    return batches_of(model, data, track=track, **{**loading, "samples": None})


def steps_of(settings: Training, feed: Feed) -> int:
    """Optimiser steps of a run.

    Raises:
        SecateurError: The settings speak of tokens or epochs, and the data has none.
    """
    if settings.steps is not None:
        return settings.steps
    if settings.tokens is not None:
        if feed.tokens is None:
            raise SecateurError("tokens: these batches are no token rows of one length: give steps or epochs")
        return max(1, round(parse_count("tokens", settings.tokens) / (feed.tokens * settings.accumulate)))
    if feed.per_epoch is None:
        raise SecateurError("the data has no length, so an epoch has no end: give steps")
    return max(1, round(feed.per_epoch * (settings.epochs or 1) / settings.accumulate))


def between_evaluations(steps: int, settings: Training, feed: Feed, rows: int) -> int:
    """Steps between evaluations on so many rows: ten in the run, or fewer where they would be most of the work."""
    own = feed.batch_size if isinstance(feed, Rows) else size_of(feed.given[0]) if isinstance(feed, Given) else 0
    trained = steps * settings.accumulate * own
    count = 10 if not own or not rows else min(10, max(1, trained // rows))
    return math.ceil(steps / count)


def order_of(feed: Feed) -> list[float]:
    """What beside the rows and the seed decides on the batches: rows in a batch, and the shares of the sources."""
    return [feed.batch_size, *feed.shares] if isinstance(feed, Rows) else []


def data_print(feed: Feed) -> str:
    """SHA-256 over what a feed holds; of a loader, its class and length alone."""
    if isinstance(feed, Rows):
        batches = list(feed.sources)
    elif isinstance(feed, Given):
        batches = list(feed.given)
    else:
        return f"{type(feed).__name__} of {feed.per_epoch}"
    named = [
        {str(i): x for i, x in enumerate(pytree.tree_leaves(batch)) if isinstance(x, torch.Tensor)} for batch in batches
    ]
    return fingerprint_data(named)
