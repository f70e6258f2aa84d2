"""The processes that work together, as torchrun starts them: who this one is, sums over all, one clear end for all."""

import contextlib
import datetime
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import distributed

from secateur.errors import SecateurError

T = TypeVar("T")
_TIMEOUT = datetime.timedelta(hours=3)
"""The longest that one may wait for the others, who may be writing a large model; a dead one is found out at once."""
_PATIENCE = datetime.timedelta(seconds=5)
_BUCKET = 2**24
"""Elements that are summed in one message, where there are many small tensors."""
_JOINED: ContextVar[bool] = ContextVar("joined", default=False)
_SPLIT: ContextVar[str] = ContextVar("split", default="")
"""What is split: data, stages (of the layers, see `methods.pipeline`), or nothing."""


def started() -> int:
    """How many processes torchrun has started, joined or not; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started_first() -> bool:
    """Whether this is the first of them."""
    return int(os.environ.get("RANK", "0")) == 0


def size() -> int:
    """How many processes there are; 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return distributed.get_rank() if size() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def share(items: Sequence[T]) -> list[T]:
    """What this process takes of a list: every size-th item, from its own number on."""
    return list(items[rank() :: size()])


def dealt(costs: Sequence[float]) -> list[int]:
    """For each of several jobs the process that does it: the longest first, each to the one that has least to do."""
    if not split():
        return [rank()] * len(costs)
    load = [0.0] * size()
    found = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[job] = load.index(min(load))
        load[found[job]] += costs[job]
    return found


@contextlib.contextmanager
def splitting() -> Iterator[None]:
    """While this is open, all processes that `joined` do one job: data and solves are split among them.

    Nothing changes in a process of its own, nor where torch.distributed was set up for something else.
    """
    before = _SPLIT.set(_SPLIT.get() or ("data" if _JOINED.get() and size() > 1 else ""))
    try:
        yield
    finally:
        _SPLIT.reset(before)


@contextlib.contextmanager
def staging() -> Iterator[None]:
    """While this is open, each process runs some of the layers, all of them on the same data."""
    before = _SPLIT.set("stages")
    try:
        yield
    finally:
        _SPLIT.reset(before)


def split() -> bool:
    """Whether processes do parts of one job, so that sums must be added up over them."""
    return bool(_SPLIT.get())


def splits_data() -> bool:
    """Whether each of them takes some of the data."""
    return _SPLIT.get() == "data"


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Put the sum over all processes into tensors, in place. All give the same shapes in the same order."""
    if size() == 1:
        return
    for bucket in _buckets(x.detach() for x in tensors):
        whole = torch.cat([tensor.reshape(-1) for tensor in bucket]) if len(bucket) > 1 else bucket[0].contiguous()
        with told():
            distributed.all_reduce(whole)
        begin = 0
        for tensor in bucket:
            if tensor is not whole:
                tensor.copy_(whole.reshape(-1)[begin : begin + tensor.numel()].reshape(tensor.shape))
            begin += tensor.numel()


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one type and place, until there are many elements."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not alike or sum(x.numel() for x in bucket) + tensor.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def add_up_named(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sum over all processes of tensors by name; a name that one process lacks counts as zeros there.

    Returns:
        New tensors, the names in the order of the first process, then what others have beside them.
    """
    if size() == 1:
        return dict(tensors)
    own = {name: (tuple(x.shape), x.dtype, x.device.type) for name, x in tensors.items()}
    known: dict[str, tuple[tuple[int, ...], torch.dtype, str]] = {}
    for found in gathered(own):
        known |= {name: facts for name, facts in found.items() if name not in known}
    summed = {
        name: tensors[name].clone() if name in tensors else torch.zeros(shape, dtype=dtype, device=place)
        for name, (shape, dtype, place) in known.items()
    }
    add_up(summed.values())
    return summed


def send(tensors: Iterable[torch.Tensor], source: int) -> None:
    """Put what one process has into the tensors of all, in place; of any type, to the last bit."""
    if size() == 1:
        return
    for tensor in tensors:
        if not tensor.numel():
            continue
        whole = tensor.contiguous()
        with told():
            distributed.broadcast(whole.reshape(-1).view(torch.uint8), source)  # gloo does not take every type
        if whole is not tensor:
            tensor.copy_(whole)


