"""Exported files: where they may be written, and that they appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import SecateurError

DATA = ".data"
"""What the name of the file with the tensors of a large model ends with, after that of the .onnx file."""
LIMIT = 1_800_000_000
"""Bytes of tensors up to which an ONNX model is one file: protobuf ends at 2 GiB."""
SUFFIXES = {".onnx": "an ONNX file", ".xml": "an OpenVINO model", ".pt2": "a torch.export file", ".json": "a list"}


def check_file(out: Path, *, overwrite: bool, suffix: str = ".onnx") -> Path:
    """Check that a file may be written; returns its absolute path.

    Args:
        out: the file.
        overwrite: whether an old one is replaced.
        suffix: what it must end in.

    Raises:
        SecateurError: for another ending, or what is in the way.
    """
    if out.suffix != suffix:
        raise SecateurError(f"{out}: {SUFFIXES[suffix]} must end in {suffix}")
    target = out.expanduser().resolve()
    above = next(p for p in target.parents if p.exists())
    if not above.is_dir():
        raise SecateurError(f"{out}: cannot be made, because {above} is a file")
    if target.is_dir():
        raise SecateurError(f"{out}: is a folder; choose another name")
    for path in (target, tensors_of(target)):
        if path.exists() and not overwrite:
            name = out if path == target else path
            raise SecateurError(
                f"{name}: exists already; choose another name, or overwrite it (overwrite=True, --overwrite)"
            )
    return target


def tensors_of(path: Path) -> Path:
    """The file beside an exported one that has its tensors: always of OpenVINO's, of others where they are large."""
    return path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(path.name + DATA)


def bytes_of(path: Path) -> int:
    """Bytes of an exported file, with those of the file of its tensors."""
    data = tensors_of(path)
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


@contextmanager
def whole_files(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`; at the end its file of that name and that of its tensors take their places.

    Nothing is left of them where that fails, and an old file stays as it was.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    stale = tensors_of(target)
    data = partial / stale.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        if data.exists():
            target.unlink(missing_ok=True)  # an old graph must not be seen with new tensors
            data.replace(stale)
            (partial / target.name).replace(target)
        else:
            (partial / target.name).replace(target)
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise SecateurError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
