"""The parametrization that holds a mask, and its way into a model and out of it again.

torch's own `parametrize` puts it there, and changes the class of the module that owns the weight meanwhile. It is
taken out by our own code: torch's deletes a property of a class that deep copies of the module share.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from secateur.errors import SecateurError
from secateur.train import criteria

Place = tuple[str, nn.Module, str]
"""Name of a module, the module, and its own name for the weight."""
_LIST = "parametrizations"
_ORDER = "_secateur_order"


class Masked(nn.Module):
    """Makes W' of W by a mask.

    Attributes:
        kind: where the mask comes from and what gradients flow: ``held``, ``hard`` (movement), ``soft`` (movement),
            ``gates`` (rb) or ``dense`` (SR-STE).
        mask: bool, of the weight's shape; True = keep. `soft` and `gates` make theirs from the scores at every pass.
        scores: the learned parameter, if any; float32 at least.
        start: weights at the start, if scores are counted from there.
        noise: of the gates at this step.
        tau: threshold of `soft`.
    """

    mask: torch.Tensor
    start: torch.Tensor | None
    noise: torch.Tensor | None

    def __init__(self, kind: str, weight: torch.Tensor, *, keep_start: bool = False, tau: float = 0.0) -> None:
        super().__init__()
        self.kind, self.tau = kind, tau
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("mask", torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        self.scores: nn.Parameter | None = None
        if kind in ("hard", "soft", "gates"):
            first = criteria.LOGIT if kind == "gates" else 0.0
            self.scores = nn.Parameter(torch.full(weight.shape, first, dtype=wide, device=weight.device))
        start = weight.detach().to(wide, copy=True) if keep_start else None
        self.register_buffer("start", start, persistent=False)
        noise = (
            torch.zeros_like(self.scores, requires_grad=False) if kind == "gates" and self.scores is not None else None
        )
        self.register_buffer("noise", noise, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The masked weight."""
        if self.scores is None:
            return (criteria.dense_gradient if self.kind == "dense" else criteria.masked)(weight, self.mask)
        if self.kind == "gates":
            return criteria.gated(weight, self.scores, self.noise if self.training else None)
        return criteria.learned(weight, self.settled(), self.scores)

    def settled(self) -> torch.Tensor:
        """The mask as it is in evaluation."""
        if self.scores is None or self.kind == "hard":
            return self.mask
        scores = self.scores.detach()
        return scores > 0 if self.kind == "gates" else criteria.above(scores, self.tau)

    def extra_repr(self) -> str:
        """The kind, for print(model)."""
        return f"{self.kind}, shape={tuple(self.mask.shape)}"


def places(model: nn.Module, names: Iterable[str]) -> dict[str, list[Place]]:
    """Where each weight lives: once, or in every module that shares it.

    Raises:
        SecateurError: for weights that no parametrization can serve.
    """
    parameters = dict(model.named_parameters())
    wanted = {id(parameters[name]): name for name in names}
    found: dict[str, list[Place]] = {name: [] for name in wanted.values()}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                name = wanted[id(parameter)]
                _check(name, module, parameter)
                found[name].append((path, module, leaf))
    return found


def _check(name: str, module: nn.Module, parameter: nn.Parameter) -> None:
    hint = f"ignore it (ignore: {name})"
    if isinstance(module, nn.RNNBase):
        raise SecateurError(
            f"{name} belongs to {type(module).__name__}, which reads its weights past a parametrization: {hint}, "
            "or mask it once with method='magnitude' of prune"
        )
    if parametrize.is_parametrized(module):
        raise SecateurError(
            f"{name}: its module is parametrized already (such as by weight_norm): undo that first, or {hint}"
        )
    if is_traceable_wrapper_subclass(parameter):
        raise SecateurError(
            f"{name} is a {type(parameter.data).__name__} (sharded or quantised): sparsify before that, or {hint}"
        )
    if parameter.is_meta:
        raise SecateurError(f"{name} is on the meta device and has no values: load the weights first")


def attach(found: Iterable[Place], masked: Masked) -> None:
    """Put the same parametrization on a weight wherever it lives; the Parameter stays the same object."""
    for _, module, leaf in found:
        order = tuple(module._parameters)
        # unsafe skips a forward pass that would check shape and type, which are right by construction
        parametrize.register_parametrization(module, leaf, masked, unsafe=True)
        holder = module.get_submodule(_LIST)
        vars(holder).setdefault(_ORDER, order)