def gathered(value: T) -> list[T]:
    """What each process gives, by rank; anything that pickles."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    with told():
        distributed.all_gather_object(found, value)
    return found


def handed_out(own: Mapping[int, Sequence[torch.Tensor]], owners: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """The tensors that were made in each job, one job after the other, given to all processes by the one that did it.

    Args:
        own: Job -> what this process has made.
        owners: For each job the process that did it; see `dealt`.
    """
    facts: dict[int, list[tuple[torch.Size, torch.dtype, str]]] = {}
    for found in gathered({job: [(x.shape, x.dtype, x.device.type) for x in made] for job, made in own.items()}):
        facts |= found
    for job, owner in enumerate(owners):
        made = list(own.get(job, ())) or [torch.empty(s, dtype=d, device=place) for s, d, place in facts[job]]
        send(made, owner)
        yield made


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes once all have come here, given to all; an error of it is raised by all.

    Raises:
        SecateurError: that `make` raised, in every process.
    """
    if size() == 1:
        return make()
    check_all(None)  # all are here: what is made may be seen by the others only now
    sent: list[Any] = [None, None]
    trouble: Exception | None = None
    if first():
        try:
            sent[0] = make()
        except SecateurError as error:
            sent[1], trouble = str(error), error
        except Exception as error:  # noqa: BLE001 - raised again below, once the others know
            sent[1], trouble = f"{type(error).__name__}: {_line(error)} (process 0 of {size()})", error
    with told():
        distributed.broadcast_object_list(sent, 0)
    if trouble is not None:
        raise trouble
    if sent[1] is not None:
        raise SecateurError(sent[1])
    return sent[0]  # type: ignore[no-any-return]


def check_same(value: Any, what: str) -> None:
    """Raise SecateurError, in all processes, unless all have the same value."""
    values = gathered(value)
    other = next((i for i, found in enumerate(values) if found != values[0]), None)
    if other is not None:
        raise SecateurError(
            f"{what} is {values[0]} in process 0 and {values[other]} in process {other}: all must be given the same"
        )


def check_all(trouble: str | None) -> None:
    """Raise SecateurError, in all processes, where one of them has a trouble to tell; the first is told."""
    found = [(i, text) for i, text in enumerate(gathered(trouble)) if text]
    if found:
        place = f" (process {found[0][0]} of {size()})" if size() > 1 else ""
        raise SecateurError(f"{found[0][1]}{place}")


@contextlib.contextmanager
def as_one() -> Iterator[None]:
    """An error of one process within this block ends the block in all of them; no process may talk to others in it.

    Raises:
        SecateurError: that of the first process that has one, in all.
    """
    trouble: SecateurError | None = None
    try:
        yield
    except SecateurError as error:
        trouble = error
        if not split():
            raise
    except Exception as error:
        if split():
            gathered(f"{type(error).__name__}: {_line(error)}")
        raise
    if split():
        values = gathered(None if trouble is None else str(trouble))
        found = [(i, text) for i, text in enumerate(values) if text]
        if trouble is not None and len({text for _, text in found}) == 1 and len(found) == size():
            raise trouble  # all have the same
        if found:
            raise SecateurError(f"{found[0][1]} (process {found[0][0]} of {size()})") from trouble


@contextlib.contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Be one of the processes that torchrun has started; nothing happens without it.

    Verbs that can (see `splitting`) then do one job together.

    Args:
        device: cpu = gloo; cuda = NCCL for what is on GPUs, gloo for the rest; each process takes the GPU of its number
            on its machine.

    Raises:
        SecateurError: The processes do not find each other, or there is no GPU for each.
    """
    if started() == 1:
        yield
        return
    token = _JOINED.set(True)
    try:
        with contextlib.nullcontext() if distributed.is_initialized() else _group(device):
            yield
    finally:
        _JOINED.reset(token)


@contextlib.contextmanager
def _group(device: str) -> Iterator[None]:
    place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.startswith("cuda:"):
        raise SecateurError(f"device {device}: each process of torchrun takes a GPU of its own, so give cuda")
    if device == "cuda" and there and place >= there:
        raise SecateurError(f"process {place} of this machine finds no GPU, there are {there}: start at most {there}")
    try:
        if device == "cuda" and there:  # without any, the device is refused where the model is loaded
            torch.cuda.set_device(place)
            distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=_TIMEOUT)
        else:
            distributed.init_process_group("gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise SecateurError(f"the processes of torchrun do not find each other: {_line(error)}") from error
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # the others may be gone
            distributed.destroy_process_group()


def speaks(message: str) -> bool:
    """Whether this process is the first that wants to say a message, so that it is said once."""
    return _first_in_store(_key(message))


def say_once(message: str, say: Callable[[], None]) -> None:
    """Say it in the first process that comes here with this message; the others wait until it is said.

    A process that ends with an error takes the others with it, so that none may end before.
    """
    if speaks(message):
        say()
        _first_in_store(f"{_key(message)}/said")
    else:
        with contextlib.suppress(RuntimeError):  # time is out, or the process with the store is gone
            _store().wait([f"{_key(message)}/said"], _PATIENCE)


def _key(message: str) -> str:
    return f"secateur/{hashlib.sha256(message.encode()).hexdigest()}"


def _first_in_store(key: str) -> bool:
    if size() == 1:
        return True
    try:
        return int(_store().add(key, 1)) == 1
    except RuntimeError:  # the process with the store is gone: better twice than never
        return True


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Say in one line that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        text, signs = _line(error), ("Connection", "closed", "Timed out", "timed out", "reset", "NCCL")
        if size() > 1 and any(word in text for word in signs):
            raise SecateurError(
                f"process {rank()} of {size()} waits for another one that has ended or hangs; look at the error of "
                f"that one ({text[:120]})"
            ) from error
        raise


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
