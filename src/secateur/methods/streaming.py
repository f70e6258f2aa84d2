"""Models larger than memory: which methods go through them block by block, and what disk and memory that takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.choose.budget import Budget
from secateur.cut.config import FIELDS
from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch
from secateur.load.model import Source
from secateur.load.store import Store
from secateur.methods import MASKING, METHODS
from secateur.methods.survey import WIDE

_GRADIENTS = "it takes gradients of the whole model"
STREAMS: Mapping[str, str | None] = {
    "minitron": None,
    "depth": None,
    "obs": None,
    "flap": None,
    "magnitude": None,
    "wanda": None,
    "sparsegpt": None,
    "alps": None,
    "gradnas": _GRADIENTS,
    "fastnas": "it measures the whole model again for every axis and size",
    "structural": "its criteria look at the whole model",
    "search": "it measures and refines candidates of the whole model",
}
"""Method -> None where it goes through a streamed model block by block; else why it does not."""
_WHOLE: Mapping[str, str] = {
    "keep_scores": "the scores of all weights would be kept together",
    "adapt_batch_norm": "batch norms are adapted in passes of the whole model",
    "loss": _GRADIENTS,
    "score": "candidates are scored in passes of the whole model",
    "rotate": "another basis changes all weights together",
}
_SOLVER_BYTES = {"obs": 4 * 8, "sparsegpt": 4 * 4, "alps": 4 * 4}
"""For each element of X'X: that matrix, its factor, its inverse, and room to work."""
_WIDE_BYTES = {"obs": 3 * 4}
"""The same of matrices that are worked in place, in float32 (`survey.WIDE`)."""
_MEND_BYTES = 3.5 * 8
"""The same for least squares, on the columns that stay."""
_MASK_BYTES = 2 * 12
"""For each element of the largest weight: two that read the same, their scores in float32, and room to rank them."""
_ROOM = 1.05
_IN_AND_OUT = 2.5
"""What goes into a block and what it gives are on the disk together, and a quarter for what goes along."""


