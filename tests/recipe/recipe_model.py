"""A user's own network, data and functions, as a module in a folder of its own, for tests of recipes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "own_pipeline"
OWN = '''
"""A network, data, a loss and a metric."""

import torch
from torch import nn
from torch.nn import functional

calls = []


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.mid, self.fc = nn.Conv2d(12, 20, 3), nn.Linear(20, 4)

    def forward(self, x):
        x = self.mid(functional.relu(self.bn(self.conv(x))))
        return self.fc(functional.relu(x).mean((2, 3)))


def net():
    torch.manual_seed(7)
    return Net()


def rows(seed, count):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        y = torch.randint(4, (8,), generator=generator)
        yield torch.randn(8, 3, 6, 6, generator=generator) + y.float().view(-1, 1, 1, 1), y


def batches():
    calls.append("batches")
    return list(rows(1, 6))


def held_out():
    return list(rows(2, 3))


def loss(model, batch):
    calls.append("loss")
    return functional.cross_entropy(model(batch[0]), batch[1]) * 0.5


def size(model):
    return sum(float(p.detach().abs().sum()) for p in model.parameters())
'''
HEAD: dict[str, Any] = {
    "model": f"{NAME}:net", "out": "small", "inputs": {"shape": [[2, 3, 6, 6]]}, "data": f"{NAME}:batches",
    "eval_data": f"{NAME}:held_out", "seed": 3,
}  # fmt: skip
PRUNE: dict[str, Any] = {"prune": {"method": "structural", "budget": "params=70%"}}
DISTILL: dict[str, Any] = {"distill": {"steps": 6, "lr": 0.01, "eval_every": 2}}
FINETUNE: dict[str, Any] = {"finetune": {"steps": 4, "lr": 0.01, "eval_every": 2}}


def mapping(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe for the network, of these steps."""
    return {**HEAD, **more, "steps": list(steps)}


@contextmanager
def module_in(folder: Path, monkeypatch: Any) -> Iterator[Any]:
    """The module in a folder in which the user stands."""
    (folder / f"{NAME}.py").write_text(OWN)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    sys.modules.pop(NAME, None)
    yield folder
    sys.modules.pop(NAME, None)
