"""Tiny models and a tokenizer, saved as people save them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import tiny, tokens
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secateur.load.model import quiet_transformers


def byte_tokenizer() -> Any:
    """One token for each byte; ids 0, 1 and 2 are padding, beginning and end, as in the tiny models."""
    special = ["<pad>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = RawTokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save_model(folder: Path, name: str = "llama", *, tokenizer: bool = True, **options: Any) -> Path:
    """A tiny model in a folder, with a tokenizer beside it."""
    settings: dict[str, Any] = {"dtype": torch.float32, "tie_word_embeddings": True}
    if name != "gpt2":
        settings["max_position_embeddings"] = 256
    model = tiny(name, **{**settings, **options})
    with quiet_transformers():
        model.save_pretrained(folder)
        if tokenizer:
            byte_tokenizer().save_pretrained(folder)
    return folder


def write_data(folder: Path) -> Path:
    """ids.npy, text.txt, text.jsonl, questions.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "ids.npy", tokens(4, 16).numpy())
    text = "The secateurs cut what the gardener does not want to keep. " * 8
    (folder / "text.txt").write_text(text)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text[i:]}) + "\n" for i in range(3)))
    questions = [{"question": f"Is it {i}?", "choices": ["no", "yes"], "answer": i % 2} for i in range(4)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder
