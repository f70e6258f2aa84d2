"""Folders of runs, written by hand: what `secateur prune`, `distill` and `run` leave, without a model."""

import json
from pathlib import Path
from typing import Any

from secateur.methods.reporting import provenance

LAYERS = 4
DENSE = "models/dense"


def write(folder: Path, report: dict[str, Any], **others: Any) -> Path:
    """A folder with report.json, weights of a few bytes, and other JSON files by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "model.safetensors").write_bytes(b"0" * 3_000_000)
    (folder / "plan.safetensors").write_bytes(b"0" * 500_000)
    return beside(folder, **others)


def beside(folder: Path, **others: Any) -> Path:
    """Put other JSON files, by their names, beside the report of a run."""
    for name, content in others.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def base(name: str = DENSE, **more: Any) -> dict[str, Any]:
    """What every report has."""
    made = provenance(["secateur", "prune", name, "--out", "out/it's small", "--budget", "params=70%"])
    return {
        "secateur": "0.1.0", **made, "method": "minitron", "model": {"name": name, "fingerprint": "f" * 64},
        "budget": "params=70%", "options": {"top_k": 10, "kv_batch": 1, "skip": [], "samples": 32},
        "bytes": {"dense": 5_000_000}, "seconds": {"total": 12.5},
        "data": {"calibration": "calib.npy", "evaluation": "val.npy"}, **more,
    }  # fmt: skip


def costs(share: float = 0.7) -> dict[str, Any]:
    """Of a model of two million parameters."""

    def both(whole: int) -> dict[str, int]:
        return {"dense": whole, "pruned": round(share * whole)}

    memory = {**both(12_000_000), "kv_batch": 1, "kv_seq_len": 4096, "kv_cache": True}
    return {"params": both(2_000_000), "active_params": both(2_000_000), "memory": memory, "macs": both(30_000_000)}


def quality(pruned: float = 18.56, tokens: int = 8160) -> dict[str, Any]:
    """Of a language model."""
    return {"tokens": tokens, "perplexity": {"dense": 16.0, "pruned": pruned}, "kl": 0.148, "top1": 0.81}


def where() -> list[dict[str, Any]]:
    """Four layers: the second has lost half of its FFN, the third its attention, the fourth is gone."""
    found = []
    for i in range(LAYERS):
        name = f"model.layers.{i}"
        left, dropped = (512, 256, 512, 0)[i], ([], [], [f"{name}.self_attn"], [name])[i]
        axes = {"ffn": {"dense": 512, "pruned": left}}
        params = {"dense": 400_000, "pruned": (400_000, 260_000, 300_000, 0)[i]}
        found.append({"name": name, "dropped": dropped, "axes": axes, "params": params})
    return found


def structural(folder: Path, **more: Any) -> Path:
    """A cut to 70% that searched among candidates."""
    sizes = {"intermediate_size": 352, "num_hidden_layers": 5}
    candidates = [
        {"sizes": sizes, "params": 1_400_000.0 - 40_000 * i, "score": 0.5 + 0.06 * i, "chosen": i == 0}
        for i in range(5)
    ]
    search = {"score": "kl", "higher_is_better": False, "feasible": 265, "candidates": candidates}
    dropped = ["model.layers.3", "model.layers.2.self_attn"]
    report = base(costs=costs(), measured=quality(), where=where(), dropped=dropped, search=search)
    return write(folder, {**report, **more})


def front(folder: Path) -> Path:
    """A search over levels."""
    points = [{"share": s / 10, "params": 2e5 * s, "expected": 0.02 * (10 - s) ** 2} for s in range(9, 2, -1)]
    levels = {"front": points, "expected": 0.18, "measured": 0.21, "measure": "kl", "history": [[0, 0.4], [9, 0.21]]}
    levels |= {"optimal": False, "gap": 0.03}
    target = {"params": {"limit": 1_400_000, "reached": 1_400_000}, "latency": {"limit": 0.004, "reached": 0.005}}
    latency = {"predicted": 0.0041, "measured": 0.005, "dense": 0.0064, "limit": 0.004}
    more: dict[str, Any] = {"method": "search", "levels": levels, "target": target, "latency": latency}
    return write(folder, base(costs=costs(), measured=quality(17.25), where=where(), **more))


def masked(folder: Path) -> Path:
    """Half of the weights are zero."""
    names = [f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.down_proj")]
    tensors = {name: {"elements": 10_000, "zeros": 4_000 + 500 * (i % 5)} for i, name in enumerate(names)}
    sparsity = {"masked": {"elements": 80_000, "zeros": 40_000}, "tensors": tensors}
    counts = {"params": {"dense": 2_000_000, "pruned": 2_000_000}, "nonzero": {"dense": 2_000_000, "pruned": 1_100_000}}
    more: dict[str, Any] = {
        "method": "alps",
        "budget": "sparsity=50%",
        "sparsity": sparsity,
        "unreached": ["model.layers.0.q"],
    }
    return write(folder, base(costs=counts, measured=quality(16.9), **more))


def history(points: int = 6) -> list[dict[str, Any]]:
    """Of a training."""
    found: list[dict[str, Any]] = [{"step": 0, "held_out": {"perplexity": 24.6, "kl": 0.47}}]
    for i in range(1, points):
        train = {"loss": 0.5 / i, "kl": 0.5 / i, "lr": 1e-4}
        found.append({"step": 20 * i, "train": train, "held_out": {"perplexity": 16 + 8 / (i + 1), "kl": 0.47 / i}})
    return found


def training() -> dict[str, Any]:
    """What distill reports of itself."""
    return {
        "settings": {"lr": None, "kl": 1.0, "teacher": "f" * 64, "params": 2_000_000}, "steps": 100, "tokens": 204_800,
        "lr": 7.7e-4, "before": {"perplexity": 24.6, "kl": 0.47}, "after": {"perplexity": 17.33, "kl": 0.094},
        "teacher": {"perplexity": 16.0}, "best": 100, "stopped": "all 100 steps are done", "diverged": False,
        "resumed": None, "masks": 0, "history": history(), "logs": [],
    }  # fmt: skip


def recipe(folder: Path) -> Path:
    """Prune, distill, evaluate."""
    cut = {
        "number": 1, "step": "prune", "options": {"budget": "params=70%"},
        "size": {"params": 1_400_000, "nonzero": 1_400_000},
        "method": "minitron", "budget": "params=70%", "costs": costs(), "where": where(), "measured": quality(24.6),
        "seconds": 11.0, "mend": {"left": {"lm_head.weight": "why"}},
    }  # fmt: skip
    heal = {
        "number": 2, "step": "distill", "options": {"tokens": "200k"}, "size": cut["size"], "teacher": "dense",
        "training": training(), "seconds": 40.0,
    }  # fmt: skip
    look = {
        "number": 3,
        "step": "evaluate",
        "options": {},
        "size": cut["size"],
        "measured": quality(17.4),
        "seconds": 2.0,
    }
    counts = {"params": {"dense": 2_000_000, "pruned": 1_400_000}, "nonzero": {"dense": 2_000_000, "pruned": 1_400_000}}
    report = base(costs=counts, measured=quality(17.4), steps=[cut, heal, look], training=True, plan="saved")
    del report["options"]
    return write(folder, {**report, "method": "recipe: prune, distill, evaluate"})


def distilled(folder: Path) -> Path:
    """The result of `secateur distill`."""
    counts = {"params": {"pruned": 1_400_000}, "nonzero": {"pruned": 1_400_000}}
    measured = {"perplexity": {"dense": 16.0, "pruned": 17.33}, "kl": 0.094, "data": "val.npy"}
    report = base("out/small", costs=counts, measured=measured, training=True, distillation=training())
    del report["options"], report["budget"], report["bytes"]
    return write(
        folder, {**report, "method": "distill", "teacher": {"name": DENSE}, "plan": "not saved: none is there"}
    )


SENSITIVITY: dict[str, Any] = {
    "format": 1, "kind": "sensitivity", "secateur": "0.1.0", "model": DENSE, "data": "calib.npy", "measure": "kl",
    "dense": {"loss": 2.77},
    "losses": {
        f"model.layers.{i}.{part}.weight": {"0.25": 0.001 * (i + 1), "0.5": 0.01 * (i + 1), "0.75": 0.2 * (i + 1)}
        for i in range(LAYERS)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    },
    "axes": {
        f"model.layers.{i}.{part}": {"kind": kind, "size": 512, "block": f"model.layers.{i}", "losses": losses}
        for i in range(LAYERS)
        for part, kind, losses in (
            ("mlp.ffn", "ffn", {"0.25": 0.002 * (i + 1), "0.5": 0.03 * (i + 1), "0.75": 0.4}),
            ("self_attn.heads", "heads", {"0.5": 0.1 / (i + 1)}),
        )
    },
    "blocks": {f"model.layers.{i}": 0.3 * (i + 1) for i in range(LAYERS)},
    "cost": {"passes": 12.5, "naive": 96.0, "seconds": 8.1},
}  # fmt: skip


def _timed(name: str, runtime: str, speedup: float, *, noise: bool = False) -> dict[str, Any]:
    times = {
        what: {
            "median": base / speedup, "low": 0.97 * base / speedup, "high": 1.04 * base / speedup, "repeats": 20,
            "speedup": speedup, "speedup_low": 0.96 * speedup, "speedup_high": 1.05 * speedup, "within_noise": noise,
            "per_second": 1 / base,
        }
        for what, base in (("prefill", 0.0432), ("decode", 0.0031))
    }  # fmt: skip
    sizes = {"params": 2_000_000, "nonzero": None, "bytes": 8_000_000, "bytes_compressed": 7_300_000}
    return {"name": name, "runtime": runtime, **sizes, "peak_memory": None, "macs": 30_000_000, "times": times}


BENCH: dict[str, Any] = {
    "format": 1, "kind": "bench", "secateur": "0.1.0",
    "machine": {"device": "cpu", "threads": 2, "torch": "2.13.0", "onnxruntime": "1.32.0"},
    "setting": {"batch": 1, "seq": 128},
    "models": [
        _timed(DENSE, "torch", 1.0), _timed("out/small", "torch", 1.41),
        _timed("out/masked", "torch", 1.01, noise=True), _timed("out/small", "onnxruntime", 2.2),
    ],
    "notes": ["Zeros were multiplied like any other number."],
}  # fmt: skip
