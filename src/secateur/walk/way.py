"""How a model is run: which modules of its lists follow each other, and where what each is called with comes from."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.mode import evaluating
from secateur.load.store import settle
from secateur.space.products import Products, plain_attention
from secateur.space.weights import Weight

Key = tuple[str, int, int]
"""(``in`` or ``out``, stage, leaf): a tensor that goes into or comes out of a block."""
TENSOR = object()
"""Stands for a tensor in what a block gives, where None may be a part of it."""


@dataclass(frozen=True)
class Way:
    """How a block is called for batches of one kind."""

    keys: tuple[Key | None, ...]
    """Where each argument comes from; None for what is no tensor."""
    leaves: tuple[Any, ...]
    """What is no tensor."""
    spec: Any
    result: tuple[Any, ...]
    """What it gives; `TENSOR` for every tensor."""
    result_spec: Any


@dataclass
class Stop:
    """One stage, before it is run."""

    name: str
    weights: list[Weight] = field(default_factory=list)
    number: int = 0
    """Place among the blocks; of weights outside of blocks, that of the block before which they are used."""
    is_block: bool = False
    ways: list["Way"] = field(default_factory=list)
    """How it is called, for each kind of batch."""
    call: "Call | None" = None
    fresh: bool = False
    """Some argument is known only from a forward pass of the model."""
    writes: bool = False
    """The block changes its arguments in place."""
    last: str | None = None
    """The weight that is met last, where each is met once."""
    until: str | None = None
    """The block at whose start the forward pass may stop."""


def chain_of(model: nn.Module, batch: Batch) -> list[str]:
    """Paths of the modules of lists that hand a tensor on from each to the next, in the order of the forward pass."""
    with torch.inference_mode(mode=False), evaluating(model), torch.no_grad(), plain_attention():
        return [call.path for call in chains(model, record(model, batch, []))]


# --- finding the way ---


@dataclass
class Call:
    """One call of a module that lies in a list of modules."""

    path: str
    begin: int
    leaves: list[Any]
    spec: Any
    versions: list[int | None]
    end: int = 0
    result: list[Any] = field(default_factory=list)
    result_spec: Any = None
    result_versions: list[int | None] = field(default_factory=list)
    writes: bool = False


@dataclass
class Events:
    """What happened in one forward pass."""

    calls: list[Call]
    uses: dict[str, list[int]]
    """Weight -> times of its products."""


def record(model: nn.Module, batch: Batch, weights: Sequence[Weight]) -> Events:
    """Run the model once and write down calls and products, with their times."""
    clock = itertools.count()
    calls: list[Call] = []
    open_calls: dict[str, list[Call]] = {}
    uses: dict[str, list[int]] = {}
    handles = []
    for path in dict.fromkeys(path for _, paths in _lists(model) for path in paths):

        def before(_: nn.Module, args: Any, kwargs: Any, *, path: str = path) -> None:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            call = Call(path, next(clock), leaves, spec, [_version(x) for x in leaves])
            calls.append(call)
            open_calls.setdefault(path, []).append(call)

        def after(_: nn.Module, __: Any, output: Any, *, path: str = path) -> None:
            call = open_calls[path].pop()
            call.result, call.result_spec = pytree.tree_flatten(output)
            call.end = next(clock)
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
        settle(model)
    return Events(calls, uses)


def _version(x: Any) -> int | None:
    return x._version if isinstance(x, torch.Tensor) and not x.is_inference() else None


def _lists(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Lists of modules, outermost first: (path, paths of what they hold)."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            yield path, [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]


def chains(model: nn.Module, events: Events) -> list[Call]:
    """Calls of the modules of lists that hand a tensor on from each to the next, in the order of time."""
    by_path: dict[str, list[Call]] = {}
    for call in events.calls:
        by_path.setdefault(call.path, []).append(call)
    found: list[Call] = []
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


def _hands_on(a: Call, b: Call) -> bool:
    given = {id(x) for x in a.result if isinstance(x, torch.Tensor)}
    return a.end < b.begin and any(id(x) in given for x in b.leaves)


def blocks_in(chain: Sequence[Call]) -> list[Stop]:
    """The blocks of a chain, and where the arguments of each come from."""
    known: dict[tuple[int, int | None], Key] = {}
    blocks: list[Stop] = []
    for number, call in enumerate(chain):
        stop = Stop(call.path, number=number, is_block=True, call=call, writes=call.writes)
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
        given = tuple(TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in call.result)
        stop.ways = [Way(tuple(keys), leaves, call.spec, given, call.result_spec)]
        blocks.append(stop)
    return blocks


def join(blocks: list[Stop], others: list[Stop]) -> None:
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


def kind_of(model: nn.Module, batch: Batch) -> tuple[Any, ...]:
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


def placed(blocks: list[Stop], events: Events, weights: Sequence[Weight], around: Mapping[str, str]) -> list[Stop]:
    """The blocks with their weights, and between them stops for the weights outside."""
    spans = [(stop.name, stop.call.begin, stop.call.end) for stop in blocks if stop.call is not None]
    between: list[Stop] = []
    unreached = Stop("weights that no calibration data reaches", number=len(blocks) + 1)
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
                between.append(Stop(name, number=number))  # a name may come again: the order is that of use
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
