"""A tiny BERT that tells program text from prose: its training and data, for movement-bert and gradnas-distil-int8.

It reads 64 tokens of Python's documentation or library, and says whether program text is in them or in the 64 tokens
that follow: a definition, a return, an import, or `self`. Rows and tokenizer are those of the bundled language model.
It trains in seconds.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

PYDOC = Path(__file__).resolve().parents[1] / "models" / "pydoc-llama"
READS = 64
SIGNS = ("def ", "return ", "self.", "import ")
Batches = list[dict[str, torch.Tensor]]


@functools.cache
def _rows(name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [N, 64], and 1 where there is program text, int64 [N]."""
    from tokenizers import Tokenizer

    ids = np.load(PYDOC / name)[:count].astype(np.int64)
    texts = Tokenizer.from_file(str(PYDOC / "tokenizer.json")).decode_batch(ids[:, : 2 * READS].tolist())
    found = [any(sign in text for sign in SIGNS) for text in texts]
    return torch.from_numpy(ids[:, :READS].copy()), torch.tensor(found).long()


def _batches(name: str, count: int, size: int) -> Batches:
    ids, labels = _rows(name, count)
    both = zip(ids.split(size), labels.split(size), strict=True)  # type: ignore[no-untyped-call]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y} for x, y in both]


def training() -> Batches:
    """128 batches of 32 rows."""
    return _batches("train_ids.npy", 4096, 32)


def calibration() -> Batches:
    """8 batches of 32 rows."""
    return _batches("calib_ids.npy", 256, 32)


def held_out() -> Batches:
    """10 batches of 32 rows of other files."""
    return _batches("val_ids.npy", 320, 32)


def make_model() -> nn.Module:
    """The model, untrained: 2 layers of 4 heads, hidden 64."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=2048, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=READS, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = BertForSequenceClassification(config)
    return model


@functools.cache
def _weights() -> dict[str, torch.Tensor]:
    """What one process trains once: two passes over the rows."""
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model: Any = make_model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        batches = training()
        for chosen in [*torch.randperm(len(batches)).tolist(), *torch.randperm(len(batches)).tolist()]:
            optimizer.zero_grad()
            model(**batches[chosen]).loss.backward()
            optimizer.step()
        return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def trained() -> nn.Module:
    """The model after training, in evaluation mode."""
    model = make_model()
    model.load_state_dict(_weights())
    return model.eval()


def example() -> dict[str, torch.Tensor]:
    """Arguments of one forward pass."""
    ids = calibration()[0]["input_ids"][:2]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
