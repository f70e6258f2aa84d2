"""Apply a plan to a model.

A Hugging Face model whose cut its own config can describe is rebuilt by the stock loader from the smaller config, so
that what is in memory is what a user will load. Anything else is operated on directly (`cut.surgery`). Either way the
result is traced again, and its shapes, sizes and constants must be those that the plan predicts.
"""

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from secateur.choose.plan import Plan
from secateur.cut.masks import masked
from secateur.cut.names import new_name, renumbered
from secateur.cut.record import remember
from secateur.cut.solve import configs_for, shapes_of
from secateur.cut.surgery import operate
from secateur.cut.tensors import cut_tensors
from secateur.cut.verify import mismatch
from secateur.errors import SecateurError
from secateur.load.model import quiet_transformers
from secateur.space import Space, discover
from secateur.space.inputs import example_inputs
from secateur.space.trace import Inputs


def apply(model: nn.Module, plan: Plan, *, space: Space | None = None, inputs: Inputs = None) -> nn.Module:
    """Return the model that the plan makes of `model`, which stays as it is.

    A plan of masks alone needs no trace: it applies to every module that has the weights.

    Args:
        model: the dense model.
        plan: what stays of it.
        space: its Space, where it is known already.
        inputs: arguments for one forward pass, as for `discover`; None for a Hugging Face model.

    Returns:
        A new model of the same class, dtype, device and mode. Tied parameters stay tied.

    Raises:
        SecateurError: for a plan that does not fit the model, that removes nothing, or whose cut cannot be verified.
    """
    if plan.only_masks:
        return masked(model, plan.masks)
    if plan.origin.get("basis"):
        raise SecateurError(f"the plan counts units of a {plan.origin['basis']} stream: load its own result instead")
    if inputs is None:
        inputs = example_inputs(model)  # the cut model is traced with the same shapes as the dense one
    space = space or discover(model, inputs)
    plan.check(space)
    tensors = sliced(model, plan, space)
    new = stock_model(model, plan, space, tensors)
    if new is None or mismatch(new, plan, space, inputs) is not None:
        new = operate(model, plan, space, tensors, inputs)
        remember(model, new, plan, space)
    moved = renumbered(space, plan)
    modes = {new_name(name, moved): module.training for name, module in model.named_modules()}
    for name, module in new.named_modules():
        module.training = modes.get(name, model.training)
    trained = {new_name(name, moved): parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trained[name])
    return new


def sliced(model: nn.Module, plan: Plan, space: Space) -> dict[str, torch.Tensor]:
    """Every parameter that stays and every buffer that axes run through, cut; none shares memory with the model.

    Raises:
        SecateurError: for a plan that removes nothing.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    tensors = cut_tensors(parameters, space, plan)
    smaller = sum(t.numel() for t in tensors.values()) < sum(p.numel() for p in parameters.values())
    if not smaller and not plan.masks:
        raise SecateurError("the plan removes no parameter: nothing would be smaller")
    tensors |= cut_tensors({name: buffers[name] for name in space.buffers}, space, plan)
    return {n: t.clone() if _same_memory(t, parameters.get(n)) else t for n, t in tensors.items()}


def _same_memory(new: torch.Tensor, old: torch.Tensor | None) -> bool:
    return old is None or new.data_ptr() == old.data_ptr()


def stock_model(model: nn.Module, plan: Plan, space: Space, tensors: Mapping[str, torch.Tensor]) -> nn.Module | None:
    """The cut model as the stock loader builds it from a config, or None where no config describes it."""
    config = getattr(model, "config", None)
    if not hasattr(type(model), "from_pretrained") or config is None or hasattr(config, "secateur"):
        return None  # no Hugging Face model, or one that was cut beyond what its config describes
    moved = renumbered(space, plan)
    state = {str(new_name(name, moved)): tensor for name, tensor in tensors.items() if name in space.parameters}
    kept = {str(new_name(name, moved)): tensor for name, tensor in tensors.items() if name not in space.parameters}
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    smaller = next((c for c in configs_for(model, plan, space) if shapes_of(type(model), c) == wanted), None)
    if smaller is None:
        return None
    new = _load(model, smaller, state, kept, moved)
    return new if _restore_scales(model, new, space, moved) else None


def _load(
    model: nn.Module,
    config: Any,
    state: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    moved: dict[str, str | None],
) -> nn.Module:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    full = dict(state)
    for name, tensor in model.state_dict().items():
        after = new_name(name, moved)
        if name not in parameters and after is not None:
            full[after] = buffers.get(after, tensor).clone()
    # The widest type loads every tensor without loss; each then gets its own back.
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in state.values() if t.is_floating_point()))
    device = next(iter(state.values())).device
    if device.type == "meta":
        with torch.device("meta"):
            return type(model)(config).to(dtype)
    with quiet_transformers():
        new, info = type(model).from_pretrained(  # type: ignore[attr-defined]
            None, config=config, state_dict=full, dtype=dtype, output_loading_info=True
        )
    tied = {alias for names in _tied(model) for alias in names}
    missing = [name for name in info["missing_keys"] if name not in tied]
    if missing or info["mismatched_keys"]:
        raise SecateurError(f"the stock loader did not take {sorted(missing)[:3]} {list(info['mismatched_keys'])[:3]}")
    for name, parameter in new.named_parameters():
        parameter.data = parameter.data.to(device=device, dtype=state[name].dtype)
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)
    return new.to(device)  # type: ignore[no-any-return]


def _tied(model: nn.Module) -> Iterator[list[str]]:
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    yield from by_id.values()


def _restore_scales(model: nn.Module, new: nn.Module, space: Space, moved: dict[str, str | None]) -> bool:
    """Whether every computed buffer means what it did; scalars that follow a size are folded into the weights.

    Gemma multiplies embeddings by sqrt(hidden size): the factor that a smaller config loses goes into the embedding,
    and, where the head is tied to it, out of the last norm's weight.
    """
    after = dict(new.named_buffers())
    scales = {scale.buffer: scale for scale in space.scales}
    for name, old in model.named_buffers():
        current = after.get(str(new_name(name, moved)))
        if current is None or old.is_meta or current.is_meta:
            continue
        if name in space.buffers:
            continue
        if old.shape != current.shape:
            return False
        if torch.allclose(old.double(), current.to(old.dtype).double(), rtol=1e-6, atol=0):
            continue
        if name not in scales or old.numel() != 1:
            return False
        embedding = dict(new.named_parameters())[scales[name].embedding]
        ratio = float(old.to(embedding.dtype)) / float(current.to(embedding.dtype))  # the model multiplies in its dtype
        _fold(dict(new.named_parameters()), space, scales[name].embedding, ratio)
    return True


@torch.no_grad()
def _fold(parameters: Mapping[str, nn.Parameter], space: Space, embedding: str, ratio: float) -> None:
    table = parameters[embedding]
    table.copy_(table.float() * ratio if table.dtype.itemsize < 4 else table * ratio)
    if any(reader.parameter == embedding for reader in space.readers):
        last = space.norms[-1]
        if last.weight is None:
            raise SecateurError(f"the norm {last.module} before the tied head has no weight to take a factor")
        weight = parameters[last.weight]
        wide = weight.float() if weight.dtype.itemsize < 4 else weight
        weight.copy_((wide + last.weight_offset) / ratio - last.weight_offset)
