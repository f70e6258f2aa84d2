"""Data in slices: which part of it each row belongs to, by a field of records, a column, a function or the class."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, is_pair, size_of
from secateur.load.data import Tokenizer, encoded, pack, read_records, text_of, usable_files

CLASS = "class"
"""What `by` says for the true classes of a classifier's samples."""
_COLUMNS = ("input_ids", "pixel_values", "labels")
"""Of a batch: a mapping with tensors under these names is no mapping of slices."""
By = str | Callable[[Batch], Any] | None
"""A column, `CLASS`, a function batch -> one label for each row; None = the data says it itself, or is not sliced."""


@dataclass(frozen=True)
class Sliced:
    """Batches, and the slice of each of their rows.

    Attributes:
        batches: as a model takes them.
        labels: the slice of every row, in the order of the batches; None = the data is not sliced.
    """

    batches: list[Batch]
    labels: tuple[str, ...] | None


def load_groups(
    source: str | Path,
    field: str,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    seq_len: int,
    samples: int,
    text_field: str = "text",
) -> dict[str, torch.Tensor]:
    """Read token rows from records, those of each value of a field by themselves.

    The texts of one value are packed into rows of `seq_len` tokens as `load_tokens` packs a file, and the remainder is
    dropped; where a value has not enough text for one row, its row is shorter.

    Args:
        source: a .jsonl or .parquet file, or a folder of them.
        field: whose values are the slices: text, a number, true or false.
        tokenizer: the model's.
        vocab_size: the model's vocabulary.
        seq_len: tokens in a row.
        samples: rows of each value at most, the first ones.
        text_field: the field that holds the text.

    Returns:
        Value -> int64 [rows, tokens], in the order in which they are met.

    Raises:
        SecateurError: for other data, a record without the field, or a value without two tokens of text.
    """
    files = usable_files(Path(source))
    for file in files:
        if file.suffix.lower() not in (".jsonl", ".parquet"):
            raise SecateurError(
                f"{file}: --by {field} reads a field of .jsonl or .parquet records; for other data give module:function"
            )
    if tokenizer is None:
        raise SecateurError(f"{source}: text needs the model's tokenizer, and there is none")
    need = samples * seq_len
    parts: dict[str, list[Any]] = {}
    have: dict[str, int] = {}
    for file in files:
        for where, record in read_records(file):
            value = _value(record, field, where)
            if have.get(value, 0) >= need:
                continue
            text = text_of(record, where, text_field, tokenizer)
            ids = encoded([text], tokenizer, need - have.get(value, 0), where, vocab_size)
            parts.setdefault(value, []).append(torch.from_numpy(ids))
            have[value] = have.get(value, 0) + len(ids)
    if not parts:
        raise SecateurError(f"{source}: there are no records")
    return {value: _rows(torch.cat(parts[value])[:need], f"{source}: {field} {value!r}", seq_len) for value in parts}


def _rows(stream: torch.Tensor, where: str, seq_len: int) -> torch.Tensor:
    if len(stream) >= seq_len:
        return pack(stream.numpy(), where, seq_len)
    if len(stream) < 2:
        raise SecateurError(f"{where} has no row: its text has {len(stream)} tokens, and a row needs 2; leave it out")
    return stream[None]


def _value(record: Mapping[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise SecateurError(f"{where}: no field {field!r} to slice by{nearest(field, record)}")
    value = record[field]
    if isinstance(value, list | dict):
        raise SecateurError(f"{where}: field {field!r} holds a {type(value).__name__}: slices need one value each")
    return str(value)


def sliced(data: Any, by: By, samples: int | None = None) -> Sliced:
    """Batches with the slice of every row.

    Args:
        data: batches; or a mapping slice -> batches, which are sliced so.
        by: a column of batches that are mappings (it is taken out of them), `CLASS`, or a function.
        samples: whole batches until there are so many rows, of each slice of a mapping; None = all.

    Raises:
        SecateurError: where there is no such column, no row, or not one label for each row.
    """
    if samples is not None and samples < 1:
        raise SecateurError(f"samples must be at least 1, not {samples}")
    if isinstance(data, Mapping):
        columns = [name for name in _COLUMNS if isinstance(data.get(name), torch.Tensor)]
        if columns:
            raise SecateurError(
                f"the data is one batch (it has {columns[0]}), and would be taken for slices: return a list of batches"
            )
        if by is not None:
            raise SecateurError("the data is sliced already, as a mapping of slices: leave out --by")
        batches: list[Batch] = []
        labels: list[str] = []
        for name, own in data.items():
            some = _some(own, samples, f"slice {str(name)!r}")
            batches += some
            labels += [str(name)] * sum(map(size_of, some))
        if not batches:
            raise SecateurError("the data has no slices")
        return Sliced(batches, tuple(labels))
    batches = _some(data, samples, "the data")
    if by is None:
        return Sliced(batches, None)
    found: list[str] = []
    kept: list[Batch] = []
    for index, batch in enumerate(batches):
        values, rest = _labels(batch, by, index)
        if len(values) != size_of(rest):
            raise SecateurError(f"--by gives {len(values)} labels for the {size_of(rest)} rows of batch {index}")
        found += [str(value) for value in values]
        kept.append(rest)
    return Sliced(kept, tuple(found))


def _some(data: Iterable[Batch], samples: int | None, what: str) -> list[Batch]:
    if isinstance(data, torch.Tensor):
        data = [data]
    if isinstance(data, str) or not hasattr(data, "__iter__"):
        raise SecateurError(f"{what} is a {type(data).__name__}, not batches")
    found: list[Batch] = []
    rows = 0
    for batch in data:
        found.append(batch)
        rows += size_of(batch)
        if samples is not None and rows >= samples:
            break
    if not rows:
        raise SecateurError(f"{what} has no rows")
    return found


def _labels(batch: Batch, by: str | Callable[[Batch], Any], index: int) -> tuple[Sequence[Any], Batch]:
    """One label for each row, and the batch without the column that had them."""
    if callable(by):
        try:
            return _values(by(batch), f"--by returned for batch {index}"), batch
        except SecateurError:
            raise
        except Exception as error:  # whatever the user's own code raises
            text = " ".join(str(error).split())
            raise SecateurError(f"--by raised {type(error).__name__} for batch {index}: {text[:300]}") from error
    if isinstance(batch, Mapping) and by in batch:
        return _values(batch[by], f"column {by!r} of batch {index}"), {k: v for k, v in batch.items() if k != by}
    if by == CLASS:
        targets: Any = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if is_pair(batch) else None
        if not isinstance(targets, torch.Tensor) or targets.dim() != 1 or targets.is_floating_point():
            raise SecateurError(f"--by {CLASS} needs one class number for each sample, and batch {index} has none")
        return targets.tolist(), batch
    if isinstance(batch, Mapping):
        raise SecateurError(f"batch {index} has no column {by!r} to slice by{nearest(by, map(str, batch))}")
    raise SecateurError(
        f"--by {by}: batch {index} is a {type(batch).__name__}, without columns: give {CLASS} (of a classifier), "
        "module:function, or data that returns a mapping slice -> batches"
    )


def _values(found: Any, what: str) -> Sequence[Any]:
    found = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(found, list | tuple):
        raise SecateurError(f"{what} is a {type(found).__name__}: one label for each row is needed")
    return found
