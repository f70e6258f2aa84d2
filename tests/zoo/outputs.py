"""What a model returns, as a flat list of tensors."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def outputs(model: Any, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Every floating-point tensor that the forward pass returns, in order; what it draws is the same every time."""
    torch.manual_seed(0)
    return list(_tensors(model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from _tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
