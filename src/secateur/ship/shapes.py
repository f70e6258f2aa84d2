"""Which sizes of a model common kernels dislike, and the nearest that they like.

Kernels of GPUs and formats of quantisation care, and convolutions on CPUs; ONNX Runtime and OpenVINO take any size of
a matrix product as it is.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

SUPER_BLOCK, BLOCK = 256, 32
"""Numbers of a row that a K-quant of GGUF, and its older types, put together (ggml: QK_K and QK8_0)."""
FP8, FP8_TILE = 16, (64, 128)
"""torch._scaled_mm takes multiples of 16; Marlin, by which vLLM runs FP8 weights, tiles of 64 outputs x 128 inputs."""
HALF = 8
"""Tensor cores in 16 bits take rows of multiples of 8; others are padded."""
HEADS = (64, 80, 96, 112, 128, 256)
"""Sizes of a head that attention kernels are built for: FlashAttention, vLLM, llama.cpp."""
PARALLEL = (2, 4, 8)
CHANNELS, FEWEST = 16, 4
"""ONNX Runtime convolves blocks of 16 channels (8 without AVX-512), and leaves them for what is no multiple of 4."""
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """Sizes that something dislikes.

    Attributes:
        dim: what has these sizes: weights by a pattern of their names, or a field of the config.
        values: the sizes; several where layers differ.
        who: what dislikes them.
        why: what it does with them.
        good: the nearest sizes that it likes, smaller first.
    """

    dim: str
    values: list[int]
    who: str
    why: str
    good: list[int]

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.dim} = {_listed(self.values)}: {self.who} {self.why}; {_listed(self.good, 'or')} would do"


def shape_advice(model: nn.Module) -> list[Finding]:
    """Sizes of a model that common kernels dislike; nothing is run, and weights may be on the meta device.

    Language models are looked at as servers see them: GGUF files of llama.cpp, FP8 and tensor parallelism in vLLM,
    attention kernels. Of other models, what tensor cores take, and convolutions on CPUs.

    Args:
        model: any module, pruned or not.
    """
    linear = list(_products(model))
    found: list[Finding] = []
    if hasattr(getattr(model, "config", None), "vocab_size") and hasattr(model, "generate"):
        found += _rows(linear)
        found += _fp8(linear)
        found += _attention(model)
        found += _parallel(model, linear)
    else:
        found += _half(linear)
    return _merged([*found, *_blocks(model)])


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """One finding where only the sizes differ, as they do in layers that were cut differently."""
    found: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        key = (finding.dim, finding.who, finding.why)
        old = found.get(key, Finding(*key[:1], [], *key[1:], []))
        good = sorted({*old.good, *finding.good})
        found[key] = Finding(old.dim, [*old.values, *finding.values], old.who, old.why, good)
    return list(found.values())


Product = tuple[str, int, int]
"""A weight by its name, outputs and inputs."""


def _products(model: nn.Module) -> Iterator[Product]:
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            yield name, module.out_features, module.in_features
        elif type(module).__name__ == "Conv1D" and weight is not None:  # of transformers: stored transposed
            yield name, weight.shape[1], weight.shape[0]


def _rows(linear: Iterable[Product]) -> Iterator[Finding]:
    for value, names in _by_value((name, inputs) for name, _, inputs in linear):
        dim = f"inputs of {names}"
        if value % BLOCK:
            why = f"has no quantised type for rows that are no multiple of {BLOCK}: they stay 16-bit"
            yield Finding(dim, [value], "GGUF", why, nearest_multiples(value, BLOCK))
        elif value % SUPER_BLOCK:
            why = f"K-quants need rows of multiples of {SUPER_BLOCK}: llama.cpp takes Q5_0 for Q4_K, Q8_0 for Q6_K"
            yield Finding(dim, [value], "GGUF", why, nearest_multiples(value, SUPER_BLOCK))


def _fp8(linear: Iterable[Product]) -> Iterator[Finding]:
    """The head of the vocabulary is left alone: nobody runs it in FP8."""
    body = [product for product in linear if not product[0].endswith(("lm_head", "embed_out"))]
    for which, index in (("outputs", 1), ("inputs", 2)):
        for value, names in _by_value((product[0], int(product[index])) for product in body):
            tile = FP8_TILE[index - 1]
            if value % FP8:
                why = f"cannot multiply sizes that are no multiple of {FP8}"
                yield Finding(f"{which} of {names}", [value], "FP8", why, nearest_multiples(value, FP8))
            elif value % tile:
                why = f"kernels for weights (Marlin) want a multiple of {tile}"
                yield Finding(f"{which} of {names}", [value], "FP8", why, nearest_multiples(value, tile))


def _half(linear: Iterable[Product]) -> Iterator[Finding]:
    for which, index in (("outputs", 1), ("inputs", 2)):
        for value, names in _by_value((product[0], int(product[index])) for product in linear):
            if value % HALF and value > HALF:
                why = f"in 16 bits are fast for multiples of {HALF}"
                yield Finding(f"{which} of {names}", [value], "tensor cores", why, nearest_multiples(value, HALF))


def _blocks(model: nn.Module) -> Iterator[Finding]:
    """Channels between convolutions: measured in docs/what-gets-faster.md."""
    convs = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    for value, names in _by_value((name, conv.out_channels) for name, conv in convs):
        if value % FEWEST:
            why = f"takes other kernels for what is no multiple of {FEWEST}, at half the speed"
        elif value % CHANNELS:
            why = f"pads its blocks of {CHANNELS} channels (8 without AVX-512)"
        else:
            continue
        yield Finding(f"channels of {names}", [value], "ONNX Runtime on CPUs", why, nearest_multiples(value, CHANNELS))


def _attention(model: nn.Module) -> Iterator[Finding]:
    config: Any = getattr(model, "config", None)
    sizes = [(name, int(m.head_dim)) for name, m in model.named_modules() if isinstance(_own(m, "head_dim"), int)]
    for value, names in _by_value(sizes):
        if value not in HEADS:
            good = sorted(
                {max((h for h in HEADS if h < value), default=HEADS[0]), *[h for h in HEADS if h > value][:1]}
            )
            hard = value % 8 or value > HEADS[-1]
            why = (
                "cannot take it" if hard else f"are made for {', '.join(map(str, HEADS))}; others are padded or slower"
            )
            yield Finding(f"head_dim of {names}", [value], "attention kernels", why, good)
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups:
        why = f"need a multiple of the {groups} key/value heads"
        yield Finding("num_attention_heads", [heads], "grouped queries", why, nearest_multiples(heads, groups))


def _parallel(model: nn.Module, linear: Iterable[Product]) -> Iterator[Finding]:
    """What cannot be split over 2, 4 or 8 GPUs: whole heads, and an MLP that comes out in whole columns."""
    config: Any = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    counted = [("num_attention_heads", heads)] if isinstance(heads, int) else []
    counted += [
        (n, inputs) for n, _, inputs in linear if n.endswith(("down_proj", "c_proj", "fc2")) and "attn" not in n
    ]
    for value, names in _by_value(counted):
        bad = [str(n) for n in PARALLEL if value % n]
        if bad:
            dim = names if names == "num_attention_heads" else f"inputs of {names}"
            why = f"over {' or '.join(bad)} GPUs cannot split it"
            yield Finding(dim, [value], "tensor parallelism", why, nearest_multiples(value, PARALLEL[-1]))


def _own(module: nn.Module, name: str) -> Any:
    return vars(module).get(name)


def _by_value(sizes: Iterable[tuple[str, int]]) -> list[tuple[int, str]]:
    """(size, names of what has it), names of layers that differ in numbers alone put together."""
    found: dict[int, dict[str, None]] = defaultdict(dict)
    for name, value in sizes:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
        found[value][pattern.removeprefix("model.").removeprefix("layers.*.")] = None
    return [(value, _listed(list(names))) for value, names in sorted(found.items())]


def _listed(names: Sequence[object], last: str = "and") -> str:
    """A few names in a line."""
    shown = [str(name) for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        return f"{', '.join(shown)} {last} {len(names) - _SHOWN} more"
    return f" {last} ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def nearest_multiples(value: int, of: int) -> list[int]:
    """The multiples of a number on both sides of a value; the one below only where it is above 0."""
    below = value // of * of
    return [n for n in (below, below + of) if n > 0]
