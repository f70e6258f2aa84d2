"""What `iterative-cnn.yaml` trains with, adapts on and decides by: functions for the bundled digits classifier.

Quick on purpose, 64 batches for a step: it shows how a recipe is made, not all that can be won.
"""

import functools
import importlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import secateur

digits: Any = importlib.import_module("examples.digits.digits")
_images = functools.cache(digits.images)  # to render them takes longer than to train on them


def train(model: nn.Module, epochs: int) -> None:
    """Fine-tune on 4096 of the training images, in place."""
    x, y = _images("train", 4096)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)  # every step is a new model
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(64):  # type: ignore[no-untyped-call]  # drawn by the recipe's seed
            optimizer.zero_grad()
            loss: Any = functional.cross_entropy(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """8 batches of 128 images of the calibration split."""
    x, y = _images("calib", 1024)
    return list(zip(torch.split(x, 128), torch.split(y, 128), strict=True))


def accuracy(model: nn.Module) -> float:
    """Share of the other images of that split that are classified right: the test images stay unseen until the end."""
    x, y = _images("calib", 2000)
    return secateur.evaluate(model, [(x[1024:], y[1024:])])["accuracy"]


def training() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """64 batches of 64 training images."""
    x, y = _images("train", 4096)
    return list(zip(torch.split(x, 64), torch.split(y, 64), strict=True))


def few() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """2 batches of 32 images of the calibration split: for a first try."""
    return [(x[:32], y[:32]) for x, y in batches()[:2]]
