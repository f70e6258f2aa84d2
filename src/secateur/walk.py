"""Go through a model block by block: each is calibrated on what the blocks before it, already changed, give.

One forward pass finds out how the model is run: which modules of its lists follow each other, what each is called
with, and where that comes from. A block whose arguments are results of earlier blocks, or were arguments of one, is run
alone, on activations that are kept; any other gets its arguments from a forward pass that stops there. Weights outside
of such lists are calibrated in a forward pass of the whole model, up to their last use.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.mode import evaluating
from secateur.progress import Track, quiet
from secateur.space.products import Enough, Products, plain_attention
from secateur.space.weights import Weight, blocks_of

Key = tuple[str, int, int]
"""(``in`` or ``out``, stage, leaf): a tensor that goes into or comes out of a block."""


Steps = Generator[None, None, None]


@dataclass(frozen=True)
class Stage:
    """A stop on the way.

    Attributes:
        name: Of the block, or of what the weights have in common.
        weights: Those that lie in it.
        passes: Starts a forward pass of all calibration data through it, as it is now, in steps of a batch.
        last: The weight at whose product a pass may end, because no other is met after it (see `Products`).
    """

    name: str
    weights: tuple[Weight, ...]
    passes: Callable[[], Steps]
    last: str | None = None

    def run(self) -> None:
        """A forward pass of all calibration data."""
        for _ in self.passes():
            pass


def walk(
    model: nn.Module,
    batches: Sequence[Batch],
    weights: Sequence[Weight],
    *,
    track: Track = quiet,
    what: str = "pruning, block by block",
) -> Generator[Stage, None, None]:
    """Visit all weights in the order of the forward pass; change those of a stage before you ask for the next one.

    Args:
        model: it is run in evaluation mode, without gradients, and left as the visitor leaves it.
        batches: calibration data.
        weights: which to visit; each belongs to one stage.
        track: shows progress over the stages.
        what: is said to be done there.

    Yields:
        The stages. Weights that no forward pass reaches come last.

    Raises:
        SecateurError: without batches.
    """
    if not batches:
        raise SecateurError("there is no calibration batch: give data")
    with torch.inference_mode(mode=False), evaluating(model), torch.no_grad(), plain_attention():
        route = _Route(model, batches, weights)
        for stop in track(route.stops, what):
            yield from route.visit(stop)


@dataclass(frozen=True)
class _Way:
    """How a block is called for batches of one kind."""

    keys: tuple[Key | None, ...]
    """Where each argument comes from; None for what is no tensor."""
    leaves: tuple[Any, ...]
    """What is no tensor."""
    spec: Any


@dataclass
class _Stop:
    """One stage, before it is run."""

    name: str
    weights: list[Weight] = field(default_factory=list)
    number: int = 0
    """Place among the blocks; of weights outside of blocks, that of the block before which they are used."""
    is_block: bool = False
    ways: list["_Way"] = field(default_factory=list)
    """How it is called, for each kind of batch."""
    call: "_Call | None" = None
    fresh: bool = False
    """Some argument is known only from a forward pass of the model."""
    writes: bool = False
    """The block changes its arguments in place."""
    last: str | None = None
    """The weight that is met last, where each is met once."""
    until: str | None = None
    """The block at whose start the forward pass may stop."""


_GONE = torch.empty(0)


class _Route:
    """What one forward pass told, and the activations that are kept."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], weights: Sequence[Weight]) -> None:
        self.model, self.batches = model, batches
        self.kept: dict[Key, list[torch.Tensor]] = {}
        kinds = [_kind(model, batch) for batch in batches]
        first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
        self.way = [sorted(first.values()).index(first[kind]) for kind in kinds]
        """Kind of each batch."""
        blocks: list[_Stop] = []
        for index in sorted(first.values()):
            events = _record(model, batches[index], weights)
            found = _blocks(_chains(model, events))
            if index == 0:
                blocks = found
                self.stops = _placed(blocks, events, weights, blocks_of(model, [w.name for w in weights]))
            _join(blocks, found)
        blocks = [stop for stop in self.stops if stop.is_block]
        ways = [(stop.number, way) for stop in blocks if not stop.fresh for way in stop.ways]
        self.needed = {key: number for number, way in ways for key in way.keys if key is not None}
        """Tensor -> the last block that takes it from what is kept."""

    def visit(self, stop: _Stop) -> Iterator[Stage]:
        if not stop.is_block:
            if stop.weights:
                yield Stage(stop.name, tuple(stop.weights), lambda: whole(self.model, self.batches, stop.until))
            return
        calls = self._fresh(stop) if stop.fresh else self._carried(stop)
        module = self.model.get_submodule(stop.name)

        def once() -> Steps:
            for args, kwargs in calls():
                with contextlib.suppress(Enough):
                    module(*args, **kwargs)
                yield

        if stop.weights:
            yield Stage(stop.name, tuple(stop.weights), once, stop.last)
        gives = [key for key in self.needed if key[:2] == ("out", stop.number)]
        found: dict[Key, list[torch.Tensor]] = {key: [] for key in gives}
        done = [key for key in self.kept if self.needed[key] <= stop.number]
        for index, (args, kwargs) in enumerate(calls() if gives else ()):
            leaves = pytree.tree_leaves(module(*args, **kwargs))
            for key in gives:  # where batches differ in kind, not all give all
                found[key].append(leaves[key[2]] if key[2] < len(leaves) else _GONE)
            for key in done:  # at once, so that not all inputs and all outputs are there together
                self.kept[key][index] = _GONE
        self.kept = {**{key: kept for key, kept in self.kept.items() if key not in done}, **found}

    def _carried(self, stop: _Stop) -> Callable[[], Iterator[tuple[Any, Any]]]:
        def calls() -> Iterator[tuple[Any, Any]]:
            for index in range(len(self.batches)):
                way = stop.ways[self.way[index]]
                leaves = [
                    leaf if key is None else self.kept[key][index]
                    for key, leaf in zip(way.keys, way.leaves, strict=True)
                ]
                yield _call(stop, leaves, way.spec)

        return calls

    def _fresh(self, stop: _Stop) -> Callable[[], Iterator[tuple[Any, Any]]]:
        found: list[tuple[list[Any], Any]] = []

        def take(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(pytree.tree_flatten((args, kwargs)))
            raise Enough

        for _ in whole(self.model, self.batches, stop.name, take):
            pass
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
        return lambda: (_call(stop, leaves, spec) for leaves, spec in found)


def whole(model: nn.Module, batches: Sequence[Batch], until: str | None = None, hook: Any = None) -> Steps:
    """A forward pass of the model on every batch, a step for each.

    Args:
        model: to run.
        batches: calibration data.
        until: the block at whose start a pass ends.
        hook: what is called there instead, as a hook before the block, with its keyword arguments.
    """

    def stop(*_: Any) -> None:
        raise Enough

    handle = None
    if until is not None:
        module = model.get_submodule(until)
        handle = module.register_forward_pre_hook(hook or stop, with_kwargs=hook is not None, prepend=True)
    try:
        for batch in batches:
            with contextlib.suppress(Enough):
                run(model, batch)
            yield
    finally:
        if handle is not None:
            handle.remove()


def _call(stop: _Stop, leaves: list[Any], spec: Any) -> tuple[Any, Any]:
    if stop.writes:
        leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def chain_of(model: nn.Module, batch: Batch) -> list[str]:
    """Paths of the modules of lists that hand a tensor on from each to the next, in the order of the forward pass."""
    with torch.inference_mode(mode=False), evaluating(model), torch.no_grad(), plain_attention():
        return [call.path for call in _chains(model, _record(model, batch, []))]


# --- finding the way ---


@dataclass
class _Call:
    """One call of a module that lies in a list of modules."""

    path: str
    begin: int
    leaves: list[Any]
    spec: Any
    versions: list[int | None]
    end: int = 0
    result: list[Any] = field(default_factory=list)
    result_versions: list[int | None] = field(default_factory=list)
    writes: bool = False


@dataclass
class _Events:
    calls: list[_Call]
    uses: dict[str, list[int]]
    """Weight -> times of its products."""


def _record(model: nn.Module, batch: Batch, weights: Sequence[Weight]) -> _Events:
    """Run the model once and write down calls and products, with their times."""
    clock = itertools.count()
    calls: list[_Call] = []
    open_calls: dict[str, list[_Call]] = {}
    uses: dict[str, list[int]] = {}
    handles = []
    for path in dict.fromkeys(path for _, paths in _lists(model) for path in paths):

        def before(_: nn.Module, args: Any, kwargs: Any, *, path: str = path) -> None:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            call = _Call(path, next(clock), leaves, spec, [_version(x) for x in leaves])
            calls.append(call)
            open_calls.setdefault(path, []).append(call)

        def after(_: nn.Module, __: Any, output: Any, *, path: str = path) -> None:
            call = open_calls[path].pop()
            call.result, call.end = pytree.tree_leaves(output), next(clock)
            call.result_versions = [_version(x) for x in call.result]
            call.writes = call.versions != [_version(x) for x in call.leaves]

        module = model.get_submodule(path)
        handles += [module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)]
        handles += [module.register_forward_hook(after)]

    def see(product: Any) -> None:
        uses.setdefault(product.weight, []).append(next(clock))

    parameters = dict(model.named_parameters())
    try:
        with Products({w.name: parameters[w.name] for w in weights}, see):
            run(model, batch)
    except SecateurError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # the user's model on the user's data
        text = " ".join(str(error).split())
        raise SecateurError(f"{type(model).__name__} does not run on the calibration data: {text[:300]}") from error
    finally:
        for handle in handles:
            handle.remove()
    return _Events(calls, uses)


