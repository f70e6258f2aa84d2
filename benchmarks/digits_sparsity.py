"""Zeros in the bundled classifier: in one shot beside NNCF, and learned while training beside one shot + fine-tuning.

One shot: 70% and 90% of all weights, accuracy on the 4,000 test images as returned and after the statistics of batch
norm are estimated anew on 50 batches of 128 training images. `--peer PYTHON` runs NNCF in its own environment
(benchmarks/peers) in the same run, and compares the masks weight by weight.

Training: 90%, 2 epochs over the 20,000 training images for every way, whatever it does with them, by the workload's
recipe (batches of 128, SGD with Nesterov momentum 0.9, weight decay 5e-4, 50 steps of warm-up, cosine to 0). Every way
has a grid of its own, the learning rate first; the setting with the smallest loss on the 2,000 calibration images is
taken (one seed, that is not among those reported), and only that one sees the test images, for three seeds.
`--resume` goes on with results/digits_sparsity.json where it ended.
"""

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, record
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.mend.batch_norm import adapt_batch_norm
from secateur.methods.iterative import iterative
from secateur.train import Cubic, Exponential, Sparsity, sparsify

Row = dict[str, Any]
NAME = "digits_sparsity"
BATCH, EPOCHS, WARM, SEEDS, TUNING_SEED = 128, 2, 50, (0, 1, 2), 100
LEVELS = (0.7, 0.9)
GLOBAL: Row = {"method": "magnitude", "scope": "global", "normalize": True}
SHOTS: dict[str, Row] = {
    "magnitude, local": {"method": "magnitude", "scope": "tensor"},
    "magnitude, global": {"method": "magnitude", "scope": "global"},
    "magnitude, global, normalised": GLOBAL,
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "alps": {"method": "alps"},
    "wanda, shares of magnitude": {"method": "wanda", "scope": "tensor", "shares": True},
    "sparsegpt, shares of magnitude": {"method": "sparsegpt", "shares": True},
    "alps, shares of magnitude": {"method": "alps", "shares": True},
}
"""One-shot methods. `shares`: each weight loses what global normalised magnitude takes from it, not the same share."""
PEERS = {"magnitude, local": "local", "magnitude, global, normalised": "global"}
"""Rows that NNCF has too, and its name for them."""


