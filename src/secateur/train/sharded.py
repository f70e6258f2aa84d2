"""Models whose weights are spread over processes by FSDP2, and what one does to such weights.

Each process keeps its part of every weight, of its gradient and of what the optimiser knows about it; a block has its
weights whole only while it runs. Everything here also takes models and tensors that are not spread.
"""

import copy
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from secateur import world
from secateur.errors import SecateurError
from secateur.load.model import fingerprint
from secateur.train.features import block_names

T = TypeVar("T")
_PRINTS: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
_PRECISE: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models that compute in bfloat16."""
_RAN: "weakref.WeakKeyDictionary[nn.Module, set[nn.Module]]" = weakref.WeakKeyDictionary()
"""Of models that are trained: the parts that have run in this process in this step."""
_HALF = (torch.float16, torch.bfloat16)


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights are spread over the processes."""
    if world.size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def print_of(model: nn.Module) -> str:
    """The fingerprint of a model; of one that `shard` has spread, that from before."""
    return _PRINTS.get(model) or fingerprint(model)


def check_plain(model: nn.Module, what: str) -> None:
    """Raise SecateurError for a model that others have spread over processes, or wrapped for them."""
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel) or is_sharded(model)
    if world.size() > 1 and wrapped and model not in _PRINTS:
        raise SecateurError(
            f"the {what} is a {type(model).__name__}, set up for several processes already: give the plain model, and "
            "it is spread over them"
        )


