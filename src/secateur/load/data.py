"""Calibration and evaluation tokens: files, folders, hub data sets, or text that the model itself writes.

Everything ends as one int64 tensor [N, seq_len]: packed rows without padding. Packing matters: ModelOpt
measured +5.8 MMLU for calibration on packed rather than padded text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from secateur.errors import SecateurError, nearest
from secateur.load.mode import evaluating
from secateur.progress import Track, quiet

ENDINGS = (".jsonl", ".npy", ".parquet", ".txt")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
_SAMPLE_BATCH = 16  # rows that are generated together: a modest key/value cache, and still one matmul for all
_SPARE_TOKENS = 64  # the last tokens of a cut text may change with what follows them; none lies this far back

IntArray = npt.NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a document, if there is one."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a document, if there is one."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """Turn text into token ids; `verbose` warns about texts that are longer than the model's context."""
        ...


def load_tokens(
    source: str | Path,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    seq_len: int,
    samples: int | None,
    text_field: str = "text",
    split: str = "train",
) -> torch.Tensor:
    """Read token rows from a file, a folder or a hub data set.

    Text is tokenised without truncation; each document (a .txt file, a record of the other formats) begins with
    the tokenizer's BOS and ends with its EOS (once, if they are the same token), and the stream of all documents is
    cut into rows of `seq_len`; the remainder is dropped. One-dimensional .npy files join that stream as they are.
    In two-dimensional .npy files one row is one sample: rows are cut to `seq_len`, shorter ones keep their length.

    Args:
        source: A .txt, .jsonl, .parquet or .npy file; a folder of them (read recursively in sorted order, hidden
            files left out); or a `datasets` hub id, ``org/name`` or ``org/name:config``.
        tokenizer: The model's tokenizer; None is enough for .npy files.
        vocab_size: The model's vocabulary: every id must lie in [0, vocab_size).
        seq_len: Tokens per row.
        samples: The first so many rows, in order; reading stops there. None takes all. Fewer rows than asked for
            is no error: compare ``len()`` of the result.
        text_field: The field or column that holds the text. A record without it but with a ``messages`` list is
            a chat, and goes through the tokenizer's chat template.
        split: The split of a hub data set.

    Returns:
        int64 [N, seq_len] on the CPU.

    Raises:
        SecateurError: The source is missing, empty, too short for one row, of an unknown format, without the text
            field, or holds ids that the model does not have.
    """
    for name, value in (("seq_len", seq_len), ("samples", samples)):
        if value is not None and value < 1:
            raise SecateurError(f"{name} must be at least 1, not {value}")
    path = Path(source)
    hub = _hub_id(str(source), path)
    need = None if samples is None else samples * seq_len
    if hub:
        name, config = hub
        records = _hub_records(name, config, split)
        parts: Iterable[str | IntArray] = (text_of(r, where, text_field, tokenizer) for where, r in records)
        return pack(
            encoded(parts, _needed(tokenizer, str(source)), need, str(source), vocab_size), str(source), seq_len
        )
    files = usable_files(path)
    arrays = {file: _load_ids(file) for file in files if file.suffix.lower() == ".npy"}
    tables = [file for file, ids in arrays.items() if ids.ndim == 2]
    if tables:
        if len(tables) < len(files):
            other = next(file for file in files if file not in tables)
            raise SecateurError(
                f"{path}: {tables[0]} holds rows (2-D) but {other} a stream of tokens; put them into separate folders"
            )
        return _rows(arrays, vocab_size, seq_len, samples)
    if len(arrays) < len(files):
        _needed(tokenizer, str(next(file for file in files if file not in arrays)))
    parts = _file_parts(files, arrays, text_field, tokenizer)
    return pack(encoded(parts, tokenizer, need, str(path), vocab_size), str(path), seq_len)


def encoded(
    parts: Iterable[str | IntArray], tokenizer: Tokenizer | None, need: int | None, where: str, vocab_size: int
) -> npt.NDArray[np.int64]:
    """Join documents into one stream of at least `need` tokens, where there are so many, and cut it there."""
    stream: list[npt.NDArray[np.int64]] = []
    have = 0
    for part in parts:
        left = None if need is None else need - have
        if isinstance(part, str):
            ids: IntArray = np.asarray(_encode(part, _needed(tokenizer, where), left), dtype=np.int64)
        else:
            ids = part[:left]
        stream.append(_checked(ids, vocab_size, where))
        have += len(ids)
        if need is not None and have >= need:
            break
    return np.concatenate(stream)[:need] if stream else np.zeros(0, dtype=np.int64)


