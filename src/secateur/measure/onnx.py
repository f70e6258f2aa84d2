"""An ONNX file as a model: ONNX Runtime behind the call of a torch module, for all that measures models."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.errors import SecateurError
from secateur.measure.ports import Array, FileModel, Port, one_line

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


def require_onnx(what: str, packages: Sequence[str] = PACKAGES, extra: str = "onnx") -> None:
    """Check that the packages of the ``onnx`` extra can be imported.

    Args:
        what: what they are needed for, for the message.
        packages: their names.
        extra: the extra that has them.

    Raises:
        SecateurError: one is missing.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise SecateurError(f"{what} needs {package} ({error}): pip install 'secateur[{extra}]'") from error


class OnnxModel(FileModel):
    """An ONNX file that is called as the torch model was: ONNX Runtime on the CPU, without parameters.

    See `FileModel` for what it takes and returns.
    """

    runtime = "ONNX Runtime"

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        """Read the file.

        Args:
            path: an .onnx file; the file of its tensors, if it has one, beside it.
            threads: for ONNX Runtime; None = as many as torch uses now.

        Raises:
            SecateurError: ONNX Runtime is missing, or cannot read or run the file.
        """
        require_onnx("running an ONNX file", ("onnxruntime",))
        import onnxruntime as ort

        super().__init__(path, threads)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # errors; what it warns of is about its own optimiser
        # Its idle threads would take the processor from what is timed after it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a class of its own for every status
            raise SecateurError(f"{path}: ONNX Runtime cannot load it ({one_line(error)})") from error
        self.inputs = [self._port(port) for port in self.session.get_inputs()]
        self.outputs = [self._port(port) for port in self.session.get_outputs()]

    def _port(self, port: Any) -> Port:
        if port.type not in _DTYPES:
            raise SecateurError(f"{self.path}: {port.name} is a {port.type}; known: {', '.join(_DTYPES)}")
        shape = tuple(size if isinstance(size, int | str) else None for size in port.shape)
        return Port(port.name, shape, _DTYPES[port.type])

    def _run(self, feed: dict[str, Array]) -> list[Array]:
        results: list[Array] = self.session.run(None, feed)
        return results
