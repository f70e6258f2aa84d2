"""Prune a causal language model with llm-compressor, in its own environment: see README.md beside this file.

`python llmcompressor_run.py MODEL_DIR CALIB.npy OUT_DIR --method wanda|sparsegpt --sparsity 0.5 [--mask-structure 2:4]`

Float32 weights, every Linear but the head, every calibration row a sample of its own. The result is saved dense, with
its zeros, and the last line of stdout is one JSON object. Method options are llm-compressor's defaults.
"""

# ruff: noqa: E402  (the clock starts before the imports)
import time

BEGIN = time.perf_counter()

import argparse
import json
import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any

HEAD = "re:.*lm_head"
"""What llm-compressor leaves out; it names a targeted layer `lm_head.`, so the plain `lm_head` would not match."""


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prune a causal language model with llm-compressor.")
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("calibration", type=Path, help="uint16 tokens, [rows, row] or flat")
    parser.add_argument("out", type=Path, help="folder for the result")
    parser.add_argument("--method", choices=["wanda", "sparsegpt"], required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--mask-structure", default="0:0", help="n:m, such as 2:4; 0:0 is unstructured")
    parser.add_argument("--samples", type=int, default=512, help="calibration rows")
    parser.add_argument("--row", type=int, default=256, help="tokens in a row, for a flat file")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", help="to load and compute in")
    return parser.parse_args()


def peak_rss() -> dict[str, float]:
    """Peak resident MB: `ru_maxrss`, which starts at that of the process that started this one, and this one's own."""
    status = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    shared = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss_mb": round(shared / 1024, 1), "peak_rss_own_mb": round(own / 1024, 1)}


def zeros(model: Any) -> float:
    """Share of zeros in the weights of the Linear layers but the head."""
    from torch import nn

    weights = [
        module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def main() -> None:
    """Prune, save, and print one line."""
    args = options()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import numpy as np
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM

    rows = np.load(args.calibration).reshape(-1, args.row)[: args.samples].astype(np.int64)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[args.method]
    recipe = modifier(sparsity=args.sparsity, mask_structure=args.mask_structure, targets=["Linear"], ignore=[HEAD])
    data = Dataset.from_dict({"input_ids": list(rows)})
    load, begin = os.getloadavg()[0], time.perf_counter()
    used = time.process_time()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        batch_size=args.batch_size,
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        shuffle_calibration_samples=False,
    )
    prune, used = time.perf_counter() - begin, time.process_time() - used
    model.save_pretrained(args.out, save_compressed=False)
    names = ("torch", "transformers", "llmcompressor", "compressed-tensors")
    result: dict[str, Any] = {"peer": "llmcompressor", "method": args.method, "sparsity": args.sparsity}
    result |= {
        "dtype": args.dtype,
        "mask_structure": args.mask_structure,
        "samples": len(rows),
        "batch_size": args.batch_size,
    }
    result |= {"prune_s": round(prune, 2), "prune_cpu_s": round(used, 2), "load_before": round(load, 2)}
    result |= {"total_s": round(time.perf_counter() - BEGIN, 2), **peak_rss()}
    result |= {"zeros": round(zeros(model), 5), "threads": torch.get_num_threads()}
    result |= {"versions": {"python": platform.python_version(), **{name: version(name) for name in names}}}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
