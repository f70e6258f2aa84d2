"""What of a model is timed: prefill and decode of a language model, one forward pass of anything else."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.batches import size_of
from secateur.measure.bench import Pass
from secateur.measure.latency import device_of, forward, tried
from secateur.measure.onnx_cache import OnnxGenerator
from secateur.measure.ports import PAST, FileModel
from secateur.space.inputs import example_inputs
from secateur.space.trace import Inputs

SEQ, DECODE = 256, 16
"""Tokens of the prompt and tokens generated after it, by default."""
_CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class Load:
    """What goes through every model.

    Attributes:
        inputs: arguments of one forward pass; of a language model {"input_ids": int64 [batch, tokens]}.
        samples: rows in them.
        language: whether models are timed as language models: prefill and decode.
        seq: tokens in each row, where there are some.
        decode: tokens that a language model generates after them.
        vocabulary: token ids are below that.
    """

    inputs: Inputs
    samples: int
    language: bool = False
    seq: int | None = None
    decode: int = 0
    vocabulary: int | None = None


def is_language_model(model: nn.Module) -> bool:
    """Whether it takes token ids alone and can go on from them: transformers' causal language models."""
    config: Any = getattr(model, "config", None)
    tokens = getattr(model, "main_input_name", None) == "input_ids" and vocabulary_of(model) is not None
    generates = getattr(model, "can_generate", lambda: False)
    return bool(tokens and not getattr(config, "is_encoder_decoder", False) and generates())


def vocabulary_of(model: nn.Module) -> int | None:
    """Tokens that a Hugging Face model knows."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def longest_of(model: nn.Module) -> int | None:
    """Positions that a Hugging Face model has."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "max_position_embeddings", None)
    return size if isinstance(size, int) else None


def token_load(
    vocabulary: int,
    *,
    batch: int | None = None,
    seq: int | None = None,
    decode: int | None = None,
    longest: int | None = None,
    language: bool = True,
    seed: int = 0,
) -> Load:
    """Random token ids.

    Args:
        vocabulary: ids are below that.
        batch: rows; None = 1.
        seq: tokens in each; None = 256, or what the models take.
        decode: tokens generated after them; None = 16.
        longest: positions that every model has.
        language: whether anything is generated.
        seed: of the ids.

    Raises:
        SecateurError: for sizes below 1, or prompts and answers longer than the models take.
    """
    more = (DECODE if decode is None else decode) if language else 0
    batch = 1 if batch is None else batch
    if seq is None:
        seq = SEQ if longest is None else max(1, min(SEQ, longest - more))
    for name, value, least in (("batch", batch, 1), ("seq", seq, 2 if more else 1), ("decode", more, 0)):
        if value < least:
            raise SecateurError(f"{name} must be at least {least}, not {value}")
    if longest is not None and seq + more > longest:
        told = f"{seq} tokens and {more} generated ones" if more else f"{seq} tokens"
        raise SecateurError(f"{told} are more than the {longest} positions that the models take: give a smaller --seq")
    ids = torch.randint(vocabulary, (batch, seq), generator=torch.Generator().manual_seed(seed))
    return Load({"input_ids": ids}, batch, language, seq, more, vocabulary)


