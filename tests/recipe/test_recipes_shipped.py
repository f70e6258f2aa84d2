"""The recipes of examples/: each runs from its beginning to its end, on little data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny

import secateur
from secateur import recipe
from secateur.load.model import quiet_transformers

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "recipes"
PYDOC = ROOT / "examples" / "models" / "pydoc-llama"
_SHORT = ["samples=4", "score_samples=2", "top_k=1", "seq_len=32"]
_TRAINED = ["tokens=null", "steps=2", "batch_size=2", "seq_len=32"]


def few(step: str, *texts: str) -> list[str]:
    return [f"{step}.{text}" for text in texts]


LITTLE: dict[str, list[str]] = {
    "iterative-cnn": few("steps.1", "steps=1", "tolerance=null"),
    "minitron-then-distil": [
        *few("steps.1", *_SHORT, "budget={intermediate_size: 256}"),
        *few("steps.2", *_TRAINED),
        "steps.3.seq_len=32",
    ],
    "iterative-to-35": [
        *few("steps.1.steps.1", *_SHORT),
        *few("steps.1.steps.2", *_TRAINED),
        "steps.2.seq_len=32",
        "model=tiny",  # three searches of the bundled model would take a minute
    ],
    "sparsegpt-24-sparse-finetune": [
        *few("steps.1", "samples=4", "seq_len=32"),
        *few("steps.2", *_TRAINED),
        "steps.3.seq_len=32",
    ],
    "gradual-magnitude-cnn": [
        *few("steps.1", "data=examples.recipes.digits_training:few", "epochs=null", "steps=6", "eval_every=6"),
        "steps.1.evaluate=null",
        "steps.2.data=examples.recipes.digits_training:few",
    ],
    "movement-bert": few("steps.1", "epochs=null", "steps=6", "eval_every=6"),
    "gradnas-distil-int8": few("steps.2", "epochs=null", "steps=3", "eval_every=3"),
    "prune-to-latency": [
        *few("steps.1", "levels=3", "trials=1", "probes=1"),
        *few("steps.2", "epochs=null", "steps=2"),
        "data=examples.recipes.digits_training:few",
    ],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the paths of the recipes are right, with a little held-out text."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with quiet_transformers():
        tiny("llama", vocab_size=2048, hidden_size=64, intermediate_size=192).save_pretrained(tmp_path / "tiny")
    np.save(tmp_path / "few.npy", np.load(PYDOC / "val_ids.npy")[:2, :32])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    return tmp_path


def told(name: str) -> list[str]:
    text = (RECIPES / f"{name}.yaml").read_text()
    held_out = "few.npy" if "pydoc-llama" in text else "examples.recipes.pydoc_bert:calibration"
    small = [] if "digits" in text else [f"eval_data={held_out}"]
    digits = ["eval_data=examples.recipes.digits_training:few"] if "digits" in text else []
    return [*LITTLE[name], *small, *digits, "out=result"]


def test_all_of_them_are_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(LITTLE)


@pytest.mark.parametrize("name", sorted(LITTLE))
def test_runs(name: str, place: Path, say: Callable[..., str]) -> None:
    words = ["run", str(RECIPES / f"{name}.yaml"), "--set", *told(name), "--json"]
    report: dict[str, Any] = json.loads(say(*words))
    assert report == {"out": "result", **json.loads((place / "result/report.json").read_text())}
    model = secateur.load("result")
    assert sum(p.numel() for p in model.parameters()) == report["costs"]["params"]["pruned"]
    check = CHECKS.get(name)
    if check is not None:
        check(report, place / "result")
    again = say("run", str(RECIPES / f"{name}.yaml"), "--set", *told(name))
    assert "there is nothing to do" in again


def _until(report: Any, out: Path) -> None:
    dense = report["costs"]["params"]["dense"]
    shares = [entry["size"]["params"] / dense for entry in report["steps"] if entry["step"] == "prune"]
    assert [entry["step"] for entry in report["steps"]] == [*["prune", "distill"] * 3, "evaluate", "report"]
    for share, most in zip(shares, (0.7, 0.49, 0.35), strict=True):
        assert most - 0.05 < share <= most
    assert "| 6 | distill |" in (out / "report.md").read_text()


def _int8(report: Any, out: Path) -> None:
    files = {path.name: path.stat().st_size for path in out.glob("*.onnx")}
    assert set(files) == {"model.onnx", "model_int8.onnx"}
    quantized = report["steps"][4]
    assert quantized["bytes"] == {"exported": files["model.onnx"], "quantized": files["model_int8.onnx"]}
    assert files["model_int8.onnx"] < 0.5 * files["model.onnx"]
    quality = quantized["quality"]["accuracy"]
    assert abs(quality["model"] - quality["int8"]) < 0.1
    assert report["costs"]["params"]["pruned"] < report["costs"]["params"]["dense"]


def _two_of_four(report: Any, out: Path) -> None:
    model: Any = secateur.load(out)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert int((weight.reshape(len(weight), -1, 4) != 0).sum(-1).max()) == 2
    assert report["steps"][1]["training"]["masks"] > 0
    assert report["plan"] == "saved"


def _sparse(share: float) -> Callable[[Any, Path], None]:
    def check(report: Any, out: Path) -> None:
        del out
        found = report["steps"][0]["sparsity"]
        assert abs(found["sparsity"] - share) < 0.01
        assert report["plan"] == "saved"

    return check


def _quicker(report: Any, out: Path) -> None:
    del out
    assert report["steps"][0]["latency"]["predicted"] <= report["steps"][0]["target"]["latency"]["limit"] * 1.001
    assert report["costs"]["params"]["pruned"] < report["costs"]["params"]["dense"]


CHECKS: dict[str, Callable[[Any, Path], None]] = {
    "iterative-to-35": _until,
    "gradnas-distil-int8": _int8,
    "sparsegpt-24-sparse-finetune": _two_of_four,
    "gradual-magnitude-cnn": _sparse(0.8),
    "movement-bert": _sparse(0.7),
    "prune-to-latency": _quicker,
}


@pytest.mark.parametrize("name", ["minitron-then-distil", "gradnas-distil-int8"])
def test_dry_run_tells_and_writes_nothing(name: str, place: Path, say: Callable[..., str]) -> None:
    chosen = recipe.load(RECIPES / f"{name}.yaml", told(name))
    found = recipe.estimate(chosen)
    assert [entry["step"] for entry in found["steps"]] == [step.name for step in chosen.steps]
    assert all(entry["seconds"] >= 0 and entry["memory"] > 0 for entry in found["steps"])
    assert found["steps"][1]["seconds"] > 0
    text = say("run", str(RECIPES / f"{name}.yaml"), "--set", *told(name), "--dry-run")
    assert "1. prune" in text
    assert "Estimates:" in text
    assert {path.name for path in place.iterdir()} == {"examples", "few.npy", "tiny"}
    assert torch.is_grad_enabled()
