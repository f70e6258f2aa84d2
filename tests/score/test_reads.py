"""Activations where units are read, against hooks by hand and against Minitron's scores."""

from typing import Any

import pytest
import torch
from small_nets import Residual, pairs, pictures, shaken
from tiny import tiny, tokens
from torch import nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.score.activation import activation_scores
from secateur.score.reads import activation
from secateur.space import discover


def test_convolutions_and_linear_layers() -> None:
    net = shaken(Residual())
    space = discover(net, pictures())
    found = activation(net, space, pairs())
    x = torch.cat([x for x, _ in pairs()])
    with torch.no_grad():
        stream = functional.relu(net.bn(net.conv(x)))
        inner = functional.relu(net.bn1(net.first(stream)))
        pooled = (stream + net.bn2(net.second(inner))).mean((2, 3))

    def r(seen: torch.Tensor) -> torch.Tensor:
        return seen.abs().mean((2, 3)).square().sum(0).sqrt() if seen.dim() == 4 else seen.square().sum(0).sqrt()

    by_size = {axis.size: found[axis.name] for axis in space.axes}
    torch.testing.assert_close(by_size[6], r(inner))
    torch.testing.assert_close(by_size[8], (r(stream) + r(pooled)) / 2)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_the_reduction_is_that_of_minitron() -> None:
    model: Any = tiny("llama", dtype=torch.float32)
    space = discover(model)
    axes = [*space.of_kind("ffn"), *space.of_kind("heads")]
    ours, theirs = activation(model, space, [tokens(3, 7)], axes), activation_scores(model, space, [tokens(3, 7)])
    for axis in axes:
        torch.testing.assert_close(ours[axis.name], theirs.axes[axis.name])


class Product(nn.Module):
    """Its middle is read by a matrix product with a parameter, not by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.matrix = nn.Linear(4, 10), nn.Parameter(torch.randn(10, 3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.up(x).relu() @ self.matrix


def test_what_cannot_be_seen_is_named() -> None:
    net = Product()
    space = discover(net, torch.zeros(2, 4))
    with pytest.raises(SecateurError, match=rf"activation: {space.axes[0].name} is read by .*magnitude_l2 or taylor"):
        activation(net, space, [torch.zeros(2, 4)])
    with pytest.raises(SecateurError, match="no calibration batch"):
        activation(net, space, [])
