"""Time and memory of discovering and proving Llamas of an 8B shape and more layers, on meta tensors.

Run: .venv/bin/python benchmarks/discovery.py [LAYERS...]; every size runs in a process of its own.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

from common import record


def measure(layers: int) -> dict[str, Any]:
    """Discover one model; seconds, and the process's peak memory."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from secateur import discover
    from secateur.cut.prove import proved

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    begin = time.perf_counter()
    traced = discover(model, prove=False)
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    space = proved(model, traced)
    proof = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    params = sum(p.numel() for p in model.parameters())
    return {
        "layers": layers,
        "params": params,
        "axes": len(space.axes),
        "seconds": round(seconds, 2),
        "proof_seconds": round(proof, 2),
        "MiB": round(peak),
    }


def main() -> None:
    """Run every size."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(int(sys.argv[2]))))
        return
    rows = []
    for layers in [int(word) for word in sys.argv[1:]] or [8, 16, 32, 64, 80, 128]:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(layers)], capture_output=True, text=True, check=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    record("discovery", {"what": "Llama of 8B width on meta tensors", "rows": rows})


if __name__ == "__main__":
    main()
