"""Language models that are exported with their key/value cache, and the proof: step by step as in one pass."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from secateur.errors import SecateurError
from secateur.load.mode import evaluating
from secateur.measure.onnx_cache import OnnxGenerator
from secateur.measure.ports import PAST, PRESENT, positions_of
from secateur.progress import Track
from secateur.ship.example import Example, Open, batched_experts, calling, without_cache
from secateur.ship.graph import to_onnx
from secateur.ship.proof import Agreement
from secateur.space.trace import export

_AWAY = "export it without the cache (leave --cache out)"
_PAST_TOKENS, _NEW_TOKENS = 3, 5  # of the trace: no size is 1, and none is another's
_STEPS = 4
_OPEN = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "past_sequence + sequence"},
    "position_ids": {0: "batch", 1: "sequence"},
}
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def convert_cached(given: Example, generator: torch.Generator) -> torch.onnx.ONNXProgram:
    """A language model as an ONNX program that takes its cache and gives it back.

    Args:
        given: the model, and token ids for it.
        generator: of the random inputs that it is traced with.

    Raises:
        SecateurError: it keeps something else than keys and values of every layer, or it cannot be traced.
    """
    model: Any = given.model
    past = _cache_of(given, generator)
    names = [f"{i}.{part}" for i in range(len(past)) for part in ("key", "value")]
    batch = len(past[0][0])
    inputs: dict[str, Any] = {
        "input_ids": _tokens(given, batch, _NEW_TOKENS, generator),
        "attention_mask": torch.ones(batch, _PAST_TOKENS + _NEW_TOKENS, dtype=torch.int64, device=past[0][0].device),
    }
    if _takes_positions(model):
        inputs["position_ids"] = positions_of(inputs["attention_mask"])[:, _PAST_TOKENS:].contiguous()
    opened: Open = {name: _OPEN[name] for name in inputs}
    # One symbol for the past of all layers: torch would reason about each alone.
    rows, new, kept = Dim("batch"), Dim("sequence"), Dim("past_sequence")
    shapes: dict[str, Any] = {name: {0: rows, 1: new} for name in inputs}
    shapes["attention_mask"] = {0: rows, 1: Dim.DYNAMIC}
    shapes["past_key_values"] = [({0: rows, 2: kept}, {0: rows, 2: kept}) for _ in past]
    try:
        with batched_experts(model), calling(model, _stepping(model, list(inputs))):
            program, _ = export(model, {**inputs, "past_key_values": past}, sources=False, dynamic_shapes=shapes)
    except SecateurError as error:
        raise SecateurError(f"{error}; {_AWAY}") from error
    caches: Open = {f"{PAST}.{name}": {0: "batch", 2: "past_sequence"} for name in names}
    found = to_onnx(
        model,
        program,
        {**opened, **caches},
        inputs=[*inputs, *caches],
        outputs=["logits", *(f"{PRESENT}.{name}" for name in names)],
    )
    for value in found.model.graph.outputs:
        labels = {0: "batch", 1: "sequence"} if value.name == "logits" else {0: "batch", 2: _OPEN["attention_mask"][1]}
        for dim, label in labels.items():
            value.shape[dim] = label  # type: ignore[index]
    return found


def check_steps(
    given: Example, path: Path, generator: torch.Generator, agreement: Agreement, track: Track
) -> list[dict[str, list[int]]]:
    """Compare the steps of a file with one pass of torch over the whole row.

    Three ways to the same row: half of it at once and then token by token; everything after one token; and rows of
    several lengths, padded on the left, of which two tokens come at once.

    Args:
        given: the model, and token ids for it.
        path: the file.
        generator: of the random tokens.
        agreement: gathers the differences.
        track: progress over the three.

    Returns:
        input -> shape, for each.

    Raises:
        SecateurError: they differ.
    """
    file = OnnxGenerator(path)
    longest = getattr(given.model.config, "max_position_embeddings", None)
    length = min(2 * _STEPS + 1, longest) if isinstance(longest, int) else 2 * _STEPS + 1
    start = max(1, length - _STEPS)
    checked = []
    # rows, padded or not, and the tokens of each call
    ways = [
        (3, False, [start, *[1] * (length - start)]),
        (1, False, [1, length - 1] if length > 1 else [1]),
        (2, True, [start, length - start] if length > start else [start]),
    ]
    for rows, padded, calls in track(ways, f"comparing {agreement.runtime} with torch"):
        ids = _tokens(given, rows, length, generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, : start // 2] = 0
        expected = _whole(given.model, ids, mask)
        done = 0
        for count in calls:
            part = ids[:, done : done + count].cpu()
            seen = mask[:, done : done + count].cpu()
            logits = file.step(part) if done else file.start(part, seen)
            where = f"logits on input_ids {list(part.shape)} after {done} tokens"
            agreement.add(where, expected[:, done : done + count], logits, seen)
            done += count
        checked.append({"input_ids": [rows, length]})
    return checked


def _whole(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of one pass without a cache [batch, tokens, vocabulary]."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if _takes_positions(model):
        inputs["position_ids"] = positions_of(mask)
    with without_cache(model):
        logits: torch.Tensor = model(**inputs).logits
    return logits


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _tokens(given: Example, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random token ids [rows, length] on the model's device."""
    ids = given.tensors["input_ids"]
    own = Example(given.model, {"input_ids": ids}, {}, {"input_ids": {0: "batch", 1: "sequence"}})
    return own.fresh({"batch": rows, "sequence": length}, generator)["input_ids"]