def pack(stream: npt.NDArray[np.int64], where: str, seq_len: int) -> torch.Tensor:
    """Cut a stream of tokens into rows, int64 [N, seq_len]."""
    rows = len(stream) // seq_len
    if rows == 0:
        raise SecateurError(
            f"{where}: {len(stream)} tokens are too few for one row of {seq_len}; give more text or a smaller seq_len"
        )
    return torch.from_numpy(stream[: rows * seq_len].reshape(rows, seq_len).copy())


def _encode(text: str, tokenizer: Tokenizer, need: int | None) -> list[int]:
    """Tokenise a document with its BOS and EOS; only about as much of it as `need` tokens take, if that is given."""
    if not text:
        return []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    length = len(text) if need is None else max(4096, 8 * need)
    while True:
        ids = list(tokenizer.encode(text[:length], add_special_tokens=False, verbose=False))
        if length >= len(text) or (need is not None and len(ids) >= need + _SPARE_TOKENS):
            break
        length *= 4
    # A chat template has often written them already.
    if bos is not None and ids[:1] != [bos] and bos != eos:
        ids.insert(0, bos)
    if eos is not None and ids[-1:] != [eos]:  # behind a cut text it lies beyond what is needed
        ids.append(eos)
    return ids


def _checked(ids: IntArray, vocab_size: int, where: str) -> npt.NDArray[np.int64]:
    """Return `ids` as int64 once each of them is known to be in the vocabulary."""
    if ids.size:
        for value in (int(ids.min()), int(ids.max())):
            if not 0 <= value < vocab_size:
                raise SecateurError(
                    f"{where}: token id {value} is outside the model's vocabulary of {vocab_size}; "
                    "use the tokenizer that belongs to the model"
                )
    return ids.astype(np.int64)


def _needed(tokenizer: Tokenizer | None, where: str) -> Tokenizer:
    """Return the tokenizer, or say that text cannot be read without one."""
    if tokenizer is None:
        raise SecateurError(
            f"{where}: text needs the model's tokenizer, and there is none; give token ids (.npy) instead"
        )
    return tokenizer


# --- files ---


def existing_file(path: Path) -> Path:
    """Return `path` if it is there.

    Raises:
        SecateurError: It is not; names the most similar file of the folder.
    """
    if path.exists():
        return path
    if not path.parent.is_dir():
        raise SecateurError(f"{path}: no such file, and no folder {path.parent}")
    names = [entry.name for entry in path.parent.iterdir()]
    hint = nearest(path.name, names) if names else f"; {path.parent} is empty"
    raise SecateurError(f"{path}: no such file or folder{hint}")


def check_source(source: str | Path) -> None:
    """Raise SecateurError where a data source is a local path with nothing to read; hub ids are not looked up."""
    if _hub_id(str(source), Path(source)) is None:
        usable_files(Path(source))


def usable_files(path: Path) -> list[Path]:
    """List the files that can be read: `path` itself, or those of the folder in sorted order."""
    existing_file(path)
    if path.is_dir():
        found = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        files = [file for file in found if file.suffix.lower() in ENDINGS]
        if not files:
            seen = ", ".join(str(file.relative_to(path)) for file in found[:8]) + (", ..." if len(found) > 8 else "")
            raise SecateurError(f"{path}: no {', '.join(ENDINGS)} file in this folder; it has {seen or 'no files'}")
    else:
        files = [path]
        if path.suffix.lower() not in ENDINGS:
            raise SecateurError(
                f"{path}: unknown ending {path.suffix!r}; calibration data is one of {', '.join(ENDINGS)}"
            )
    for file in files:
        if file.stat().st_size == 0:
            raise SecateurError(f"{file}: the file is empty")
    return files


