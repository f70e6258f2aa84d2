"""`search` on the bundled CNN at half its MACs, and on all-MiniLM-L6-v2 at 70% of its encoder; nothing is trained.

The CNN by the same code as the peers (benchmarks/peers/digits_task.py): as returned, batch norm estimated anew, and
after 2 epochs. The encoder (`--minilm FOLDER`) on 256 calibration and 512 unseen sentences
(benchmarks/peers/minilm.py), as a module that gives sentence embeddings: cosine to the dense ones, and Spearman's
correlation of the similarities of all pairs.
"""

import argparse
import importlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, record
from torch import nn

import secateur

sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
sys.path.insert(0, str(ROOT / "examples" / "digits"))
RESULT = ROOT / "benchmarks" / "results" / "search_small.json"


def digits() -> list[dict[str, Any]]:
    """Half the MACs."""
    module: Any = importlib.import_module("digits_task")
    task = module.Task()
    dense, example = task.trained(), torch.zeros(2, 1, 24, 24)
    calibration = list(zip(torch.split(task.calib[0], 128), torch.split(task.calib[1], 128), strict=True))
    rows = []
    ways: dict[str, dict[str, Any]] = {
        "search": {"method": "search"},
        "obs": {"method": "obs"},
        "fastnas": {"method": "fastnas"},
    }
    for name, options in ways.items():
        begin = time.perf_counter()
        result = secateur.prune(dense, "macs=50%", data=calibration, inputs=example, **options)
        seconds = time.perf_counter() - begin
        model = result.model
        row = {"way": name, "macs": module.macs(model), "params": sum(p.numel() for p in model.parameters())}
        row |= {"returned": module.accuracy(model, task.test), "seconds": round(seconds, 1)}
        row["estimated"] = module.accuracy(task.estimate(model), task.test)
        rows.append(row | {"finetuned": module.accuracy(task.finetune(model), task.test)})
        print(rows[-1], flush=True)
    return rows


class Sentence(nn.Module):
    """A BERT that gives one vector for each sentence."""

    def __init__(self, bert: nn.Module, pooled: Any) -> None:
        super().__init__()
        self.bert, self.pooled = bert, pooled

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[N, T] -> [N, 384], of length 1."""
        found: torch.Tensor = self.pooled(
            self.bert(input_ids=input_ids, attention_mask=attention_mask)[0], attention_mask
        )
        return found


def encoder(folder: Path) -> list[dict[str, Any]]:
    """70% of the encoder's parameters."""
    minilm: Any = importlib.import_module("minilm")
    bert, tokenizer = minilm.load(folder)
    known, unseen = minilm.sentences()
    lengths: dict[int, list[list[int]]] = {}
    for text in known:  # sentences of one length together, so that nothing is padded
        ids = tokenizer(text, truncation=True, max_length=128)["input_ids"]
        lengths.setdefault(len(ids), []).append(ids)
    data = [
        {"input_ids": torch.tensor(v), "attention_mask": torch.ones(len(v), k).long()}
        for k, v in sorted(lengths.items())
    ]
    random.Random(0).shuffle(data)
    whole, dense = minilm.encoder(bert), minilm.embed(bert, tokenizer, unseen)
    limit = sum(p.numel() for p in bert.parameters()) - int(0.3 * whole)
    model = Sentence(bert, minilm.pooled).eval()
    rows = []
    ways: dict[str, dict[str, Any]] = {
        "search, free": {"uniform": False, "probes": 4},
        "search, free, heads whole": {"uniform": False, "probes": 4, "only": ("ffn",)},
    }
    for name, options in ways.items():
        begin = time.perf_counter()
        result = secateur.prune(
            model, f"params={limit}", method="search", data=data, inputs=data[5], score_samples=256, **options
        )
        cosine, spearman = minilm.fidelity(dense, minilm.embed(result.model.bert, tokenizer, unseen))
        row = {
            "way": name,
            "encoder": minilm.encoder(result.model.bert) / whole,
            "cosine": cosine,
            "spearman": spearman,
        }
        rows.append(row | {"seconds": round(time.perf_counter() - begin, 1)})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run what is asked for, and keep results/search_small.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--minilm", type=Path)
    asked = parser.parse_args()
    kept: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if asked.digits:
        kept["digits"] = digits()
    if asked.minilm:
        kept["minilm"] = encoder(asked.minilm)
    record("search_small", kept)


if __name__ == "__main__":
    main()
