"""How many zeros the weights of a model hold, in which patterns, and what they could save.

Zeros do not make anything faster by themselves: dense kernels multiply with them. What they buy is size, once the
file is compressed; 2:4 also buys time in large products on NVIDIA Ampere or newer, with kernels made for it. So
`macs_skipped` is what a kernel that skips zeros would save, and no promise.
"""

import dataclasses
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.choose.mask import NM
from secateur.errors import SecateurError
from secateur.load.batches import size_of
from secateur.load.mode import evaluating
from secateur.space.products import Product, Products, plain_attention
from secateur.space.trace import Inputs, arguments
from secateur.space.weights import Weight, maskable
from secateur.train.masked import parametrized

_LEVEL = 6
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Pattern:
    """How far a weight keeps an N:M pattern.

    Attributes:
        share: Of its groups of M consecutive columns, those with at most N non-zeros, in [0, 1].
        all: Whether every group is such.
    """

    share: float
    all: bool


@dataclass(frozen=True)
class WeightStatistics:
    """The zeros of one weight.

    Attributes:
        name: Of the parameter.
        shape: Of the tensor.
        elements: In it.
        zeros: Of them, exactly zero.
        sparsity: zeros / elements.
        patterns: Each N:M -> how far it is kept; None where M does not divide the innermost input channels.
        macs: Multiply-accumulates of one sample of the inputs; None without a forward pass, and for a weight that
            took no part in it.
        macs_skipped: Those of them that multiply with a zero.
        bytes: As it is.
        bytes_bitmask: One bit for each element, and the non-zeros.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    zeros: int
    sparsity: float
    patterns: Mapping[str, Pattern | None]
    macs: float | None
    macs_skipped: float | None
    bytes: int
    bytes_bitmask: int


@dataclass(frozen=True)
class Totals:
    """Sums over several tensors, each shared one once.

    Attributes:
        elements: In all.
        zeros: Of them.
        sparsity: zeros / elements.
        macs: Multiply-accumulates of one sample with these tensors; None without a forward pass.
        macs_skipped: Those of them that multiply with a zero.
        bytes: As they are.
        bytes_bitmask: One bit for each element, and the non-zeros; of tensors that this makes larger, as they are.
    """

    elements: int
    zeros: int
    sparsity: float
    macs: float | None
    macs_skipped: float | None
    bytes: int
    bytes_bitmask: int


@dataclass(frozen=True)
class Statistics:
    """The zeros of a model.

    Attributes:
        weights: The maskable ones, in the model's order.
        maskable: Their totals.
        parameters: Totals of all parameters: norms, biases and embeddings too.
        left: Tensors of two dimensions or more that are not among the weights -> why.
        gzip: Bytes of all parameters after zlib level 6, measured; None where that was not asked for.
        no_macs: Why there are no MACs; None where there are.
    """

    weights: tuple[WeightStatistics, ...]
    maskable: Totals
    parameters: Totals
    left: Mapping[str, str]
    gzip: int | None
    no_macs: str | None

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            **dataclasses.asdict(self),
            "weights": [{**dataclasses.asdict(w), "shape": list(w.shape)} for w in self.weights],
        }


@dataclass
class _Work:
    """Multiply-accumulates of one sample with one parameter."""

    macs: float = 0
    skipped: float = 0


def statistics(
    model: nn.Module,
    *,
    inputs: Inputs = None,
    only: Sequence[str] = (),
    ignore: Sequence[str] = (),
    patterns: Sequence[NM] = ((2, 4),),
    gzip: bool = False,
) -> Statistics:
    """Read the zeros off the weights of any model: just pruned, finalized, or loaded from disk.

    MACs are counted in one real forward pass on the inputs, as products of activations with weights; those of
    activations with each other (attention scores) are not among them.

    Args:
        model: any module with values.
        inputs: arguments of one forward pass, for MACs; None = those of a Hugging Face model, and no MACs for others.
        only: names of weights or modules, or patterns, of the weights that are listed; all maskable ones by default.
        ignore: the same, of what is not.
        patterns: (N, M) of N:M patterns to look for.
        gzip: compress the bytes of all parameters, to measure what is left; takes about a minute a GB.

    Raises:
        SecateurError: for a name that matches nothing, a pattern that is none, a model without values, one whose masks
            `sparsify` still holds, and inputs that it does not take.
    """
    for n, m in patterns:
        if not 0 < n < m:
            raise SecateurError(f"the pattern {n}:{m} is none: N:M needs 0 < N < M, such as 2:4")
    parameters = _values_of(model)
    zeros = {name: p.numel() - int(p.count_nonzero()) for name, p in parameters.items()}
    work, no_macs = _work(model, inputs, parameters)
    found = maskable(model, inputs, only=only, ignore=ignore)
    weights = tuple(_of(w, parameters[w.name], zeros[w.name], work, patterns) for w in found)
    names = [w.name for w in found]
    return Statistics(
        weights,
        _totals({name: parameters[name] for name in names}, zeros, work),
        _totals(parameters, zeros, work),
        dict(found.left),
        _compressed(parameters) if gzip else None,
        no_macs,
    )


def _values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, each shared one once."""
    held = next(parametrized(model), None)
    if held is not None:
        path, _, leaf = held[0]
        name = f"{path}.{leaf}".lstrip(".")
        raise SecateurError(
            f"{name} holds a mask of sparsify, and its zeros are not in the weights yet: finalize first"
        )
    found = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in found.items():
        if p.is_meta:
            raise SecateurError(f"{name} is on the meta device and has no values: load the weights first")
    return found