def _stepping(model: nn.Module, names: list[str]) -> Any:
    """A forward pass from tensors of a cache to tensors of a cache."""
    from transformers import DynamicCache

    forward = model.forward

    def step(**inputs: Any) -> tuple[torch.Tensor, Pairs]:
        """Without a config the cache keeps all positions, of layers with a window too; their masks see the window."""
        past = DynamicCache(inputs.pop("past_key_values"))
        found = forward(**inputs, past_key_values=past, use_cache=True, return_dict=True)
        return found.logits, [(layer.keys, layer.values) for layer in found.past_key_values.layers]

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind) for name in (*names, "past_key_values")]
    setattr(step, "__signature__", inspect.Signature(parameters))  # noqa: B010  # what torch.export reads
    return step


def _cache_of(given: Example, generator: torch.Generator) -> Pairs:
    """Keys and values of a few tokens, layer by layer: their shapes are those of the cache.

    Raises:
        SecateurError: for a model that keeps nothing, or something else.
    """
    model: Any = given.model
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise SecateurError(f"{name} is no Hugging Face model, and only those have a key/value cache: {_AWAY}")
    if config.is_encoder_decoder:
        raise SecateurError(f"{name} has an encoder and a decoder, each with a cache of its own: {_AWAY}")
    if "input_ids" not in given.tensors or "past_key_values" not in inspect.signature(model.forward).parameters:
        raise SecateurError(f"{name} takes no key/value cache: {_AWAY}")
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    ids = _tokens(given, 2, _PAST_TOKENS, generator)
    with evaluating(model), torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, return_dict=True)
    cache = getattr(found, "past_key_values", None)
    if cache is None or not hasattr(found, "logits"):
        raise SecateurError(f"{name} gives back no key/value cache, so it writes no text token by token: {_AWAY}")
    layers = list(getattr(cache, "layers", ()))
    for index, layer in enumerate(layers):
        plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        if not plain or not isinstance(layer.keys, torch.Tensor) or layer.keys.dim() != 4:
            kept = type(layer).__name__ if not plain else "nothing of its own"
            raise SecateurError(f"{name} keeps {kept} in layer {index}, which is no key/value cache: {_AWAY}")
    if not layers:
        raise SecateurError(f"{name} keeps a {type(cache).__name__} without layers: {_AWAY}")
    return [(layer.keys[:, :, -_PAST_TOKENS:].clone(), layer.values[:, :, -_PAST_TOKENS:].clone()) for layer in layers]
