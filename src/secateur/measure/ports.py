"""What a file with named inputs and outputs needs to be called as the torch model was, whatever runs it."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, is_pair

PAST, PRESENT = "past_key_values", "present"
"""What the names of a key/value cache begin with, as an input and as an output: ``past_key_values.0.key``."""
_LEFT_OUT = {"attention_mask": 1, "token_type_ids": 0}  # what transformers takes where it is not given
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Port:
    """One input or output of a file.

    Attributes:
        name: as in the file.
        shape: sizes; a name where any size is taken, None where the file says nothing.
        dtype: the type of its elements.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: torch.dtype


class FileModel(nn.Module):
    """A file that is called as the torch model was, on the CPU, without parameters.

    It takes what measuring functions give: tensors by place or by name. Whole numbers are cast to the file's type of
    whole numbers, floats to its type of floats. What transformers makes up where it is not given is made up here too:
    an ``attention_mask`` of ones, ``token_type_ids`` of zeros, ``position_ids`` that count what the mask does not hide,
    and a key/value cache that is empty. ``labels`` are left out: a file has no loss.

    Attributes:
        path: the file.
        inputs: what it takes, in order.
        outputs: what it returns, in order.
        threads: threads that it runs on.
        runtime: what runs it, for messages.
    """

    runtime = "a runtime"
    inputs: list[Port]
    outputs: list[Port]

    def __init__(self, path: str | Path, threads: int | None) -> None:
        """Check that there is such a file, and how many threads it may have; None = as many as torch uses now."""
        super().__init__()
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise SecateurError(f"{path}: there is no such file")
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise SecateurError(f"threads must be at least 1, not {threads}")

    @abstractmethod
    def _run(self, feed: dict[str, Array]) -> list[Array]:
        """Arrays of all outputs, in order, for arrays of all inputs."""

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """Run the file on a batch.

        Args:
            args: tensors, in the order of `inputs`.
            kwargs: tensors by name.

        Returns:
            The output, a tensor on the CPU; of a file with several, an object with an attribute for each.

        Raises:
            SecateurError: for inputs that the file does not take.
        """
        feed = self.feed(*args, **kwargs)
        try:
            results = self._run(feed)
        except Exception as error:  # runtimes have classes of their own for everything
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feed.items() if value.size)
            raise SecateurError(f"{self.path}: {self.runtime} cannot run it on {shapes} ({one_line(error)})") from error
        tensors = [torch.from_numpy(result) for result in results]
        if len(tensors) == 1:
            return tensors[0]
        return SimpleNamespace(**{port.name: value for port, value in zip(self.outputs, tensors, strict=True)})

    def feed(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> dict[str, Array]:
        """Inputs as the runtime takes them: input -> array.

        Args:
            args: as for a call.
            kwargs: as for a call.

        Raises:
            SecateurError: as for a call.
        """
        given = self._named(args, kwargs)
        return {port.name: self._ready(port, given).numpy() for port in self.inputs}

    def feed_of(self, batch: Batch) -> dict[str, Array]:
        """The same for a batch, as data is read: a tensor, a mapping of inputs, or a pair (inputs, targets).

        Raises:
            SecateurError: as for a call, or for another form of batch.
        """
        if isinstance(batch, tuple | list) and not is_pair(batch):
            raise SecateurError(f"a batch is a tensor, a mapping or a pair (inputs, targets), not {len(batch)} things")
        inputs: Any = batch[0] if isinstance(batch, tuple | list) else batch
        if isinstance(inputs, Mapping):
            return self.feed(**inputs)
        return self.feed(*inputs) if isinstance(inputs, tuple | list) else self.feed(inputs)

    def _named(self, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Everything by name, without what a file does not need."""
        names = [port.name for port in self.inputs]
        if len(args) > len(names):
            raise SecateurError(f"{self.path} takes {len(names)} inputs ({', '.join(names)}), not {len(args)}")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise SecateurError(f"{self.path}: {name} is given twice, by place and by name")
            if name in names:
                given[name] = value
            elif name == "attention_mask" and not bool((value != 1).any()):
                continue  # it hides nothing
            elif name != "labels":
                raise SecateurError(f"{self.path} has no input {name!r}{nearest(name, names)}")
        return given

    def _ready(self, port: Port, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """One input as the file takes it."""
        value = given.get(port.name)
        if value is None:
            value = _made_up(port, given)
        if value is None:
            raise SecateurError(f"{self.path}: the input {port.name!r} is missing; given: {', '.join(given)}")
        fixed = len(value.shape) == len(port.shape) and all(
            not isinstance(size, int) or size == own for size, own in zip(port.shape, value.shape, strict=True)
        )
        if not fixed:
            raise SecateurError(
                f"{self.path}: {port.name} has the shape {list(value.shape)}, and the file takes {list(port.shape)}"
            )
        if value.is_floating_point() != port.dtype.is_floating_point:
            raise SecateurError(f"{self.path}: {port.name} is {value.dtype}, and the file takes {port.dtype}")
        return value.detach().to("cpu", port.dtype).contiguous()

    def extra_repr(self) -> str:
        """The file, for printing."""
        return str(self.path)


def _made_up(port: Port, given: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What transformers takes where it is not given; None where it would not know either."""
    ids = given.get("input_ids")
    if ids is None:
        return None
    if port.name in _LEFT_OUT:
        return torch.full(ids.shape, _LEFT_OUT[port.name], dtype=port.dtype)
    if port.name == "position_ids":
        return positions_of(given.get("attention_mask", torch.ones_like(ids)))[:, -ids.shape[1] :]
    if port.name.startswith(f"{PAST}."):
        return torch.zeros(empty_shape(port, len(ids)), dtype=port.dtype)
    return None


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions of tokens [batch, tokens], counted without those that the mask (1 = seen) hides."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def empty_shape(port: Port, batch: int) -> list[int]:
    """The shape [batch, heads, 0, numbers] of a cache of nothing; sizes that are open, but the first, are 0."""
    return [batch, *(size if isinstance(size, int) else 0 for size in port.shape[1:])]


def one_line(error: BaseException) -> str:
    """The message of an error in one line that is not too long."""
    return " ".join(str(error).split())[:300]
