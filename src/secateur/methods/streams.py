"""The residual stream of a model as its norms see it: who reads each of them, and the statistics to choose a basis by.

A stream can be turned by any orthogonal matrix where only RMS norms read it and only matrix products read those. What
else a model does with it is found in one forward pass, and is refused by name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.load.batches import Batch, first_samples, run, samples_of, size_of
from secateur.load.mode import evaluating
from secateur.progress import Track, quiet
from secateur.score.fisher import output_gradients
from secateur.space import Axis, Space
from secateur.space.products import Product, Products, plain_attention
from secateur.space.types import Norm

KIND = "hidden"
_ATEN = torch.ops.aten
_PLACED = """view _unsafe_view reshape transpose permute t unsqueeze squeeze expand slice select index index_select
    clone _to_copy alias detach contiguous split split_with_sizes unbind repeat gather lift_fresh""".split()
"""Operators that only move rows about; their results are read like what went in."""
_SHAPES = """zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full sym_size size is_pinned
    _local_scalar_dense""".split()
"""Operators that take no more than the form of a tensor."""
_MULTIPLY = ("mul", "mul_", "div", "div_")


@dataclass(frozen=True)
class Stream:
    """One norm of the stream; u = h / rms(h) is what it makes before its weight.

    Attributes:
        norm: Path of the module.
        weight: What it multiplies u by (with its offset), [d] float64.
        readers: Parameters that are multiplied with its result.
        second: E[u u'], [d, d] float64.
        fisher: F, the second moments of the gradients of log p(y) at u, likewise.
        reads: L = sum over readers of diag(weight) W'W diag(weight), likewise; an expert counts for its share of rows.
        outer: Second moments of the gradients at the norm's result, likewise.
    """

    norm: str
    weight: torch.Tensor
    readers: tuple[str, ...]
    second: torch.Tensor
    fisher: torch.Tensor
    reads: torch.Tensor
    outer: torch.Tensor


@dataclass(frozen=True)
class Streams:
    """What is known of a residual stream.

    Attributes:
        axis: The axis of the stream.
        streams: Of all norms, in the order of the forward pass.
        tied: The norm whose result a head reads that shares the embedding; None where there is none.
        sample: One sample of the data.
        samples: Calibration samples that went in.
    """

    axis: str
    streams: tuple[Stream, ...]
    tied: str | None
    sample: Batch
    samples: int
    found: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Spaces that were worked out, by (k, iterations)."""

    @property
    def width(self) -> int:
        """Units of the stream."""
        return len(self.streams[0].weight)

    @property
    def seconds(self) -> list[torch.Tensor]:
        """E[u u'] of each norm."""
        return [stream.second for stream in self.streams]

    @property
    def fishers(self) -> list[torch.Tensor]:
        """Second moments of the gradients at each u."""
        return [stream.fisher for stream in self.streams]


@torch.inference_mode(mode=False)
def measure_streams(
    model: nn.Module,
    space: Space,
    data: Sequence[Batch],
    *,
    fisher_samples: int = 96,
    seed: int = 0,
    track: Track = quiet,
) -> Streams:
    """Find who reads the residual stream, and measure what a basis for it is chosen by.

    Args:
        model: whose stream only RMS norms read, and these only matrix products (Llama, Qwen, Mistral, Gemma 1...).
        space: its Space, with one axis of the kind hidden.
        data: calibration batches.
        fisher_samples: samples that gradients are taken of.
        seed: what y of log p(y) is drawn with.
        track: shows progress.

    Raises:
        SecateurError: where the stream cannot be turned (says what reads it, and how), without data, for activations
            that are not finite.
    """
    if not data:
        raise SecateurError("a basis for the residual stream is chosen by what runs through it: give calibration data")
    if fisher_samples < 1:
        raise SecateurError(f"fisher_samples must be at least 1, not {fisher_samples}")
    axis = stream_axis(space)
    norms = [norm for norm in space.norms if norm.axis == axis.name]
    sample = samples_of(data[0])[0]
    readers, tied = _linked(model, space, axis, norms, sample)
    norms = [norm for norm in norms if norm.module in readers]
    seconds = _seconds(model, norms, axis.size, data, track)
    few = first_samples(data, fisher_samples)
    outers = output_gradients(model, [norm.module for norm in norms], few, seed=seed, track=track)
    parameters = dict(model.named_parameters())
    streams = []
    for norm in norms:
        weight, second = weight_of(norm, parameters, axis.size), seconds[norm.module]
        outer = outers.get(norm.module, torch.zeros(axis.size, axis.size)).to(second)
        fisher = weight[:, None] * outer * weight[None, :]
        own = tuple(readers[norm.module])
        reads = sum((_gram(space, axis, parameters, name) for name in own), torch.zeros_like(second))
        reads = weight[:, None] * reads * weight[None, :]
        if not bool(torch.isfinite(second).all() and torch.isfinite(fisher).all() and torch.isfinite(reads).all()):
            raise SecateurError(f"NaN or infinite numbers at {norm.module}: check the weights, the data and the dtype")
        streams.append(Stream(norm.module, weight, own, second, fisher, reads, outer))
    return Streams(axis.name, tuple(streams), tied, sample, sum(map(size_of, data)))


def stream_axis(space: Space) -> Axis:
    """The axis of the residual stream.

    Raises:
        SecateurError: unless there is just one, with norms, and every tensor has it on one whole dimension.
    """
    axes = space.of_kind(KIND)
    if len(axes) != 1:
        raise refusal(f"it has {len(axes)} axes of the kind {KIND}, not one")
    axis = axes[0]
    if axis.groups != 1:
        raise refusal(f"{axis.name} comes in {axis.groups} groups")
    if not any(norm.axis == axis.name for norm in space.norms):
        raise refusal(f"no norm reads {axis.name}")
    seen: set[str] = set()
    for part in axis.slices:
        whole = space.tensor(part.parameter).shape[part.dim] == axis.size and len(part.rows().flatten()) == axis.size
        if not whole or part.parameter in seen:
            raise refusal(f"{axis.name} is but a part of {part.parameter}, or lies in it twice")
        seen.add(part.parameter)
    if space.buffers and any(part.parameter in space.buffers for part in axis.slices):
        raise refusal(f"{axis.name} runs through a buffer")
    return axis


def weight_of(norm: Norm, parameters: Mapping[str, torch.Tensor], size: int) -> torch.Tensor:
    """What a norm multiplies by, float64 [size]."""
    if norm.weight is None:
        return torch.ones(size, dtype=torch.float64)
    return parameters[norm.weight].detach().double() + norm.weight_offset


def refusal(reason: str) -> SecateurError:
    """What is raised where a stream cannot be turned."""
    return SecateurError(
        f"the residual stream cannot be turned: {reason}; cut the hidden size by its own units instead (no rotation)"
    )


@contextmanager
def normalised(model: nn.Module, norms: Sequence[Norm], see: Callable[[Norm, torch.Tensor], None]) -> Iterator[None]:
    """While it is on, `see` is called with a norm and u [rows, width], what it makes before its weight."""
    parameters, handles = dict(model.named_parameters()), []
    for norm in norms:

        def hook(module: nn.Module, args: Any, result: torch.Tensor, *, norm: Norm = norm) -> None:
            with torch.no_grad():
                see(norm, _unscaled(module, norm, args, result, parameters))

        handles.append(model.get_submodule(norm.module).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unscaled(
    module: nn.Module, norm: Norm, args: Any, result: Any, parameters: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What a norm makes before its weight; refuses one that is no number for each row and its weight."""
    kind = f"{norm.module} ({type(module).__name__})"
    if len(args) != 1 or not isinstance(args[0], torch.Tensor) or not isinstance(result, torch.Tensor):
        raise refusal(f"{kind} takes or gives more than one tensor")
    h, y = args[0].flatten(0, -2), result.flatten(0, -2)
    h, y = (x if x.dtype == torch.float64 else x.float() for x in (h, y))
    weighted = h * weight_of(norm, parameters, h.shape[-1]).to(h)
    share = (y * weighted).sum(-1, keepdim=True) / weighted.square().sum(-1, keepdim=True).clamp_min(1e-30)
    precision = max(torch.finfo(result.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5  # many norms work in float32
    if bool((y - share * weighted).norm() > precision * y.norm().clamp_min(1e-30)):
        raise refusal(f"{kind} is no RMS norm: the mean that it takes away, or a bias, does not turn with the basis")
    return h * share


def _seconds(
    model: nn.Module, norms: Sequence[Norm], size: int, data: Sequence[Batch], track: Track
) -> dict[str, torch.Tensor]:
    """E[u u'] of each norm."""
    found: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}

    def see(norm: Norm, u: torch.Tensor) -> None:
        empty = torch.zeros(size, size, dtype=torch.float64, device=u.device)
        found[norm.module] = found.get(norm.module, empty) + (u.T @ u).double()
        rows[norm.module] = rows.get(norm.module, 0) + len(u)

    with evaluating(model), torch.no_grad(), normalised(model, norms, see):
        for batch in track(data, "what runs through the stream"):
            run(model, batch)
    return {name: total / rows[name] for name, total in found.items()}


def _gram(space: Space, axis: Axis, parameters: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """W'W of a reader; of stacked experts for the share of rows that each meets."""
    dim = next(part.dim for part in axis.slices if part.parameter == name)
    rows = parameters[name].detach().movedim(dim, -1).flatten(0, -2).double()
    share = 1.0
    for router in space.routers:
        experts = space.axis(router.axis)
        if any(part.parameter == name for part in experts.slices) and parameters[name].dim() > 2:
            share = router.active / experts.size
    return share * (rows.T @ rows)


# --- who reads what ---


def _linked(
    model: nn.Module, space: Space, axis: Axis, norms: Sequence[Norm], sample: Batch
) -> tuple[dict[str, list[str]], str | None]:
    """Norm -> the parameters that read it, and the norm of a tied head; refuses whatever reads the stream besides."""
    wanted = {reader.parameter for reader, _ in space.consumers(axis)}
    weights = {name: p for name, p in model.named_parameters() if name in wanted}
    weighted = {norm.weight for norm in norms}
    others = {part.parameter for part in axis.slices} - wanted - weighted
    parameters = dict(model.named_parameters())
    vectors = {name: parameters[name] for name in others if parameters[name].dim() == 1}
    watch = _Feeds(weights, vectors)
    handles = []
    calls: dict[str, int] = {}
    for norm in norms:

        def mark(_: nn.Module, __: Any, result: torch.Tensor, *, name: str = norm.module) -> None:
            calls[name] = calls.get(name, 0) + 1
            watch.mark(result, name)

        handles.append(model.get_submodule(norm.module).register_forward_hook(mark))
    try:
        with evaluating(model), torch.no_grad(), plain_attention(), watch:
            run(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    if watch.reason:
        raise refusal(watch.reason)
    read = {norm for sources in watch.fed.values() for norm in sources}
    unread = next((name for name in calls if name not in read), None)
    if unread is not None:
        raise refusal(f"no weight is multiplied with the result of {unread}, which the model may return as it is")
    twice = next((name for name, count in calls.items() if count > 1), None)
    if twice is not None:
        raise refusal(f"{twice} runs {calls[twice]} times in one pass")
    return _checked(model, wanted, watch.fed)


def _checked(
    model: nn.Module, wanted: set[str], fed: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], str | None]:
    """What each norm feeds, where every reader is fed by just one."""
    readers: dict[str, list[str]] = {}
    for name in sorted(wanted):
        sources = fed.get(name, [])
        if len(sources) != 1:
            what = f"{len(sources)} norms ({', '.join(sources)})" if sources else "no norm in the first sample"
            raise refusal(f"{name} reads it through {what}")
    for name, sources in fed.items():
        readers.setdefault(sources[0], []).append(name)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    shared = {name for name, p in model.named_parameters() if id(p) in tables}
    tied = [norm for norm, own in readers.items() if shared.intersection(own)]
    if len(tied) > 1 or any(len(readers[norm]) > 1 for norm in tied):
        raise refusal(f"{', '.join(readers[tied[0]])} share {tied[0]} with a tied head")
    return readers, tied[0] if tied else None


class _Feeds(Products):  # type: ignore[no-untyped-call]
    """Follows what norms give, through operators that only move rows, to the products that read it."""

    def __init__(self, weights: Mapping[str, torch.Tensor], vectors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(weights, self._note)
        self.fed: dict[str, list[str]] = {}
        self.reason = ""
        self.vectors = {_memory(p): name for name, p in vectors.items()}
        self._norm: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []
        self._products = 0

    def mark(self, tensor: torch.Tensor, norm: str) -> None:
        """This tensor, and all that shares its memory, is what a norm gave."""
        self._norm[_memory(tensor)] = norm
        self._alive.append(tensor)  # else its address could be another's

    def _note(self, product: Product) -> None:
        norm = self._norm.get(_memory(product.operand), "")
        if not norm:
            self._refuse(f"{product.weight} reads it without a norm in between")
            return
        self._products += 1
        own = self.fed.setdefault(product.weight, [])
        if norm not in own:
            own.append(norm)

    def _refuse(self, reason: str) -> None:
        self.reason = self.reason or reason

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and tell where its result comes from."""
        self._products = 0
        given = [x for x in pytree.tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        norm = next((self._norm[_memory(x)] for x in given if _memory(x) in self._norm), None)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.partition("::")[2]
        factor = next((self.vectors[_memory(x)] for x in given if _memory(x) in self.vectors), None)
        if factor is not None and name in _MULTIPLY:
            self._refuse(f"{factor} multiplies its units one by one")
        if norm is None or self._products or name in _SHAPES:
            return result
        outcome = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        if name in _PLACED:
            for x in outcome:
                self.mark(x, norm)
        elif outcome:
            into = (
                "is added to something, not only multiplied with weights"
                if name in ("add", "add_")
                else f"goes into {name}"
            )
            self._refuse(f"the result of {norm} {into}")
        return result


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
