"""The way through a model, stop by stop, and the activations that are kept on it."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.journal import Journal, Place, Spill
from secateur.load.shards import Shard
from secateur.load.store import Store, held, settle, store_of
from secateur.load.through import Watcher
from secateur.space.products import Enough
from secateur.space.weights import Weight, blocks_of
from secateur.walk.way import (
    TENSOR,
    Key,
    Stop,
    blocks_in,
    chains,
    join,
    kind_of,
    placed,
    record,
)

Steps = Generator[None, None, None]


@dataclass(frozen=True)
class Stage:
    """A stop on the way.

    Attributes:
        name: Of the block, or of what the weights have in common.
        weights: Those that lie in it.
        passes: Starts a forward pass of all calibration data through it, as it is now, in steps of a batch.
        last: The weight at whose product a pass may end, because no other is met after it (see `Products`).
        number: Of the stop.
        done: A run before this one has finished it: its weights are as that run left them, and `recall` has what it
            kept; no passes are to be made.
        journal: Where results are kept; None for a model in memory.
    """

    name: str
    weights: tuple[Weight, ...]
    passes: Callable[[], Steps]
    last: str | None = None
    number: int = 0
    done: bool = False
    journal: Journal | None = None

    def run(self) -> None:
        """A forward pass of all calibration data."""
        for _ in self.passes():
            pass

    def keep(self, tensors: Mapping[str, torch.Tensor], values: Any = None) -> None:
        """Write what was found here, for `recall`; nothing is written for a model in memory.

        Args:
            tensors: what was found.
            values: what else, as JSON holds it.
        """
        if self.journal is not None:
            self.journal.keep(self.number, tensors, values)

    def recall(self) -> tuple[Shard, Any]:
        """What a run before this one kept here: the file of its tensors, and its values."""
        if self.journal is None:
            raise ValueError("nothing is kept of a walk in memory")
        return self.journal.recall(self.number)


class Nobody:
    """A watcher that sees nothing."""

    def at(self, index: int | None) -> None:
        """Nothing is noted."""

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing is kept."""
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Nothing is put back."""


_GONE = torch.empty(0)
_Kept = torch.Tensor | Place


class Route:
    """What one forward pass told, and the activations that are kept: in memory, or of a streamed model on disk."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], weights: Sequence[Weight], name: str) -> None:
        self.model, self.batches = model, batches
        self.store: Store | None = store_of(model)
        self.journal = None if self.store is None else Journal(self.store.work / name)
        self.kept: dict[Key, list[_Kept]] = {}
        kinds = [kind_of(model, batch) for batch in batches]
        first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
        self.way = [sorted(first.values()).index(first[kind]) for kind in kinds]
        """Kind of each batch."""
        blocks: list[Stop] = []
        for index in sorted(first.values()):
            events = record(model, batches[index], weights)
            found = blocks_in(chains(model, events))
            if index == 0:
                blocks = found
                self.stops = placed(blocks, events, weights, blocks_of(model, [w.name for w in weights]))
            join(blocks, found)
        self.blocks = blocks
        used = [stop for stop in self.stops if stop.is_block] if weights else blocks
        ways = [(stop.number, way) for stop in used if not stop.fresh for way in stop.ways]
        self.needed = {key: number for number, way in ways for key in way.keys if key is not None}
        """Tensor -> the last block that takes it from what is kept."""
        simple = bool(blocks) and not any(stop.fresh for stop in blocks[1:])
        after = [stop for stop in self.stops if not stop.is_block and stop.number >= len(blocks)]
        self.ends_alone = simple and (not weights or (self.store is not None and bool(after)))
        """What lies behind the blocks is run on what the last one gives."""
        if self.ends_alone:
            last = blocks[-1]
            places = [i for way in last.ways for i, leaf in enumerate(way.result) if leaf is TENSOR]
            self.needed |= {("out", last.number, i): last.number + 1 for i in places}
        if self.journal is not None and self.store is not None and self.journal.done:
            for unit in self.journal.units:  # as the run before this one has left them
                if not self.store.adopt(unit):
                    raise SecateurError(
                        f"{self.store.file_of(unit)}: is gone, and the unfinished run needs it: begin anew (--restart)"
                    )
            self.kept = {_key(text): [p or _GONE for p in own] for text, own in self.journal.kept.items()}

    # --- stops of a walk ---

    def visit(self, number: int, stop: Stop) -> Iterator[Stage]:
        """The stage of a stop, if it has one; afterwards what it gives is kept."""
        weights = tuple(stop.weights)
        if self.journal is not None and number < self.journal.done:
            if weights:
                yield Stage(stop.name, weights, partial(_no_passes, stop.name), None, number, True, self.journal)
            return
        if not stop.is_block:
            if weights:
                with held(self.model, names=[w.name for w in weights]):
                    passes = self._passes(stop)
                    yield Stage(stop.name, weights, passes, None, number, False, self.journal)
            self._finish(number)
            return
        calls = self._fresh(number, stop) if stop.fresh else self._carried(stop)
        module = self.model.get_submodule(stop.name)

        def once() -> Steps:
            for args, kwargs in calls():
                with _until_enough(self.model):
                    module(*args, **kwargs)
                yield

        with held(self.model, stop.name):
            if weights:
                yield Stage(stop.name, weights, once, stop.last, number, False, self.journal)
            self._outputs(number, stop, calls, None)
        self._finish(number)

    def _passes(self, stop: Stop) -> Callable[[], Steps]:
        """Forward passes for weights outside of the blocks."""
        if self.ends_alone and stop.number == len(self.blocks):
            return self._tails
        if self.store is not None and stop.number > len(self.blocks) and len(set(self.way)) == 1:
            return _nothing  # the batch that was recorded did not reach them
        return partial(whole, self.model, self.batches, stop.until)

    def _tails(self) -> Steps:
        for _ in self.ends(Nobody()):
            yield

    # --- running all blocks ---

    def advance(self, number: int, stop: Stop, watcher: Watcher) -> None:
        """Run all batches through a block, and keep what it gives."""
        if self.journal is not None and number < self.journal.done:
            if number + 1 == self.journal.done:
                shard, _ = self.journal.recall(number)
                watcher.restore({name: shard.read(name) for name in shard.entries})
            return
        calls = self._fresh(number, stop, watcher) if stop.fresh else self._carried(stop)
        with held(self.model, stop.name):
            self._outputs(number, stop, calls, watcher)
        if self.journal is not None:
            self.journal.keep(number, watcher.state())
        self._finish(number)
        if self.journal is not None and number:
            self.journal.forget(number - 1)

    def ends(self, watcher: Watcher) -> Iterator[Any]:
        """What the model makes of what the last block gave: the blocks are stood in for, all else runs."""
        last = self.blocks[-1]
        for index, batch in enumerate(self.batches):
            own = [block.ways[self.way[index]] for block in self.blocks]
            given = [
                self._get("out", last.number, place, index) if leaf is TENSOR else leaf
                for place, leaf in enumerate(own[-1].result)
            ]

            def stand_in(number: int, index: int, own: Any, given: Any, args: Any, kwargs: Any) -> Any:
                way = own[number]
                if number == last.number:
                    watcher.at(index)
                    return pytree.tree_unflatten(given, way.result_spec)
                some = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
                return pytree.tree_unflatten([some if x is TENSOR else x for x in way.result], way.result_spec)

            watcher.at(None)  # what lies before the blocks has been seen
            with contextlib.ExitStack() as stack:
                for block in self.blocks:
                    act = partial(stand_in, block.number, index, own, given)
                    stack.enter_context(_instead(self.model.get_submodule(block.name), act))
                result = None
                with _until_enough(self.model):
                    result = run(self.model, batch)
            yield result

    # --- activations ---

    def _outputs(
        self, number: int, stop: Stop, calls: Callable[[], Iterator[tuple[Any, Any]]], watcher: Watcher | None
    ) -> None:
        """Run a block, as it is now, on all batches, and keep what later blocks need of what it gives."""
        gives = [key for key in self.needed if key[:2] == ("out", stop.number)]
        found: dict[Key, list[_Kept]] = {key: [] for key in gives}
        done = [key for key in self.kept if self.needed.get(key, -1) <= stop.number]
        module = self.model.get_submodule(stop.name)
        with self._spill(number, "out") as keep:
            for index, (args, kwargs) in enumerate(calls() if gives or watcher is not None else ()):
                if watcher is not None:
                    watcher.at(index)
                leaves = pytree.tree_leaves(module(*args, **kwargs))
                for key in gives:  # where batches differ in kind, not all give all
                    found[key].append(keep(leaves[key[2]]) if key[2] < len(leaves) else _GONE)
                for key in done:  # at once, so that not all inputs and all outputs are there together
                    self.kept[key][index] = _GONE
        self.kept = {**{key: kept for key, kept in self.kept.items() if key not in done}, **found}

    def _carried(self, stop: Stop) -> Callable[[], Iterator[tuple[Any, Any]]]:
        def calls() -> Iterator[tuple[Any, Any]]:
            for index in range(len(self.batches)):
                way = stop.ways[self.way[index]]
                leaves = [
                    leaf if key is None else self._get(*key, index)
                    for key, leaf in zip(way.keys, way.leaves, strict=True)
                ]
                yield _call(stop, leaves, way.spec)

        return calls

    def _fresh(
        self, number: int, stop: Stop, watcher: Watcher | None = None
    ) -> Callable[[], Iterator[tuple[Any, Any]]]:
        found: list[tuple[list[Any], Any]] = []
        with self._spill(number, "in") as keep:

            def take(_: nn.Module, args: Any, kwargs: Any) -> None:
                leaves, spec = pytree.tree_flatten((args, kwargs))
                found.append(([keep(x) if isinstance(x, torch.Tensor) else x for x in leaves], spec))
                raise Enough

            for index, _ in enumerate(whole(self.model, self.batches, stop.name, take, watcher)):
                if len(found) != index + 1:
                    break
        if len(found) != len(self.batches):
            raise SecateurError(
                f"{stop.name} runs on {len(found)} of {len(self.batches)} calibration batches: give batches that all "
                "take the same way through the model"
            )
        for index, (leaves, _) in enumerate(found):
            way = stop.ways[self.way[index]] if stop.ways else None
            for key, leaf in zip(way.keys, leaves, strict=True) if way is not None else ():
                if key is not None and key in self.needed:
                    self.kept.setdefault(key, [_GONE] * len(found))[index] = leaf

        def calls() -> Iterator[tuple[Any, Any]]:
            for leaves, spec in found:
                yield _call(stop, [self._value(x) for x in leaves], spec)

        return calls

    @contextlib.contextmanager
    def _spill(self, number: int, what: str) -> Iterator[Callable[[torch.Tensor], _Kept]]:
        """Where tensors are kept: as they are, or in a file."""
        if self.journal is None:
            yield lambda tensor: tensor
            return
        file: Spill = self.journal.writer(number, what)

        def keep(tensor: torch.Tensor) -> _Kept:
            return file.add(tensor)

        try:
            yield keep
        except BaseException:
            file.drop()
            raise
        file.close()

    def _get(self, side: str, number: int, leaf: int, index: int) -> Any:
        return self._value(self.kept[side, number, leaf][index])

    def _value(self, kept: Any) -> Any:
        return self.journal.read(kept) if isinstance(kept, Place) and self.journal is not None else kept

    def _finish(self, number: int) -> None:
        """Note that a stop is done."""
        if self.journal is not None:
            places = {
                _text(key): [place if isinstance(place, Place) else None for place in own]
                for key, own in self.kept.items()
            }
            self.journal.finish(number, places, () if self.store is None else self.store.taken())


def _nothing() -> Steps:
    yield from ()


def _no_passes(name: str) -> Steps:
    """What there is to run of a stage that is done."""
    raise ValueError(f"{name} is done: there is nothing to run")
    yield


def _text(key: Key) -> str:
    return f"{key[0]}:{key[1]}:{key[2]}"


def _key(text: str) -> Key:
    side, number, leaf = text.split(":")
    return side, int(number), int(leaf)


@contextlib.contextmanager
def _until_enough(model: nn.Module) -> Iterator[None]:
    """A forward pass that may end early; weights that it had loaded are let go."""
    try:
        yield
    except Enough:
        settle(model)


@contextlib.contextmanager
def _instead(module: nn.Module, act: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Call something else in place of a module, without its hooks."""
    before = module.__dict__.get("_call_impl")
    module.__dict__["_call_impl"] = lambda *args, **kwargs: act(args, kwargs)
    try:
        yield
    finally:
        module.__dict__.pop("_call_impl")
        if before is not None:
            module.__dict__["_call_impl"] = before


def whole(
    model: nn.Module,
    batches: Sequence[Batch],
    until: str | None = None,
    hook: Any = None,
    watcher: Watcher | None = None,
) -> Steps:
    """A forward pass of the model on every batch, a step for each.

    Args:
        model: to run.
        batches: calibration data.
        until: the block at whose start a pass ends.
        hook: what is called there instead, as a hook before the block, with its keyword arguments.
        watcher: is told which batch runs.
    """

    def stop(*_: Any) -> None:
        raise Enough

    handle = None
    if until is not None:
        module = model.get_submodule(until)
        handle = module.register_forward_pre_hook(hook or stop, with_kwargs=hook is not None, prepend=True)
    try:
        for index, batch in enumerate(batches):
            if watcher is not None:
                watcher.at(index)
            with _until_enough(model):
                run(model, batch)
            yield
    finally:
        if handle is not None:
            handle.remove()


def _call(stop: Stop, leaves: list[Any], spec: Any) -> tuple[Any, Any]:
    if stop.writes:
        leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs
