"""FastNAS on the bundled classifier; FLAP, GradNAS and depth on the bundled language model; nothing trained, no repair.

The classifier: half its MACs, accuracy on 4,000 test images as returned and after batch norm is estimated anew on 50
batches of 128 training images (ModelOpt's FastNAS, same model, data and budget: 31.3 and 46.0 in 540 s). The language
model: perplexity on 320 rows, after 512 calibration rows. Seconds are of the process on one thread.

Run: .venv/bin/python benchmarks/more_methods.py (about ten minutes).
"""

import importlib
import sys
import time
from typing import Any

import torch
from common import ROOT, bundled_model, record, tokens
from torch import nn

import secateur
from secateur.measure.classify import classify
from secateur.measure.quality import perplexity
from secateur.mend.batch_norm import adapt_batch_norm
from secateur.methods.verbs import decide

EXAMPLE = torch.zeros(2, 1, 24, 24)
CLASSIFIER: list[tuple[str, dict[str, Any]]] = [
    ("fastnas", {}),
    ("fastnas, levels 4", {"levels": 4}),
    ("fastnas, the insides of blocks", {"only": ["layers.[0-9].channels"]}),
]
LANGUAGE: list[tuple[str, dict[str, Any]]] = [
    ("flap", {}),
    ("flap, uniform=False", {"uniform": False}),
    ("flap, only ffn", {"only": ["ffn"]}),
    ("gradnas", {}),
    ("gradnas, threshold unit", {"threshold": "unit"}),
    ("gradnas, uniform=True", {"uniform": True}),
    ("depth", {}),
    ("depth, sublayers", {"what": "sublayers"}),
]


def classifier(rows: list[dict[str, Any]]) -> None:
    """Half the MACs of the ResNet-20."""
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    digits: Any = importlib.import_module("digits")
    dense = digits.trained()
    train, test = (
        list(zip(x.split(size), y.split(size), strict=True))
        for (x, y), size in ((digits.images("train", 50 * 128), 128), (digits.images("test", 4000), 250))
    )
    for name, options in CLASSIFIER:
        begin = time.process_time()
        decision = decide(dense, "macs=50%", method="fastnas", data=train, inputs=EXAMPLE, **options)
        seconds = time.process_time() - begin
        pruned = secateur.apply(dense, decision.plan, space=decision.space, inputs=EXAMPLE)
        returned = _percent(pruned, test)
        adapt_batch_norm(pruned, [x for x, _ in train])
        row = {"method": name, "macs": decision.details["target"]["macs"]["reached"], "returned": returned}
        rows.append({**row, "estimated": _percent(pruned, test), "seconds": round(seconds, 1)})
        print(rows[-1], flush=True)


def _percent(model: nn.Module, batches: Any) -> float:
    return round(100 * classify(model, batches).accuracy, 1)


def language(rows: list[dict[str, Any]]) -> None:
    """The pydoc-llama at 80% and 70% of its parameters."""
    dense = bundled_model()
    calibration = list(torch.split(tokens("calib_ids.npy"), 16))
    held_out = list(torch.split(tokens("val_ids.npy")[:320], 16))
    whole = sum(p.numel() for p in dense.parameters())
    for budget in ("params=80%", "params=70%"):
        for name, options in LANGUAGE:
            begin = time.process_time()
            method = name.partition(",")[0]
            decision = decide(dense, budget, method=method, data=calibration, **options)
            seconds = time.process_time() - begin
            pruned = secateur.apply(dense, decision.plan, space=decision.space)
            share = sum(p.numel() for p in pruned.parameters()) / whole
            found = round(perplexity(pruned, held_out), 2)
            row = {"method": name, "budget": budget, "params": round(100 * share, 1), "perplexity": found}
            rows.append({**row, "seconds": round(seconds, 1)})
            print(rows[-1], flush=True)


def main() -> None:
    """Run both, and keep results/more_methods.json."""
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, Any]]] = {"classifier": [], "language": []}
    classifier(rows["classifier"])
    language(rows["language"])
    record("more_methods", rows)


if __name__ == "__main__":
    main()