def check_streams(method: str, options: Mapping[str, Any], budget: Budget) -> None:
    """Raise SecateurError where a method, with its options, cannot go through a model block by block.

    Args:
        method: its name.
        options: of the method and of `prune`, those that are given; also `data`, where the model is to write it.
        budget: of the run.
    """
    if method not in METHODS:
        raise SecateurError(f"there is no method {method!r}{nearest(method, METHODS)}")
    why = STREAMS.get(method, "it is not known to go block by block")
    if why is not None:
        can = ", ".join(name for name, reason in STREAMS.items() if reason is None)
        raise SecateurError(f"{method} needs the model in memory: {why}; block by block go {can}")
    for name, reason in _WHOLE.items():
        if options.get(name):
            raise SecateurError(f"{_flag(name)} needs the model in memory: {reason}; leave it out, or --no-stream")
    if options.get("data") == "self":
        raise SecateurError(
            "data self is written by the model, which reads all weights for every token: give data to stream the model"
        )
    allocation = options.get("allocation", "uniform")
    if allocation in ("owl", "magnitude"):
        raise SecateurError(
            f"allocation {allocation} looks at the whole model first, which needs it in memory: take uniform, or "
            "shares of your own"
        )
    if method == "obs" and options.get("gradients", True) and options.get("survey") is None:
        raise SecateurError(
            f"obs needs the model in memory, because {_GRADIENTS}; without them it goes block by block: "
            "--no-gradients (gradients=False)"
        )
    layers = {"layers", "num_layers", *FIELDS["layers"]} & set(budget.dims)
    if method == "minitron" and options.get("measure", True) and (layers or not budget.dims):
        what = f"dropped layers ({min(layers)})" if layers else "candidates of a budget"
        raise SecateurError(
            f"minitron measures {what} in passes of the whole model; by importance alone it goes block by block: "
            "--no-measure (measure=False)"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# --- what a run takes ---


@dataclass(frozen=True)
class Needs:
    """What a streamed run takes, in bytes, by what for."""

    disk: Mapping[str, int]
    memory: Mapping[str, int]
    largest: str
    """The unit that takes most memory."""

    @property
    def all_disk(self) -> int:
        """Bytes, with a margin."""
        return round(_ROOM * sum(self.disk.values()))

    @property
    def all_memory(self) -> int:
        """Bytes, beside what the process has already, with a margin."""
        return round(_ROOM * sum(self.memory.values()))


def needs(
    model: nn.Module,
    store: Store,
    source: Source,
    budget: Budget,
    method: str,
    data: Sequence[Batch],
    mend: str = "least_squares",
) -> Needs:
    """What a streamed run will take at most; nothing is read for that.

    Args:
        model: streamed, dense.
        store: of the model.
        source: of the model.
        budget: of the run.
        method: its name.
        data: calibration batches.
        mend: how the cut is repaired.
    """
    weights, count = sum(p.nbytes for p in store.parameters.values()), sum(p.numel() for p in store.parameters.values())
    share = 1.0 if method in MASKING else _share(budget, count, weights)
    result = round(share * weights)
    kinds = {p.dtype for p in store.parameters.values()}
    again = source.dtype is not None and kinds != {source.dtype}
    stored = round(share * count * source.dtype.itemsize) if again and source.dtype is not None else result
    other = again or bool(getattr(model, "_weight_conversions", None))
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, vocabulary = (int(getattr(text, name, 0) or 0) for name in ("hidden_size", "vocab_size"))
    size = max(kind.itemsize for kind in kinds)
    tokens = [_tokens(batch) for batch in data]
    disk = {
        "result": result,
        "result in the form of its checkpoint": stored if other else 0,
        "masks": count // 8 if method in MASKING else 0,
        "activations": round(_IN_AND_OUT * sum(tokens) * hidden * size),
    }
    sizes = {unit: sum(store.parameters[name].nbytes for name in names) for unit, names in store.units.items()}
    # A block that is cut is there twice, as it was and as it will be; one that is masked has a byte for each weight.
    times = 1 if method in MASKING else 2
    sizes = {unit: (times if _is_block(unit) else 1) * taken for unit, taken in sizes.items()}
    beside = {unit: _masking(store, unit) if method in MASKING and _is_block(unit) else 0 for unit in sizes}
    largest = max(sizes, key=lambda unit: sizes[unit] + beside[unit])
    columns = max((n for unit in sizes if _is_block(unit) for n in _columns(store, unit)), default=0)
    kind = _WIDE_BYTES if columns > WIDE and method in _WIDE_BYTES else _SOLVER_BYTES
    solver = columns**2 * kind.get(method, 0)
    fit = _MEND_BYTES * (share * columns) ** 2 if mend == "least_squares" and method not in MASKING else 0
    memory = {
        f"weights of {largest}": sizes[largest],
        "its masks and scores": beside[largest],
        f"matrices of {columns} columns": round(max(solver, fit)),
        "a batch": max(tokens, default=0) * (vocabulary + 4 * columns + 8 * hidden) * size,
    }
    return Needs({k: v for k, v in disk.items() if v}, {k: v for k, v in memory.items() if v}, largest)


def _share(budget: Budget, count: int, weights: int) -> float:
    """The share of the weights that a budget leaves at most."""
    dense = {"params": float(count), "memory": float(weights)}
    found = [budget.limits[m].absolute(of) / of for m, of in dense.items() if m in budget.limits and of]
    return min([1.0, *found])


def _is_block(unit: str) -> bool:
    return unit.rpartition(".")[2].isdecimal()


def _masking(store: Store, unit: str) -> int:
    """Bytes that masks of a unit take while they are made, beside its weights."""
    counts = [store.parameters[name].numel() for name in store.units[unit]]
    return sum(counts) + _MASK_BYTES * max(counts, default=0)


def _columns(store: Store, unit: str) -> Iterator[int]:
    yield from (store.parameters[n].shape[-1] for n in store.units[unit] if store.parameters[n].dim() > 1)


def _tokens(batch: Batch) -> int:
    return max((x.numel() for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)), default=0)


def file_system(path: Path) -> Path:
    """Where the file system is mounted that a path, which need not be there yet, is on."""
    there = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    return next((p for p in [there, *there.parents] if p.is_mount()), there)
