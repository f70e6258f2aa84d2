"""Structural pruning of the bundled classifier to half its MACs: every criterion with every scope, beside the peers.

Accuracy on 4,000 test images as returned, and after the statistics of batch norm are estimated anew on 50 batches of
128 training images; nothing is trained. Peers' figures: the same model, data and budget, measured once with
torch-pruning 1.6.1 and nvidia-modelopt 0.47 (torch 2.13, CPU, one seed).
"""

import importlib
import sys
import time
from typing import Any

import torch
from common import ROOT, record
from torch import nn

import secateur
from secateur.mend.batch_norm import adapt_batch_norm
from secateur.methods.structural import FROM_DATA, FROM_WEIGHTS, SCOPES
from secateur.methods.verbs import decide

EXAMPLE = torch.zeros(2, 1, 24, 24)
INSIDE = ["layers.[0-9].channels"]
"""The channels inside blocks; the streams stay whole."""
PEERS = [
    ("ModelOpt FastNAS, divisor 4 (540 s)", 2.843e6, 31.3, 46.0),
    ("Torch-Pruning magnitude, global", 2.79e6, 3.2, 42.4),
    ("Torch-Pruning magnitude, progressive", 2.83e6, 2.7, 39.9),
    ("Torch-Pruning magnitude, uniform", 2.74e6, 3.6, 43.7),
    ("Torch-Pruning Taylor, global", 2.84e6, 3.8, 43.2),
    ("Torch-Pruning Taylor, progressive", 2.84e6, 1.1, 5.6),
    ("Torch-Pruning Taylor, uniform", 2.74e6, 2.8, 30.1),
]


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent of the images that are right."""
    batches = list(zip(torch.split(x, 250), torch.split(y, 250), strict=True))
    return 100 * secateur.evaluate(model, batches)["accuracy"]


def main() -> None:
    """Run all, and keep results/structural.json and .md."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    digits: Any = importlib.import_module("digits")
    dense, calibration = digits.trained(), list(digits.calibration())
    (x, y), train = digits.images("test", 4000), torch.split(digits.images("train", 50 * 128)[0], 128)
    rows = []
    for criterion in (*FROM_WEIGHTS, *FROM_DATA):
        for scope in (*SCOPES, "global, streams whole"):
            only: dict[str, Any] = {"only": INSIDE} if "," in scope else {}
            begin = time.perf_counter()
            decision = decide(
                dense, "macs=50%", method="structural", data=calibration, inputs=EXAMPLE, criterion=criterion,
                scope=scope.partition(",")[0], **only,
            )  # fmt: skip
            pruned = secateur.apply(dense, decision.plan, space=decision.space, inputs=EXAMPLE)
            seconds = time.perf_counter() - begin
            returned = accuracy(pruned, x, y)
            adapt_batch_norm(pruned, train)
            params = sum(p.numel() for p in pruned.parameters())
            row = {"criterion": criterion, "scope": scope, "params": params}
            row |= {"macs": int(decision.details["target"]["macs"]["reached"]), "returned": round(returned, 1)}
            rows.append(row | {"estimated": round(accuracy(pruned, x, y), 1), "seconds": round(seconds, 1)})
            print(rows[-1], flush=True)
    whole = {"params": 278_036, "macs": 5_704_192, "accuracy": round(accuracy(dense, x, y), 1)}
    peers = [dict(zip(("peer", "macs", "returned", "estimated"), peer, strict=True)) for peer in PEERS]
    (ROOT / "benchmarks" / "results" / "structural.md").write_text(table(rows, whole))
    record("structural", {"dense": whole, "rows": rows, "peers": peers})


def table(rows: list[dict[str, Any]], whole: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Half the MACs of the bundled classifier, nothing trained", ""]
    lines += [
        f"Dense: {whole['accuracy']}% of 4,000 test images, {whole['macs']:,} MACs, {whole['params']:,} parameters."
    ]
    lines += ["One standard error is about 0.5 points for good models, and one seed is one seed.", ""]
    lines += [
        "| | MACs | parameters | as returned | batch norm estimated again | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda row: -row["estimated"]):
        name = f"{r['criterion']}, {r['scope']}"
        lines.append(
            f"| {name} | {r['macs']:,} | {r['params']:,} | {r['returned']} | {r['estimated']} | {r['seconds']} |"
        )
    lines += [f"| *{name}* | {macs:,.0f} | | {a} | {b} | |" for name, macs, a, b in PEERS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