def _of(
    weight: Weight, tensor: torch.Tensor, zeros: int, work: Mapping[str, _Work] | None, patterns: Sequence[NM]
) -> WeightStatistics:
    own = None if work is None else work.get(weight.name)
    return WeightStatistics(
        name=weight.name,
        shape=weight.shape,
        elements=weight.size,
        zeros=zeros,
        sparsity=zeros / weight.size,
        patterns={f"{n}:{m}": _pattern(weight, tensor, (n, m)) for n, m in patterns},
        macs=None if own is None else own.macs,
        macs_skipped=None if own is None else own.skipped,
        bytes=tensor.nbytes,
        bytes_bitmask=_bitmask(tensor, zeros),
    )


def _pattern(weight: Weight, tensor: torch.Tensor, n_m: NM) -> Pattern | None:
    n, m = n_m
    if weight.channels % m:
        return None
    fit = 0
    for part in weight.parts():
        kept = (weight.matrix(tensor, part) != 0).reshape(-1, m).sum(1)
        fit += int((kept <= n).sum())
    groups = weight.size // m
    return Pattern(fit / groups, fit == groups)


def _bitmask(tensor: torch.Tensor, zeros: int) -> int:
    return math.ceil(tensor.numel() / 8) + (tensor.numel() - zeros) * tensor.element_size()


def _totals(tensors: Mapping[str, torch.Tensor], zeros: Mapping[str, int], work: Mapping[str, _Work] | None) -> Totals:
    elements = sum(t.numel() for t in tensors.values())
    gone = sum(zeros[name] for name in tensors)
    own = None if work is None else [work[name] for name in tensors if name in work]
    return Totals(
        elements,
        gone,
        gone / elements if elements else 0.0,
        None if own is None else sum(w.macs for w in own),
        None if own is None else sum(w.skipped for w in own),
        sum(t.nbytes for t in tensors.values()),
        sum(min(t.nbytes, _bitmask(t, zeros[name])) for name, t in tensors.items()),
    )


def _compressed(parameters: Mapping[str, torch.Tensor]) -> int:
    """Bytes of one zlib stream of all parameters, in their order."""
    stream, size = zlib.compressobj(_LEVEL), 0
    for tensor in parameters.values():
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for begin in range(0, len(raw), _CHUNK):
            size += len(stream.compress(raw[begin : begin + _CHUNK].tobytes()))
    return size + len(stream.flush())


def _work(
    model: nn.Module, inputs: Inputs, parameters: Mapping[str, torch.Tensor]
) -> tuple[dict[str, _Work] | None, str | None]:
    """What one forward pass multiplies with each parameter; or None, and why there is no forward pass.

    Raises:
        SecateurError: for inputs that the model does not take.
    """
    try:
        positional, named = arguments(model, inputs)
        found = _counted(model, positional, named, parameters)
    except SecateurError as error:
        if inputs is not None:
            raise
        return None, str(error)
    batch = size_of((positional, named))
    return {name: _Work(_each(w.macs, batch), _each(w.skipped, batch)) for name, w in found.items()}, None


def _counted(
    model: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any], parameters: Mapping[str, torch.Tensor]
) -> dict[str, _Work]:
    found: dict[str, _Work] = {}
    sizes: dict[tuple[str, tuple[tuple[int, int], ...]], tuple[int, int]] = {}

    def see(product: Product) -> None:
        key = product.weight, product.part
        if key not in sizes:  # a weight may be used many times
            part = parameters[product.weight][tuple(slice(a, b) for a, b in product.part)]
            sizes[key] = part.numel(), part.numel() - int(part.count_nonzero())
        rows, (size, zeros) = _rows(product), sizes[key]
        work = found.setdefault(product.weight, _Work())
        work.macs += rows * size
        work.skipped += rows * zeros

    watch = Products({name: p for name, p in parameters.items() if p.dim() > 1}, see)
    try:
        with evaluating(model), torch.no_grad(), plain_attention(), plain_recurrence(model), watch:
            model(*positional, **named)
    except Exception as error:  # whatever the user's own code raises
        text = " ".join(str(error).split())[:300]
        raise SecateurError(
            f"{type(model).__name__} does not run on these inputs ({type(error).__name__}: {text}): give inputs of "
            "the shapes that it takes"
        ) from error
    return found


def _rows(product: Product) -> int:
    """How often every element of the part takes part."""
    kernel = len(product.columns) - 1
    if kernel and product.columns[-1] == 0:  # transposed convolutions: each input position meets the whole kernel
        return product.operand.numel() // product.operand.shape[-kernel - 1]
    return len(product.read())


@contextmanager
def plain_recurrence(model: nn.Module) -> Iterator[None]:
    """Without the fused kernels of recurrent layers, whose products nobody sees."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # switching oneDNN warns about hardware that is not there
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield


def _each(count: float, batch: int) -> float:
    """Of one sample; a whole number where it is one."""
    return int(count) // batch if count % batch == 0 else count / batch
