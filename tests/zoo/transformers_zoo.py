"""Every transformers architecture whose config shrinks to a tiny model that runs: built from its size fields."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from sizes import EXTRA, FIELDS, LISTS, NAMES, SINGLE
from torch import nn
from transformers.integrations import moe
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_TASKS = (
    *("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "CAUSAL_LM"),
    *("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION", "CTC", "AUDIO_CLASSIFICATION"),
    *("VIDEO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "DEPTH_ESTIMATION", "KEYPOINT_DETECTION"),
)
_MOST = 3_000_000  # parameters: what is larger did not shrink
_PARTS = {"text": 64, "vision": 48, "audio": 80, "speech": 80, "encoder": 48, "decoder": 64, "qformer": 56}
"""Hidden sizes of sub-configs, by a word of their name."""


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers and the class that is built for it: the one that uses most of it."""

    name: str
    task: str
    classname: str

    @property
    def model_class(self) -> Any:
        """The class, imported now."""
        return getattr(transformers, self.classname)


def _all() -> Iterator[Architecture]:
    found: set[str] = set()
    for task in (*_TASKS, "BASE"):
        table = "MODEL_MAPPING_NAMES" if task == "BASE" else f"MODEL_FOR_{task}_MAPPING_NAMES"
        for name, classes in getattr(modeling_auto, table).items():
            if name not in found:
                found.add(name)
                yield Architecture(name, task, classes if isinstance(classes, str) else classes[0])


moe._can_use_grouped_mm = lambda *_: False  # torch.grouped_mm takes no float64; the fallback is the same sum

EVERY: dict[str, Architecture] = {a.name: a for a in _all()}
ARCHITECTURES: dict[str, Architecture] = {n: EVERY[n] for n in NAMES.split()}


def build(name: str, *, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Any:
    """A random tiny model of an architecture, in eval mode; every parameter is away from its initial value."""
    dtype = torch.float32 if name in SINGLE else dtype
    architecture = EVERY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = shrunk(name)
        with torch.device("meta"):
            count = sum(p.numel() for p in architecture.model_class(config).parameters())
        if count > _MOST:
            raise ValueError(f"{name} did not shrink: {count:,} parameters")
        torch.manual_seed(seed)
        with torch.device(device):
            model = architecture.model_class(shrunk(name)).to(dtype).eval()
    if device != "meta":
        scatter(model)
    return model


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Move parameters and running statistics away from their initial values, by enough that signals do not fade."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.copy_(torch.nan_to_num(parameter).clamp(-3, 3))
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 400
            parameter.add_(min(max(0.05, fan_in**-0.5), 0.3) * torch.randn_like(parameter))
    norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), torch.Tensor)]
    if norms:
        _settle(model, norms)


