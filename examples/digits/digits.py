"""A small image classifier: read two handwritten digits in a cluttered 24x24 image (100 classes), with a ResNet-20."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
SIDE = 24
Array = npt.NDArray[Any]
Split = tuple[torch.Tensor, torch.Tensor]
"""Images float32 [N, 1, 24, 24] and classes int64 [N]."""


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.down(x))


class ResNet(nn.Module):
    """Three stages of three blocks."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), blocks: int = 3, classes: int = 100) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        layers, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(Block(inputs, width, 2 if stage and block == 0 else 1))
                inputs = width
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 1, 24, 24] -> logits [N, 100]."""
        x = self.layers(functional.relu(self.bn(self.conv(x))))
        result: torch.Tensor = self.fc(x.mean((2, 3)))
        return result


def make_model() -> ResNet:
    """The model, untrained."""
    return ResNet()


def trained() -> ResNet:
    """The model with its weights (`model.safetensors`), in evaluation mode: 89.6% of the test images."""
    model = make_model()
    model.load_state_dict(load_file(HERE / "model.safetensors"))
    return model.eval()


def images(split: str, count: int) -> Split:
    """The first images of a split: train, calib or test. Scans behind the test images appear in no other split."""
    stored = load_file(HERE / "scans.safetensors")
    scans, labels = stored["images"].float().numpy() / np.float32(16), stored["labels"].long().numpy()
    order = np.random.default_rng(0).permutation(len(scans))
    chosen = order[1257:] if split == "test" else order[:1257]
    whole, seed = {"train": (20000, 1), "calib": (2000, 2), "test": (4000, 3)}[split]
    x, y = _render(scans[chosen], labels[chosen], whole, seed)
    return x[:count], y[:count]


def calibration() -> Iterator[Split]:
    """2 batches of 128 for calibration."""
    x, y = images("calib", 256)
    return zip(torch.split(x, 128), torch.split(y, 128), strict=True)


def held_out() -> Iterator[Split]:
    """4 batches of 250 to measure on."""
    x, y = images("test", 1000)
    return zip(torch.split(x, 250), torch.split(y, 250), strict=True)


def _render(scans: Array, labels: Array, n: int, seed: int) -> Split:
    """Paste two digits, pieces of others and noise."""
    rng = np.random.default_rng(seed)

    def pick() -> Array:
        return rng.integers(0, len(scans), n)

    def between(low: float, high: float) -> Array:
        return rng.uniform(low, high, n)

    def ink(low: float, high: float) -> torch.Tensor:
        return torch.as_tensor(between(low, high)).float().view(-1, 1, 1, 1)

    left, right = pick(), pick()
    image = torch.zeros(n, 1, SIDE, SIDE)
    for index, low in ((left, 5.5), (right, 14.0)):
        shade = ink(0.6, 1.0)
        where = (between(9, 14), between(low, low + 4), between(6.5, 16.5), between(-0.35, 0.35))
        image = torch.maximum(image, shade * _paste(scans[index], *where))
    for _ in range(4):
        part = scans[pick()].copy()
        part[:, :, 3:] = 0
        shade = ink(0.2, 0.6)
        where = (between(8, 16), between(0, SIDE - 1), between(0, SIDE - 1), between(-3.14, 3.14))
        image = torch.maximum(image, shade * _paste(part, *where))
    image += 0.12 * torch.as_tensor(rng.standard_normal((n, 1, SIDE, SIDE))).float()
    return (image - 0.15) / 0.27, torch.as_tensor(labels[left] * 10 + labels[right])


def _paste(scans: Array, side: Array, cx: Array, cy: Array, angle: Array) -> torch.Tensor:
    """Render 8x8 scans on canvases: side and centre in pixels, angle in radians."""
    scale = torch.as_tensor(SIDE / side)
    cos, sin = torch.as_tensor(np.cos(angle)), torch.as_tensor(np.sin(angle))
    tx, ty = torch.as_tensor(2 * (cx + 0.5) / SIDE - 1), torch.as_tensor(2 * (cy + 0.5) / SIDE - 1)
    row0 = torch.stack([scale * cos, scale * sin, -scale * (cos * tx + sin * ty)], 1)
    row1 = torch.stack([-scale * sin, scale * cos, -scale * (-sin * tx + cos * ty)], 1)
    theta = torch.stack([row0, row1], 1).float()
    grid = functional.affine_grid(theta, [len(scans), 1, SIDE, SIDE], align_corners=False)
    return functional.grid_sample(torch.as_tensor(scans).float()[:, None], grid, align_corners=False)
