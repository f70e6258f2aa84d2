"""A pruned model: the stock class, built in its dense sizes and then cut to the recorded structure.

Secateur writes this file beside weights that no stock config can describe: layers of different sizes, attention or
MLP sub-layers that are gone, sizes that the config class rejects. It needs torch and transformers alone. What was cut
stands in config.json under "secateur"; the sizes there are those of the pruned model. Load the folder with::

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

NOT_STOCK = "this_model_needs_trust_remote_code.safetensors"
"""Named as the weight file in config.json: a stock class that is made to read that config finds no weights."""


class RemovedSublayer(nn.Module):
    """Stands in for a dropped attention or MLP: adds nothing to the residual stream, has no parameters.

    A dropped attention still counts positions in the KV cache, with one head of one number (an empty one counts as no
    position): models ask their first layer how long the past is.
    """

    # What nn.TransformerEncoderLayer asks its attention before it takes a fused path: this one has none.
    batch_first = False
    in_proj_bias = None
    num_heads = 1
    _qkv_same_embed_dim = False

    def __init__(self, output: Any, layer_idx: int | None = None) -> None:
        """Remember the structure of the output: "tensor" becomes zeros like the input, None stays None."""
        super().__init__()
        self.output = output
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the input's shape, where the sub-layer's own result stood."""
        cache = next((x for x in (*args, *kwargs.values()) if hasattr(x, "get_seq_length")), None)
        if cache is not None and self.layer_idx is not None:
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)
        return _zeros(self.output, hidden_states)


def _zeros(output: Any, like: torch.Tensor) -> Any:
    if isinstance(output, tuple | list):
        return type(output)(_zeros(part, like) for part in output)
    if isinstance(output, dict):
        return {key: _zeros(part, like) for key, part in output.items()}
    return None if output is None else torch.zeros_like(like)


class Idle(nn.Module):
    """Stands in for a norm that has nothing left to normalise; code may still ask its weight for a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0), persistent=False)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The input, as it is."""
        return hidden_states


class SizedAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose heads need not add up to the size of its input; parameters have the same names."""

    @classmethod
    def of(cls, dense: nn.MultiheadAttention) -> "SizedAttention":
        """The same attention, with the same parameters."""
        new = cls.__new__(cls)
        vars(new).update(vars(dense))
        new._sized()
        return new

    def _sized(self) -> None:
        if self.bias_k is not None or self.bias_v is not None or self.add_zero_attn:
            raise ValueError("nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be cut")
        self.scale = self.head_dim**-0.5  # as in the dense model, however many of its dimensions are left
        self._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer from its fused path

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As nn.MultiheadAttention, but for sizes: those of the weights."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = list(self.in_proj_weight.chunk(3))
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (
            torch.unflatten(nn.functional.linear(x, w, b), -1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in inputs
        )
        mask = self._mask(query, key, key_padding_mask, attn_mask, is_causal)
        scores = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scale
            scores = (scores if mask is None else scores + mask).softmax(-1)
            mixed = nn.functional.dropout(scores, self.dropout, self.training) @ v
            scores = scores.mean(1) if average_attn_weights else scores
        else:
            drop = self.dropout if self.training else 0.0
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask, drop, scale=self.scale)
        result = self.out_proj(mixed.transpose(1, 2).flatten(2))
        result = result if self.batch_first else result.transpose(0, 1)
        if batched:
            return result, scores
        return result.squeeze(0 if self.batch_first else 1), None if scores is None else scores.squeeze(0)

    def _mask(
        self, query: torch.Tensor, key: torch.Tensor, padding: Any, mask: Any, is_causal: bool
    ) -> torch.Tensor | None:
        """What is added to the scores, [batch or 1, heads or 1, queries, keys]; None for nothing."""
        if is_causal and mask is None:
            mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).triu(1)
        total = None
        for part, shape in ((mask, None), (padding, (key.shape[0], 1, 1, key.shape[1]))):
            if part is None:
                continue
            added = part
            if part.dtype == torch.bool:
                added = torch.zeros_like(part, dtype=query.dtype).masked_fill(part, -torch.inf)
            if shape is not None:
                added = added.reshape(shape)
            elif added.dim() == 3:
                added = torch.unflatten(added, 0, (-1, self.num_heads)) if added.shape[0] != 1 else added.unsqueeze(0)
            total = added if total is None else total + added
        return total


def decode(value: Any) -> Any:
    """A value out of JSON: tuples, mappings and infinities are marked by a mapping with one key."""
    if isinstance(value, list):
        return [decode(entry) for entry in value]
    if isinstance(value, dict):
        ((mark, content),) = value.items()
        if mark == "tuple":
            return tuple(decode(entry) for entry in content)
        return float(content) if mark == "float" else {key: decode(entry) for key, entry in content.items()}
    return value


# --- taking the structure away ---


def replay(model: nn.Module, structure: Mapping[str, Any]) -> list[tuple[Any, str, Any]]:
    """Cut a dense model, in place, to a recorded structure; tied parameters stay tied.

    Args:
        model: as its class or constructor builds it.
        structure: "layers" (path of a list of modules -> numbers of those that stay), "modules" (path -> what stands
            there now), "tensors" (name -> size of each dimension, None where it stays), "attributes" (path of a
            module -> values) and "configs" (path of a config that is not the model's own -> values).

    Returns:
        (object, attribute, value in the dense model) for all values that were set.
    """
    for path, numbers in structure.get("layers", {}).items():
        layers = model.get_submodule(path)._modules
        kept = [list(layers.values())[number] for number in numbers]
        layers.clear()
        layers.update({str(index): layer for index, layer in enumerate(kept)})
    for path, now in structure.get("modules", {}).items():
        owner, name = _owner(model, path)
        if now == "absent":
            del owner._modules[name]
        else:
            owner._modules[name] = _stand_in(now, owner._modules[name])
    _resize(model, structure.get("tensors", {}))
    for name in structure.get("stored", []):
        owner, leaf = _owner(model, name)
        owner._non_persistent_buffers_set.discard(leaf)
    before: list[tuple[Any, str, Any]] = []
    for path, values in structure.get("attributes", {}).items():
        _assign(model.get_submodule(path), values, before)
    for path, values in structure.get("configs", {}).items():
        owner, name = _owner(model, path)
        _assign(getattr(owner, name), values, before)
    return before


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _stand_in(now: Any, old: Any) -> nn.Module | None:
    """What stands in the place of a dense module."""
    if now is None:
        return None
    if now == "identity":
        return nn.Identity()
    if now == "idle":
        return Idle()
    if now == "sized attention":
        return SizedAttention.of(old)
    return RemovedSublayer(decode(now["output"]), now["layer_idx"])


def _resize(model: nn.Module, tensors: Mapping[str, Any]) -> None:
    resized: dict[int, Any] = {}
    before = []  # kept alive, so that no id is given twice
    for name, sizes in tensors.items():
        owner, leaf = _owner(model, name)
        old = getattr(owner, leaf, None)
        if id(old) not in resized or old is None:
            resized[id(old)] = _resized(old, sizes, buffer=leaf in owner._buffers)
            before.append(old)
        if leaf in owner._buffers or leaf in owner._parameters:
            setattr(owner, leaf, resized[id(old)])
        else:
            owner.register_parameter(leaf, resized[id(old)])


@torch.no_grad()
def _resized(old: torch.Tensor | None, sizes: Sequence[int | None] | None, *, buffer: bool) -> torch.Tensor | None:
    """A tensor of other sizes with the first values of the old one; its real values come from the weight files."""
    if sizes is None:
        return None
    if old is None:
        new = torch.zeros([int(n or 0) for n in sizes])
    else:
        new = old.detach().new_zeros([old.shape[dim] if n is None else n for dim, n in enumerate(sizes)])
        common = tuple(slice(min(a, b)) for a, b in zip(old.shape, new.shape, strict=False))
        if old.dim() == new.dim():
            new[common] = old.detach()[common]
    return new if buffer else nn.Parameter(new, old is None or old.requires_grad)


def _assign(target: Any, values: Mapping[str, Any], before: list[tuple[Any, str, Any]]) -> None:
    for name, value in values.items():
        if hasattr(target, name):
            before.append((target, name, getattr(target, name)))
        setattr(target, name, decode(value))


@contextlib.contextmanager
def _for_now(values: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes for the length of a block."""
    after = [(target, name, getattr(target, name)) for target, name, _ in values]
    try:
        for target, name, value in values:
            setattr(target, name, value)
        yield
    finally:
        for target, name, value in after:
            setattr(target, name, value)


# --- the classes ---


class CutConfig:
    """The stock config with the sizes of the pruned model, whether or not the stock class would accept them."""

    secateur: Mapping[str, Any] | None = None

    def __init__(self, secateur: Mapping[str, Any] | None = None, **values: Any) -> None:
        """Build the config of the dense model, and then set what the cut changed."""
        values = copy.deepcopy(values)
        values.pop("transformers_weights", None)
        cut = {}
        for path, dense in (secateur or {}).get("config", {}).items():
            *outer, name = path.split(".")
            part: Any = values
            for key in outer:
                part = part.get(key, {})
            if name in part:
                cut[path], part[name] = part[name], dense
        super().__init__(**values)
        self.secateur = secateur
        for path, value in cut.items():
            setattr(*self._place(path), value)

    def _place(self, path: str) -> tuple[Any, str]:
        *outer, name = path.split(".")
        part: Any = self
        for key in outer:
            part = getattr(part, key)
        return part, name

    def dense(self) -> contextlib.AbstractContextManager[None]:
        """The sizes of the dense model, for the length of a block."""
        changed = (self.secateur or {}).get("config", {})
        return _for_now([(*self._place(path), copy.deepcopy(value)) for path, value in changed.items()])

    def validate(self) -> None:
        """The rules of the stock class speak of the dense sizes."""
        with self.dense():
            super().validate()  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """The stock class' values, with a note that keeps stock model classes away from the weights."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**values, "transformers_weights": NOT_STOCK}


class CutModel(nn.Module):
    """The stock model without what was cut."""

    is_secateur_model = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the dense model, without values where transformers loads it, and cut it."""
        self._dense_values: list[tuple[Any, str, Any]]
        with config.dense():
            super().__init__(config, *args, **kwargs)
        self._dense_values = replay(self, config.secateur or {})
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        names |= {name for name, _ in self.named_buffers(remove_duplicate=False)}
        ties: dict[str, str] = self.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
        self.all_tied_weights_keys = {a: b for a, b in ties.items() if {a, b} <= names}
        self._keys_to_ignore_on_save: set[str] = set()  # position tables that stock models compute from the dense sizes

    def initialize_weights(self) -> None:
        """Fill what no weight file holds, such as rotary tables, as in the dense model: they follow its sizes."""
        config: Any = self.config
        with config.dense(), _for_now(getattr(self, "_dense_values", [])):
            super().initialize_weights()  # type: ignore[misc]
