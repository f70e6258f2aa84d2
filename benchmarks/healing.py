"""What wins a cut back: distilling, cross entropy, training from scratch, or cutting in stages; equal tokens each.

The bundled model is cut by Minitron with least squares to 70% and 50% of its parameters. Every run sees the same rows
in the same order (of train_ids.npy, 8 x 256 tokens a step) and is measured on all 320 held-out rows. Learning rates:
what `distill` proposes, for distilling and cross entropy; from scratch the best of a grid at 250k tokens.

    .venv/bin/python benchmarks/healing.py --runs 70         # in two processes, if there are two cores
    .venv/bin/python benchmarks/healing.py --runs 50
    .venv/bin/python benchmarks/healing.py --runs stages     # when these are done; then search, memory
    .venv/bin/python benchmarks/healing.py                   # collects benchmarks/results/healing.json

What is done is kept under --out and not done again.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import MODEL, bundled_model, record, tokens
from torch import nn

import secateur
from secateur.measure.quality import Reference, compare
from secateur.methods.healing import cache_teacher

BATCH = 8
LENGTHS = ("250k", "500k", "1M")
LEARNING_RATES: Mapping[str, Mapping[str, float | None]] = {
    "distil": {"70": None, "50": None},  # as proposed: 7.8e-4 and 1.4e-3
    "ce": {"70": 8e-4, "50": 1.5e-3},
    "scratch": {"70": 1e-2, "50": 1e-2},  # by Muon, as the dense model was trained: AdamW at 3e-3 is far worse
}
_TRAIN = str(MODEL / "train_ids.npy")


class Bench:
    """Runs, each kept in a line of runs.jsonl."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.dense = bundled_model()
        self.held_out = list(torch.split(tokens("val_ids.npy"), BATCH))
        self.reference = Reference(self.dense, self.held_out)

    def run(self, name: str, train: Any) -> nn.Module | None:
        """Train, measure and keep, unless that was done before."""
        log = self.out / "runs.jsonl"
        if log.exists() and any(json.loads(line)["run"] == name for line in log.read_text().splitlines()):
            return None
        start = time.perf_counter()
        before, healed, told = train()
        seconds = time.perf_counter() - start
        entry = {"run": name, "seconds": seconds, **told}
        for when, model in (("before", before), ("after", healed)):
            found = compare(model, self.reference)
            entry[when] = {"perplexity": found.perplexity, "kl": found.kl, "top1": found.top1}
        entry["params"] = sum(p.numel() for p in healed.parameters())
        with log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{name}: {entry['before']['perplexity']:.2f} -> {entry['after']['perplexity']:.2f}, {seconds:.0f} s")
        return healed  # type: ignore[no-any-return]

    def cut(
        self, model: nn.Module, percent: float, name: str, *, dims: Mapping[str, int] | None = None, **options: Any
    ) -> nn.Module:
        """The model cut to a share of the dense one's parameters, or to sizes, once."""
        path = self.out / f"{name}.pt"
        if not path.exists():
            size = sum(p.numel() for p in self.dense.parameters())
            budget = dims or f"params={round(size * percent / 100)}"
            torch.save(secateur.prune(model, budget, data=str(MODEL / "calib_ids.npy"), **options).model, path)
        return torch.load(path, weights_only=False)  # type: ignore[no-any-return]

    def distil(self, student: nn.Module, length: str, lr: float | None = None, seed: int = 0) -> Any:
        """KL to the dense model, whose logits are cached."""
        how: dict[str, Any] = {"tokens": length, "batch_size": BATCH, "lr": lr, "seed": seed}
        cache = self.out / "teacher"
        if not (cache / "train" / "meta.json").exists():
            cache_teacher(self.dense, student, _TRAIN, cache=cache, **{**how, "tokens": None, "epochs": 1})
        healed = secateur.distill(None, student, _TRAIN, cache=cache, **how)
        return student, healed.model, _told(healed.report)

    def ce(self, student: nn.Module, length: str, lr: float | None, optimizer: str = "adamw") -> Any:
        """Cross entropy alone."""
        healed = secateur.finetune(student, _TRAIN, tokens=length, batch_size=BATCH, lr=lr, optimizer=optimizer)
        return student, healed.model, _told(healed.report)

    def scratch(self, student: nn.Module, length: str, lr: float | None) -> Any:
        """The same architecture with random weights, as transformers draws them."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        config: Any = student.config
        return self.ce(AutoModelForCausalLM.from_config(config).float(), length, lr, "muon")

    def size(self, percent: str) -> None:
        """All ways at one size."""
        student = self.cut(self.dense, float(percent), f"cut-{percent}")
        for length in LENGTHS:
            for way in ("distil", "ce", "scratch"):
                rate = LEARNING_RATES[way][percent]
                train = getattr(self, way)
                self.run(f"{percent} {way} {length}", lambda t=train, n=length, r=rate: t(student, n, r))

    def searched(self, length: str) -> None:
        """Distilling what `search` cuts, with sizes of their own in every layer."""
        for percent in (70, 50):
            student = self.cut(self.dense, percent, f"cut-search-{percent}", method="search", uniform=False)
            self.run(f"{percent} search+distil {length}", lambda s=student: self.distil(s, length))

    def stages(self, length: str, half: str) -> None:
        """100 -> 70 -> 50 with half of the tokens at either size, beside one cut with all of them.

        Once with the sizes that Minitron chooses for the second cut (it drops another layer), once with those of the
        one cut, so that only the way there differs.
        """
        config: Any = self.cut(self.dense, 50, "cut-50").config
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        same = {name: getattr(config, name) for name in names}

        def train(name: str, dims: Mapping[str, int] | None) -> Any:
            first = self.distil(self.cut(self.dense, 70, "cut-70"), half)[1]
            second = self.cut(first, 50, f"cut-70-{half}-50{name}", dims=dims)
            _, healed, told = self.distil(second, half, seed=1)  # rows in another order: others, but for chance
            return second, healed, told | {"tokens": 2 * told["tokens"]}

        self.run(f"50 stages {length}", lambda: train("", None))
        self.run(f"50 stages to the same sizes {length}", lambda: train("-same", same))


def _told(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("tokens", "steps", "lr")}


def memory(out: Path) -> None:
    """Peak memory and loss of a live teacher and of cached logits, each in a process of its own; teacher of 60M."""
    found = {}
    for way in ("cache", "live", "cached"):
        done = subprocess.run(
            [sys.executable, __file__, "--out", str(out), "--one", way], capture_output=True, text=True, check=True
        )
        found[way] = json.loads(done.stdout.splitlines()[-1])
    (out / "memory.json").write_text(json.dumps(found))


def one(out: Path, way: str) -> None:
    """One process of `memory`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048, "max_position_embeddings": 256}

    def llama(layers: int, hidden: int) -> nn.Module:
        torch.manual_seed(1)
        made: nn.Module = LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=3 * hidden, **sizes)
        )
        return made

    student = llama(2, 256)
    how: dict[str, Any] = {"steps": 12, "batch_size": 4, "top_k": 64, "lr": 1e-3}
    how["eval_data"] = tokens("val_ids.npy")[:16]
    teacher = None if way == "cached" else llama(12, 640)
    cache = out / "memory-teacher"
    if way == "cache" and teacher is not None:
        cache_teacher(teacher, student, _TRAIN, cache=cache, **how)
        told: dict[str, Any] = {}
    else:
        healed = secateur.distill(teacher, student, _TRAIN, cache=cache if way == "cached" else None, **how)
        told = {"losses": [e["train"]["kl"] for e in healed.report["history"][1:]], "after": healed.report["after"]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": peak, **told}))


def main() -> None:
    """Run what is asked for, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/healing"))
    parser.add_argument("--runs", choices=["70", "50", "stages", "search", "memory"])
    parser.add_argument("--one", choices=["cache", "live", "cached"])
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.one is not None:
        one(out, arguments.one)
    elif arguments.runs == "memory":
        memory(out)
    elif arguments.runs == "stages":
        bench = Bench(out)
        for length, half in (("500k", "250k"), ("1M", "500k")):
            bench.stages(length, half)
    elif arguments.runs == "search":
        Bench(out).searched("1M")
    elif arguments.runs is not None:
        Bench(out).size(arguments.runs)
    else:
        runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
        kept = out / "memory.json"
        record("healing", {"runs": runs, "memory": json.loads(kept.read_text()) if kept.exists() else None})


if __name__ == "__main__":
    main()
