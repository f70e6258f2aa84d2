"""all-MiniLM-L6-v2 and English sentences for it, without network: nothing of Secateur in here.

`sentences()` gives calibration and unseen sentences, `embed` the sentence embeddings of a model, `fidelity` how near
those of a pruned model are to the dense ones.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

CALIBRATION, UNSEEN, EACH = 256, 512, 4
"""Sentences for calibration and evaluation, and the most of one document."""
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "encodings", "pydoc_data"}
"""Folders of the standard library that are not read."""
CODE = re.compile(r"[`*=<>_{}\[\]|\\~^#@]|::|\.\.\.|\w\(")
WORD = re.compile(r"[\"'(]?[A-Za-z][a-z'-]*[\"').,;:]*")
Batch = dict[str, torch.Tensor]


def documents() -> Iterator[tuple[str, str]]:
    """Name and text of the topics of pydoc, and of the standard library's modules: their docstrings."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    yield from ((f"topic {name}", text) for name, text in topics.items())
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if LEFT_OUT.intersection(name.parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_text("utf8", "replace"))
        except SyntaxError:
            continue
        nodes = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        yield name.as_posix(), "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def split(text: str) -> Iterator[str]:
    """The sentences of 5 to 40 words that are prose."""
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z\"])", " ".join(paragraph.split())):
            words = sentence.split()
            if not 5 <= len(words) <= 40 or not sentence[0].isupper() or not sentence.endswith("."):
                continue
            if not CODE.search(sentence) and sum(bool(WORD.fullmatch(w)) for w in words) >= 0.9 * len(words):
                yield sentence


def digest(text: str) -> int:
    """A number that depends on the text alone."""
    return int(hashlib.md5(text.encode()).hexdigest(), 16)


def sentences() -> tuple[list[str], list[str]]:
    """256 sentences to calibrate on and 512 to measure on, at most 4 of a document and no document in both."""
    seen: set[str] = set()
    sides: tuple[list[str], list[str]] = ([], [])
    for name, text in sorted(documents()):
        found = [s for s in dict.fromkeys(split(text)) if s not in seen]
        chosen = sorted(found, key=digest)[:EACH]
        seen.update(chosen)
        sides[digest(name) % 2].extend(chosen)
    calibration, unseen = (sorted(side, key=digest) for side in sides)
    return calibration[:CALIBRATION], unseen[:UNSEEN]


def load(folder: str | Path) -> tuple[Any, Any]:
    """Model (float32, eager attention, no pooler, evaluation mode) and tokenizer of a checkpoint."""
    transformers: Any = import_module("transformers")
    options = {"dtype": torch.float32, "attn_implementation": "eager", "add_pooling_layer": False}
    model = transformers.BertModel.from_pretrained(folder, **options)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def batches(tokenizer: Any, texts: list[str], size: int = 16) -> list[Batch]:
    """Token ids and masks, int64 [size, longest]."""
    found = []
    for begin in range(0, len(texts), size):
        tokens = tokenizer(texts[begin : begin + size], padding=True, truncation=True, max_length=128)
        found.append({key: torch.tensor(tokens[key]) for key in ("input_ids", "attention_mask")})
    return found


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that the mask keeps, of length 1: [N, T, D] -> [N, D]."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    means: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return nn.functional.normalize(means, dim=1)


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Sentence embeddings, float32 [sentences, 384], of length 1."""
    model.eval()
    return torch.cat([pooled(model(**b)[0].float(), b["attention_mask"]) for b in batches(tokenizer, texts, 32)])


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Rank of every value; equal values get the mean of their ranks."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    middles: torch.Tensor = ends - (counts.double() - 1) / 2
    return middles[inverse]


def fidelity(dense: torch.Tensor, pruned: torch.Tensor) -> tuple[float, float]:
    """Mean cosine to the dense embeddings, and Spearman's rank correlation of the similarities of all pairs."""
    cosine = float(nn.functional.cosine_similarity(dense, pruned).mean())
    upper = torch.triu_indices(len(dense), len(dense), 1)
    similarities = torch.stack([ranks((e @ e.T)[upper[0], upper[1]]) for e in (dense, pruned)])
    return cosine, float(torch.corrcoef(similarities)[0, 1])


def encoder(model: Any) -> int:
    """Parameters without the embeddings."""
    return sum(p.numel() for p in model.encoder.parameters())


class Loss:
    """What the gradients are of, without labels; at the dense model none of them is flat.

    `contrastive`: the two random halves of a sentence's tokens, each pooled, shall find each other in the batch
    (InfoNCE, temperature 0.05). `direction`: the embeddings along random directions, one per sentence (its squared
    gradients are Gauss-Newton for the distance to the dense embeddings). `norm`: squared norm of a random projection of
    the embeddings to 64 numbers.
    """

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.kind, self.generator = kind, torch.Generator().manual_seed(seed)
        self.projection = torch.randn(384, 64, generator=self.generator) / 8

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, T, 384] and mask [N, T] -> a number."""
        if self.kind == "norm":
            return (pooled(hidden, mask) @ self.projection).square().sum(1).mean()
        if self.kind == "direction":
            embeddings = pooled(hidden, mask)
            return (embeddings * torch.randn(embeddings.shape, generator=self.generator)).sum()
        half = torch.rand(mask.shape, generator=self.generator) < 0.5
        one, other = (pooled(hidden, mask * side) for side in (half, ~half))
        return nn.functional.cross_entropy(one @ other.T / 0.05, torch.arange(len(one)))


def measured(model: Any, tokenizer: Any, unseen: list[str], dense: torch.Tensor, whole: int) -> dict[str, Any]:
    """What is left of the encoder, and how near its embeddings are to the dense ones."""
    cosine, spearman = fidelity(dense, embed(model, tokenizer, unseen))
    layers, left = model.encoder.layer, encoder(model)
    result: dict[str, Any] = {"encoder_params": left, "encoder_share": round(left / whole, 5)}
    result |= {"cosine": round(cosine, 4), "spearman": round(spearman, 4)}
    result["heads"] = [m.attention.self.query.out_features // m.attention.self.attention_head_size for m in layers]
    return result | {"ffn": [m.intermediate.dense.out_features for m in layers]}