def parametrized(model: nn.Module) -> Iterator[tuple[Place, Masked]]:
    """Every place of a model that holds a mask of ours."""
    for path, module in model.named_modules():
        for leaf, entries in getattr(module, _LIST, {}).items() if parametrize.is_parametrized(module) else ():
            for entry in entries:
                if isinstance(entry, Masked):
                    yield (path, module, leaf), entry


def original(place: Place) -> nn.Parameter:
    """The parameter that a mask lies over."""
    parameter = place[1].get_submodule(f"{_LIST}.{place[2]}").original
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"{place[0]}.{place[2]} is not a parameter")
    return parameter


@torch.no_grad()
def detach(model: nn.Module, masks: Mapping[Masked, torch.Tensor]) -> None:
    """Write zeros into the weights and give every module its class, its parameters and their order back.

    Raises:
        SecateurError: where parametrizations of others lie over ours; the model stays as it is.
    """
    found = list(parametrized(model))
    for (path, module, leaf), _ in found:
        others = len(module.get_submodule(f"{_LIST}.{leaf}")._modules) > 1 or len(
            module.get_submodule(_LIST)._modules
        ) > sum(place[1] is module for place, _ in found)
        if others:
            raise SecateurError(f"{path}.{leaf} has other parametrizations too: remove them first")
    kept = [(place, original(place)) for place, _ in found]
    for (_, parameter), (_, masked) in zip(kept, found, strict=True):
        parameter.masked_fill_(~masks[masked].to(parameter.device), 0)
    for module in {id(place[1]): place[1] for place, _ in found}.values():
        holder = module._modules.pop(_LIST)
        if holder is None:
            raise TypeError("a parametrized module without parametrizations")
        module.__class__ = type(module).__bases__[0]
        own = {**module._parameters, **{place[2]: p for place, p in kept if place[1] is module}}
        order = [*vars(holder)[_ORDER], *own]
        module._parameters.clear()
        for leaf in dict.fromkeys(order):
            if leaf in own:
                module.register_parameter(leaf, own[leaf])


def strip(model: nn.Module, masks: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Fold the masks of training-time sparsity into the weights and remove them, in place.

    For copies: an average of weights (EMA), a deep copy, a model in another process. `Sparsity.finalize` does it for
    the model itself.

    Args:
        model: a module that holds masks of `sparsify`, at any depth.
        masks: weight name -> mask, as `Sparsity.masks` gives it, where the copy's own are not wanted: the exact counts
            of method rb, or an average that also averaged buffers. None = the model's own.

    Returns:
        The same module: its classes, parameter objects and names are those from before `sparsify`, its zeros exact.

    Raises:
        SecateurError: where the model holds no mask of ours, or `masks` has other names or shapes than it.
    """
    found = list(parametrized(model))
    if not found:
        raise SecateurError(f"{type(model).__name__} holds no masks of sparsify: there is nothing to strip")
    own = {masked: masked.settled() for _, masked in found}
    if masks is not None:
        own = _given(found, masks)
    detach(model, own)
    return model


def _given(found: Iterable[tuple[Place, Masked]], masks: Mapping[str, torch.Tensor]) -> dict[Masked, torch.Tensor]:
    """Each parametrization's mask by name; AveragedModel, DDP and LightningModule put a prefix before the names."""
    paths: dict[Masked, list[str]] = {}
    for (path, _, leaf), masked in found:
        paths.setdefault(masked, []).append(f"{path}.{leaf}")
    own: dict[Masked, torch.Tensor] = {}
    left = set(masks)
    for masked, known in paths.items():
        fits = [name for name in masks if any(f".{path}".endswith(f".{name}") for path in known)]
        name = max(fits, key=len, default=None)
        if name is None:
            raise SecateurError(f"strip: no mask is given for {known[0].lstrip('.')}")
        if masks[name].shape != masked.mask.shape:
            shapes = f"{list(masks[name].shape)}, and the weight is {list(masked.mask.shape)}"
            raise SecateurError(f"strip: the mask of {name} is {shapes}")
        own[masked] = masks[name]
        left.discard(name)
    if left:
        raise SecateurError(f"strip: a mask is given for {min(left)}, where the model holds none")
    return own
