"""An OpenVINO model (.xml and .bin) behind the call of a torch module, for all that measures models."""

import importlib
from pathlib import Path
from typing import Any

import torch

from secateur.errors import SecateurError
from secateur.measure.ports import Array, FileModel, Port, one_line

_DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "boolean": torch.bool,
}


def require_openvino(what: str) -> None:
    """Check that OpenVINO can be imported.

    Args:
        what: what it is needed for, for the message.

    Raises:
        SecateurError: it cannot.
    """
    try:
        importlib.import_module("openvino")
    except ImportError as error:
        raise SecateurError(f"{what} needs openvino ({error}): pip install 'secateur[openvino]'") from error


class OpenvinoModel(FileModel):
    """An OpenVINO model that is called as the torch model was: on the CPU, without parameters.

    See `FileModel` for what it takes and returns.
    """

    runtime = "OpenVINO"

    def __init__(self, path: str | Path, *, threads: int | None = None, exact: bool = True) -> None:
        """Read the model and compile it for this CPU.

        Args:
            path: an .xml file, its .bin beside it; an .onnx file will do too.
            threads: for OpenVINO; None = as many as torch uses now.
            exact: compute in float32, where the CPU would else round to bfloat16 or float16 to be faster.

        Raises:
            SecateurError: OpenVINO is missing, or cannot read or compile the model.
        """
        require_openvino("running an OpenVINO model")
        import openvino

        super().__init__(path, threads)
        tensors = self.path.with_suffix(".bin")
        if self.path.suffix == ".xml" and not tensors.is_file():
            raise SecateurError(f"{path}: its tensors, {tensors.name}, are not beside it")
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}
        if exact:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        try:
            self._compiled = openvino.Core().compile_model(str(self.path), "CPU", settings)
        except RuntimeError as error:
            raise SecateurError(f"{path}: OpenVINO cannot load it ({one_line(error)})") from error
        self._request = self._compiled.create_infer_request()
        self.inputs = [self._port(port) for port in self._compiled.inputs]
        self.outputs = [self._port(port) for port in self._compiled.outputs]

    def _port(self, port: Any) -> Port:
        kind, name = port.get_element_type().get_type_name(), port.get_any_name()
        if kind not in _DTYPES:
            raise SecateurError(f"{self.path}: {name} is a {kind}; known: {', '.join(_DTYPES)}")
        shape = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
        return Port(name, shape, _DTYPES[kind])

    def _run(self, feed: dict[str, Array]) -> list[Array]:
        self._request.infer(feed, share_inputs=True)
        return [self._request.get_output_tensor(i).data.copy() for i in range(len(self.outputs))]
