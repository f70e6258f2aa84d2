"""Train pydoc-llama again from scratch: corpus, tokenizer, model, perplexity.

Run from the repository root, with the documentation sources of Python 3.11 (see the README beside this file)::

    .venv/bin/python examples/models/pydoc-llama/train.py --docs python3.11/html/_sources --out out/pydoc-llama

Without ``--docs`` the corpus is the standard library alone, which is another corpus: its perplexity cannot be compared.
"""

import argparse
import hashlib
import math
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

HERE = Path(__file__).resolve().parent
END = "<|endoftext|>"  # token 0: it begins every file
ROW = 256  # tokens in one sample, everywhere
CALIB_ROWS, VAL_ROWS = 512, 320
STDLIB_LEFT_OUT = {"test", "encodings", "lib2to3", "pydoc_data", "site-packages"}
# The split hashes the path a file had in Debian's python3.11-doc package, whatever folder it lies in now.
DOCS_PREFIX = "usr/share/doc/python3.11/html/_sources/"

Ids = npt.NDArray[np.uint16]


class Source(NamedTuple):
    """One text file of the corpus, and the path that decides its split."""

    name: str
    text: str

    @property
    def validates(self) -> bool:
        """True for about 4% of the names: those whose MD5 is 0 modulo 25."""
        return int(hashlib.md5(self.name.encode()).hexdigest(), 16) % 25 == 0


def docs_sources(folder: Path) -> list[Source]:
    """Read every ``.rst`` or ``.rst.txt`` under `folder`, sorted by name."""
    found = []
    for path in (*folder.rglob("*.rst"), *folder.rglob("*.rst.txt")):
        name = path.relative_to(folder).as_posix().removesuffix(".txt") + ".txt"
        found.append(Source(DOCS_PREFIX + name, path.read_text("utf8", "replace")))
    return sorted(found)


def stdlib_sources(folder: Path) -> list[Source]:
    """Read every ``.py`` under `folder` that is not in a left-out folder, sorted by name."""
    found = []
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder)
        if not STDLIB_LEFT_OUT.intersection(name.parts):
            found.append(Source(name.as_posix(), path.read_text("utf8", "replace")))
    return sorted(found)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE whose token 0 is ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, sources: Iterable[Source]) -> Ids:
    """Return the ids of all files in one line, each file after a token 0."""
    ids: list[int] = []
    for source in sources:
        ids.append(0)
        ids.extend(tokenizer.encode(source.text).ids)
    return np.array(ids, dtype=np.uint16)


def rows(ids: Ids, count: int, what: str) -> Tensor:
    """Cut the first `count` rows of 256 tokens, int64 [rows, 256]; fewer where the text is short.

    Raises:
        SystemExit: the text has not one whole row.
    """
    count = min(count, len(ids) // ROW)
    if count == 0:
        sys.exit(f"train.py: the {what} split has {len(ids)} tokens, less than one row of {ROW}: give a larger corpus")
    return torch.from_numpy(ids[: count * ROW].astype(np.int64)).view(count, ROW)


def save_data(tokenizer: Tokenizer, sources: Sequence[Source], out: Path) -> tuple[Ids, Ids]:
    """Write train_ids, val_ids and calib_ids; return the ids of the two splits."""
    train = encode(tokenizer, (s for s in sources if not s.validates))
    val = encode(tokenizer, (s for s in sources if s.validates))
    order = np.random.default_rng(0).permutation(len(train) // ROW)[:CALIB_ROWS]
    calib = rows(train, len(train), "training").numpy()[order].astype(np.uint16)
    for name, ids in (("train", train), ("val", val), ("calib", calib)):
        np.save(out / f"{name}_ids.npy", ids)
        print(f"{name}_ids.npy: {ids.size:,} tokens")
    return train, val


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Fraction of the peak learning rate: 50 steps of warm-up, then a cosine to 5%."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / 50) * (0.05 + 0.95 * cosine)


def fit(model: Any, train: Ids, *, steps: int, batch: int, seed: int) -> None:
    """Take `steps` optimiser steps of `batch` random rows, in bf16 autocast."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.from_numpy(train.astype(np.int64))
    opts = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(opt, lambda step: rate(step, steps)) for opt in opts]
    model.train()
    began = time.perf_counter()
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - ROW + 1, (batch,), generator=generator)
        ids_BL = text[starts[:, None] + torch.arange(ROW)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, schedule in zip(opts, schedules, strict=True):
            opt.step()
            schedule.step()
            opt.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)


@torch.no_grad()
def perplexity(model: Any, rows_NL: Tensor) -> float:
    """Return exp(mean next-token loss) over int64 rows [N, 256], each row on its own."""
    model.eval()
    total = 0.0
    for start in range(0, len(rows_NL), 16):
        ids_BL = rows_NL[start : start + 16]
        total += model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss.item() * len(ids_BL)
    return math.exp(total / len(rows_NL))


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the tokenizer and the ids")
    parser.add_argument("--docs", type=Path, help="folder with the .rst (or .rst.txt) sources of the documentation")
    parser.add_argument(
        "--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of the standard library"
    )
    parser.add_argument("--steps", type=int, default=3491)
    parser.add_argument("--batch", type=int, default=16, help="rows of 256 tokens in one step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or args.batch < 1:
        parser.error(f"--steps and --batch must be at least 1, got {args.steps} and {args.batch}")
    return args


def main() -> None:
    """Build the corpus, train, save, measure."""
    from transformers import AutoConfig, LlamaForCausalLM, TokenizersBackend

    args = options()
    sources = stdlib_sources(args.stdlib)
    if not sources:
        sys.exit(f"train.py: no .py file under --stdlib {args.stdlib}")
    if args.docs is None:
        print("note: no --docs, so this corpus is the standard library alone: not the one of the bundled model")
    else:
        docs = docs_sources(args.docs)
        if not docs:
            sys.exit(f"train.py: no .rst or .rst.txt file under --docs {args.docs}")
        sources = docs + sources
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(sources):,} files, {sum(s.validates for s in sources)} for validation")

    config = AutoConfig.from_pretrained(HERE)
    tokenizer = train_tokenizer((s.text for s in sources if not s.validates), config.vocab_size)
    train, val = save_data(tokenizer, sources, args.out)
    TokenizersBackend(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(args.out)
    val_NL = rows(val, VAL_ROWS, "validation")

    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config).float()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    fit(model, train, steps=args.steps, batch=args.batch, seed=args.seed)
    model.to(torch.bfloat16).save_pretrained(args.out)
    print(f"validation perplexity {perplexity(model.float(), val_NL):.2f} over {len(val_NL)} rows of {ROW}")


if __name__ == "__main__":
    main()
