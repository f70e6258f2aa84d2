"""What was cut where, how many zeros each tensor has, what each part bears: tables of bars and of shades."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.report import values
from secateur.report.read import Run, as_list, as_map

SHOWN = 40
"""Rows that are shown at once; the others are folded away."""
_COLUMNS = 9  # of a matrix of layers and tensors
_FILLED = 0.6  # share of its cells that must have something
_DECADES = 3.0  # that shades tell apart


@dataclass(frozen=True)
class Cell:
    """One number of a grid.

    Attributes:
        text: As it is shown.
        share: 0 to 1, how long its bar or how dark its shade is; None = neither.
        title: In full.
        gone: Whether what it is about is not there any more.
    """

    text: str
    share: float | None = None
    title: str = ""
    gone: bool = False


@dataclass(frozen=True)
class Grid:
    """Rows with names, columns with names.

    Attributes:
        title: Above it; empty for none.
        first: What the rows are.
        columns: What each column is.
        rows: Name, full name, cells (None where there is nothing).
        shades: Whether cells are shades; bars otherwise.
        folded: Whether it is folded away.
    """

    title: str
    first: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[Cell | None]]]
    shades: bool = False
    folded: bool = False


# --- names ---


def short_names(names: Sequence[str]) -> list[str]:
    """Dotted names without what all of them begin with, but for the last word of that: ``layers.3``."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    common = 0
    least = min(len(own) for own in parts)
    while common < least - 1 and len({own[common] for own in parts}) == 1:
        common += 1
    return [".".join(own[max(0, common - 1) :]) for own in parts]


def _without_last(names: Sequence[str]) -> list[str]:
    """Dotted names without a last word that all of them share: what it says stands in the title already."""
    heads = [name.rpartition(".")[0] for name in names]
    last = {name.rpartition(".")[2] for name in names}
    while len(last) == 1 and all(heads) and len(set(heads)) == len(heads):
        names, last = heads, {name.rpartition(".")[2] for name in heads}
        heads = [name.rpartition(".")[0] for name in heads]
    return list(names)


def place_of(name: str) -> tuple[str, str]:
    """The layer of a weight, up to its first number, and the rest: ``model.layers.3``, ``mlp.down_proj``."""
    words = name.removesuffix(".weight").split(".")
    at = next((i for i, word in enumerate(words) if word.isdigit()), None)
    if at is None or at + 1 == len(words):
        return "", ".".join(words)
    return ".".join(words[: at + 1]), ".".join(words[at + 1 :])


def _matrix(cells: Mapping[str, Cell], first: str, title: str) -> Grid | None:
    """Layers x tensors, where most layers have most tensors; None otherwise."""
    placed = {place_of(name): cell for name, cell in cells.items()}
    layers = list(dict.fromkeys(layer for layer, _ in placed))
    parts = list(dict.fromkeys(part for _, part in placed))
    if len(layers) < 2 or "" in layers or not 1 < len(parts) <= _COLUMNS:
        return None
    if len(placed) < _FILLED * len(layers) * len(parts):
        return None
    labels = short_names(layers)
    last = [part.rpartition(".")[2] for part in parts]
    columns = last if len(set(last)) == len(last) else parts
    rows = [
        (label, layer, [placed.get((layer, part)) for part in parts])
        for label, layer in zip(labels, layers, strict=True)
    ]
    return Grid(title, first, columns, rows)


def _list(cells: Mapping[str, Cell], first: str, column: str, title: str) -> Grid:
    rows = [(label, name, [cells[name]]) for label, name in zip(short_names(list(cells)), cells, strict=True)]
    return Grid(title, first, [column], rows)


def pieces(grid: Grid) -> list[Grid]:
    """A long grid as what is shown at once and what is folded away."""
    if len(grid.rows) <= SHOWN:
        return [grid]
    rest = replace(grid, title=f"{len(grid.rows) - SHOWN} more", rows=grid.rows[SHOWN:], folded=True)
    return [replace(grid, rows=grid.rows[:SHOWN]), rest]


# --- what was cut ---


def cuts(run: Run) -> list[tuple[str, Grid]]:
    """For each structural cut of the run: which step it was, and what it left of each layer or axis."""
    found = [(name, _where(as_list(part.get("where")))) for name, part in run.parts()]
    kept = [(name, grid) for name, grid in found if grid is not None]
    if not kept and run.plan is not None:
        grid = _where(_of_plan(run.plan))
        kept = [] if grid is None else [("", grid)]
    return [(name if i == 0 else "", piece) for name, grid in kept for i, piece in enumerate(pieces(grid))]


