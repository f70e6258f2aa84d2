"""Small networks that are no Hugging Face models, with their inputs and labelled batches."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Residual(nn.Module):
    """A stream of 8 channels (conv, twice normalised), 6 inside the block, and a head of 5 classes."""

    def __init__(self, stream: int = 8, inside: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, stream, 3, padding=1), nn.BatchNorm2d(stream)
        self.first, self.bn1 = nn.Conv2d(stream, inside, 3, padding=1, bias=False), nn.BatchNorm2d(inside)
        self.second, self.bn2 = nn.Conv2d(inside, stream, 3, padding=1, bias=False), nn.BatchNorm2d(stream)
        self.fc = nn.Linear(stream, classes)

    def forward(self, x: torch.Tensor) -> Any:
        x = functional.relu(self.bn(self.conv(x)))
        inner = functional.relu(self.bn1(self.first(x)))
        return self.fc((x + self.bn2(self.second(inner))).mean((2, 3)))


class Mlp(nn.Module):
    """Two hidden layers without a norm."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(4, width), nn.Linear(width, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))


class Mobile(nn.Module):
    """Depthwise and grouped convolutions, a group norm, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.depth, self.point = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 16, 1)
        self.grouped, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.GroupNorm(4, 16)
        self.fc = nn.Linear(16 * 4, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = functional.relu(self.point(self.depth(functional.relu(self.stem(x)))))
        x = functional.relu(self.norm(self.grouped(x)))
        return self.fc(functional.adaptive_avg_pool2d(x, 2).flatten(1))


def shaken(model: nn.Module, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """In evaluation mode, with every parameter and running statistic away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith(("mean", "var")):
                buffer.add_(0.2 * torch.rand(buffer.shape, generator=generator))
    return model.to(dtype).eval()


def pictures(batch: int = 2, size: int = 6, seed: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise [batch, 3, size, size]."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pairs(
    sizes: tuple[int, ...] = (3, 2), classes: int = 5, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Labelled pictures, in batches of these sizes."""
    x = pictures(sum(sizes), dtype=dtype)
    y = torch.randint(classes, (sum(sizes),), generator=torch.Generator().manual_seed(4))
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))  # type: ignore[no-untyped-call]
