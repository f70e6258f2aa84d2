"""The bundled classifier, and how a pruned one is measured: the same for every peer, and nothing of Secateur."""

import copy
import json
import math
import platform
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
EXAMPLE = torch.zeros(2, 1, 24, 24)
BATCHES, BATCH, EPOCHS, WARM = 50, 128, 2, 50
"""Batches of training images for batch norm and their size; of fine-tuning, the epochs and the steps of warm-up."""
STEPS = EPOCHS * (20_000 // BATCH)


class Task:
    """The images, the trained model, and the measurements."""

    def __init__(self) -> None:
        sys.path.insert(0, str(DIGITS))
        self.digits: Any = import_module("digits")
        self.x, self.y = self.digits.images("train", 20_000)
        self.calib: tuple[torch.Tensor, torch.Tensor] = self.digits.images("calib", 2000)
        self.test: tuple[torch.Tensor, torch.Tensor] = self.digits.images("test", 4000)

    def trained(self) -> nn.Module:
        """The dense model, in evaluation mode."""
        model: nn.Module = self.digits.trained()
        return model

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """50 batches of 128 training images: for batch norm."""
        count = BATCHES * BATCH
        return list(zip(torch.split(self.x[:count], BATCH), torch.split(self.y[:count], BATCH), strict=True))

    @torch.no_grad()
    def estimate(self, model: nn.Module) -> nn.Module:
        """A copy whose statistics of batch norm are the plain mean over these batches."""
        model = copy.deepcopy(model).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        for x, _ in self.batches():
            model(x)
        return model.eval()

    def finetune(self, model: nn.Module, lr: float = 0.02, seed: int = 0) -> nn.Module:
        """A copy after 2 epochs: SGD with Nesterov momentum 0.9, weight decay 5e-4, 50 steps of warm-up, cosine."""
        model = copy.deepcopy(model).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        generator = torch.Generator().manual_seed(seed)
        step = 0
        for _ in range(EPOCHS):
            order = torch.randperm(len(self.x), generator=generator)
            for rows in torch.split(order[: STEPS // EPOCHS * BATCH], BATCH):
                warm = min((step + 1) / WARM, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
                optimizer.param_groups[0]["lr"] = lr * warm
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(self.x[rows]), self.y[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
        return model.eval()

    def measured(self, model: nn.Module, path: Path) -> dict[str, Any]:
        """Save the model as returned, and measure it: as returned, batch norm estimated again, fine-tuned."""
        model.eval()
        torch.save(model, path)
        result: dict[str, Any] = {"params": sum(p.numel() for p in model.parameters()), "macs": macs(model)}
        result["accuracy_returned"] = accuracy(model, self.test)
        result["accuracy_estimated"] = accuracy(self.estimate(model), self.test)
        begin = time.perf_counter()
        result["accuracy_finetuned"] = accuracy(self.finetune(model), self.test)
        return result | {"finetune_s": round(time.perf_counter() - begin, 1), "saved": str(path)}


@torch.no_grad()
def accuracy(model: nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Percent of the images that are right."""
    model.eval()
    pairs = zip(torch.split(images[0], 250), torch.split(images[1], 250), strict=True)
    return round(100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(images[1]), 2)


@torch.no_grad()
def macs(model: nn.Module) -> int:
    """Multiply-accumulates of the convolutions and the linear layers for one image, counted in a forward pass."""
    total = 0

    def count(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)  # noqa: S101
        total += output[0].numel() * weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model.eval()
    model(EXAMPLE[:1])
    for hook in hooks:
        hook.remove()
    return total


def finish(result: dict[str, Any], *packages: str) -> None:
    """Print the last line: the result with the versions."""
    result["threads"] = torch.get_num_threads()
    result["versions"] = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    print(json.dumps(result), flush=True)
