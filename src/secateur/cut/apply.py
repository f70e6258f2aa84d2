"""Apply a plan to a model.

A Hugging Face model whose cut its own config can describe is rebuilt by the stock loader from the smaller config, so
that what is in memory is what a user will load. Anything else is operated on directly (`cut.surgery`). Either way the
result is traced again, and its shapes, sizes and constants must be those that the plan predicts.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from secateur.choose.cost import gone_parameters
from secateur.choose.plan import Plan
from secateur.cut.masks import masked
from secateur.cut.names import new_name, renumbered
from secateur.cut.record import remember
from secateur.cut.solve import configs_for, shapes_of
from secateur.cut.surgery import operate
from secateur.cut.tensors import cut_tensors, cutter, kept_rows
from secateur.cut.verify import mismatch
from secateur.errors import SecateurError
from secateur.load.megatron import closed, is_megatron, opened, token_inputs
from secateur.load.model import quiet_transformers
from secateur.load.store import Entry, Store, drop_hooks, made, store_of
from secateur.space import Space, discover
from secateur.space.inputs import example_inputs
from secateur.space.trace import Inputs

Fold = Callable[[torch.Tensor], torch.Tensor]
Folds = dict[str, Fold]
"""Parameter of the cut model -> what its values become, so that a factor which the config loses stays."""


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
    if is_megatron(model):
        return closed(apply(opened(model), plan, space=space, inputs=token_inputs(inputs)))
    if plan.origin.get("basis"):
        raise SecateurError(f"the plan counts units of a {plan.origin['basis']} stream: load its own result instead")
    if inputs is None:
        inputs = example_inputs(model)  # the cut model is traced with the same shapes as the dense one
    space = space or discover(model, inputs)
    plan.check(space)
    tensors = sliced(model, plan, space)
    found = stock_model(model, plan, space, tensors)
    new, folds = found if found is not None else (None, {})
    if new is None or mismatch(new, plan, space, inputs) is not None:
        new, folds = operate(model, plan, space, tensors, inputs), {}
        remember(model, new, plan, space)
    moved = renumbered(space, plan)
    store = store_of(model)
    if store is None:
        _fold(new, folds)
    else:
        _stream(new, store, plan, space, folds)
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
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    buffers, streamed = dict(model.named_buffers()), store_of(model) is not None
    if streamed:
        parameters = {name: p.to("meta") for name, p in parameters.items()}
    tensors = cut_tensors(parameters, space, plan)
    smaller = sum(t.numel() for t in tensors.values()) < sum(p.numel() for p in parameters.values())
    if not smaller and not plan.masks:
        raise SecateurError("the plan removes no parameter: nothing would be smaller")
    if streamed:  # memory that nobody writes to is not there
        tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}
    tensors |= cut_tensors({name: buffers[name] for name in space.buffers}, space, plan)
    return {n: t.clone() if _same_memory(t, parameters.get(n)) else t for n, t in tensors.items()}


def _same_memory(new: torch.Tensor, old: torch.Tensor | None) -> bool:
    return old is None or new.data_ptr() == old.data_ptr()


def _stream(new: nn.Module, store: Store, plan: Plan, space: Space, folds: Folds) -> None:
    """Let the weights of a cut model be made of those on disk, whenever they are loaded."""
    cut, moved = cutter(space, plan), renumbered(space, plan)
    touched = {name for name, _ in kept_rows(space, plan)} | set(plan.masks)
    gone, parameters = gone_parameters(space, plan), dict(new.named_parameters())
    entries: dict[str, Entry] = {}
    for name, entry in store.entries.items():
        after = str(new_name(name, moved))
        fold = folds.get(after)
        if name in gone:
            continue
        if name not in touched and fold is None:
            entries[after] = entry
            continue

        def load(name: str = name, entry: Entry = entry, fold: Fold | None = fold) -> torch.Tensor:
            value = cut(name, entry.load())
            if value is None:
                raise ValueError(f"{name} is gone")
            return value if fold is None else fold(value).to(value.dtype)

        entries[after] = made(load, parameters[after], entry.shards)
    drop_hooks(new)
    Store(new, entries, store.work / "cut", work=store.work)


def stock_model(
    model: nn.Module, plan: Plan, space: Space, tensors: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, Folds] | None:
    """The cut model as the stock loader builds it from a config, or None where no config describes it.

    Some of its weights are yet to take a factor; see `_restored`.
    """
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
    folds = _restored(model, new, space, moved)
    return None if folds is None else (new, folds)


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


def _restored(model: nn.Module, new: nn.Module, space: Space, moved: dict[str, str | None]) -> Folds | None:
    """What makes every computed buffer mean what it did; None where nothing does.

    Gemma multiplies embeddings by sqrt(hidden size): the factor that a smaller config loses goes into the embedding,
    and, where the head is tied to it, out of the last norm's weight.
    """
    after = dict(new.named_buffers())
    scales = {scale.buffer: scale for scale in space.scales}
    folds: Folds = {}
    for name, old in model.named_buffers():
        current = after.get(str(new_name(name, moved)))
        if current is None or old.is_meta or current.is_meta:
            continue
        if name in space.buffers:
            continue
        if old.shape != current.shape:
            return None
        if torch.allclose(old.double(), current.to(old.dtype).double(), rtol=1e-6, atol=0):
            continue
        if name not in scales or old.numel() != 1:
            return None
        table = scales[name].embedding
        kind = dict(new.named_parameters())[table].dtype
        folds |= _folds(space, table, float(old.to(kind)) / float(current.to(kind)))  # it multiplies in its own type
    return folds


def _folds(space: Space, embedding: str, ratio: float) -> Folds:
    """A factor that goes into an embedding, and out of the last norm where the head is tied to it."""
    found: Folds = {embedding: lambda table: _wide(table) * ratio}
    if any(reader.parameter == embedding for reader in space.readers):
        last = space.norms[-1]
        if last.weight is None:
            raise SecateurError(f"the norm {last.module} before the tied head has no weight to take a factor")
        found[last.weight] = lambda weight: (_wide(weight) + last.weight_offset) / ratio - last.weight_offset
    return found


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


@torch.no_grad()
def _fold(new: nn.Module, folds: Folds) -> None:
    parameters = dict(new.named_parameters())
    for name, fold in folds.items():
        parameters[name].copy_(fold(parameters[name]))
