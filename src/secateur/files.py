"""Files of results: JSON, written whole or not at all, and never over something else."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError


def check_file(
    path: Path | str, what: str, *, overwrite: bool = False, known: Callable[[Path], object] | None = None
) -> Path:
    """Check that a file may be written there; cheap, so ask before anything is measured.

    Args:
        path: of the file to make.
        what: it is, for messages, such as "a latency table".
        overwrite: whether an old one may be replaced.
        known: reads an old one, and raises where it is something else; None = any file may be replaced.

    Returns:
        The absolute path.

    Raises:
        SecateurError: Something is in the way, and how to get around it.
    """
    target = Path(path).expanduser().resolve()
    above = next((p for p in target.parents if p.exists()), target.parent)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise SecateurError(f"{path}: cannot be made, because {above} is not a folder that can be written to")
    if target.is_dir():
        raise SecateurError(f"{path}: is a folder, and {what} is a file; choose another name")
    if target.exists() and not overwrite:
        raise SecateurError(f"{path}: exists already; choose another name, or overwrite it (--overwrite)")
    if target.exists() and known is not None:
        known(target)
    return target


def write_json(target: Path, values: Mapping[str, Any] | Sequence[Any], *, sort_keys: bool = False) -> None:
    """Write a JSON file, whole or not at all; its folder is made.

    Raises:
        SecateurError: It cannot be written.
        ValueError: A number is not finite.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    text = json.dumps(values, indent=1, sort_keys=sort_keys, allow_nan=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())  # else it may be empty after a power cut
        partial.replace(target)
    except OSError as error:
        raise SecateurError(f"{target}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path | str, what: str) -> Any:
    """What a JSON file holds.

    Raises:
        SecateurError: It is not there, or not JSON.
    """
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SecateurError(f"{path}: is no readable {what}: {error}") from error
