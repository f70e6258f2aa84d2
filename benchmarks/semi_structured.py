"""2:4 on a GPU: products and a stack of Llama layers, dense beside both backends of torch, 1 to 4096 tokens.

.venv/bin/python benchmarks/semi_structured.py [--quick]

All times of a row are taken in turns, after a check that the results agree. It needs an NVIDIA GPU of Ampere or newer.
It has not run where it was written: no GPU was lent.
"""

import argparse
import copy
from typing import Any

import torch
from common import record
from torch import nn

from secateur.choose.mask import n_of_m
from secateur.errors import SecateurError
from secateur.measure.latency import Timing, time_models
from secateur.ship.semi_structured import BACKENDS, require_sparse_gpu, to_semi_structured

TOKENS = (1, 16, 64, 256, 1024, 4096)
PRODUCTS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
"""Outputs and inputs: attention and MLP of Llamas of 8B and 70B parameters."""
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LAYERS = 4
AGREES = 2e-2
"""Largest difference from the dense result, over its largest value: sums of 16-bit products in another order."""


def backends(device: torch.device) -> dict[str, str | None]:
    """Backend -> why it cannot run here; None where it can.

    Raises:
        SecateurError: none can.
    """
    found: dict[str, str | None] = {}
    for backend in BACKENDS:
        try:
            require_sparse_gpu(device, backend)
            found[backend] = None
        except SecateurError as error:
            found[backend] = str(error)
    if all(found.values()):
        raise SecateurError(next(iter(found.values())) or "")
    return found


def pruned(model: nn.Module) -> nn.Module:
    """The model with 2:4 in every Linear weight, by magnitude."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(n_of_m(module.weight.abs(), (2, 4)))
    return model


def compared(models: dict[str, nn.Module], inputs: Any, repeats: int) -> dict[str, Any]:
    """Times of every model on the same inputs, and the largest difference from the dense one."""
    errors: dict[str, float] = {}
    with torch.no_grad():
        expected = output(models["dense"], inputs).float()
        for name, model in models.items():
            difference = (output(model, inputs).float() - expected).abs().max() / expected.abs().max()
            errors[name] = float(difference)
            if not errors[name] <= AGREES:
                raise SystemExit(f"{name} differs from the dense model by {errors[name]:.2g} of its largest value")
    times = dict(zip(models, time_models(list(models.values()), inputs, repeats=repeats), strict=True))
    return {name: row(time, times["dense"], errors[name]) for name, time in times.items()}


def output(model: nn.Module, inputs: Any) -> torch.Tensor:
    """What a model gives, a tensor."""
    found = model(**inputs, use_cache=False) if isinstance(inputs, dict) else model(inputs)
    result: torch.Tensor = getattr(found, "last_hidden_state", found)
    return result


def row(time: Timing, dense: Timing, error: float) -> dict[str, float]:
    """Microseconds, and the ratio to dense."""
    return {
        "median_us": 1e6 * time.median,
        "low_us": 1e6 * time.low,
        "high_us": 1e6 * time.high,
        "speedup": dense.median / time.median,
        "max_rel_error": error,
    }


def variants(dense: nn.Module, usable: list[str]) -> dict[str, nn.Module]:
    """The dense model and a packed copy for each backend."""
    models = {"dense": dense}
    for backend in usable:
        models[backend] = copy.deepcopy(dense)
        told = to_semi_structured(models[backend], backend=backend)
        linear = [name for name in told.left if "embed" not in name]
        if linear:
            raise SystemExit(f"{backend} leaves {linear[:3]} dense: {told.left[linear[0]]}")
    return models


def llama(device: torch.device) -> nn.Module:
    """Layers of a random Llama of 8B width, in bfloat16."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(**LLAMA, num_hidden_layers=LAYERS, vocab_size=1024, max_position_embeddings=8192)
    with torch.device(device):
        model: nn.Module = LlamaModel(config).to(torch.bfloat16).eval()
    return model


def main() -> None:
    """Time, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two sizes, a few repeats")
    quick = parser.parse_args().quick
    device = torch.device("cuda")
    try:
        found = backends(device)
    except SecateurError as error:
        raise SystemExit(f"nothing was measured: {error}") from error
    usable = [backend for backend, reason in found.items() if reason is None]
    tokens, products, repeats = (TOKENS[::5], PRODUCTS[:1], 5) if quick else (TOKENS, PRODUCTS, 30)
    torch.manual_seed(0)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "backends": found, "dtype": "bfloat16"}
    result["products"] = []
    for outputs, inputs in products:
        layer = pruned(nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16))
        models = variants(layer.eval(), usable)
        for count in tokens:
            x = torch.randn(count, inputs, device=device, dtype=torch.bfloat16)
            times = compared(models, x, repeats)
            result["products"].append({"outputs": outputs, "inputs": inputs, "tokens": count, **times})
            show(f"{outputs} x {inputs}, {count} tokens", times)
        del models, layer
        torch.cuda.empty_cache()
    result["layers"] = []
    models = variants(pruned(llama(device)), usable)
    for count in tokens:
        ids = torch.randint(1024, (1, count), device=device)
        times = compared(models, {"input_ids": ids}, repeats)
        result["layers"].append({"layers": LAYERS, "tokens": count, **times})
        show(f"{LAYERS} Llama layers, {count} tokens", times)
    record("semi_structured", result)


def show(what: str, times: dict[str, Any]) -> None:
    """One line."""
    parts = [f"{name} {one['median_us']:.0f} us ({one['speedup']:.2f}x)" for name, one in times.items()]
    print(f"{what}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
