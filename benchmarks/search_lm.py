"""The bundled language model at 80, 70, 60 and 50% of its parameters: `search` and the others, without training.

Held-out perplexity by the protocol of the bundled model (float32, 320 rows of 256 tokens), calibration on all
512 rows. `--peer PYTHON` runs Torch-Pruning in its own environment (benchmarks/peers) in the same run. `--distill`:
each model that is there is then distilled on the same 0.5M training tokens (KL of the logits, AdamW, the best of two
learning rates by the loss on calibration rows), by the same code. Results are kept after each row; `--resume` goes on.
"""

import argparse
import json
import math
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import MODEL, ROOT, bundled_model, record, tokens
from torch import nn
from torch.nn import functional

import secateur

SHARES = (0.8, 0.7, 0.6, 0.5)
WAYS: dict[str, dict[str, Any]] = {
    "search, free": {"method": "search", "uniform": False},
    "search, uniform": {"method": "search"},
    "obs, free": {"method": "obs", "uniform": False},
    "obs, uniform": {"method": "obs"},
    "flap, uniform": {"method": "flap"},
    "flap, free": {"method": "flap", "uniform": False},
    "taylor": {"method": "structural", "criterion": "taylor", "only": ("ffn", "heads"), "mend": "none"},
    "taylor + least squares": {"method": "structural", "criterion": "taylor", "only": ("ffn", "heads")},
}
TOKENS, BATCH, RATES = 500_000, 16, (1e-3, 3e-4)
"""Of distillation."""
PEER = {"magnitude": ("uniform", "global"), "taylor": ("uniform", "global")}


def held_out() -> torch.Tensor:
    """320 rows of 256 held-out tokens."""
    return tokens("val_ids.npy").flatten()[: 320 * 256].reshape(320, 256)


def perplexity(model: nn.Module, rows: torch.Tensor) -> float:
    """On rows of token ids."""
    return float(secateur.evaluate(model, rows, batch_size=16)["perplexity"])


def distilled(model: nn.Module, teacher: nn.Module, rows: torch.Tensor, rate: float) -> nn.Module:
    """The model after one pass over the rows: KL to the teacher's logits, cosine to a tenth, 5% warm-up."""
    model.train().requires_grad_(requires_grad=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    batches = torch.split(rows, BATCH)
    for step, batch in enumerate(batches):
        done = step / len(batches)
        factor = min(1.0, (step + 1) / (0.05 * len(batches))) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        optimizer.param_groups[0]["lr"] = rate * factor
        with torch.no_grad():
            wanted = teacher(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        given = model(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        loss = functional.kl_div(given.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def pruned(dense: nn.Module, way: str, share: float, rows: torch.Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """One model, and what was measured of it."""
    begin = time.perf_counter()
    result = secateur.prune(dense, f"params={100 * share:g}%", data=list(torch.split(rows, 16)), **WAYS[way])
    seconds = time.perf_counter() - begin
    params = sum(p.numel() for p in result.model.parameters())
    return result.model, {"way": way, "share": share, "params": params, "seconds": round(seconds, 1)}


def peers(python: str, folder: Path) -> list[dict[str, Any]]:
    """Torch-Pruning on the FFN units; it cannot cut the heads of this model within minutes."""
    script = ROOT / "benchmarks" / "peers" / "torchpruning_run.py"
    found = []
    for importance, scopes in PEER.items():
        for scope in scopes:
            words = [python, str(script), "llama", str(folder), "--importance", importance, "--scope", scope]
            words += ["--budgets", *map(str, SHARES)]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ})
            for row in json.loads(done.stdout.strip().splitlines()[-1])["rows"]:
                way = f"Torch-Pruning {importance}, {scope}"
                keep = {k: row[k] for k in ("params", "perplexity", "saved")}
                found.append({"way": way, "share": row["budget"], **keep, "seconds": row["prune_s"]})
    return found


def main() -> None:
    """Run what is asked for, and keep results/search_lm.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES))
    parser.add_argument("--models", type=Path, default=Path("out/search_lm"))
    parser.add_argument("--peer")
    parser.add_argument("--distill", nargs="*", default=[], help="ways to distil, of those that are there")
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args()
    asked.models.mkdir(parents=True, exist_ok=True)
    path = ROOT / "benchmarks" / "results" / "search_lm.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if asked.resume and path.exists() else []
    dense, calibration, rest = bundled_model(), tokens("calib_ids.npy"), held_out()
    whole = round(perplexity(dense, rest), 4)

    def keep() -> None:
        record("search_lm", {"dense": whole, "rows": rows})

    def find(way: str, share: float) -> dict[str, Any] | None:
        return next((row for row in rows if (row["way"], row["share"]) == (way, share)), None)

    if asked.peer and find("Torch-Pruning taylor, uniform", 0.8) is None:
        rows += peers(asked.peer, asked.models)
        keep()
    for way in asked.ways:
        for share in asked.shares:
            if find(way, share) is None:
                model, row = pruned(dense, way, share, calibration)
                saved = asked.models / f"{way}-{share}.pt".replace(", ", "-").replace(" ", "_")
                torch.save(model, saved)
                rows.append({**row, "perplexity": round(perplexity(model, rest), 3), "saved": str(saved)})
                keep()
    train = torch.from_numpy(np.load(MODEL / "train_ids.npy")[:TOKENS].astype(np.int64)) if asked.distill else None
    for way in asked.distill:
        for share in asked.shares:
            own = find(way, share)
            if own is None or "distilled" in own or train is None:
                continue
            tried = []
            for rate in RATES:
                model = torch.load(own["saved"], weights_only=False).float()
                model = distilled(model, dense, train[: len(train) // 256 * 256].reshape(-1, 256), rate)
                tried.append((perplexity(model, calibration[:128]), rate, perplexity(model, rest)))
            own["distilled"], own["rate"] = round(min(tried)[2], 3), min(tried)[1]
            keep()


if __name__ == "__main__":
    main()