def _version(x: Any) -> int | None:
    return x._version if isinstance(x, torch.Tensor) and not x.is_inference() else None


def _lists(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Lists of modules, outermost first: (path, paths of what they hold)."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            yield path, [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]


def _chains(model: nn.Module, events: _Events) -> list[_Call]:
    """Calls of the modules of lists that hand a tensor on from each to the next, in the order of time."""
    by_path: dict[str, list[_Call]] = {}
    for call in events.calls:
        by_path.setdefault(call.path, []).append(call)
    found: list[_Call] = []
    for _, paths in _lists(model):
        found_in = [by_path.get(path, []) for path in paths]
        if any(len(calls) > 1 for calls in found_in):
            continue
        chain = [calls[0] for calls in found_in if calls]
        if len({id(model.get_submodule(call.path)) for call in chain}) < len(chain):
            continue
        if any(f"{call.path}.".startswith(f"{other.path}.") for call in chain for other in found):
            continue
        if len(chain) > 1 and all(_hands_on(a, b) for a, b in itertools.pairwise(chain)):
            found += chain
    return sorted(found, key=lambda call: call.begin)


def _hands_on(a: _Call, b: _Call) -> bool:
    given = {id(x) for x in a.result if isinstance(x, torch.Tensor)}
    return a.end < b.begin and any(id(x) in given for x in b.leaves)


def _blocks(chain: Sequence[_Call]) -> list[_Stop]:
    """The blocks of a chain, and where the arguments of each come from."""
    known: dict[tuple[int, int | None], Key] = {}
    blocks: list[_Stop] = []
    for number, call in enumerate(chain):
        stop = _Stop(call.path, number=number, is_block=True, call=call, writes=call.writes)
        keys: list[Key | None] = []
        for place, leaf in enumerate(call.leaves):
            if isinstance(leaf, torch.Tensor):
                state = id(leaf), call.versions[place]  # what was changed in place since is another tensor now
                stop.fresh = stop.fresh or state not in known
                keys.append(known.setdefault(state, ("in", number, place)))
            else:
                plain = leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device)
                stop.fresh = stop.fresh or not plain
                keys.append(None)
        for place, leaf in enumerate(call.result):
            if isinstance(leaf, torch.Tensor):
                known[id(leaf), call.result_versions[place]] = ("out", number, place)
        leaves = tuple(None if key is not None else leaf for key, leaf in zip(keys, call.leaves, strict=True))
        stop.ways = [_Way(tuple(keys), leaves, call.spec)]
        blocks.append(stop)
    return blocks


