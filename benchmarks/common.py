"""What the benchmarks share: the bundled model and its tokens, and where results go."""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "models" / "pydoc-llama"


def tokens(name: str) -> torch.Tensor:
    """Token rows of the bundled model, int64 [rows, 256]."""
    return torch.from_numpy(np.load(MODEL / name).astype(np.int64))


def bundled_model() -> nn.Module:
    """The bundled model in float32."""
    from secateur.load.model import load_model

    return load_model(MODEL, dtype="float32")[0]


def record(name: str, result: dict[str, Any]) -> None:
    """Print a result, and keep it in benchmarks/results."""
    result = {**result, "torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    text = json.dumps(result, indent=2)
    print(text)
    (ROOT / "benchmarks" / "results" / f"{name}.json").write_text(text + "\n")
