"""Lines and points as inline SVG: by matplotlib, with text as text and the page's own colours."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import SecateurError
from secateur.report import values
from secateur.report.read import Run, as_list, as_map, step_name

_INCHES = (5.2, 3.1)
# Stands in the drawing for a variable of the page's style, so that one drawing serves light and dark.
_COLOURS = {"ink": "#010203", "muted": "#010204", "line": "#010205", "surface": "#010206"}
_SERIES = ("#010211", "#010212", "#010213", "#010214")
_VARIABLES = {colour: f"var(--{name})" for name, colour in _COLOURS.items()} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, start=1)
}
_MARKERS = ("o", "s", "^", "D")  # not by colour alone
_FEWEST = 3  # points that make a curve worth drawing


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        label: In the legend; empty for none.
        points: (x, y).
        line: Whether they are joined.
        big: Whether they are what the reader should look at.
        names: Beside the points; empty for none.
    """

    label: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    big: bool = False
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A drawing, before it is drawn.

    Attributes:
        caption: What it shows, in words.
        x: What is on the axis below.
        y: What is on the axis at the left.
        series: What is drawn.
        svg: The drawing; empty before.
    """

    caption: str
    x: str
    y: str
    series: Sequence[Series]
    svg: str = ""


# --- what is drawn ---


def front(run: Run) -> list[Chart]:
    """What a search has seen, with what it chose."""
    found = []
    for name, part in run.parts():
        prefix = f"{name}: " if name else ""
        found += [_levels(prefix, part)] if as_map(part.get("levels")).get("front") else []
        found += [_candidates(prefix, part)] if as_map(part.get("search")).get("candidates") else []
    return [chart for chart in found if chart is not None]


def _levels(prefix: str, part: Mapping[str, Any]) -> Chart | None:
    told = as_map(part["levels"])
    target = as_map(part.get("target"))
    measure = next(iter(target), "params")
    points = _points((as_map(p).get(measure), as_map(p).get("expected")) for p in as_list(told["front"]))
    at = values.number(as_map(target.get(measure)).get("reached"))
    expected, measured = values.number(told.get("expected")), values.number(told.get("measured"))
    if len(points) < 2:
        return None
    series = [Series("least loss at a budget", points)]
    if at is not None and expected is not None:
        series.append(Series("chosen, expected", [(at, expected)], line=False, big=True))
    if at is not None and measured is not None:
        series.append(Series("chosen, measured", [(at, measured)], line=False, big=True))
    what = str(told.get("measure", "loss"))
    text = f"{prefix}the least loss that the search expects at each budget, and what it chose."
    history = [values.number(own[1]) for own in as_list(told.get("history")) if isinstance(own, list) and len(own) == 2]
    if len(history) > 1 and history[0] is not None and history[-1] is not None:
        text += f" Trials brought the measured {what} from {values.score(history[0])} to {values.score(history[-1])}."
    return Chart(_sentence(text), _MEASURES.get(measure, measure), f"loss: {_MEASURES.get(what, what)}", series)


def _candidates(prefix: str, part: Mapping[str, Any]) -> Chart | None:
    told = as_map(part["search"])
    every = [as_map(entry) for entry in as_list(told["candidates"])]
    pick = [entry for entry in every if entry.get("chosen")]
    others = _points((e.get("params"), e.get("score")) for e in every if not e.get("chosen"))
    chosen = _points((e.get("params"), e.get("score")) for e in pick)
    if len(others) + len(chosen) < 2:
        return None
    better = "higher" if told.get("higher_is_better") else "lower"
    series = [Series("candidates", others, line=False), Series("chosen", chosen, line=False, big=True)]
    text = (
        f"{prefix}the {len(every)} candidates that were measured, of {values.shown(told.get('feasible'))} within the "
        f"budget ({better} is better)."
    )
    score = str(told.get("score", "score"))
    return Chart(_sentence(text), "parameters", _MEASURES.get(score, score), [s for s in series if s.points])


_MEASURES = {
    "params": "parameters", "active_params": "parameters that a token meets", "macs": "multiply-accumulates",
    "flops": "floating-point operations", "memory": "memory, bytes", "latency": "latency, seconds",
    "kl": "KL to the dense model",
}  # fmt: skip


def curves(run: Run) -> list[Chart]:
    """How each training went: losses, and what was measured on held-out data."""
    found = []
    for name, history in histories(run):
        prefix = f"{name}: " if name else ""
        for group, what in (("train", "in training"), ("held_out", "on held-out data")):
            entries = [(one.get("step"), as_map(one.get(group))) for one in history]
            keys = dict.fromkeys(key for _, told in entries for key in told)
            for key in [k for k in keys if group == "held_out" or k == "loss"][:2]:
                points = _points((step, told.get(key)) for step, told in entries)
                if len(points) >= _FEWEST:
                    label = "KL" if key == "kl" else key
                    caption = _sentence(f"{prefix}{label} {what}.")
                    found.append(Chart(caption, "step of training", label, [Series("", points)]))
    for entry in run.steps:
        history = [as_map(one) for one in as_list(entry.get("history"))]
        if entry.get("step") == "iterative" and len(history) >= _FEWEST:
            found.append(_in_steps(entry, history))
    return found


def histories(run: Run) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Step and history of every training of a run."""
    told = as_map(run.report.get("distillation"))
    found = [("", told)] if told else []
    found += [(step_name(entry), as_map(entry.get("training"))) for entry in run.steps if entry.get("training")]
    return [(name, [as_map(one) for one in as_list(training.get("history"))]) for name, training in found]


def _in_steps(entry: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Chart:
    metric = str(entry.get("metric", "metric"))
    series = [
        Series(label, _points((100 * (values.number(one.get("sparsity")) or 0), one.get(key)) for one in history))
        for key, label in (("before", "before training"), ("after", "after training"))
    ]
    dense = values.number(entry.get("dense"))
    gone = [x for own in series for x, _ in own.points]
    if dense is not None and gone:
        series.append(Series("dense model", [(min(gone), dense), (max(gone), dense)]))
    text = f"{step_name(entry)}: {metric} as more and more goes."
    return Chart(_sentence(text), "gone, %", metric, [own for own in series if own.points])


def _points(pairs: Any) -> list[tuple[float, float]]:
    """Those of which both are finite numbers, from left to right."""
    both = [(values.number(x), values.number(y)) for x, y in pairs]
    return sorted((x, y) for x, y in both if x is not None and y is not None)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


# --- drawing ---


def svg(chart: Chart) -> str:
    """A drawing as an <svg> element: no file, no script, no date; the same bytes each time.

    Raises:
        SecateurError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError as error:
        raise SecateurError(
            f"the report has charts, and matplotlib is missing ({error}): pip install 'secateur[report]'"
        ) from error
    ink, muted, line = (_COLOURS[name] for name in ("ink", "muted", "line"))
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "secateur", "font.size": 9.5, "text.color": ink,
        "axes.edgecolor": line, "axes.labelcolor": muted, "xtick.color": muted, "ytick.color": muted,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": line,
        "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 9,
        "font.family": "DejaVu Sans", "axes.formatter.useoffset": False, "path.simplify": False,
        "text.parse_math": False,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=_INCHES, layout="constrained")
        canvas: Any = FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for number, own in enumerate(chart.series):
            _draw(axes, own, number)
        axes.set_xlabel(chart.x)
        axes.set_ylabel(chart.y)
        every = [point for own in chart.series for point in own.points]
        axes.xaxis.set_major_locator(MaxNLocator(5, integer="step" in chart.x))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        for axis, largest in ((axes.xaxis, max(abs(x) for x, _ in every)), (axes.yaxis, max(abs(y) for _, y in every))):
            if largest >= 1e4:
                axis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(0.08, 0.12)
        if any(own.label for own in chart.series):
            axes.legend(loc="best")
        text = io.StringIO()
        canvas.print_svg(text, metadata={"Date": None, "Creator": None})
    return _as_element(text.getvalue(), chart)


def _draw(axes: Any, own: Series, number: int) -> None:
    colour = _SERIES[number % len(_SERIES)]
    x, y = zip(*own.points, strict=True)
    few = len(own.points) <= 40 and not (own.line and len(own.points) == 2)
    axes.plot(
        x, y, color=colour, label=own.label or None, linewidth=1.8, linestyle="-" if own.line else "none",
        marker=_MARKERS[number % len(_MARKERS)] if few or not own.line else None,
        markersize=9 if own.big else 4.5, markerfacecolor=colour if not own.big else _COLOURS["surface"],
        markeredgecolor=colour, markeredgewidth=2.2 if own.big else 0.0, clip_on=False, zorder=3 + own.big,
    )  # fmt: skip
    for (left, top), name in zip(own.points, own.names, strict=False):
        axes.annotate(
            name, (left, top), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=9,
            color=_COLOURS["ink"],
        )  # fmt: skip


def _as_element(text: str, chart: Chart) -> str:
    """What can stand in a page: without header and metadata, with the page's colours, fonts and a name for readers."""
    from html import escape

    text = text[text.index("<svg") :]
    for needless in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        text = re.sub(needless, "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"font-family: [^;\"]+; ?", "", text)  # the page's own
    text = re.sub(r' id="(figure|axes|patch|line2d|xtick|ytick|text|legend|matplotlib[.]axis)_\d+"', "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'^<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg class="chart" role="img" viewBox="\1">', text)
    # The ids of clips and markers are made of what they hold: two drawings in one page may share them.
    name = escape(chart.caption)
    return re.sub(r"\s*\n\s*", "\n", text).replace(">", f"><title>{name}</title>", 1).strip()
