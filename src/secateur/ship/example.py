"""What goes into an exported model: its inputs by name, which sizes stay open, and random inputs of other sizes."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError, nearest
from secateur.load.mode import evaluating
from secateur.space.trace import Inputs, arguments

_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_LONGER = 3  # tokens that the check is longer than the example
Open = Mapping[str, Mapping[int, str]]
"""Sizes of inputs that stay open: input -> dim -> the size's name."""
Tensors = dict[str, torch.Tensor]
Sizing = Callable[[int], int]


@dataclass(frozen=True)
class Example:
    """The arguments of one forward pass, by name.

    Attributes:
        model: what they are for.
        tensors: those that become inputs of the file.
        constants: the others, which are fixed in it.
        opened: sizes that stay open.
    """

    model: nn.Module
    tensors: Tensors
    constants: dict[str, Any]
    opened: Open

    @staticmethod
    def of(model: nn.Module, example: Inputs, dynamic: bool | Open) -> "Example":
        """Read an example; Hugging Face models get a mask and no cache.

        Args:
            model: any module.
            example: a tensor, a tuple, a mapping; None = made for a Hugging Face model.
            dynamic: True leaves the batch open, and of token ids the sequence too; False fixes all sizes; or which
                are open.

        Raises:
            SecateurError: it does not fit the forward pass, or `dynamic` does not fit it.
        """
        tensors, constants = _named(model, example)
        return Example(model, tensors, constants, _opened(model, tensors, dynamic))

    def shapes(self) -> dict[str, Any] | None:
        """Open sizes as torch.export takes them; None where all are fixed."""
        if not self.opened:
            return None
        shapes: dict[str, Any] = {name: dict.fromkeys(self.opened.get(name, {}), Dim.DYNAMIC) for name in self.tensors}
        return shapes | dict.fromkeys(self.constants)

    def sizes(self, batch: Sizing, others: Sizing = lambda n: n) -> dict[str, int]:
        """Open sizes by name: those of the example, changed."""
        found: dict[str, int] = {}
        for name, dims in self.opened.items():
            for dim, label in dims.items():
                size = self.tensors[name].shape[dim]
                if found.setdefault(label, size) != size:
                    raise SecateurError(f"the open size {label!r} is {found[label]} and {size} in the example")
                if label != "batch" and size < 2:
                    raise SecateurError(f"the open size {label!r} is {size} in the example: give at least 2")
        return {label: batch(size) if label == "batch" else others(size) for label, size in found.items()}

    def fresh(self, sizes: Mapping[str, int], generator: torch.Generator) -> Tensors:
        """Random inputs like the example: any tokens, masks that end anywhere, floats of its mean and spread."""
        found = {}
        for name, value in self.tensors.items():
            shape = list(value.shape)
            for dim, label in self.opened.get(name, {}).items():
                shape[dim] = sizes[label]
            own = value.detach().cpu()
            table = _embedding(self.model) if name.endswith("input_ids") else None
            if table is not None:
                made = torch.randint(table.num_embeddings, shape, generator=generator)
            elif name.endswith("attention_mask") and len(shape) == 2:
                ends = torch.randint(1, shape[1] + 1, (shape[0],), generator=generator)
                ends[0] = shape[1]
                made = torch.arange(shape[1])[None] < ends[:, None]
            elif own.is_floating_point():
                spread, mean = _spread(own)
                made = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + mean
            else:  # which whole numbers a model takes, only the example says
                made = own.flatten()[torch.randint(max(own.numel(), 1), shape, generator=generator)]
            found[name] = made.to(value.device, value.dtype)
        return found

    def traced(self, generator: torch.Generator) -> "Example":
        """Random inputs to trace with: torch.export takes a batch of one for a size that is fixed."""
        tensors = self.fresh(self.sizes(lambda n: max(n, 2)), generator)
        return Example(self.model, tensors, self.constants, self.opened)

    def trials(self, generator: torch.Generator) -> list[Tensors]:
        """Two sets of fresh inputs: more and longer than the example, and a single one that is shorter."""
        longest = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)

        def longer(size: int) -> int:
            """A model of a user's own may have no place for more."""
            return min(size + _LONGER, longest) if isinstance(longest, int) else size

        wanted: list[tuple[Sizing, Sizing]] = [(lambda n: n + 1, longer), (lambda _: 1, lambda n: max(2, n // 2))]
        return [self.fresh(self.sizes(*how), generator) for how in wanted]


def check_weights(model: nn.Module, runtime: str = "ONNX Runtime", *, narrow: bool = False) -> None:
    """Check that a model has values, and of a type that the runtime computes in.

    Args:
        model: any module.
        runtime: what will run it, for the message.
        narrow: whether it computes in bfloat16 too.

    Raises:
        SecateurError: it has not.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise SecateurError(f"{type(model).__name__}: {name} has no values (it is on the meta device): load them")
        if tensor.dtype == torch.bfloat16 and not narrow:
            raise SecateurError(
                f"{type(model).__name__}: {name} is bfloat16, which {runtime} runs hardly anything in; export "
                "model.float() (--dtype float32)"
            )


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and a Hugging Face model that makes no key/value cache.

    The config says it: not every forward pass has a ``use_cache`` that torch.export takes.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    configs = [c for c in {id(c): c for c in (config, text)}.values() if getattr(c, "use_cache", None) is not None]
    before = [c.use_cache for c in configs]
    for c in configs:
        c.use_cache = False
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        for c, value in zip(configs, before, strict=True):
            c.use_cache = value


@contextmanager
def batched_experts(model: nn.Module) -> Iterator[None]:
    """Let a mixture of experts of transformers compute by products of batches, for a while.

    Its grouped products, the default, have no form in ONNX.
    """
    told: Any = model
    before = told.get_experts_implementation() if hasattr(model, "get_experts_implementation") else {}
    if "grouped_mm" not in before.values():
        yield
        return
    told.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        told.set_experts_implementation(before)


@contextmanager
def calling(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` be what a model does when it is called, for a while: its tensors keep their names in a trace."""
    own = vars(model).get("forward")
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = own


def _embedding(model: Any) -> nn.Embedding | None:
    """The table that token ids of a Hugging Face model are looked up in; those without token ids may have none."""
    found = (
        model.get_input_embeddings() if hasattr(model, "config") and hasattr(model, "get_input_embeddings") else None
    )
    return found if isinstance(found, nn.Embedding) else None


def _spread(values: torch.Tensor) -> tuple[float, float]:
    """(standard deviation, mean); of an example of zeros, which says nothing of them, 1 and 0."""
    if not values.numel():
        return 1.0, 0.0
    return float(values.double().std(correction=0)) or 1.0, float(values.double().mean())


def _named(model: nn.Module, example: Inputs) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and other arguments of the forward pass by name."""
    args, kwargs = arguments(model, example)
    signature = inspect.signature(model.forward)
    try:
        named: dict[str, Any] = dict(signature.bind_partial(*args).arguments)
    except TypeError as error:
        raise SecateurError(f"the example does not fit {type(model).__name__}.forward: {error}") from error
    for name, parameter in signature.parameters.items():
        if name in named and parameter.kind is parameter.VAR_POSITIONAL:
            raise SecateurError(f"{type(model).__name__}.forward takes *{name}: pass an example of named inputs")
    named |= kwargs
    if hasattr(model, "config"):
        named.pop("use_cache", None)
        if "use_cache" in signature.parameters:  # the others read the config: see without_cache
            named["use_cache"] = False
        ids = named.get("input_ids")
        if isinstance(ids, torch.Tensor) and "attention_mask" in signature.parameters:
            named.setdefault("attention_mask", torch.ones_like(ids))
    for name in named:
        if name not in signature.parameters:
            raise SecateurError(
                f"{type(model).__name__}.forward has no input {name!r} of its own{nearest(name, signature.parameters)}"
            )
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    tensors = {name: value.to(place) for name, value in named.items() if isinstance(value, torch.Tensor)}
    for name, value in named.items():
        if name not in tensors and pytree.tree_any(lambda x: isinstance(x, torch.Tensor), value):
            raise SecateurError(f"the input {name!r} is a {type(value).__name__} of tensors: only tensors are exported")
    if not tensors:
        raise SecateurError("the example holds no tensor")
    return tensors, {name: value for name, value in named.items() if name not in tensors}


def _opened(model: nn.Module, inputs: Mapping[str, torch.Tensor], dynamic: bool | Open) -> Open:
    """Which sizes stay open."""
    if isinstance(dynamic, Mapping):
        for name, dims in dynamic.items():
            if name not in inputs:
                raise SecateurError(f"dynamic names the input {name!r}{nearest(name, inputs)}")
            for dim in dims:
                if not 0 <= dim < inputs[name].dim():
                    raise SecateurError(f"dynamic names dim {dim} of {name}, whose shape is {list(inputs[name].shape)}")
        return dynamic
    if not dynamic:
        return {}
    batch = next((len(x) for x in inputs.values() if x.dim()), 0)
    found: dict[str, dict[int, str]] = {}
    for name, value in inputs.items():
        if not value.dim() or len(value) != batch:
            continue
        found[name] = {0: "batch"}
        whole = value.dim() == 2 and not value.is_floating_point()
        if whole and (name.removeprefix("decoder_") in _TOKENS or not hasattr(model, "config")):
            found[name][1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
    return found