def _join(blocks: list[_Stop], others: list[_Stop]) -> None:
    """Take in how another kind of batch runs the blocks; where it runs others, nothing is carried."""
    if blocks is others:
        return
    same = [stop.name for stop in blocks] == [stop.name for stop in others]
    for place, stop in enumerate(blocks):
        if same:
            stop.ways += others[place].ways
            stop.fresh, stop.writes = stop.fresh or others[place].fresh, stop.writes or others[place].writes
        else:
            stop.fresh, stop.ways = True, []


def _kind(model: nn.Module, batch: Batch) -> tuple[Any, ...]:
    """What decides how a model is run: shapes, and masks and positions, of which a model may make None."""
    main = getattr(model, "main_input_name", None)
    named = dict(batch) if isinstance(batch, Mapping) else {"": batch}
    found: list[Any] = []
    for name, value in named.items():
        for x in pytree.tree_leaves(value):
            if isinstance(x, torch.Tensor) and name != "labels":
                counts = isinstance(batch, Mapping) and name != main and not x.is_floating_point()
                found.append((name, tuple(x.shape), x.cpu().numpy().tobytes() if counts else None))
    return tuple(found)


def _placed(blocks: list[_Stop], events: _Events, weights: Sequence[Weight], around: Mapping[str, str]) -> list[_Stop]:
    """The blocks with their weights, and between them stops for the weights outside."""
    spans = [(stop.name, stop.call.begin, stop.call.end) for stop in blocks if stop.call is not None]
    between: list[_Stop] = []
    unreached = _Stop("weights that no calibration data reaches", number=len(blocks) + 1)
    for weight in sorted(weights, key=lambda w: events.uses.get(w.name, [0])[0]):
        inside = next((stop for stop in blocks if weight.name.startswith(f"{stop.name}.")), None)
        times = events.uses.get(weight.name, [-1])
        first, last = times[0], times[-1]
        if first < 0:
            (inside or unreached).weights.append(weight)
        elif inside is not None and spans[inside.number][1] < first <= last < spans[inside.number][2]:
            inside.weights.append(weight)
        else:
            number = sum(end < first for _, _, end in spans)
            name = around[weight.name]
            if not between or (between[-1].number, between[-1].name) != (number, name):
                between.append(_Stop(name, number=number))  # a name may come again: the order is that of use
            between[-1].weights.append(weight)
    for stop in blocks:
        met = {w.name: events.uses.get(w.name, []) for w in stop.weights}
        if met and all(len(found) == 1 for found in met.values()):  # so nothing that depends on the data is among them
            stop.last = max(met, key=lambda name: met[name][0])
    for stop in between:
        last = max(events.uses[weight.name][-1] for weight in stop.weights)
        stop.until = next((path for path, begin, _ in spans if begin > last), None)
    for stop in blocks:
        stop.call = None  # it holds activations
    ordered = sorted([*between, *blocks, unreached], key=lambda stop: (stop.number, stop.is_block))
    ends = [place for place, stop in enumerate(ordered) if stop.weights]
    return ordered[: ends[-1] + 1] if ends else []
