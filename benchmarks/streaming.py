"""Checkpoints larger than memory: what `secateur prune --stream` takes, on a random Llama of any size.

    python benchmarks/streaming.py make FOLDER [--layers 32]     # 8B parameters in bfloat16, 16 GB, by default
    python benchmarks/streaming.py run FOLDER METHOD OUT.json    # prune it to 70% in a process of its own
    python benchmarks/streaming.py growth SCRATCH OUT.json       # peak memory over layers, and over batches

Peak memory is the most that the process ever had resident (ru_maxrss), mapped files included. The plain forward pass is
that of the dense model over the same tokens, block by block from the same files, in a process of its own.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.load.shards import write_shard

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"
)  # fmt: skip
BUDGETS = {
    "minitron": ["--budget", "params=70%", "--no-measure", "--skip", "layers"],
    "obs": ["--budget", "params=70%", "--no-gradients"],
    "wanda": ["--budget", "sparsity=30%"],
    "sparsegpt": ["--budget", "sparsity=30%"],
    "flap": ["--budget", "params=70%"],
    "magnitude": ["--budget", "sparsity=30%"],
}
GROWING: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16,
    "head_dim": 64, "vocab_size": 8192,
}  # fmt: skip
"""16.8 million parameters in a layer: 34 MB in bfloat16."""
TINY = {**GROWING, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
LAYERS = (4, 8, 16, 32)
BATCHES = (4, 16, 64)
ROWS, LENGTH = 2, 128
GROWTH = {
    "wanda": ["--method", "wanda", "--budget", "sparsity=30%"],
    "minitron": ["--method", "minitron", "--dims", '{"intermediate_size": 2816}', "--mend", "none"],
    "minitron, mended": ["--method", "minitron", "--dims", '{"intermediate_size": 2816}'],
}
FORWARD = """
import json, sys, time, torch
from pathlib import Path
from secateur.load.data import load_tokens
from secateur.load.streamed import load_streamed
from secateur.walk import outputs
folder, data, samples, length, batch, work = sys.argv[1:]
model, _, _ = load_streamed(folder, work=Path(work))
how = {"vocab_size": model.config.vocab_size, "seq_len": int(length), "samples": int(samples)}
tokens = load_tokens(data, tokenizer=None, **how)
begin = time.perf_counter()
with torch.no_grad():
    for _ in outputs(model, list(torch.split(tokens, int(batch))), name="forward"):
        pass
print(json.dumps({"seconds": time.perf_counter() - begin}))
"""


def make(folder: Path, changes: dict[str, Any], seed: int = 0) -> None:
    """Write a random checkpoint: a shard for every four layers, weights of standard deviation 0.02."""
    config = LLAMA_8B | changes
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))

    def some(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def layer(i: int) -> dict[str, torch.Tensor]:
        sizes = {
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
        }  # fmt: skip
        norms = {n: torch.ones(hidden, dtype=torch.bfloat16) for n in ("input_layernorm", "post_attention_layernorm")}
        own = {name: some(*shape) for name, shape in sizes.items()} | norms
        return {f"model.layers.{i}.{name}.weight": tensor for name, tensor in own.items()}

    count = config["num_hidden_layers"]
    parts = [range(first, min(count, first + 4)) for first in range(0, count, 4)]
    total = len(parts) + 1
    where: dict[str, str] = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}-of-{total:05d}.safetensors"
        write_shard(folder / name, tensors)
        where.update(dict.fromkeys(tensors, name))

    for number, layers in enumerate(parts, start=1):
        write(number, {n: t for i in layers for n, t in layer(i).items()})
    ends = {"model.embed_tokens.weight": some(vocab, hidden), "lm_head.weight": some(vocab, hidden)}
    write(total, ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def tokens(path: Path, rows: int, length: int, vocab: int) -> Path:
    """Random token ids."""
    import numpy as np

    np.save(path, np.random.default_rng(0).integers(0, vocab, size=(rows, length)).astype(np.int32))
    return path


def measured(words: Sequence[str]) -> dict[str, Any]:
    """Run a command; its seconds, peak memory, bytes read and written, and what it printed.

    ``peak_rss`` is what the kernel noted; ``peak_anonymous`` and ``peak_files`` (mapped pages of files, which it may
    take back at any time) are the most that was seen, ten times a second.
    """
    begin = time.perf_counter()
    seen = {"RssAnon": 0, "RssFile": 0}
    io: dict[str, int] = {}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(words, stdout=out)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            with contextlib.suppress(OSError, ValueError):
                text = Path(f"/proc/{process.pid}/io").read_text()
                io = {k: int(v) for k, v in (line.split(": ") for line in text.splitlines())}
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    name = line.partition(":")[0]
                    if name in seen:
                        seen[name] = max(seen[name], int(line.split()[1]) * 1024)
            time.sleep(0.1)
        out.seek(0)
        told = out.read()
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}")
    return {
        "seconds": time.perf_counter() - begin, "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss": usage.ru_maxrss * 1024, "peak_anonymous": seen["RssAnon"], "peak_files": seen["RssFile"],
        "read": io.get("rchar"), "written": io.get("wchar"), "told": told,
    }  # fmt: skip


def run(folder: Path, method: str, out: Path, samples: int, length: int, batch: int, more: list[str]) -> dict[str, Any]:
    """Prune a checkpoint to 70%; what it took."""
    config = json.loads((folder / "config.json").read_text())
    data = tokens(out.parent / f"{out.name}.npy", samples, length, config["vocab_size"])
    reading = ["--data", str(data), "--samples", str(samples), "--seq-len", str(length), "--batch-size", str(batch)]
    load = os.getloadavg()[0]
    words = [sys.executable, "-m", "secateur", "prune", str(folder), "--out", str(out), "--method", method, "--stream"]
    found = measured([*words, "--max-memory", "6GiB", *BUDGETS[method], *reading, *more, "--json"])
    report = json.loads(found.pop("told"))
    found |= {
        "method": method,
        "load_before": load,
        "threads": torch.get_num_threads(),
        "command": [*BUDGETS[method], *more],
    }
    found |= {"config": {key: config[key] for key in SIZES}, "length": length, "batch_tokens": batch * length}
    found |= {"tokens": samples * length, "layers": config["num_hidden_layers"], "report_seconds": report["seconds"]}
    found |= {"streamed": report.get("streamed"), "sizes": report["sizes"], "costs": report["costs"]}
    found["seconds_per_block"] = found["seconds"] / config["num_hidden_layers"]
    return found


def forward(folder: Path, scratch: Path, samples: int, length: int, batch: int) -> dict[str, Any]:
    """A plain pass of the same tokens, block by block."""
    config = json.loads((folder / "config.json").read_text())
    data = tokens(scratch / "forward.npy", samples, length, config["vocab_size"])
    work = scratch / "forward"
    shutil.rmtree(work, ignore_errors=True)
    words = [sys.executable, "-c", FORWARD, str(folder), str(data), str(samples), str(length), str(batch), str(work)]
    found: dict[str, Any] = measured(words)
    found |= json.loads(found.pop("told").splitlines()[-1])
    shutil.rmtree(work, ignore_errors=True)
    return found


def growth(scratch: Path, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Peak memory and time over the number of layers, and over that of batches; all until now, after each point.

    ``program`` is the same command on a model of next to no weights: what is above that is due to the model.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"shape": GROWING, "tokens_per_batch": ROWS * LENGTH, "threads": torch.get_num_threads()}
    found |= {"program": {}, "points": []}
    plan = [(method, 2, 8) for method in methods]
    plan += [(m, n, 8) for m in methods for n in (LAYERS if m != "minitron, mended" else LAYERS[:2])]
    plan += [(m, LAYERS[0], n) for m in methods for n in (BATCHES if m != "minitron, mended" else BATCHES[:2])]
    for method, layers, batches in plan:
        is_tiny = layers == 2
        folder = scratch / ("tiny" if is_tiny else f"layers-{layers}")
        if not folder.exists():
            make(folder, {**(TINY if is_tiny else GROWING), "num_hidden_layers": layers})
        data = tokens(scratch / "tokens.npy", ROWS * batches, LENGTH, GROWING["vocab_size"])
        more = GROWTH[method]
        if is_tiny:
            more = [word.replace("2816", "64") for word in more]
        point: dict[str, Any] = {
            "method": method,
            "layers": layers,
            "batches": batches,
            "load_before": os.getloadavg()[0],
        }
        words = [sys.executable, "-m", "secateur", "prune", str(folder), "--out", str(scratch / "out"), *more]
        words += ["--stream", "--max-memory", "6GiB", "--overwrite", "--restart", "--data", str(data), "--json"]
        words += ["--samples", str(ROWS * batches), "--seq-len", str(LENGTH), "--batch-size", str(ROWS)]
        point |= measured(words)
        report = json.loads(point.pop("told"))
        point |= {"streamed": report["streamed"], "steps": report["seconds"]}
        point["weights"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if is_tiny:
            found["program"][method] = point
        else:
            point["above_program"] = point["peak_rss"] - found["program"][method]["peak_rss"]
            found["points"].append(point)
        print(
            json.dumps({k: v for k, v in point.items() if k not in ("streamed", "steps")}), file=sys.stderr, flush=True
        )
        shutil.rmtree(scratch / "out")
        yield found


def keep(results: Path | None, name: str, point: dict[str, Any]) -> None:
    """Print what was measured, and put it into the results."""
    print(json.dumps(point, indent=1))
    if results is not None:
        known = json.loads(results.read_text()) if results.exists() else {}
        known["large"] = {**known.get("large", {}), name: point}
        results.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "forward", "growth"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--more", default="")
    parser.add_argument("--results", type=Path, help="of run and forward: a file that takes the point up, too")
    given = parser.parse_args()
    sizes = (given.samples, given.seq_len, given.batch_size)
    if given.what == "make":
        make(given.folder, {"num_hidden_layers": given.layers})
    elif given.what == "forward":
        keep(given.results, f"{given.folder.name} forward", forward(given.folder, Path(given.rest[0]), *sizes))
    elif given.what == "growth":
        methods = given.more.split(",") if given.more else list(GROWTH)
        out = Path(given.rest[0])
        for found in growth(given.folder, methods):
            known = json.loads(out.read_text()) if out.exists() else {}
            out.write_text(json.dumps({**known, "growth": found}, indent=1) + "\n")
    else:
        method, out = given.rest[0], Path(given.rest[1])
        found = run(given.folder, method, out, *sizes, given.more.split())
        keep(given.results, f"{given.folder.name} {method}", found)


if __name__ == "__main__":
    main()
