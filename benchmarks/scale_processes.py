"""Calibration by one process and by two, one thread each: minitron's scores and wanda's masks, in turns.

Run: .venv/bin/python benchmarks/scale_processes.py
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import record

ROWS, LENGTH, BATCH, TURNS = 48, 256, 4, 3
COUNTS = (1, 2)


def model() -> Any:
    """A random Llama of 38M parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8000}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=8, num_key_value_heads=4)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def work(out: Path) -> None:
    """What each process does; the first one writes seconds, and what was decided."""
    from secateur import discover, prune, world
    from secateur.score import activation_scores

    torch.set_num_threads(1)
    dense = model()
    space = discover(dense)
    ids = torch.randint(0, 8000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    batches = list(torch.split(ids, BATCH))
    with world.joined(), world.splitting():
        activation_scores(dense, space, batches[:2])  # what is made once is made here

        def timed(job: Callable[[], Any]) -> tuple[float, float, Any]:
            """Seconds until all are done, the most CPU seconds of one process, and the result."""
            world.check_all(None)
            begin, busy = time.perf_counter(), time.process_time()
            found = job()
            busy = max(world.gathered(time.process_time() - busy))
            return time.perf_counter() - begin, busy, found

        *scoring, scores = timed(lambda: activation_scores(dense, space, batches))
        *masking, result = timed(lambda: prune(dense, "sparsity=50%", method="wanda", data=batches))
        plan = prune(dense, {"intermediate_size": 1024, "hidden_size": 384}, data=batches, mend="none").plan
        if world.first():
            own = result.report["seconds"]
            told = {
                "minitron": scoring[0], "wanda": own["calibrating"] + own["solving"],
                "minitron, CPU": scoring[1], "wanda with all around it, CPU": masking[1],
            }  # fmt: skip
            masks = {name: result.plan.masks[name].clone() for name in result.plan.masks}
            kept = {name: list(kept.units) for name, kept in plan.kept.items()}
            torch.save({"seconds": told, "masks": masks, "kept": kept, "blocks": dict(scores.blocks)}, out)


def measure(count: int, folder: Path) -> dict[str, Any]:
    """One run by so many processes."""
    out = folder / f"{count}.pt"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(count)] if count > 1 else []
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if count > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *launch, __file__, str(out)], check=True, env=env)
    found: dict[str, Any] = torch.load(out)
    return found


def main() -> None:
    """Take turns, and compare the fastest of each."""
    seconds: dict[str, dict[int, list[float]]] = {}
    loads: list[float] = []
    last: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(TURNS):
            for count in COUNTS:
                loads.append(os.getloadavg()[0])
                last[count] = measure(count, Path(folder))
                for what, taken in last[count]["seconds"].items():
                    seconds.setdefault(what, {n: [] for n in COUNTS})[count].append(taken)
    one, two = last[1], last[2]
    differ = sum(int((mask != two["masks"][name]).sum()) for name, mask in one["masks"].items())
    elements = sum(mask.numel() for mask in one["masks"].values())
    tokens = ROWS * LENGTH
    record(
        "scale_processes",
        {
            "what": f"calibration of a random Llama of 38M on {tokens} tokens by 1 and 2 processes of one thread each",
            "seconds": {what: {str(n): found for n, found in by.items()} for what, by in seconds.items()},
            "tokens_per_second": {
                what: {str(n): tokens / min(f) for n, f in by.items()} for what, by in seconds.items()
            },
            "speedup": {what: min(by[1]) / min(by[2]) for what, by in seconds.items()},
            "minitron_plan_equal": one["kept"] == two["kept"],
            "wanda_masks_that_differ": f"{differ} of {elements}",
            "load_before_each_run": loads,
        },
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(Path(sys.argv[1]))
    else:
        main()
