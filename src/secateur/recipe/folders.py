"""What a recipe keeps of each step, so that a second run does nothing twice: a folder and a fingerprint for each."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.choose.plan import Plan
from secateur.choose.rescore import MaskScores
from secateur.errors import SecateurError
from secateur.load.functions import is_constructor
from secateur.recipe.options import names_function
from secateur.ship import load, save
from secateur.ship.checkpoint import json_values, whole_folder

FORMAT = 1
RECORD = "step.json"
_HASHED = 2**28  # bytes up to which a file is known by its content; larger ones by size and time of change
_PIECE = 2**22


# --- fingerprints ---


@dataclass(frozen=True)
class Mark:
    """What the result of a step depends on.

    Attributes:
        number: of the step, from 1.
        name: of the step.
        parts: what it depends on, as JSON values; ``before`` is the fingerprint of the step before it.
    """

    number: int
    name: str
    parts: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the parts, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(json_values(self.parts), sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.number:02d}-{self.name}"


def mark_of(number: int, name: str, before: Mark | None, **parts: Any) -> Mark:
    """The mark of a step: what it was told, the version, and the step before."""
    known = {"step": name, "secateur": importlib.metadata.version("secateur"), **parts}
    return Mark(number, name, {**known, "before": "" if before is None else before.fingerprint})


def identity(text: str) -> Any:
    """What is known about a file, a folder, a module of a function or a hub id without reading much of it.

    Returns:
        JSON values: the SHA-256 of a file, for large ones size and time of change; for a folder, that of each of its
        files; for ``module:function``, that of the module's file; for anything else, the text itself.
    """
    if names_function(text) or is_constructor(text):
        module = text.partition(":")[0]
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        origin = None if spec is None else spec.origin
        return {text: _file(Path(origin)) if origin is not None and Path(origin).is_file() else ""}
    path = Path(text).expanduser()
    if path.is_dir():
        every = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        return {str(p.relative_to(path)): _file(p) for p in every}
    return _file(path) if path.is_file() else text


def _file(path: Path) -> str:
    found = path.stat()
    if found.st_size > _HASHED:
        return f"{found.st_size} bytes, changed at {found.st_mtime_ns}"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In a few words, what two marks do not agree on."""
    words = []
    for name in dict.fromkeys([*new, *old]):
        a, b = old.get(name), new.get(name)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            words += [f"{key} changed" for key in dict.fromkeys([*b, *a]) if a.get(key) != b.get(key)]
        elif name == "step":
            return f"it was {a}"
        else:
            words.append("a step before it changed" if name == "before" else f"{name} changed")
    return ", ".join(dict.fromkeys(words)) or "its record is of another format"


# --- the folders ---


@dataclass(frozen=True)
class Record:
    """What is kept of a step that is done.

    Attributes:
        folder: where.
        parts: of its mark.
        entry: of the report.
        changed: whether the model is another one after it; it is saved in the folder then.
        cuts: whether it has a plan of what it cut.
        trained: whether it trained.
        plan: whether that plan is in the folder: it cut something.
        scores: whether what its masks were chosen by is there too.
        files: that it wrote, by their names.
    """

    folder: Path
    parts: Mapping[str, Any]
    entry: Mapping[str, Any]
    changed: bool
    cuts: bool
    trained: bool
    plan: bool
    scores: bool
    files: tuple[str, ...]

    def load_plan(self) -> Plan:
        """The plan of what it cut; an empty one where it cut nothing."""
        return Plan.load(self.folder) if self.plan else Plan()

    def load_scores(self) -> MaskScores | None:
        """What its masks were chosen by."""
        return MaskScores.load(self.folder) if self.scores else None

    def load_model(self) -> nn.Module:
        """The model after it."""
        return load(self.folder)

    def paths(self) -> dict[str, Path]:
        """Name -> path of the files that it wrote."""
        return {name: self.folder / "files" / name for name in self.files}