class Digits:
    """The images, and how the model is trained and measured on them."""

    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT / "examples" / "digits"))
        digits: Any = importlib.import_module("digits")
        self.trained: Callable[[], nn.Module] = digits.trained
        self.x, self.y = digits.images("train", 20_000)
        self.test, self.calib = digits.images("test", 4000), digits.images("calib", 2000)
        self.steps = len(self.x) // BATCH
        """Of one epoch; the last 32 images of its order are left out."""

    def calibration(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All calibration images, in batches."""
        return list(zip(*(torch.split(part, BATCH) for part in self.calib), strict=True))

    def adapted(self, model: nn.Module) -> nn.Module:
        """The model, its batch norms estimated anew on 50 batches of training images."""
        adapt_batch_norm(model, torch.split(self.x[: 50 * BATCH], BATCH))
        return model

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Training batches without end, in an order that the seed gives."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.x), generator=generator)
            for rows in torch.split(order[: self.steps * BATCH], BATCH):
                yield self.x[rows], self.y[rows]


@torch.no_grad()
def measured(model: nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Percent of the images that are right, and the mean loss."""
    model.eval()
    logits = torch.cat([model(x) for x in torch.split(images[0], 250)])
    right = int((logits.argmax(1) == images[1]).sum())
    return round(100 * right / len(images[1]), 2), round(float(nn.functional.cross_entropy(logits, images[1])), 4)


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where the weights of convolutions and of the linear layer are exactly zero."""
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}


def share(found: dict[str, torch.Tensor]) -> float:
    """Share of zeros."""
    return sum(int(z.sum()) for z in found.values()) / sum(z.numel() for z in found.values())


def shot(digits: Digits, level: float, options: Row) -> nn.Module:
    """The trained model, pruned in one shot."""
    dense, asked = digits.trained(), dict(options)
    if asked["method"] != "magnitude":
        asked["data"] = digits.calibration()
    if asked.pop("shares", False):
        model = secateur.prune(dense, f"sparsity={level}", **GLOBAL).model
        asked["allocation"] = {name: share({name: z}) for name, z in zeros(model).items()}
    return secateur.prune(dense, f"sparsity={level}", **asked).model


def one_shot(digits: Digits, name: str, level: float, peers: dict[str, Row], states: dict[str, Any]) -> Row:
    """A row of the first table."""
    begin = time.perf_counter()
    model = shot(digits, level, SHOTS[name])
    seconds = time.perf_counter() - begin
    gone = zeros(model)
    row: Row = {"name": name, "sparsity": level, "zeros": round(share(gone), 5), "seconds": round(seconds, 2)}
    row["returned"] = measured(model, digits.test)[0]
    row["adapted"] = measured(digits.adapted(model), digits.test)[0]
    key = f"{PEERS.get(name)}-{level}"
    if key in peers:
        theirs = {n: states[key][n] == 0 for n in gone}
        differ = sum(int((gone[n] != theirs[n]).sum()) for n in gone)
        row["peer"] = {k: peers[key][k] for k in ("accuracy_raw", "accuracy_adapted", "zeros", "versions")}
        row["peer"] |= {"zeros_that_differ": differ, "size": sum(z.numel() for z in gone.values())}
    return row


def peers_of(python: str) -> tuple[dict[str, Row], dict[str, Any]]:
    """NNCF's results and weights by level and sparsity, measured now."""
    rows: dict[str, Row] = {}
    states: dict[str, Any] = {}
    script = ROOT / "benchmarks" / "peers" / "nncf_run.py"
    with tempfile.TemporaryDirectory() as out:
        for level in PEERS.values():
            for sparsity in LEVELS:
                command = [python, str(script), out, "--level", level, "--sparsity", str(sparsity)]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                key = f"{level}-{sparsity}"
                rows[key] = json.loads(done.stdout.splitlines()[-1])
                states[key] = load_file(Path(out) / f"nncf-{key}-raw.safetensors")
                print(rows[key], flush=True)
    return rows, states


def rate(lr: float, step: int, steps: int) -> float:
    """The workload's learning rate: warm-up, then cosine."""
    return lr * min((step + 1) / WARM, 0.5 * (1 + math.cos(math.pi * step / steps)))


def started(s: Sparsity, how: str) -> None:
    """What the learned scores start from.

    `own`: what sparsify starts them from. `magnitude`: their order is that of |W| over the norm of its tensor: for
    movement that number over its mean, for gates a logit between 0 and 4.6 by the rank of it.
    """
    if how == "own":
        return
    state = s._originals  # noqa: SLF001
    with torch.no_grad():
        sizes = {name: w.detach().abs() / w.detach().norm() for name, w in state.items()}
        everything = torch.cat([size.flatten() for size in sizes.values()])
        for scores, size in zip(s.scores(), sizes.values(), strict=True):
            if s.settings.method == "rb":
                rank = torch.searchsorted(everything.sort().values, size.flatten()).view_as(size) / len(everything)
                scores.copy_(4.6 * rank)
            else:
                scores.copy_(size / everything.mean())


def masking(model: nn.Module, way: Row, steps: int) -> Sparsity:
    """Masks that move as a way asks."""
    options = {key: way[key] for key in ("scope", "normalize", "mode", "penalty", "seed") if key in way}
    method = way["method"]
    if method == "fixed":
        return sparsify(model, method="fixed")
    times = {"begin": round(way["begin"] * steps), "end": round(way["end"] * steps)}
    schedule = Exponential(**times) if method == "rb" else Cubic(**times, frequency=way.get("frequency", 1))
    return sparsify(model, None if way.get("mode") == "soft" else "sparsity=90%", method=method, schedule=schedule, **options)


def trained(digits: Digits, way: Row, seed: int) -> nn.Module:
    """A model after 2 epochs of one way.

    From the share `hold` of the steps on the masks are what they are then: folded, and held by method fixed.
    """
    steps, lr = EPOCHS * digits.steps, way["lr"]
    model = digits.trained() if "shot" not in way else shot(digits, 0.9, way["shot"])
    s = None if way["method"] == "dense" else masking(model, {**way, "seed": seed} if way["method"] == "rb" else way, steps)
    if s is not None:
        started(s, way.get("start", "own"))
    model.to(memory_format=torch.channels_last)
    scores = [] if s is None else s.scores()
    learned = {id(p) for p in scores}
    weights = [p for p in model.parameters() if id(p) not in learned]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(weights, lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    ]
    if scores and way["scores"] == "adam":
        optimizers.append(torch.optim.Adam(scores, lr=way["lr_scores"]))
    elif scores:
        optimizers.append(torch.optim.SGD(scores, lr=way["lr_scores"], momentum=0.9))
    model.train()
    hold = round(way.get("hold", 2) * steps)
    for step, (x, y) in zip(range(steps), digits.batches(seed), strict=False):
        if s is not None and step == hold:
            s.finalize()
            s, optimizers = sparsify(model, method="fixed"), optimizers[:1]
        optimizers[0].param_groups[0]["lr"] = rate(lr, step, steps)
        loss = nn.functional.cross_entropy(model(x), y) + (0 if s is None else s.loss())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        if s is not None:
            s.step()
    if s is not None:
        s.finalize()
    return model.eval()
