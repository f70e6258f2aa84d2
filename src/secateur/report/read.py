"""What a run left in its folder: report.json, and the plan, sensitivity.json and bench.json beside it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.choose.plan import READ
from secateur.errors import SecateurError
from secateur.methods.reporting import FORMAT

REPORT = "report.json"
_NO_WEIGHTS = ("plan.safetensors", "scores.safetensors")
_DEPTH, _MOST = 3, 500  # how far down, and among how many folders, runs are looked for


@dataclass(frozen=True)
class Run:
    """A run, as its folder tells it.

    Attributes:
        folder: As it was named.
        name: Of the folder.
        report: What report.json holds.
        plan: What plan.json holds; None where there is none.
        sensitivity: Likewise sensitivity.json.
        bench: Likewise bench.json.
        files: Name -> bytes of what lies in it.
    """

    folder: str
    name: str
    report: Mapping[str, Any]
    plan: Mapping[str, Any] | None = None
    sensitivity: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    files: Mapping[str, int] = field(default_factory=dict)

    @property
    def old(self) -> bool:
        """Whether its report was written before reports had a format."""
        return "format" not in self.report

    @property
    def weights(self) -> int | None:
        """Bytes of the files that hold the weights; None where there are none."""
        kinds = (".safetensors", ".bin")
        found = [n for name, n in self.files.items() if name.endswith(kinds) and name not in _NO_WEIGHTS]
        return sum(found) or None

    @property
    def steps(self) -> Sequence[Mapping[str, Any]]:
        """Of a recipe: what its steps reported; empty for anything else."""
        return [entry for entry in as_list(self.report.get("steps")) if isinstance(entry, Mapping)]

    def parts(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Everything that reported something of its own: (name to show, what it reported)."""
        if not self.steps:
            yield "", self.report
        for entry in self.steps:
            yield step_name(entry), entry


def read(folder: str | Path, *, shown: str | Path | None = None) -> Run:
    """Read the folder of a run.

    Args:
        folder: what prune, distill, run or `secateur.save` wrote.
        shown: what the page calls it; by default the folder as it is named.

    Raises:
        SecateurError: The folder is not there or is of no run, a file in it is damaged, or of another format.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        what = "is a file, and a run is a folder" if place.exists() else "no such folder"
        raise SecateurError(f"{folder}: {what}; give what secateur prune, distill or run has written")
    path = place / REPORT
    if not path.is_file():
        raise SecateurError(f"{folder}: no {REPORT} is in it, so it is no run{_nearby(place)}")
    report = _loaded(path)
    check_format(report, path)
    if not any(key in report for key in ("costs", "steps", "measured", "method")):
        raise SecateurError(f"{path}: this is no report of a run: it has neither costs, steps nor a method")
    named = Path(shown if shown is not None else folder)
    return Run(
        str(named),
        named.name or named.resolve().name,
        report,
        _optional(place / "plan.json", kind=None, formats=READ),
        _optional(place / "sensitivity.json", kind="sensitivity"),
        _optional(place / "bench.json", kind="bench"),
        {p.name: p.stat().st_size for p in sorted(place.iterdir()) if p.is_file()},
    )


def check_format(content: Mapping[str, Any], path: Path, formats: Sequence[int] = (FORMAT,)) -> None:
    """Raise SecateurError for a file of a format that this version does not read; none at all is of before 1."""
    found = content.get("format", FORMAT)
    if found not in formats or isinstance(found, bool):
        version = content.get("secateur", "of an unknown version")
        known = " and ".join(map(str, formats))
        raise SecateurError(
            f"{path}: written by secateur {version}, format {found!r}; this version reads format {known}: use that "
            "version, or make it again with this one"
        )


def as_list(value: Any) -> list[Any]:
    """The list that a report should have there; an empty one where it has something else."""
    return value if isinstance(value, list) else []


def as_map(value: Any) -> Mapping[str, Any]:
    """The mapping that a report should have there; an empty one where it has something else."""
    return value if isinstance(value, Mapping) else {}


def step_name(entry: Mapping[str, Any]) -> str:
    """A step of a recipe, as it is shown."""
    turn = f" (round {entry['round']})" if entry.get("round") else ""
    return f"{entry.get('number', '')}. {entry.get('step', 'step')}{turn}".removeprefix(". ")


def _optional(path: Path, *, kind: str | None, formats: Sequence[int] = (FORMAT,)) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    content = _loaded(path)
    check_format(content, path, formats)
    if kind is not None and content.get("kind") != kind:
        raise SecateurError(f"{path}: it should be of kind {kind!r}, and is of {content.get('kind')!r}; take it away")
    return content


def _loaded(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        raise SecateurError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise SecateurError(f"{path}: it holds a {type(content).__name__}, and should be a JSON object")
    return content


def _nearby(place: Path) -> str:
    """Which folders below have one, or failing that the folder above."""
    below: list[str] = []
    level = [place]
    looked = 0
    for _ in range(_DEPTH):
        level = [p for folder in level for p in _folders(folder)]
        looked += len(level)
        below += [str(p) for p in level if (p / REPORT).is_file()]
        if looked > _MOST:
            break
    if below:
        more = f" and {len(below) - 3} more" if len(below) > 3 else ""
        return f"; these are: {', '.join(below[:3])}{more}"
    if (place.parent / REPORT).is_file():
        return f"; the folder above is: {place.parent}"
    return "; give what secateur prune, distill or run has written"


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []
