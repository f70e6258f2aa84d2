"""The heat map of a sensitivity scan: blocks x parts at the middle ratio."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import SecateurError
from secateur.methods.scan_result import Sensitivity

FORMATS = (".png", ".svg")
_WHOLE = "whole model"
_WIDE = 30.0
"""Largest over smallest increase above which colours go by the logarithm."""
_UNITS = {"kl": "KL, nats for each prediction", "loss": "loss, nats", "accuracy": "accuracy lost", "mse": "mse"}


def check_plot(path: Path | str, *, overwrite: bool = False) -> Path:
    """Check that a plot can be made; cheap, so ask before anything is measured.

    Args:
        path: of the picture, .png or .svg.
        overwrite: whether an old one may be replaced.

    Raises:
        SecateurError: for another kind of file, one that is in the way, or where matplotlib is missing.
    """
    target = Path(path).expanduser().resolve()
    if target.suffix not in FORMATS:
        raise SecateurError(f"{path}: a plot is a {' or '.join(FORMATS)} file: give it a name that ends so")
    above = next((p for p in target.parents if p.exists()), target.parent)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK) or target.is_dir():
        raise SecateurError(f"{path}: cannot be made there; choose another name")
    if target.exists() and not overwrite:
        raise SecateurError(f"{path}: exists already; choose another name, or overwrite it (--overwrite)")
    if importlib.util.find_spec("matplotlib") is None:
        raise SecateurError("a plot needs matplotlib: pip install 'secateur[report]'")
    return target


def grids(found: Sensitivity) -> dict[str, dict[str, dict[str, float]]]:
    """What is drawn: title -> {block: {part: increase at the middle ratio}}, in the order of the model.

    Axes and dropped blocks share a grid; what runs through several blocks stands in the row ``whole model``.
    """
    at = found.middle
    weights: dict[str, dict[str, float]] = {}
    for name, losses in found.losses.items():
        told = found.weights.get(name, {})
        weights.setdefault(str(told.get("block", _WHOLE)), {})[str(told.get("part", name))] = losses[at]
    structure: dict[str, dict[str, float]] = {}
    for name, entry in found.axes.items():
        if at not in entry["losses"]:
            continue
        block = entry["block"] or next((b for b in weights if name.startswith(f"{b}.")), _WHOLE)
        inside = structure.setdefault(block, {})
        part = entry["kind"]
        if part in inside or block == _WHOLE:  # several of a kind: told by name
            part = name.removeprefix(f"{block}.")
        inside[part] = entry["losses"][at]
    rows = sorted(structure, key=len, reverse=True)
    for name, loss in found.blocks.items():
        row = next((b for b in (*rows, *weights) if f"{name}.".startswith(f"{b}.")), name)
        structure.setdefault(row, {})["dropped" if row == name else f"{name.removeprefix(f'{row}.')} dropped"] = loss
    if _WHOLE in structure:
        structure[_WHOLE] = structure.pop(_WHOLE)  # the last row
    both = {f"weights, {_percent(at)} of the elements": weights, f"units of axes, {_percent(at)}; blocks": structure}
    return {title: grid for title, grid in both.items() if grid}


def draw(found: Sensitivity, path: Path | str, *, overwrite: bool = False) -> Path:
    """Draw the heat map of a scan.

    Args:
        found: the scan.
        path: of the picture, .png or .svg.
        overwrite: whether an old one may be replaced.

    Raises:
        SecateurError: as `check_plot`, and for a scan in which nothing was measured.
    """
    target = check_plot(path, overwrite=overwrite)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = grids(found)
    if not panels:
        raise SecateurError("nothing was measured, so there is nothing to draw")
    rows = max(len(grid) for grid in panels.values())
    widths = [max(1, len(_parts(grid))) for grid in panels.values()]
    figure = Figure(figsize=(3 + 0.62 * sum(widths) + 1.6 * len(panels), 2.2 + 0.32 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for place, (title, grid) in zip(axes, panels.items(), strict=True):
        _panel(figure, place, title, grid, found.measure)
    figure.suptitle(f"{found.model}: what single cuts cost", fontsize=11)
    partial = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"svg.hashsalt": "secateur"}):
            figure.savefig(partial, dpi=120, metadata={"Date": None} if target.suffix == ".svg" else {})
        partial.replace(target)
    except OSError as error:
        raise SecateurError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _panel(figure: Any, place: Any, title: str, grid: Mapping[str, Mapping[str, float]], measure: str) -> None:
    from matplotlib.colors import LogNorm

    parts = _parts(grid)
    values = np.array([[row.get(part, np.nan) for part in parts] for row in grid.values()])
    above = values[np.isfinite(values) & (values > 0)]
    wide = len(above) > 0 and above.max() > _WIDE * max(above.min(), above.max() / 1e6)
    norm = LogNorm(max(above.min(), above.max() / 1e6), above.max()) if wide else None
    image = place.imshow(np.clip(values, norm.vmin, None) if norm else values, cmap="YlOrRd", norm=norm, aspect="auto")
    place.set_xticks(range(len(parts)), parts, rotation=50, ha="right", rotation_mode="anchor", fontsize=8)
    place.set_yticks(range(len(grid)), list(grid), fontsize=8)
    place.set_title(title, fontsize=9)
    place.set_facecolor("#e8e8e8")  # where there is no such part
    figure.colorbar(image, ax=place, label=_UNITS.get(measure, measure))


def _parts(grid: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(part for row in grid.values() for part in row))


def _percent(text: str) -> str:
    return f"{100 * float(text):g}%"
