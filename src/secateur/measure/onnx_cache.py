"""An ONNX file of a language model with a key/value cache, called token by token."""

from pathlib import Path
from typing import Any

import torch

from secateur.errors import SecateurError
from secateur.measure.onnx import OnnxModel
from secateur.measure.ports import PAST, PRESENT, Port, empty_shape, one_line, positions_of


class OnnxGenerator:
    """A language model in an ONNX file that keeps its key/value cache between calls.

    `start` reads a prompt into a fresh cache, `step` adds tokens to it::

        model = OnnxGenerator("llama-cache.onnx")
        logits = model.start(prompt)  # [batch, tokens, vocabulary]
        for _ in range(20):
            logits = model.step(logits[:, -1:].argmax(-1))  # [batch, 1, vocabulary]

    The file is one that `export_onnx(..., cache=True)` wrote, or any other with the inputs and outputs of Hugging
    Face's optimum: ``input_ids``, ``attention_mask``, ``position_ids`` (not all have it), ``past_key_values.N.key`` and
    ``.value``; ``logits``, ``present.N.key`` and ``.value``. Keys and values stay in ONNX Runtime's memory; what it
    gives back goes in again without a copy.

    Attributes:
        path: the file.
        threads: threads of ONNX Runtime.
        model: the file itself, to call with a cache of your own.
        positions: tokens in the cache now, padding counted.
        cache_bytes: bytes of keys and values in the cache now.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        """Read the file.

        Args:
            path: an .onnx file with a cache.
            threads: for ONNX Runtime; None = as many as torch uses now.

        Raises:
            SecateurError: ONNX Runtime cannot read it, or it has no cache.
        """
        self.model = OnnxModel(path, threads=threads)
        self.path, self.threads = self.model.path, self.model.threads
        self._past = cache_ports(self.model)
        self.positions = 0
        self.cache_bytes = 0
        self._mask = torch.ones(0, 0, dtype=torch.int64)
        self._cache: dict[str, Any] = {}

    def start(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Forget everything and read a prompt.

        Args:
            ids: token ids, int64 [batch, tokens].
            mask: 1 for tokens, 0 for padding, [batch, tokens]; None = there is no padding.

        Returns:
            logits [batch, tokens, vocabulary].

        Raises:
            SecateurError: for ids that are none, or that the file does not take.
        """
        import onnxruntime as ort

        _check_ids(ids)
        self._cache = {
            port.name: ort.OrtValue.ortvalue_from_numpy(
                torch.zeros(empty_shape(port, len(ids)), dtype=port.dtype).numpy()
            )
            for port in self._past
        }
        self.positions = 0
        self._mask = torch.ones(len(ids), 0, dtype=torch.int64)
        return self._more(ids, torch.ones_like(ids) if mask is None else mask)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Add tokens to what the cache holds.

        Args:
            ids: token ids, int64 [batch, tokens]; mostly one token.

        Returns:
            logits [batch, tokens, vocabulary].

        Raises:
            SecateurError: before `start`, for another batch, or for ids that the file does not take.
        """
        _check_ids(ids)
        if not self._cache:
            raise SecateurError(f"{self.path}: step comes after start, which reads the prompt")
        if len(ids) != len(self._mask):
            raise SecateurError(f"{self.path}: the cache holds {len(self._mask)} rows, and step was given {len(ids)}")
        return self._more(ids, torch.ones_like(ids))

    def _more(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        import onnxruntime as ort

        if mask.shape != ids.shape:
            raise SecateurError(f"{self.path}: the mask is {list(mask.shape)}, and the ids are {list(ids.shape)}")
        whole = torch.cat([self._mask, mask.to(torch.int64)], 1)
        given = {"input_ids": ids, "attention_mask": whole, "position_ids": positions_of(whole)[:, -ids.shape[1] :]}
        feed = dict(self._cache)
        for port in self.model.inputs:
            if port.name in given:
                value = given[port.name].to("cpu", port.dtype).contiguous()
                feed[port.name] = ort.OrtValue.ortvalue_from_numpy(value.numpy())
        names = ["logits", *(_present(port) for port in self._past)]
        try:
            results = self.model.session.run_with_ort_values(names, feed)
        except Exception as error:  # ONNX Runtime has a class of its own for every status
            raise SecateurError(
                f"{self.path}: ONNX Runtime cannot run it on ids {list(ids.shape)} after {self.positions} positions "
                f"({one_line(error)})"
            ) from error
        self._cache = {port.name: value for port, value in zip(self._past, results[1:], strict=True)}
        self._mask, self.positions = whole, whole.shape[1]
        self.cache_bytes = sum(value.tensor_size_in_bytes() for value in results[1:])
        logits: torch.Tensor = torch.from_numpy(results[0].numpy())
        return logits


def cache_ports(model: OnnxModel) -> list[Port]:
    """The inputs of a file that are its key/value cache.

    Raises:
        SecateurError: it has none, or does not give back what it takes.
    """
    past = [port for port in model.inputs if port.name.startswith(f"{PAST}.")]
    if not past:
        raise SecateurError(
            f"{model.path}: has no key/value cache (no input {PAST}.0.key): export it with one (--cache), or call it "
            "whole"
        )
    known = {port.name for port in model.outputs}
    missing = [name for name in ("logits", *map(_present, past)) if name not in known]
    if missing:
        raise SecateurError(f"{model.path}: has no output {missing[0]!r}, which a file with a key/value cache needs")
    return past


def _present(port: Port) -> str:
    """The output that becomes an input at the next step."""
    return PRESENT + port.name.removeprefix(PAST)


def _check_ids(ids: torch.Tensor) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or not ids.shape[1]:
        raise SecateurError(f"token ids are whole numbers [batch, tokens], not {ids.dtype} {list(ids.shape)}")
