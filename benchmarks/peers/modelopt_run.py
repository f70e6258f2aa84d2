"""Prune with ModelOpt, in its own environment: see README.md beside this file.

`python modelopt_run.py fastnas OUT` cuts the bundled classifier to half its MACs: FastNAS, scored by the accuracy on
the 2,000 calibration images, batch norm calibrated on 50 batches of 128 training images. `gradnas OUT` cuts heads and
FFN units of all-MiniLM-L6-v2 to 70% of the encoder's parameters (ModelOpt 0.44: later versions have no GradNAS). The
last line of stdout is one JSON object.
"""

import argparse
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from digits_task import EXAMPLE, Task, accuracy, finish, macs


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prune with ModelOpt.")
    parser.add_argument("job", choices=["fastnas", "gradnas"])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--budget", type=float, help="share of MACs (fastnas: 0.5) or encoder parameters (0.7)")
    parser.add_argument("--divisor", type=int, default=4, help="what numbers of channels or features are multiples of")
    parser.add_argument("--model", type=Path, default=Path("/work/peers/minilm"), help="of gradnas")
    parser.add_argument("--loss", default="contrastive", help="of gradnas: contrastive, direction or norm")
    parser.add_argument("--scale", type=float, default=1e4, help="of the loss, for gradnas: its threshold is absolute")
    parser.add_argument("--keep-heads", action="store_true", help="of gradnas: cut FFN units alone")
    return parser.parse_args()


def fastnas(args: argparse.Namespace) -> dict[str, Any]:
    """The classifier at half its MACs."""
    prune: Any = import_module("modelopt.torch.prune")
    task = Task()
    model = task.trained()
    config = prune.fastnas.FastNASConfig()
    config["nn.Conv2d"]["*"]["channel_divisor"] = args.divisor
    config["nn.BatchNorm2d"]["*"]["feature_divisor"] = args.divisor
    dense = macs(model)
    settings = {"data_loader": task.batches(), "collect_func": lambda batch: batch[0], "max_iter_data_loader": 50}
    settings["score_func"] = lambda found: accuracy(found, task.calib)
    constraints = {"flops": f"{100 * (args.budget or 0.5):g}%"}
    begin = time.perf_counter()
    pruned, _ = prune.prune(model, [("fastnas", config)], constraints, EXAMPLE[:1], settings)
    seconds = round(time.perf_counter() - begin, 1)
    result = {"prune_s": seconds, "divisor": args.divisor, "dense_macs": dense}
    return result | task.measured(pruned, args.out / "modelopt-fastnas.pt")


def gradnas(args: argparse.Namespace) -> dict[str, Any]:
    """The encoder at 70% of its parameters; heads in `BertAttention`, units in the first FFN layer."""
    prune: Any = import_module("modelopt.torch.prune")
    minilm: Any = import_module("minilm")
    model, tokenizer = minilm.load(args.model)
    calibration, unseen = minilm.sentences()
    dense = minilm.embed(model, tokenizer, unseen)
    whole, outside = minilm.encoder(model), sum(p.numel() for p in model.embeddings.parameters())
    batches = minilm.batches(tokenizer, calibration)
    loss = minilm.Loss(args.loss)
    config = prune.gradnas.GradNASConfig()
    config["nn.Linear"] = {"*": {"features_ratio": None, "feature_divisor": args.divisor}}
    config["nn.LayerNorm"] = {"*": None}  # the residual stream stays
    if args.keep_heads:
        config["hf.BertAttention"] = {"*": None}
    settings = {
        "data_loader": batches,
        "collect_func": lambda batch: (batch["input_ids"], batch["attention_mask"]),
        "loss_func": lambda output, batch: args.scale * loss(output.last_hidden_state, batch["attention_mask"]),
        "max_iter_data_loader": len(batches),
    }
    limit = outside + int((args.budget or 0.7) * whole)
    example = (batches[0]["input_ids"][:1], batches[0]["attention_mask"][:1])
    begin = time.perf_counter()
    pruned, _ = prune.prune(model, [("gradnas", config)], {"params": limit}, example, settings)
    seconds = round(time.perf_counter() - begin, 1)
    result: dict[str, Any] = {"prune_s": seconds, "divisor": args.divisor, "loss": args.loss, "scale": args.scale}
    result |= {"keep_heads": args.keep_heads} | minilm.measured(pruned, tokenizer, unseen, dense, whole)
    name = f"modelopt-gradnas-{args.loss}-{args.divisor}-{args.scale:g}{'-ffn' if args.keep_heads else ''}.pt"
    torch.save(pruned, args.out / name)
    return result | {"saved": str(args.out / name)}


def main() -> None:
    """Prune, measure, save, and print one line."""
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    job = {"fastnas": fastnas, "gradnas": gradnas}[args.job]
    packages = ["torch", "nvidia-modelopt", *(["transformers"] if args.job == "gradnas" else [])]
    finish({"peer": "modelopt", "method": args.job} | job(args), *packages)


if __name__ == "__main__":
    main()
