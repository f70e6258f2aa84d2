"""An ONNX file as a model: ONNX Runtime behind the call of a torch module, for all that measures models."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, is_pair

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}
_LEFT_OUT = {"attention_mask": 1, "token_type_ids": 0}  # what transformers takes where it is not given


def require_onnx(what: str, packages: Sequence[str] = PACKAGES) -> None:
    """Check that the packages of the ``onnx`` extra can be imported.

    Args:
        what: what they are needed for, for the message.
        packages: their names.

    Raises:
        SecateurError: one is missing.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise SecateurError(f"{what} needs {package} ({error}): pip install 'secateur[onnx]'") from error


@dataclass(frozen=True)
class Port:
    """One input or output of an ONNX file.

    Attributes:
        name: as in the file.
        shape: sizes; a name where any size is taken, None where the file says nothing.
        dtype: the type of its elements.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: torch.dtype


class OnnxModel(nn.Module):
    """An ONNX file that is called as the torch model was: ONNX Runtime on the CPU, without parameters.

    It takes what measuring functions give: tensors by place or by name. Whole numbers are cast to the file's type of
    whole numbers, floats to its type of floats. What transformers makes up where it is not given is made up here too:
    an ``attention_mask`` of ones, ``token_type_ids`` of zeros. ``labels`` are left out: a file has no loss.

    Attributes:
        path: the file.
        inputs: what it takes, in order.
        outputs: what it returns, in order.
        threads: threads of ONNX Runtime.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        """Read the file.

        Args:
            path: an .onnx file; the file of its tensors, if it has one, beside it.
            threads: for ONNX Runtime; None = as many as torch uses now.

        Raises:
            SecateurError: ONNX Runtime is missing, or cannot read or run the file.
        """
        super().__init__()
        require_onnx("running an ONNX file", ("onnxruntime",))
        import onnxruntime as ort

        self.path = Path(path)
        if not self.path.is_file():
            raise SecateurError(f"{path}: there is no such file")
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise SecateurError(f"threads must be at least 1, not {threads}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # errors; what it warns of is about its own optimiser
        try:
            self._session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a class of its own for every status
            raise SecateurError(f"{path}: ONNX Runtime cannot load it ({_line(error)})") from error
        self.inputs = [self._port(port) for port in self._session.get_inputs()]
        self.outputs = [self._port(port) for port in self._session.get_outputs()]

    def _port(self, port: Any) -> Port:
        if port.type not in _DTYPES:
            raise SecateurError(f"{self.path}: {port.name} is a {port.type}; known: {', '.join(_DTYPES)}")
        shape = tuple(size if isinstance(size, int | str) else None for size in port.shape)
        return Port(port.name, shape, _DTYPES[port.type])

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
            results = self._session.run(None, feed)
        except Exception as error:  # as above
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feed.items())
            raise SecateurError(f"{self.path}: ONNX Runtime cannot run it on {shapes} ({_line(error)})") from error
        tensors = [torch.from_numpy(result) for result in results]
        if len(tensors) == 1:
            return tensors[0]
        return SimpleNamespace(**{port.name: value for port, value in zip(self.outputs, tensors, strict=True)})

    def feed(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> dict[str, npt.NDArray[Any]]:
        """Inputs as ONNX Runtime takes them: input -> array.

        Args:
            args: as for a call.
            kwargs: as for a call.

        Raises:
            SecateurError: as for a call.
        """
        given = self._named(args, kwargs)
        return {port.name: self._ready(port, given).numpy() for port in self.inputs}

    def feed_of(self, batch: Batch) -> dict[str, npt.NDArray[Any]]:
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
        ids = given.get("input_ids")
        if port.name not in given and port.name in _LEFT_OUT and ids is not None:
            return torch.full(ids.shape, _LEFT_OUT[port.name], dtype=port.dtype)
        value = given.get(port.name)
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


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
