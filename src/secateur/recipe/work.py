"""What a step of a recipe gets and gives back, and how it reads its data."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from secateur.choose.plan import Plan
from secateur.choose.rescore import MaskScores
from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.load.constructor import build
from secateur.load.functions import call, is_constructor
from secateur.load.model import Source, load_model
from secateur.methods import verbs
from secateur.progress import Track
from secateur.recipe.options import at_least, names_function

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
    """What a step gets; it leaves all of it as it is, but for what it writes into the two folders."""

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
    files: Path
    """An empty folder: what a step writes into it goes beside the model in the result."""
    state: Path | None = None
    """A folder that outlives a kill: what a step finds in it, it left there itself. None = nothing is kept."""
    entries: Sequence[Mapping[str, Any]] = ()
    """What the steps before reported."""
    made: Mapping[str, Path] = field(default_factory=dict)
    """Files that the steps before wrote, by their names."""
    plan: Plan | None = None
    """What is left of the dense model, where exactly one step before has cut it."""


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


def open_model(name: str) -> tuple[nn.Module, Any, Source | None]:
    """A model by its folder, hub id or ``module:callable``, with its tokenizer and source where it has them."""
    if is_constructor(name):
        return build(name).eval(), None, None
    return load_model(name)


def parted(options: Mapping[str, Any], *kinds: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that are fields of these dataclasses, and the others."""
    own = {entry.name for kind in kinds for entry in dataclasses.fields(kind)}
    return {n: v for n, v in options.items() if n in own}, {n: v for n, v in options.items() if n not in own}


def given(name: str, data: Any) -> Any:
    """What a recipe calls data: the batches of a function that it names, anything else as it is.

    Raises:
        SecateurError: The function fails, or returns nothing that can be gone through.
    """
    if not isinstance(data, str) or not names_function(data):
        return data
    found = call(data, name, "my_data:batches")
    if isinstance(found, torch.Tensor) or not hasattr(found, "__iter__"):
        raise SecateurError(f"{name} {data} returned a {type(found).__name__}, not batches that can be gone through")
    return found


def rows_of(work: Work, name: str, data: Any, reading: Mapping[str, Any]) -> list[Batch] | None:
    """Batches of what a recipe calls data; None where it gives none."""
    if data is None:
        return None
    return verbs.batches_of(
        work.model, given(name, data), tokenizer=work.tokenizer, seed=work.seed, track=work.track, **reading
    )


def shown(data: Any) -> Any:
    """Data as a report names it."""
    if isinstance(data, Mapping) and all(isinstance(weight, int | float) for weight in data.values()):
        return {str(name): weight for name, weight in data.items()}
    return data if data is None else str(data) if isinstance(data, str | Path) else "given batches"


def counts(model: nn.Module) -> dict[str, int]:
    """Parameters of a model, and those that are not zero."""
    found = [(p.numel(), int(p.count_nonzero())) for p in model.parameters()]
    return {"params": sum(n for n, _ in found), "nonzero": sum(n for _, n in found)}
