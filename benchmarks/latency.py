"""How well times of parts predict the time of a model that was really cut; prints rows for docs/latency.md.

OMP_NUM_THREADS=1 python benchmarks/latency.py
"""

import importlib
import platform
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.choose.plan import Plan
from secateur.choose.rank import plan_for_sizes
from secateur.cut import apply
from secateur.cut.prove import discover
from secateur.measure.clock import Clock
from secateur.measure.latency import LatencyTable, Stopwatch, time_models


def llama() -> tuple[Any, Any, Any]:
    """A random Llama (hidden 512, ffn 2048, 4 layers), 1 x 128 tokens; and plans."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 8000},
        **{"num_attention_heads": 8, "num_key_value_heads": 4},
    )
    model = LlamaForCausalLM(config).eval()
    space = discover(model)
    scores = {axis.name: torch.rand(axis.size) for axis in space.axes}
    plans = {
        "ffn 1024": plan_for_sizes(space, scores, {"ffn": 1024}),
        "hidden 384, ffn 1280": plan_for_sizes(space, scores, {"hidden": 384, "ffn": 1280}),
        "4 heads in 2 groups, ffn 1536": plan_for_sizes(space, scores, {"heads": 4, "kv_groups": 2, "ffn": 1536}),
        "ffn 1024, 3 layers": plan_for_sizes(space, scores, {"ffn": 1024}, ["model.layers.1"]),
        "hidden 256, ffn 512, one attention and one MLP fewer": plan_for_sizes(
            space, scores, {"ffn": 512, "hidden": 256}, ["model.layers.1.self_attn", "model.layers.3.mlp"]
        ),
    }
    return model, {"input_ids": torch.randint(0, 8000, (1, 128))}, (space, plans)


def digits() -> tuple[Any, Any, Any]:
    """The ResNet of examples/digits, 64 images; and plans of the method structural."""
    model, images = importlib.import_module("examples.digits.digits").trained(), torch.randn(64, 1, 24, 24)
    plans = {
        f"{budget}, {scope}": secateur.plan(model, budget, method="structural", inputs=images, scope=scope)
        for budget, scope in (("macs=50%", "global"), ("macs=30%", "local"), ("params=50%", "isomorphic"))
    }
    return model, images, (discover(model, images), plans)


def main() -> None:
    """Predict, cut, measure, print."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    timer = Stopwatch(torch.device("cpu"), "process")
    print(f"{LatencyTable.here().device}, torch {torch.__version__}, {platform.system()}, load {load()}")
    for name, (model, inputs, (space, plans)) in (("Llama", llama()), ("digits", digits())):
        clock = Clock(model, space, inputs, timer=timer)
        traced = None if name == "Llama" else inputs
        cut = [apply(model, plan, space=space, inputs=traced) for plan in plans.values()]
        whole, *others = time_models([model, *cut], inputs, timer=timer, repeats=30)
        print(f"| {name}, dense | {1000 * clock.predict(Plan()):.2f} ms | {1000 * whole.median:.2f} ms | |")
        for (what, plan), measured in zip(plans.items(), others, strict=True):
            predicted, real = clock.predict(plan) / clock.predict(Plan()), measured.median / whole.median
            print(f"| {name}, {what} | {predicted:.3f} | {real:.3f} | {100 * (predicted / real - 1):+.1f}% |")


def load() -> str:
    """What else runs."""
    path = Path("/proc/loadavg")
    return path.read_text().split()[0] if path.exists() else "unknown"


if __name__ == "__main__":
    main()