def _settle(model: nn.Module, norms: list[nn.Module]) -> None:
    """Give batch norms nearly the statistics of what they see; with others, deep models forget their input."""
    from secateur.space.inputs import example_inputs  # `reload` imports this file where there is no secateur

    inputs = example_inputs(model)
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # type: ignore[assignment]
    with contextlib.suppress(ValueError):  # one value per channel has no variance
        model(
            **{
                k: torch.randn_like(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                for k, v in inputs.items()
            }
        )
    for norm in norms:
        norm.eval()
        norm.momentum = 0.1  # type: ignore[assignment]
        mean, var = norm.running_mean, norm.running_var
        assert isinstance(mean, torch.Tensor)
        assert isinstance(var, torch.Tensor)
        var.clamp_(min=1e-3).mul_(0.7 + 0.6 * torch.rand_like(var))
        mean.add_(0.2 * var.sqrt() * torch.randn_like(mean))


# --- shrinking ---


def shrunk(name: str) -> Any:
    """The tiny config of an architecture."""
    return _config(CONFIG_MAPPING[name], EXTRA.get(name, {}), 64)


def _config(kind: Any, extra: dict[str, Any], hidden: int) -> Any:
    return kind(**_values(kind, kind(), extra, hidden))


def _values(kind: Any, default: Any, extra: dict[str, Any], hidden: int) -> dict[str, Any]:
    fields = {**vars(default)}
    aliases = dict(getattr(kind, "attribute_map", {}))
    extra = {aliases.get(k, k): v for k, v in extra.items()}
    named = (set(inspect.signature(kind.__init__).parameters) | set(fields)) - set(aliases)
    values: dict[str, Any] = {}
    layers = _layers(fields)
    for name in sorted(named):
        value = fields.get(name, _get(default, name))
        nested = extra.get(name)
        if isinstance(property_ := getattr(kind, name, None), property) and property_.fset is None:
            continue
        if hasattr(value, "to_dict"):
            part = next((size for word, size in _PARTS.items() if word in name), hidden)
            sub = _values(type(value), value, nested if isinstance(nested, dict) else {}, part)
            values[name] = type(value)(**sub)
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types") and isinstance(value, (list, tuple)):
            values[name] = _types(value, layers)
        elif isinstance(value, bool):
            continue
        elif isinstance(value, dict) and name.startswith("rope"):
            values[name] = _rope(value, hidden)
        elif value is None and name == "head_dim" and "qk_rope_head_dim" not in fields:
            values[name] = hidden // 4
        elif isinstance(value, int):
            small = _size(name, value, hidden, layers, fields)
            if small is not None:
                values[name] = small
        elif isinstance(value, (list, tuple)) and name in LISTS:
            values[name] = LISTS[name](value)
    known = {k: v for k, v in extra.items() if not (isinstance(v, dict) and hasattr(fields.get(k), "to_dict"))}
    return {**values, **known}


def _get(default: Any, name: str) -> Any:
    try:
        return getattr(default, name, None)
    except ValueError:  # attributes that each layer has in its own way
        return None


def _rope(value: dict[str, Any], hidden: int) -> dict[str, Any]:
    """Rotary parameters with sections for a small head."""
    result = {k: _rope(v, hidden) if isinstance(v, dict) else v for k, v in value.items()}
    if isinstance(value.get("mrope_section"), (list, tuple)):
        half, share = hidden // 8, len(value["mrope_section"])
        result["mrope_section"] = [half - (share - 1) * (half // (share + 1)), *[half // (share + 1)] * (share - 1)]
    return result


def _layers(fields: dict[str, Any]) -> int:
    """Three layers, so that one can go whole and parts of the others; or two of each type."""
    types = next((v for k in ("layer_types", "layers_block_type") if isinstance(v := fields.get(k), (list, tuple))), ())
    return 2 * len(set(types)) if len(set(types)) > 1 else 3


def _types(types: Any, layers: int) -> list[Any]:
    """Each type in turn, in the order of their first appearance, the last layer as it was."""
    distinct = list(dict.fromkeys(types))
    return [distinct[i % len(distinct)] for i in range(layers)]


def _size(name: str, value: int, hidden: int, layers: int, fields: dict[str, Any]) -> int | None:
    if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"):
        return layers
    if name == "head_dim":
        return _head_dim(value, hidden, fields)
    if name.endswith("_id") or name.endswith(("_token_index", "_token_ids")):
        return _special(name, value)
    if name == "num_key_value_heads" and ("kv_lora_rank" in fields or fields.get("num_attention_heads") == value > 32):
        return 4
    if name in FIELDS:
        small = FIELDS[name]
        small = small(hidden) if callable(small) else small
        return min(small, value) if value > 0 else None
    return None


def _head_dim(value: int, hidden: int, fields: dict[str, Any]) -> int:
    heads, width = fields.get("num_attention_heads"), fields.get("hidden_size")
    if "qk_rope_head_dim" in fields:
        return 8  # what the rotary tables are made for
    same = isinstance(heads, int) and isinstance(width, int) and heads * value == width
    return hidden // 4 if same or not isinstance(heads, int) else 24


@functools.lru_cache
def _special(name: str, value: int) -> int | None:
    """Token ids that lie within the small vocabulary."""
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if value < 0:
        return None
    return fixed.get(name, value if value < 3 else 200 + sum(map(ord, name)) % 97)


def flat(config: Any) -> Iterator[tuple[str, Any]]:
    """Every field of a config and of the configs inside of it."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from flat(value)
        else:
            yield name, value