def twin(model: nn.Module) -> nn.Module:
    """A copy whose parameters are new objects over the same memory: what is put in their place is the copy's alone."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def shard(
    model: nn.Module, *, precision: str = "float32", dtype: torch.dtype | None = None, trains: bool = False
) -> nn.Module:
    """Spread a model over all processes, in place: block by block, so that no more than one is there twice.

    Args:
        model: the same in all processes, on any device; it ends on the one that they talk through.
        precision: of the forward pass, as in `Training`: with bfloat16 the weights of blocks travel in it, and all
            that runs the model does so within `computing`.
        dtype: that weights in half precision are cast to.
        trains: whether it is trained.

    Returns:
        The same module.

    Raises:
        SecateurError: for a model that cannot be spread.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    blocks = block_names(model)
    _check(model, blocks, trains=trains)
    if trains:
        _watch(model)
    else:
        _PRINTS[model] = fingerprint(model)
    device = _place()
    mesh = init_device_mesh(device.type, (world.size(),))
    # Autocast would keep a second copy of every weight until the forward pass is over.
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for path in [*blocks, ""]:
        part = model.get_submodule(path)
        for tensor in [*part.parameters(), *part.buffers()]:
            if not _spread(tensor):
                wider = dtype if tensor.dtype in _HALF else None
                tensor.data = tensor.detach().to(device, wider).contiguous()
        policy = half if precision == "bfloat16" and path else MixedPrecisionPolicy()
        try:
            fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        except (ValueError, NotImplementedError, AssertionError) as error:
            why = " ".join(str(error).split())[:300]
            raise SecateurError(
                f"{path or type(model).__name__} cannot be spread over processes ({why}): train in one process"
            ) from error
    if precision == "bfloat16":
        _PRECISE.add(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # losses are divided by the numbers of all processes already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)
            module.set_reduce_scatter_unused_params(reduce_scatter_unused_params=True, recurse=False)
    return model


def _watch(model: nn.Module) -> None:
    """Note which parts of a model run."""
    ran = _RAN[model] = set()

    def note(module: nn.Module, _: Any) -> None:
        if torch.is_grad_enabled():
            ran.add(module)

    for module in model.modules():
        if module._parameters:
            module.register_forward_pre_hook(note)


def drop_unused(model: nn.Module) -> None:
    """Take the gradients away, after the backward pass, of parts that have run in no process.

    FSDP gives zeros to parts that did not run, such as experts that got no tokens, so that all processes add up the
    same tensors; optimisers move weights by zeros too, but not by nothing.
    """
    ran = {id(p) for module in _RAN[model] for p in module._parameters.values()}
    _RAN[model].clear()
    found = [p for p in model.parameters() if p.grad is not None]
    used = [float(id(p) in ran or bool(local(p.grad).any())) for p in found]
    counts = torch.tensor(used, device=local(found[0]).device)
    world.add_up([counts])
    for p, count in zip(found, counts.tolist(), strict=True):
        p.grad = p.grad if count else None


def in_turns(make: Callable[[], T]) -> T:
    """Make something in one process of a machine after the other, so that its memory holds what that takes once.

    Nothing in it may talk to other processes; reading a model and spreading it does not.

    Raises:
        SecateurError: that of one process, in all.
    """
    place, own = int(os.environ.get("LOCAL_RANK", world.rank())), int(os.environ.get("LOCAL_WORLD_SIZE", world.size()))
    made: list[T] = []
    for turn in range(max(world.gathered(own))):
        trouble = None
        if turn == place:
            try:
                made.append(make())
            except SecateurError as error:
                trouble = str(error)
        world.check_all(trouble)
    return made[0]


def computing(model: nn.Module) -> torch.autocast:
    """The precision of the forward passes of a model outside training: that in training, where it is spread."""
    device = local(next(model.parameters())).device.type
    return torch.autocast(device, torch.bfloat16, enabled=model in _PRECISE)


def _check(model: nn.Module, blocks: Sequence[str], *, trains: bool) -> None:
    """Raise SecateurError for a model that would not be trained as in one process."""
    for path, module in model.named_modules():
        if trains and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise SecateurError(
                f"{path or 'the model'} is a batch norm, whose statistics would be of the rows of one process alone: "
                "train in one process"
            )
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((path for path in blocks if name.startswith(f"{path}.")), "")
        first = owners.setdefault(id(parameter), owner)
        if first != owner:
            raise SecateurError(
                f"{name} is a weight that {first or 'the model'} and {owner or 'the model'} share, and each is spread "
                "over processes by itself: train in one process"
            )
        if not parameter.dim():
            raise SecateurError(f"{name} is a single number, which cannot be spread: train in one process")


def _place() -> torch.device:
    """Where the processes keep what they train: GPUs, if they talk to each other by NCCL."""
    if "nccl" in str(distributed.get_backend_config()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# --- tensors ---


def _spread(tensor: Any) -> bool:
    if world.size() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Any) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory."""
    found: torch.Tensor = tensor.to_local() if _spread(tensor) else tensor
    return found


@torch.no_grad()
def local_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this process would hold of a whole tensor if it were spread like another one."""
    if not _spread(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    given: Any = like
    made = distribute_tensor(whole.to(given.device), given.device_mesh, given.placements, src_data_rank=None)
    return made.to_local()


@torch.no_grad()
def gather(model: nn.Module, into: nn.Module) -> None:
    """Bring the weights and buffers of a spread model together in the first process, one at a time.

    Args:
        model: the spread one.
        into: a model of the same names. Its parameters get new memory on the devices that they are on; in the other
            processes it goes to the meta device, so that nothing can be done with it by mistake.
    """
    places = {**dict(into.named_parameters()), **dict(into.named_buffers())}
    tensors: list[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        whole = tensor.full_tensor() if _spread(tensor) else tensor
        if world.first():
            places[name].data = whole.detach().to(places[name].device, copy=True)
    if not world.first():
        into.to("meta")


def clipped(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Clip gradients to a norm, in place; their norm before."""
    if world.size() == 1:
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    found = [p.grad for p in parameters if p.grad is not None]
    parts = [local(gradient) for gradient in found]
    squares = torch.zeros(2, dtype=torch.float64, device=parts[0].device)
    for gradient, part in zip(found, parts, strict=True):
        squares[0 if _spread(gradient) else 1] += torch.linalg.vector_norm(part).double().square()
    world.add_up([squares[:1]])  # what is not spread is the same everywhere
    norm = float(squares.sum().sqrt())
    if norm > limit:
        torch._foreach_mul_(parts, limit / (norm + 1e-6))
    return norm


def finite(model: nn.Module) -> bool:
    """Whether all weights that are trained are finite."""
    every = [p for p in model.parameters() if p.requires_grad]
    good = all(bool(torch.isfinite(local(p)).all()) for p in every)
    if world.size() == 1:
        return good
    bad = torch.tensor(float(not good), device=local(every[0]).device)
    world.add_up([bad])
    return not bool(bad)


@torch.no_grad()
def round_to(model: nn.Module, kinds: Mapping[str, torch.dtype]) -> None:
    """Round weights to what they will be in other dtypes; they stay in their own."""
    for name, parameter in model.named_parameters():
        if name in kinds:
            part = local(parameter)
            part.copy_(part.to(kinds[name]))
