"""Prune the bundled classifier with NNCF, in its own environment: see README.md beside this file.

`python nncf_run.py OUT_DIR --level local|global --sparsity 0.7` masks by magnitude, then adapts batch norm on 50
batches of 128 training images. `--method rb --sparsity 0.9` learns masks with the weights in 2 epochs over the training
images. State dicts are saved under the plain model's keys, and the last line of stdout is one JSON object.
"""

# ruff: noqa: E402  (the clock starts before the imports)
import time

BEGIN = time.perf_counter()

import argparse
import json
import os
import platform
import resource
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("NNCF_CI", "1")  # before nncf is imported: no telemetry

import nncf
import torch
from nncf.torch.function_hook.pruning.rb.losses import RBLoss
from nncf.torch.function_hook.pruning.rb.schedulers import ExponentialRBPruningScheduler
from safetensors.torch import save_file
from torch import nn

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
EXAMPLE = torch.zeros(2, 1, 24, 24)
BATCHES, BATCH = 50, 128
"""Batches of training images for batch norm, and their size."""


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prune the bundled classifier with NNCF.")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--method", choices=["magnitude", "rb"], default="magnitude")
    parser.add_argument("--level", choices=["local", "global"], default="global", help="of magnitude")
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--epochs", type=int, default=2, help="of rb")
    parser.add_argument("--lr", type=float, default=0.05, help="of the weights, for rb")
    parser.add_argument("--mask-lr", type=float, default=0.2, help="of the mask logits, for rb")
    parser.add_argument("--ramp", type=float, default=0.5, help="share of the steps until the target is asked, for rb")
    parser.add_argument("--seed", type=int, default=0, help="of the masks' noise and the order of the images, for rb")
    parser.add_argument("--p", type=float, default=0.05, help="of RBLoss")
    return parser.parse_args()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent of the images that are right."""
    model.eval()
    right = sum(
        int((model(a).argmax(1) == b).sum()) for a, b in zip(torch.split(x, 250), torch.split(y, 250), strict=True)
    )
    return round(100 * right / len(y), 2)


def adapt(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Batch norm adapted by NNCF over batches of images; what it returns is in evaluation mode."""
    data = nncf.Dataset(list(torch.split(x[: BATCHES * BATCH], BATCH)))
    adapted: nn.Module = nncf.batch_norm_adaptation(model, calibration_dataset=data, num_iterations=BATCHES)
    return adapted.eval()


def keep(model: nn.Module, plain: nn.Module, path: Path) -> float:
    """Strip a copy, save it under the plain model's keys, and return the share of zeros in its weight tensors."""
    stripped: nn.Module = nncf.strip(model, do_copy=True, strip_format=nncf.StripFormat.IN_PLACE)
    found = stripped.state_dict()
    state: dict[str, torch.Tensor] = {name: found[name].detach().clone().contiguous() for name in plain.state_dict()}
    save_file(state, path)
    weights = [tensor for tensor in state.values() if tensor.ndim > 1]
    return round(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights), 5)


def magnitude(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Masks by magnitude, in each tensor or over all of them (global: magnitudes over the tensor's norm)."""
    modes = {"local": "UNSTRUCTURED_MAGNITUDE_LOCAL", "global": "UNSTRUCTURED_MAGNITUDE_GLOBAL"}
    mode = nncf.PruneMode[modes[args.level]]
    pruned: nn.Module = nncf.prune(model, mode=mode, ratio=args.sparsity, examples_inputs=EXAMPLE)
    return pruned


def learned(model: nn.Module, args: argparse.Namespace, x: torch.Tensor, y: torch.Tensor) -> tuple[nn.Module, Any]:
    """Masks learned with the weights under NNCF's L0 regulariser, its exponential schedule stepped at every batch.

    The logits start at 4.6 and the gradient of the regulariser is spread over all of them: at the weights' rate and
    with SGD none would cross zero in a few hundred steps, so they get Adam and a rate of their own.
    """
    mode = nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED
    pruned: nn.Module = nncf.prune(model, mode=mode, examples_inputs=EXAMPLE)
    masks = [p for name, p in pruned.named_parameters() if name.endswith(".mask")]
    weights = [p for name, p in pruned.named_parameters() if not name.endswith(".mask")]
    loss = RBLoss(pruned, target_ratio=args.sparsity, p=args.p)
    steps = args.epochs * -(-len(x) // BATCH)
    ramp = max(1, round(args.ramp * steps))
    scheduler = ExponentialRBPruningScheduler(loss, initial_ratio=0.0, target_ratio=args.sparsity, target_epoch=ramp)
    sgd = torch.optim.SGD(weights, lr=args.lr, momentum=0.9, weight_decay=1e-4)
    adam = torch.optim.Adam(masks, lr=args.mask_lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    for _ in range(args.epochs):
        pruned.train()
        for rows in torch.split(torch.randperm(len(x)), BATCH):
            scheduler.step()
            total = nn.functional.cross_entropy(pruned(x[rows]), y[rows]) + loss()
            sgd.zero_grad()
            adam.zero_grad()
            total.backward()
            sgd.step()
            adam.step()
            cosine.step()
    settings = {"epochs": args.epochs, "batch": BATCH, "weights": f"SGD lr {args.lr} cosine, momentum 0.9, decay 1e-4"}
    settings |= {"masks": f"Adam lr {args.mask_lr}", "p": args.p, "initial_ratio": 0.0, "seed": args.seed}
    settings |= {"scheduler": f"exponential, every batch, target at step {ramp} of {steps}"}
    return pruned.eval(), settings


def main() -> None:
    """Prune, adapt, save, and print one line."""
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(DIGITS))
    digits: Any = import_module("digits")
    torch.manual_seed(args.seed)
    (x, y), (test_x, test_y) = digits.images("train", 20_000), digits.images("test", 4000)
    plain = digits.trained()
    result: dict[str, Any] = {"peer": "nncf", "method": args.method, "sparsity": args.sparsity}
    begin = time.perf_counter()
    if args.method == "rb":
        pruned, result["settings"] = learned(digits.trained(), args, x, y)
    else:
        pruned, result["level"] = magnitude(digits.trained(), args), args.level
    result["prune_s"] = round(time.perf_counter() - begin, 2)
    name = f"nncf-{'rb' if args.method == 'rb' else args.level}-{args.sparsity}"
    keep(pruned, plain, args.out / f"{name}-raw.safetensors")
    result["accuracy_raw"] = accuracy(pruned, test_x, test_y)
    begin = time.perf_counter()
    pruned = adapt(pruned, x)
    result["adapt_s"] = round(time.perf_counter() - begin, 2)
    result["accuracy_adapted"] = accuracy(pruned, test_x, test_y)
    result["zeros"] = keep(pruned, plain, args.out / f"{name}.safetensors")
    result |= {"total_s": round(time.perf_counter() - BEGIN, 2), "threads": torch.get_num_threads()}
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    result["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    result["peak_rss_own_mb"] = round(int(own.split()[1]) / 1024, 1)
    result["versions"] = {"python": platform.python_version(), "torch": version("torch"), "nncf": version("nncf")}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