def _where(entries: Sequence[Any]) -> Grid | None:
    rows = [entry for entry in entries if isinstance(entry, Mapping) and "name" in entry]
    if not any(entry.get("dropped") or entry.get("axes") for entry in rows):
        return None
    kinds = list(dict.fromkeys(kind for entry in rows for kind in as_map(entry.get("axes"))))
    layers = any("params" in entry for entry in rows)
    found = []
    for label, entry in zip(short_names([str(entry["name"]) for entry in rows]), rows, strict=True):
        dropped = [str(name) for name in as_list(entry.get("dropped"))]
        whole = entry["name"] in dropped
        cells = [_kept(as_map(as_map(entry.get("axes")).get(kind)), "units", gone=whole) for kind in kinds]
        if layers:
            cells.insert(0, _kept(as_map(entry.get("params")), "parameters", gone=whole))
        gone = f": {'dropped' if whole else _without(str(entry['name']), dropped)}" if dropped else ""
        found.append((f"{label}{gone}", str(entry["name"]), cells))
    columns = [*(["parameters"] if layers else []), *kinds]
    return Grid("", "layer" if layers else "axis", columns, found)


def _without(name: str, dropped: Iterable[str]) -> str:
    return "no " + ", no ".join(gone.removeprefix(f"{name}.") for gone in dropped)


def _kept(both: Mapping[str, Any], what: str, *, gone: bool) -> Cell | None:
    dense, left = values.number(both.get("dense")), values.number(both.get("pruned"))
    if dense is None or left is None or not dense:
        return None
    if gone or not left:
        return Cell("0%", 0.0, f"0 of {dense:,.0f} {what}", gone=True)
    share = left / dense
    text = "100%" if share == 1 else f"{min(99.0, 100 * share):.0f}%"
    return Cell(text, share, f"{left:,.0f} of {dense:,.0f} {what}")


