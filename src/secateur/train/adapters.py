"""LoRA by way of peft: small matrices beside the weights are trained, and added to them at the end.

Hu et al. 2021 (arXiv:2106.09685).
"""

import importlib.util
from typing import Any

from torch import nn

from secateur.errors import SecateurError


def adapted(model: nn.Module, rank: int) -> Any:
    """Put adapters into all linear layers of a model but its head, in place; nothing else is trained then.

    Returns:
        peft's model around it, for `merged`.

    Raises:
        SecateurError: peft is not installed, or there is no linear layer.
    """
    if importlib.util.find_spec("peft") is None:
        raise SecateurError("lora needs peft: pip install 'secateur[train]'")
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    if not linear:
        raise SecateurError(f"lora: {type(model).__name__} has no linear layer besides its head")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear))


def merged(adapter: Any) -> nn.Module:
    """The model with the adapters added to its weights, as it was otherwise; its weights take no gradients yet."""
    model: nn.Module = adapter.merge_and_unload()
    return model