def default_load(model: nn.Module, batch: int) -> Load:
    """What a Hugging Face model that is no language model takes, with so many rows."""
    made = example_inputs(model)
    rows = size_of(made)

    def sized(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.dim() or len(x) != rows:
            return x
        return x[:1].expand(batch, *x.shape[1:]).clone()

    return Load({name: sized(value) for name, value in made.items()}, batch)


def torch_passes(model: nn.Module, load: Load, *, keep: bool = True) -> dict[str, Pass]:
    """What is timed of a torch model, once it has been seen to run.

    Args:
        model: in evaluation mode, on one device.
        load: what goes in.
        keep: keep the cache of the prompt, and begin each decoding with a copy of it; without, the prompt is read
            anew each time, which takes longer and no memory.

    Raises:
        SecateurError: where the model does not run on these inputs, or keeps no cache.
    """
    whole = _without_gradient(forward(model, load.inputs))
    tried(model, whole)
    if not load.language:
        return {"forward": Pass(whole, load.samples)}
    found = {"prefill": Pass(whole, load.samples * (load.seq or 1))}
    if load.decode:
        decoding = _Decoding(model, load, keep)
        tried(model, decoding.reset)
        found["decode"] = Pass(decoding.run, load.samples * load.decode, decoding.reset)
    return found


def file_passes(model: FileModel, load: Load, generator: OnnxGenerator | None = None) -> dict[str, Pass]:
    """What is timed of a file under its runtime; decoding needs one with a key/value cache.

    Raises:
        SecateurError: where it does not run on these inputs.
    """
    whole = _whole(model, load.inputs)
    if not load.language:
        whole()
        return {"forward": Pass(whole, load.samples)}
    count = load.samples * (load.seq or 1)
    if generator is None:
        whole()
        return {"prefill": Pass(whole, count)}
    ids = _ids(load)

    def prefill() -> object:
        return generator.start(ids)

    def reset() -> None:
        generator.start(ids[:, :-1])
        generator.step(ids[:, -1:])

    def decode() -> None:
        for _ in range(load.decode):
            generator.step(ids[:, -1:])

    prefill()
    found = {"prefill": Pass(prefill, count)}
    if load.decode:
        found["decode"] = Pass(decode, load.samples * load.decode, reset)
    return found


def file_load(path: Path, model: FileModel, *, batch: int | None, seq: int | None, decode: int | None) -> Load | None:
    """What a file takes, where it says so by itself; None where sizes are open that nothing says.

    Args:
        path: of the file, for messages.
        model: the file.
        batch: rows; None = 1, or as the file has it.
        seq: tokens; None as `token_load`.
        decode: tokens generated.

    Raises:
        SecateurError: for sizes that the file has not.
    """
    ids = next((port for port in model.inputs if port.name == "input_ids"), None)
    if ids is not None:
        rows, length = ids.shape if len(ids.shape) == 2 else (None, None)
        vocabulary = file_vocabulary(model)
        if vocabulary is None:
            raise SecateurError(f"{path}: does not say how many tokens it knows: bench it beside its torch model")
        cached = any(port.name.startswith(f"{PAST}.") for port in model.inputs)
        if decode and not cached:
            raise SecateurError(f"--decode {decode}: {path} has no key/value cache to decode with")
        for option, own, asked in (("batch", rows, batch), ("seq", length, seq)):
            if isinstance(own, int) and asked not in (None, own):
                raise SecateurError(f"--{option} {asked}: {path} takes {own} alone")
        fixed = rows if isinstance(rows, int) else batch, length if isinstance(length, int) else seq
        return token_load(vocabulary, batch=fixed[0], seq=fixed[1], decode=decode if cached else 0)
    for option, asked in (("seq", seq), ("decode", decode)):
        if asked is not None:
            raise SecateurError(f"--{option} is for language models, and {path} takes no token ids")
    inputs = {}
    for port in model.inputs:
        shape = [batch or 1 if i == 0 and not isinstance(n, int) else n for i, n in enumerate(port.shape)]
        if not all(isinstance(n, int) for n in shape):
            return None
        sizes = [n for n in shape if isinstance(n, int)]
        inputs[port.name] = torch.zeros(sizes, dtype=port.dtype)
    rows_here = size_of(inputs)
    if batch is not None and batch != rows_here:
        raise SecateurError(f"--batch {batch}: {path} takes {rows_here} rows")
    return Load(inputs, rows_here)


def file_vocabulary(model: FileModel) -> int | None:
    """Tokens that a file of a language model knows: the last size of its logits."""
    logits = next((port for port in model.outputs if port.name == "logits"), None)
    size = logits.shape[-1] if logits is not None and len(logits.shape) == 3 else None
    return size if isinstance(size, int) else None


class _Decoding:
    """Generate tokens one after the other, always from the same context."""

    def __init__(self, model: nn.Module, load: Load, keep: bool) -> None:
        self.model, self.steps, self.keep = model, load.decode, keep
        self.ids = _ids(load).to(device_of(model))
        self.base: Any = None
        self.name, self.cache = "", None

    @torch.no_grad()
    def reset(self) -> None:
        """A cache of the whole prompt; its last token goes in alone, as later ones do, so that they find all warm."""
        if self.base is None:
            result = self.model(input_ids=self.ids[:, :-1], use_cache=True)
            found = {name: value for name in _CACHES if (value := getattr(result, name, None)) is not None}
            if not found:
                raise SecateurError(
                    f"{type(self.model).__name__} keeps no cache to decode with: leave decoding out with --decode 0"
                )
            self.name, self.base = next(iter(found.items()))
        self.cache = copy.deepcopy(self.base) if self.keep else self.base
        if not self.keep:
            self.base = None
        self._step()

    @torch.no_grad()
    def run(self) -> None:
        for _ in range(self.steps):
            self._step()

    def _step(self) -> None:
        result = self.model(input_ids=self.ids[:, -1:], use_cache=True, **{self.name: self.cache})
        self.cache = getattr(result, self.name)


def _ids(load: Load) -> torch.Tensor:
    named: Any = load.inputs
    ids: torch.Tensor = named["input_ids"]
    return ids


def _whole(model: FileModel, inputs: Inputs) -> Callable[[], object]:
    """One call of a file."""
    if isinstance(inputs, torch.Tensor):
        return lambda: model(inputs)
    if isinstance(inputs, tuple | list):
        return lambda: model(*inputs)
    named = {name: value for name, value in (inputs or {}).items() if isinstance(value, torch.Tensor)}
    return lambda: model(**named)


def _without_gradient(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return function()

    return run