def _of_plan(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries of a report that has none, from what its plan says of the axes that were cut."""
    dropped = [str(name) for name in as_list(plan.get("dropped"))]
    rows: dict[str, dict[str, Any]] = {}
    for name, axis in as_map(plan.get("axes")).items():
        layer, _ = place_of(name)
        home = layer if str(as_map(axis).get("kind")) != "channels" and layer else name
        row = rows.setdefault(home, {"name": home, "dropped": [], "axes": {}})
        size = row["axes"].setdefault(str(axis.get("kind")), {"dense": 0, "pruned": 0})
        size["dense"] += axis.get("size") or 0
        size["pruned"] += axis.get("kept") or 0
    for name in dropped:
        home = place_of(f"{name}.")[0] or name
        rows.setdefault(home, {"name": home, "dropped": [], "axes": {}})["dropped"].append(name)
    return sorted(rows.values(), key=lambda row: _natural(row["name"]))


def _natural(name: str) -> list[tuple[int, str]]:
    """For sorting: numbers in a name by their value."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


# --- zeros ---


def zeros(run: Run) -> list[tuple[str, Grid]]:
    """For each masking of the run: which step it was, and the share of zeros of each tensor."""
    found = []
    parts = list(run.parts())
    if run.steps and not any(as_map(part.get("sparsity")).get("tensors") for _, part in parts):
        parts = [("", run.report)]
    for name, part in parts:
        cells = {}
        for tensor, count in as_map(as_map(part.get("sparsity")).get("tensors")).items():
            whole, gone = values.number(as_map(count).get("elements")), values.number(as_map(count).get("zeros"))
            if whole and gone is not None:
                cells[tensor] = Cell(
                    values.percent(gone / whole), gone / whole, f"{gone:,.0f} of {whole:,.0f} are zero"
                )
        if cells:
            grid = _matrix(cells, "layer", "") or _list(cells, "tensor", "zeros", "")
            found += [(name if i == 0 else "", piece) for i, piece in enumerate(pieces(grid))]
    return found


# --- sensitivity ---


def sensitivity(run: Run) -> list[Grid]:
    """What cuts of one part alone cost, as measured: of axes, weights and blocks, whichever there are."""
    told = run.sensitivity
    if told is not None:
        axes = {str(name): as_map(axis) for name, axis in as_map(told.get("axes")).items()}
        blocks = as_map(told.get("blocks"))
        return [*_of_axes(axes), *_of_blocks(blocks), *_of_weights(as_map(told.get("losses")))]
    for _, part in run.parts():
        table = as_map(part.get("sensitivity"))
        axes = {str(name): {"losses": _shares(as_map(sizes))} for name, sizes in table.items()}
        grids = _of_axes({name: axis for name, axis in axes.items() if axis["losses"]})
        if grids:
            return grids
    return []


def sensitivity_note(run: Run) -> str:
    """What the numbers of `sensitivity` are, in a sentence or two."""
    told = run.sensitivity
    if told is None:
        scores = [as_map(part.get("score")).get("name") for _, part in run.parts() if part.get("sensitivity")]
        by = f" by the score {scores[0]}" if scores and scores[0] else ""
        return f"What is lost{by} where one axis alone is cut, to several sizes."
    parts = [f"increase of {told['measure']}"] if told.get("measure") else []
    parts += [f"on {told['data']}"] if told.get("data") else []
    text = "What cutting each part alone costs" + (f": {', '.join(parts)}" if parts else "") + "."
    passes, naive = (values.number(as_map(told.get("cost")).get(key)) for key in ("passes", "naive"))
    if passes and naive:
        few, many = values.shown(passes, 3), values.shown(naive, 3)
        text += f" Measured with {few} passes over the data; one by one it takes {many}."
    return text


def _shares(sizes: Mapping[str, Any]) -> dict[str, float]:
    """Losses by the share that goes, in tenths, from losses by the size that stays."""
    known = {int(size): loss for size, loss in sizes.items() if size.isdigit() and values.number(loss) is not None}
    whole = max(known, default=0)
    found: dict[str, float] = {}
    for size in sorted(known, reverse=True):
        if size < whole:
            found[f"{max(1, round(10 * (1 - size / whole))) / 10:g}"] = known[size]
    return found


def _of_axes(axes: Mapping[str, Mapping[str, Any]]) -> list[Grid]:
    """One grid for each kind of axis: a row for each axis, a column for each share."""
    kinds: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, axis in axes.items():
        kinds.setdefault(str(axis.get("kind", "")), {})[name] = as_map(axis.get("losses"))
    shade = _shader(loss for own in kinds.values() for losses in own.values() for loss in losses.values())
    found = []
    for kind, own in kinds.items():
        shares = sorted({share for losses in own.values() for share in losses}, key=_as_float)
        rows = [
            (label, name, [shade(own[name].get(share)) for share in shares])
            for label, name in zip(short_names(_without_last(list(own))), own, strict=True)
        ]
        columns = [f"{values.percent(_as_float(share), 0)} gone" for share in shares]
        found += pieces(Grid(kind, "axis", columns, rows, shades=True))
    return found


def _of_weights(losses: Mapping[str, Any]) -> list[Grid]:
    """A matrix of layers and tensors for each share, the highest first; a list where there is no such matrix."""
    shares = sorted({share for own in losses.values() for share in as_map(own)}, key=_as_float)
    shade = _shader(loss for own in losses.values() for loss in as_map(own).values())
    found: list[Grid] = []
    for share in reversed(shares):
        cells = {str(name): shade(as_map(own).get(share)) for name, own in losses.items()}
        title = f"weights, {values.percent(_as_float(share), 0)} zero"
        grid = _matrix({name: cell for name, cell in cells.items() if cell is not None}, "layer", title)
        if grid is not None:
            found.append(replace(grid, shades=True, folded=bool(found)))
    if found or not shares:
        return found
    rows = [
        (label, str(name), [shade(as_map(losses[name]).get(share)) for share in shares])
        for label, name in zip(short_names([str(name) for name in losses]), losses, strict=True)
    ]
    columns = [f"{values.percent(_as_float(share), 0)} zero" for share in shares]
    return pieces(Grid("weights", "weight", columns, rows, shades=True))


def _of_blocks(blocks: Mapping[str, Any]) -> list[Grid]:
    shade = _shader(blocks.values())
    rows = [(label, str(n), [shade(blocks[n])]) for label, n in zip(short_names(list(blocks)), blocks, strict=True)]
    return pieces(Grid("dropped whole", "block", ["gone"], rows, shades=True)) if rows else []


def _shader(losses: Iterable[Any]) -> Any:
    """A function that makes a cell of a loss; shades are logarithmic, over three decades at most."""
    positive = [loss for loss in (values.number(own) for own in losses) if loss is not None and loss > 0]
    high = max(positive, default=1.0)
    low = max(min(positive, default=high), high / 10**_DECADES)
    wide = math.log(high / low) if high > low else 1.0

    def cell(loss: Any) -> Cell | None:
        if loss is None:
            return None
        found = values.number(loss)
        if found is None:
            return Cell(values.shown(loss), 1.0, values.shown(loss))
        share = 0.0 if found <= low else math.log(found / low) / wide
        return Cell(values.score(found), round(share, 3), values.shown(found, 6))

    return cell


def _as_float(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.inf