def _file_parts(
    files: Sequence[Path], arrays: dict[Path, IntArray], text_field: str, tokenizer: Tokenizer | None
) -> Iterator[str | IntArray]:
    """Yield the documents of all files: texts, or the token ids of .npy files."""
    for file in files:
        if file in arrays:
            yield arrays[file]
        elif file.suffix.lower() == ".txt":
            yield _read_text(file)
        else:
            for where, record in read_records(file, (text_field, "messages")):
                yield text_of(record, where, text_field, tokenizer)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SecateurError(f"{path}: not UTF-8 text (byte {error.start}); convert the file first") from error


def read_records(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a .jsonl or .parquet file, each with its place ("data.jsonl line 3") for messages.

    Args:
        path: The file.
        columns: The columns that are wanted of a parquet file: the others are not read. None reads all.

    Raises:
        SecateurError: The file is not valid, or has none of `columns`.
    """
    if path.suffix.lower() == ".parquet":
        yield from _parquet_records(path, columns)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                # json.loads finds the encoding of bytes by itself, a byte order mark included
                record = json.loads(line)
            except ValueError as error:
                raise SecateurError(f"{where}: invalid JSON ({error})") from error
            if not isinstance(record, dict):
                raise SecateurError(f"{where}: a record must be a JSON object, not {type(record).__name__}")
            yield where, record


def _parquet_records(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SecateurError(f"{path}: parquet files need pyarrow; pip install 'secateur[hf]'") from error
    try:
        with pq.ParquetFile(path) as file:
            there = list(file.schema_arrow.names)
            wanted = there if columns is None else [name for name in columns if name in there]
            if not wanted:
                missing = columns[0] if columns else ""
                raise SecateurError(f"{path}: no column {missing!r}; it has {', '.join(map(repr, there)) or 'none'}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path} row {row}", record
    except (pa.ArrowException, OSError) as error:
        raise SecateurError(f"{path}: not a valid parquet file ({_one_line(error)})") from error


def text_of(record: dict[str, Any], where: str, text_field: str, tokenizer: Tokenizer | None) -> str:
    """Return the text of one record: its text field, or its chat messages through the chat template."""
    if text_field in record:
        text = record[text_field]
        if not isinstance(text, str):
            raise SecateurError(f"{where}: field {text_field!r} holds {type(text).__name__}, not text")
        return text
    if "messages" not in record:
        raise SecateurError(
            f"{where}: no field {text_field!r}; it has {', '.join(map(repr, record)) or 'none'}; set text_field"
        )
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise SecateurError(f"{where}: 'messages' must be a list of {{role, content}} objects")
    apply = getattr(tokenizer, "apply_chat_template", None)
    if apply is None or getattr(tokenizer, "chat_template", None) is None:
        raise SecateurError(
            f"{where}: holds chat messages, but the model's tokenizer has no chat template; "
            f"give the text in a field {text_field!r}"
        )
    from jinja2 import TemplateError

    try:
        return str(apply(messages, tokenize=False))
    except TemplateError as error:
        raise SecateurError(f"{where}: the chat template rejects these messages ({_one_line(error)})") from error


def _load_ids(path: Path) -> IntArray:
    """Map a .npy file of token ids, 1-D or 2-D."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise SecateurError(f"{path}: not a .npy array of numbers ({_one_line(error)})") from error
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
        raise SecateurError(
            f"{path}: token ids must be integers, not {getattr(ids, 'dtype', 'an archive')}; save them as integers"
        )
    if ids.ndim not in (1, 2):
        raise SecateurError(f"{path}: token ids must be 1-D (a stream) or 2-D (rows), not of shape {ids.shape}")
    if ids.size == 0:
        raise SecateurError(f"{path}: the array is empty, of shape {ids.shape}")
    return ids


def _rows(arrays: dict[Path, IntArray], vocab_size: int, seq_len: int, samples: int | None) -> torch.Tensor:
    """Join 2-D arrays: one row is one sample."""
    widths = {file: min(ids.shape[1], seq_len) for file, ids in arrays.items()}
    first = next(iter(arrays))
    for file, width in widths.items():
        if width != widths[first]:
            raise SecateurError(f"{file}: its rows have {width} tokens, but those of {first} have {widths[first]}")
    taken: list[npt.NDArray[np.int64]] = []
    have = 0
    for file, ids in arrays.items():
        left = None if samples is None else samples - have
        part = _checked(ids[:left, :seq_len], vocab_size, str(file))
        taken.append(part)
        have += len(part)
        if samples is not None and have >= samples:
            break
    return torch.from_numpy(np.concatenate(taken))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# --- the hub ---


def _hub_id(source: str, path: Path) -> tuple[str, str | None] | None:
    """Split ``org/name:config``; None for what is, or was meant to be, a local path."""
    match = _HUB_ID.fullmatch(source)
    local = path.exists() or path.parent.is_dir() or source.startswith(("./", "../"))
    if match is None or local or path.suffix.lower() in ENDINGS:
        return None
    return match["name"], match["config"]


def _hub_records(name: str, config: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream the records of a hub data set, each with its place for messages."""
    try:
        import datasets
    except ImportError as error:
        raise SecateurError(
            f"{name}: no such path, and hub data sets need `datasets`; pip install 'secateur[hf]'"
        ) from error
    where = f"{name}:{config}" if config else name
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
        for row, record in enumerate(stream, start=1):
            yield f"{where} row {row}", dict(record)
    # What the library and the network raise; RuntimeError: data sets that are scripts, which it no longer runs.
    except (OSError, ValueError, RuntimeError) as error:
        raise SecateurError(
            f"{where}: no such local path, and split {split!r} cannot be read from the hub ({_one_line(error)})"
        ) from error


# --- the model's own text ---


def sample_tokens(model: nn.Module, *, samples: int, seq_len: int, seed: int, track: Track = quiet) -> torch.Tensor:
    """Let the model write its own calibration rows: plain sampling at temperature 1, with a key/value cache.

    A row begins with BOS (without one, with a random token) and is one sample of `seq_len` tokens: EOS does not end
    it, so there is no padding. The settings that the model brings for generation (top-k, penalties) are left aside.
    The same seed gives the same rows; the global random state, the modes of the modules and the model's generation
    settings are as before afterwards.

    Args:
        model: A transformers causal language model.
        samples: Rows.
        seq_len: Tokens per row, BOS included.
        seed: Seed of the sampling.
        track: Progress over the batches.

    Returns:
        int64 [samples, seq_len] on the CPU.

    Raises:
        SecateurError: The model cannot generate, the rows are longer than its context, or its logits are not finite.
    """
    from transformers import GenerationConfig

    config: Any = getattr(model, "config", None)
    generate: Any = getattr(model, "generate", None)
    if config is None or generate is None or getattr(config, "is_encoder_decoder", False):
        raise SecateurError(
            f"{type(model).__name__} is no causal language model that generates; give calibration data as a file"
        )
    for name, value in (("seq_len", seq_len), ("samples", samples)):
        if value < 1:
            raise SecateurError(f"{name} must be at least 1, not {value}")
    text_config = config.get_text_config(decoder=True)
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise SecateurError(f"seq_len {seq_len} is longer than the model's context of {longest} tokens")
    holder: Any = model
    own = holder.generation_config
    bos = own.bos_token_id if own.bos_token_id is not None else getattr(text_config, "bos_token_id", None)
    device = next(model.parameters()).device
    forked = list(range(torch.cuda.device_count()))  # manual_seed reaches every one of them
    rows: list[torch.Tensor] = []
    sizes = [min(_SAMPLE_BATCH, samples - start) for start in range(0, samples, _SAMPLE_BATCH)]
    # A fresh configuration: `generate` fills what a caller leaves open from the model's own one.
    holder.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=forked):
            torch.manual_seed(seed)
            for size in track(sizes, "sampling calibration rows"):
                if bos is None:
                    prompt = torch.randint(text_config.vocab_size, (size, 1)).to(device)
                else:
                    prompt = torch.full((size, 1), bos, dtype=torch.int64, device=device)
                if not rows and not bool(torch.isfinite(holder(input_ids=prompt).logits).all()):
                    raise SecateurError(f"{type(model).__name__}: its logits are not finite, so it cannot be sampled")
                if seq_len > 1:
                    mask = torch.ones_like(prompt)
                    prompt = generate(prompt, attention_mask=mask, max_new_tokens=seq_len - 1, use_cache=True)
                rows.append(prompt.cpu())
    finally:
        holder.generation_config = own
    return torch.cat(rows)