class Folders:
    """The folders of the steps of one recipe, beside its result.

    Attributes:
        root: the folder that holds them.
        marks: of the steps, in order.
        fresh: whether what is there is passed over.
    """

    def __init__(self, out: Path, marks: Sequence[Mark], *, fresh: bool = False) -> None:
        place = out.expanduser()
        self.root = place.with_name(f"{place.name}.steps")
        self.marks, self.fresh = marks, fresh

    def done(self) -> list[Record]:
        """The first steps that are done already, as they are to be done."""
        found: list[Record] = []
        for mark in self.marks if not self.fresh else ():
            record = self._record(self.root / mark.folder)
            if record is None or self._mark(record.folder) != mark.fingerprint:
                break
            found.append(record)
        return found

    def why_again(self, number: int) -> str | None:
        """Why a step that was done is done again; None where it was not."""
        mark = self.marks[number - 1]
        old = next((r for p in self._of(number) if (r := self._record(p)) is not None), None)
        if old is None or self._mark(old.folder) == mark.fingerprint:
            return None
        return difference(old.parts, json_values(mark.parts))

    def state(self, number: int) -> tuple[Path, bool]:
        """The folder that a step works in until it is done, and whether a run that was cut off left it.

        Raises:
            SecateurError: It cannot be made.
        """
        mark = self.marks[number - 1]
        place = self.root / f"{mark.folder}.work"
        with self._writing(place):
            sign = place / "fingerprint"
            same = not self.fresh and sign.is_file() and sign.read_text(encoding="utf-8") == mark.fingerprint
            if not same:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                sign.write_text(mark.fingerprint, encoding="utf-8")
            shutil.rmtree(place / "files", ignore_errors=True)
            (place / "files").mkdir()
        return place, same and (place / "run").exists()

    def keep(self, number: int, model: nn.Module | None, record: Mapping[str, Any], **saved: Any) -> Record:
        """Save a step as a whole, or nothing; then what it worked in goes, and what was there of another step.

        Args:
            number: of the step.
            model: after it; None where it is that of the step before.
            record: as `Record` has it.
            saved: for `ship.save`.

        Raises:
            SecateurError: It cannot be written.
        """
        mark = self.marks[number - 1]
        place = self.root / mark.folder
        work = self.root / f"{mark.folder}.work"
        content = {"format": FORMAT, "fingerprint": mark.fingerprint, "parts": mark.parts, **record}
        with self._writing(place), whole_folder(place) as partial:
            if model is not None:
                save_into(partial, place, model, **saved)
            if record["files"]:
                shutil.copytree(work / "files", partial / "files")
            self._keep_metrics(work / "run", partial)
            text = json.dumps(json_values(content), indent=2, allow_nan=False)
            (partial / RECORD).write_text(text + "\n", encoding="utf-8")
        for other in [work, *(p for p in self._of(number) if p != place)]:
            shutil.rmtree(other, ignore_errors=True)
        found = self._record(place)
        if found is None:
            raise SecateurError(f"{place}: what was just written there is gone")
        return found

    def _keep_metrics(self, run: Path, partial: Path) -> None:
        """What TensorBoard shows outlives the training."""
        for file in sorted(run.rglob("*")) if run.is_dir() else ():
            if file.name == "metrics.jsonl" or file.name.startswith("events."):
                (partial / "metrics").mkdir(exist_ok=True)
                shutil.copyfile(file, partial / "metrics" / file.name)

    def clean(self) -> None:
        """Remove what runs that were killed while they wrote have left."""
        for path in self.root.glob(".*.partial-*") if self.root.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)

    def _of(self, number: int) -> list[Path]:
        return sorted(p for p in self.root.glob(f"{number:02d}-*") if p.is_dir()) if self.root.is_dir() else []

    def _mark(self, folder: Path) -> str:
        return str(json.loads((folder / RECORD).read_text(encoding="utf-8")).get("fingerprint"))

    def _record(self, folder: Path) -> Record | None:
        """What is kept in a folder; None where it is no folder of a step that is done."""
        try:
            content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            return None
        content.pop("fingerprint", None)
        try:
            return Record(folder, **{**content, "files": tuple(content["files"])})
        except (KeyError, TypeError):
            return None

    @contextmanager
    def _writing(self, place: Path) -> Iterator[None]:
        with as_user_error(place, f"steps that are done stay in {self.root}"):
            yield


def save_into(partial: Path, place: Path, model: nn.Module, **saved: Any) -> None:
    """Save a model into a folder that is being made for another place, which errors name."""
    try:
        save(model, partial, **saved)
    except SecateurError as error:
        raise SecateurError(str(error).replace(str(partial), str(place))) from error


@contextmanager
def as_user_error(place: Path, stays: str) -> Iterator[None]:
    """Full discs and missing rights, as one line."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno is not None else str(error)
        raise SecateurError(f"{place}: cannot be written ({reason}); {stays}") from error
