"""Go through a model block by block: each is calibrated on what the blocks before it, already changed, give.

One forward pass finds out how the model is run: which modules of its lists follow each other, what each is called
with, and where that comes from. A block whose arguments are results of earlier blocks, or were arguments of one, is run
alone, on activations that are kept; any other gets its arguments from a forward pass that stops there. Weights outside
of such lists are calibrated in a forward pass of the whole model, up to their last use.

Of a streamed model (`load.store`) only the block that is visited is in memory; the activations rest on disk, and what
is finished is noted in a journal, so that a walk that was killed goes on from there.
"""

import contextlib
import itertools
import math
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.files import read_json, write_json
from secateur.load.batches import Batch, run
from secateur.load.mode import evaluating
from secateur.load.store import settle, store_of
from secateur.load.through import Through, Watcher, whole_passes
from secateur.progress import Track, quiet
from secateur.space.products import plain_attention
from secateur.space.weights import Weight
from secateur.walk.route import Nobody, Route, Stage, Steps, whole
from secateur.walk.way import chain_of

__all__ = ["Stage", "Steps", "chain_of", "each", "outputs", "remembered", "through", "walk", "way", "whole"]


STAGES = "secateur_stages"
"""Where a model has its pipeline stages, while it has any; see `methods.pipeline`."""


def walk(
    model: nn.Module,
    batches: Sequence[Batch],
    weights: Sequence[Weight],
    *,
    track: Track = quiet,
    what: str = "pruning, block by block",
    name: str = "walk",
) -> Generator[Stage, None, None]:
    """Visit all weights in the order of the forward pass; change those of a stage before you ask for the next one.

    Args:
        model: it is run in evaluation mode, without gradients, and left as the visitor leaves it.
        batches: calibration data.
        weights: which to visit; each belongs to one stage.
        track: shows progress over the stages.
        what: is said to be done there.
        name: of the walk, under which a streamed model's run keeps what is finished.

    Yields:
        The stages. Weights that no forward pass reaches come last.

    Raises:
        SecateurError: without batches.
    """
    if not batches:
        raise SecateurError("there is no calibration batch: give data")
    with _still(model):
        route = Route(model, batches, weights, name)
        for number, stop in enumerate(track(route.stops, what)):
            yield from route.visit(number, stop)


def through(model: nn.Module, batches: Sequence[Batch], watcher: Watcher, *, name: str, track: Track = quiet) -> None:
    """Run all batches block by block, each through a block before the next block; see `load.through`.

    What the watcher sees of one batch it sees in the order of a whole pass, and of one module in the order of batches.

    Args:
        model: it is run in evaluation mode, without gradients.
        batches: calibration data.
        watcher: is told which batch runs; its sums are kept at every block of a streamed model.
        name: of the walk, see `walk`.
        track: shows progress.
    """
    for _ in outputs(model, batches, watcher, name=name, track=track):
        pass


def outputs(
    model: nn.Module,
    batches: Sequence[Batch],
    watcher: Watcher | None = None,
    *,
    name: str,
    track: Track = quiet,
    what: str = "running, block by block",
) -> Iterator[Any]:
    """What the model returns for each batch, as `run` does, but each block is loaded once for all batches.

    A model whose blocks do not simply follow each other is run whole, for every batch.
    """
    with _still(model):
        if watcher is not None:
            watcher.at(None)  # what shows how the model runs does not count
        route = Route(model, batches, (), name)
        if not route.ends_alone:
            for index, batch in enumerate(batches):
                if watcher is not None:
                    watcher.at(index)
                yield run(model, batch)
            return
        watching = watcher or Nobody()
        for number, stop in enumerate(track(route.blocks, what)):
            route.advance(number, stop, watching)
        yield from route.ends(watching)


@contextlib.contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    with torch.inference_mode(mode=False), evaluating(model), torch.no_grad(), plain_attention():
        try:
            yield
        finally:
            settle(model)


def way(model: nn.Module, name: str, track: Track = quiet) -> Through:
    """How data goes through a model: a whole pass for each batch; of a streamed model block by block, as `name`."""
    stages = getattr(model, STAGES, None)
    if stages is not None:
        own: Through = stages.through
        return own
    return whole_passes if store_of(model) is None else partial(through, name=name, track=track)


def each(model: nn.Module, name: str) -> Callable[[nn.Module, Sequence[Batch]], Iterator[Any]] | None:
    """How several models, cut from a streamed one, are run one after the other; None for a model in memory.

    Nothing of such a run is kept: see `remembered`.
    """
    store = store_of(model)
    if store is None:
        return None
    folder = store.work / name

    def runs(candidate: nn.Module, batches: Sequence[Batch]) -> Iterator[Any]:
        shutil.rmtree(folder, ignore_errors=True)
        yield from outputs(candidate, batches, name=name)
        shutil.rmtree(folder, ignore_errors=True)

    return runs


def remembered(model: nn.Module, measure: Callable[[nn.Module], float], name: str) -> Callable[[nn.Module], float]:
    """The same measure; of a streamed model each result is kept, so that a run that goes on does not measure it again.

    Models must be measured in the same order in every run.
    """
    store = store_of(model)
    if store is None:
        return measure
    file, count = store.work / f"{name}.json", itertools.count()
    known: list[float] = read_json(file, "list of results") if file.exists() else []

    def found(candidate: nn.Module) -> float:
        if (number := next(count)) == len(known):
            value = measure(candidate)
            if not math.isfinite(value):
                raise SecateurError(f"a candidate is infinitely far from the dense model ({value}): check the data")
            known.append(value)
            write_json(file, known)
        return known[number]

    return found
