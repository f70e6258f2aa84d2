"""One-shot masks on the bundled model: perplexity, time and memory, beside llm-compressor in the same run.

Each prune is a process of its own, from the same checkpoint and tokens, and what it saves is loaded by stock
transformers and measured in float32. `--peer` is the python of an environment with llm-compressor (see
peers/README.md); without it our side alone is run. Timings depend on threads: set OMP_NUM_THREADS, and keep the
machine idle.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import MODEL, ROOT, record, tokens
from torch import nn
from torch.nn import functional

PEER = ROOT / "benchmarks" / "peers" / "llmcompressor_run.py"
TARGETS = {"50%": "sparsity=50%", "70%": "sparsity=70%", "2:4": "n:m=2:4"}
BUDGET_OF_PEER = {"50%": ("0.5", "0:0"), "70%": ("0.7", "0:0"), "2:4": ("0.5", "2:4")}


def ours(words: list[str]) -> None:
    """Run the command line in this process, then print the most memory that it held."""
    from secateur.cli import main

    code = main(words)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"peak_rss_own_mb": round(peak, 1)}))
    sys.exit(code)


def timed(command: list[str]) -> tuple[dict[str, Any], float, float]:
    """(the last line of JSON, wall seconds, CPU seconds) of a command."""
    before, begin = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    wall, after = time.perf_counter() - begin, os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found, wall, cpu


@torch.no_grad()
def perplexity(folder: Path) -> tuple[float, float]:
    """(perplexity on the first 320 rows of the held-out tokens, share of zeros in the linear layers but the head)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    rows = tokens("val_ids.npy")[:320]
    for batch in torch.split(rows, 16):
        logits = model(batch, use_cache=False).logits[:, :-1]
        total += float(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    linear = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    zeros = sum(int((w == 0).sum()) for w in linear) / sum(w.numel() for w in linear)
    return math.exp(total / (rows.numel() - len(rows))), zeros


def run_ours(checkpoint: Path, out: Path, method: str, target: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Prune with Secateur's command line."""
    words = ["prune", str(checkpoint), "--out", str(out), "--method", method, "--budget", TARGETS[target]]
    words += ["--overwrite", "--data", str(MODEL / "calib_ids.npy"), *more]
    found, wall, cpu = timed([sys.executable, __file__, "--ours", *words])
    return {"tool": "secateur", "wall_s": wall, "cpu_s": cpu, "peak_mb": found["peak_rss_own_mb"]}


def run_peer(python: str, checkpoint: Path, out: Path, method: str, target: str, dtype: str) -> dict[str, Any]:
    """Prune with llm-compressor."""
    sparsity, structure = BUDGET_OF_PEER[target]
    command = [python, str(PEER), str(checkpoint), str(MODEL / "calib_ids.npy"), str(out), "--method", method]
    command += ["--sparsity", sparsity, "--mask-structure", structure, "--dtype", dtype]
    found, wall, cpu = timed(command)
    result = {"tool": "llm-compressor", "wall_s": wall, "cpu_s": cpu, "peak_mb": found["peak_rss_own_mb"]}
    return {**result, "prune_s": found["prune_s"], "versions": found["versions"]}


def checkpoint_in(dtype: str, folder: Path) -> Path:
    """The bundled checkpoint in a type, so that both tools load, compute and save in it."""
    if dtype == "bfloat16":
        return MODEL
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def run(peer: str | None, dtypes: list[str], repeats: int) -> list[dict[str, Any]]:
    """All rows; timings are medians of interleaved repeats."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for dtype in dtypes:
            checkpoint = checkpoint_in(dtype, Path(place) / "dense")
            cases: list[tuple[str, str, str, tuple[str, ...]]] = [
                (m, t, m, ()) for m in ("wanda", "sparsegpt", "alps") for t in TARGETS
            ]
            owl = ("--allocation", "owl")
            cases += [(m, "70%", f"{m}, owl", owl) for m in ("wanda", "sparsegpt", "alps")]
            for method, target, name, more in cases:
                out = Path(place) / "out"
                tries: dict[str, list[dict[str, Any]]] = {}
                both = peer is not None and method != "alps" and not more
                for _ in range(repeats):
                    if both and peer is not None:
                        other = out.with_name("peer")
                        tries.setdefault("llm-compressor", []).append(
                            run_peer(peer, checkpoint, other, method, target, dtype)
                        )
                    tries.setdefault("secateur", []).append(run_ours(checkpoint, out, method, target, more))
                for tool, found in tries.items():
                    loss, zeros = perplexity(out if tool == "secateur" else out.with_name("peer"))
                    row = {"dtype": dtype, "method": name, "target": target, **found[0], "perplexity": loss}
                    for key in ("wall_s", "cpu_s", "peak_mb"):
                        row[key] = round(statistics.median(f[key] for f in found), 2)
                    rows.append({**row, "zeros": zeros})
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: ours beside the peer's."""
    lines = [
        "| computed in | method | target | perplexity | llm-compressor's | seconds | llm-compressor's | ratio "
        "| peak MB | llm-compressor's |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    peers = {(r["dtype"], r["method"], r["target"]): r for r in rows if r["tool"] != "secateur"}
    for r in (r for r in rows if r["tool"] == "secateur"):
        p = peers.get((r["dtype"], r["method"], r["target"]))
        theirs = [""] * 4
        if p is not None:
            ratio = f"{p['wall_s'] / r['wall_s']:.2f}"
            theirs = [f"{p['perplexity']:.2f}", f"{p['wall_s']:.1f}", ratio, f"{p['peak_mb']:.0f}"]
        cells = [r["dtype"], r["method"], r["target"], f"{r['perplexity']:.2f}", theirs[0], f"{r['wall_s']:.1f}"]
        lines.append("| " + " | ".join([*cells, *theirs[1:3], f"{r['peak_mb']:.0f}", theirs[3]]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for."""
    if sys.argv[1:2] == ["--ours"]:
        ours(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="python of an environment with llm-compressor")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    rows = run(args.peer, args.dtypes, args.repeats)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    record("sparsity", {"OMP_NUM_THREADS": threads, "repeats": args.repeats, "rows": rows})
    (ROOT / "benchmarks" / "results" / "sparsity.md").write_text(
        f"OMP_NUM_THREADS={threads}, {args.repeats} run(s) of each; seconds are the whole process.\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
