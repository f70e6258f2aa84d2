"""What the files of plain models share: makers of example inputs, and a few blocks that every CNN has."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]
Table = dict[Callable[[], nn.Module], Callable[[], Inputs]]
"""Constructor -> what makes its example inputs; `plain_models` names the entries."""


def floats(*shapes: tuple[int, ...]) -> Callable[[], Inputs]:
    """Positional inputs of normal noise."""

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(7)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return make


def image(size: int = 32, channels: int = 3, batch: int = 2) -> Callable[[], Inputs]:
    return floats((batch, channels, size, size))


def ids(vocabulary: int, *shapes: tuple[int, ...]) -> Callable[[], Inputs]:
    """Positional inputs of token numbers."""

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(7)
        return tuple(torch.randint(vocabulary, shape, generator=generator) for shape in shapes)

    return make


def keywords(**makers: Callable[[], Inputs]) -> Callable[[], Inputs]:
    """Keyword inputs, each the first of what its maker gives."""

    def make() -> Inputs:
        return {name: next(iter(_values(maker()))) for name, maker in makers.items()}

    return make


def joined(*makers: Callable[[], Inputs]) -> Callable[[], Inputs]:
    """Positional inputs, those of one maker after those of the other."""

    def make() -> Inputs:
        return tuple(value for maker in makers for value in _values(maker()))

    return make


def _values(inputs: Inputs) -> Iterator[Any]:
    return iter(inputs.values() if isinstance(inputs, dict) else inputs)


class ConvBN(nn.Sequential):
    """Convolution that keeps the size (but for the stride), batch norm, activation."""

    def __init__(
        self,
        i: int,
        o: int,
        k: int = 3,
        s: int = 1,
        g: int = 1,
        d: int = 1,
        act: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(nn.Conv2d(i, o, k, s, d * (k // 2), d, g, bias=False), nn.BatchNorm2d(o), act())


class SqueezeExcite(nn.Module):
    """A gate per channel from the means of all channels."""

    def __init__(self, width: int, inner: int, gate: Callable[[], nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.act = nn.Conv2d(width, inner, 1), nn.ReLU()
        self.fc2, self.gate = nn.Conv2d(inner, width, 1), gate()

    def forward(self, x: Tensor) -> Any:
        return x * self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))


class Head(nn.Sequential):
    """Global mean and a classifier."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
