"""Several runs in one page: sizes, quality, options and budgets side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from secateur.report import facts, notes, values
from secateur.report.charts import Chart, Series
from secateur.report.facts import Row
from secateur.report.read import Run, as_list, as_map
from secateur.report.render import drawn, render
from secateur.report.values import MISSING

_SCALE = ("params", "nonzero", "memory", "macs", "bytes")
_LABEL = 20  # characters beside a point
_QUALITY = ("perplexity", "accuracy", "metric", "loss")


@dataclass(frozen=True)
class Cell:
    """What one run has in a row.

    Attributes:
        text: As it is shown.
        note: The change against the dense model.
        best: Whether no other run is better.
        share: Of a size, what is left of it.
    """

    text: str
    note: str = ""
    best: bool = False
    share: float | None = None


@dataclass(frozen=True)
class Line:
    """One measure of all runs."""

    label: str
    dense: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Size:
    """One size of all runs, as bars: name, text, share of the longest."""

    label: str
    bars: Sequence[tuple[str, str, float]]


def page_of(runs: Sequence[Run]) -> str:
    """The page of several runs."""
    names = _names(runs)
    tables = _tables(runs)
    same_dense, same_data = len(_dense(runs)) == 1, _same_data(runs)
    shown = _chart(names, tables, comparable=same_dense and same_data)
    return render(
        "compare.html",
        {
            "title": f"{len(runs)} runs of Secateur",
            "version": runs[0].report.get("secateur", "of an unknown version"),
            "names": list(zip(names, (run.folder for run in runs), strict=True)),
            "dense": next(iter(_dense(runs).values())) if same_dense else None,
            "warnings": _warnings(runs, names),
            "about": _about(runs),
            "lines": _lines(tables, same_dense=same_dense, same_data=same_data),
            "sizes": _sizes(names, tables, same_dense=same_dense),
            "charts": drawn([shown] if shown is not None else []),
            "options": [row for row in _options(runs) if len(row[1]) - row[1].count(MISSING) > 1],
            "own_options": [row for row in _options(runs) if len(row[1]) - row[1].count(MISSING) == 1],
            "runs": [
                (name, facts.headline(run), notes.warnings(run), facts.command(run))
                for name, run in zip(names, runs, strict=True)
            ],
        },
    )


def _tables(runs: Sequence[Run]) -> list[dict[str, Row]]:
    """The measures of each run by name; beside runs with masks, what others have left counts as not zero."""
    tables = [{row.key: row for row in facts.rows(run)} for run in runs]
    masked = next((table["nonzero"] for table in tables if "nonzero" in table), None)
    for table in tables:
        if masked is not None and "params" in table:
            table.setdefault("nonzero", replace(table["params"], key=masked.key, label=masked.label))
    return tables


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names; with what is above them where two are alike."""
    parts = [PurePath(run.folder).parts or (run.name,) for run in runs]
    found = []
    for i, own in enumerate(parts):
        others = [other for k, other in enumerate(parts) if k != i]
        depth = next((n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own))
        found.append(str(PurePath(*own[-depth:])))
    return found


def _dense(runs: Sequence[Run]) -> dict[str, str]:
    """What the runs began with: fingerprint (or the name, where there is none) -> name."""
    found: dict[str, str] = {}
    for run in runs:
        model = as_map(run.report.get("teacher")) or as_map(run.report.get("model"))
        name = str(model.get("name", "an unnamed model"))
        teacher = as_map(as_map(run.report.get("distillation")).get("settings")).get("teacher")
        found.setdefault(str(teacher or model.get("fingerprint") or name), name)
    return found


def _same_data(runs: Sequence[Run]) -> bool:
    """Whether quality was measured on the same data, wherever it was."""
    return len({_measured_on(run) for run in runs if "measured" in run.report}) < 2


def _measured_on(run: Run) -> str:
    measured, data = as_map(run.report.get("measured")), as_map(run.report.get("data"))
    counts = [f", {values.shown(measured[key])} {key}" for key in ("tokens", "samples") if measured.get(key)]
    return f"{measured.get('data') or data.get('evaluation')}{''.join(counts)}"


def _warnings(runs: Sequence[Run], names: Sequence[str]) -> list[notes.Note]:
    found = []
    dense = _dense(runs)
    if len(dense) > 1:
        begun = "; ".join(
            f"{name}: {next(iter(_dense([run]).values()))} ({next(iter(_dense([run])))[:8]})"
            for name, run in zip(names, runs, strict=True)
        )
        found.append(
            f"These runs began with {len(dense)} different dense models ({begun}): their numbers cannot be compared, "
            "and nothing is marked best."
        )
    if not _same_data(runs):
        on = "; ".join(
            f"{n}: {_measured_on(run)}" for n, run in zip(names, runs, strict=True) if "measured" in run.report
        )
        found.append(
            f"Quality was not measured on the same data ({on}): it cannot be compared, and nothing is marked best "
            "there. Measure all of them with secateur eval on one file."
        )
    unmeasured = [name for name, run in zip(names, runs, strict=True) if "measured" not in run.report]
    if unmeasured:
        found.append(f"Quality was not measured: {', '.join(unmeasured)}.")
    old = [name for name, run in zip(names, runs, strict=True) if run.old]
    if old:
        found.append(f"Written before reports had a format, so less is known of them: {', '.join(old)}.")
    return [notes.Note(text) for text in found]


def _about(runs: Sequence[Run]) -> list[Line]:
    """How each was made, in words."""
    told = [dict(facts.about(run)) for run in runs]
    keys = list(dict.fromkeys(key for own in told for key in own))
    left_out = ("dense model", "held-out tokens", "held-out samples")
    return [
        Line(key, "", [Cell(own.get(key, MISSING)) for own in told])
        for key in keys
        if key not in left_out or len({own.get(key) for own in told}) > 1
    ]


def _lines(tables: Sequence[Mapping[str, Row]], *, same_dense: bool, same_data: bool) -> list[Line]:
    """Every measure that some run has."""
    found = []
    some = list(dict.fromkeys(key for table in tables for key in table))
    order = [*(key for key in facts.ORDER if key in some), *(key for key in some if key not in facts.ORDER)]
    for key in order:
        rows = [table.get(key) for table in tables]
        first = next(row for row in rows if row is not None)
        known = [row.value for row in rows if row is not None and row.value is not None]
        dense = {row.dense for row in rows if row is not None}
        one = len(dense) == 1 and same_dense
        ranked = same_dense and (first.share is not None or same_data) and len(set(known)) > 1
        best = (max if first.higher_is_better else min)(known) if ranked else None
        cells = [
            Cell(MISSING)
            if row is None
            else Cell(
                row.now if one or row.dense == MISSING else f"{row.dense} {values.ARROW} {row.now}",
                row.change, row.value is not None and row.value == best, row.share,
            )
            for row in rows
        ]  # fmt: skip
        labels = {row.label for row in rows if row is not None}
        label = first.label if len(labels) == 1 else first.label.partition(":")[0]
        found.append(Line(label, next(iter(dense)) if one else "", cells))
    return found


def _sizes(names: Sequence[str], tables: Sequence[Mapping[str, Row]], *, same_dense: bool) -> list[Size]:
    """Sizes as bars, the dense model's first."""
    found = []
    for key in _SCALE:
        known = [(name, table[key]) for name, table in zip(names, tables, strict=True) if key in table]
        if len(known) < 2:
            continue
        dense = next((row for _, row in known if row.dense_value), None)
        bars = [("dense", dense.dense, dense.dense_value or 0.0)] if dense is not None and same_dense else []
        bars += [(name, row.now, row.value or 0.0) for name, row in known]
        longest = max(length for _, _, length in bars) or 1.0
        label = known[0][1].label.partition(":")[0]
        found.append(Size(label, [(name, text, length / longest) for name, text, length in bars]))
    return found


def _chart(names: Sequence[str], tables: Sequence[Mapping[str, Row]], *, comparable: bool) -> Chart | None:
    """Quality against size; None where less than two runs have both, or they cannot be compared."""
    if not comparable:
        return None
    for key in _QUALITY:
        points, labels, dense = [], [], None
        for name, table in zip(names, tables, strict=True):
            size, good = table.get("nonzero", table.get("params")), table.get(key)
            if size is not None and good is not None and size.value is not None and good.value is not None:
                points.append((size.value, good.value))
                labels.append(name)
                if size.dense_value is not None and good.dense_value is not None:
                    dense = (size.dense_value, good.dense_value)
        if len(points) > 1:
            series = [Series("runs", points, line=False, names=[_shortened(name) for name in labels])]
            series += [Series("dense model", [dense], line=False, big=True)] if dense is not None else []
            better = "higher" if key in ("accuracy", "metric") else "lower"
            text = f"{key.capitalize()} against size: parameters that are not zero. To the left and {better} is better."
            return Chart(text, "parameters that are not zero", key, series)
    return None


def _shortened(name: str) -> str:
    """A name that fits beside a point: its begin and its end, where names of a sweep differ."""
    half = _LABEL // 2
    return name if len(name) <= _LABEL else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def _options(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Options and parts of the budget that are not the same in all runs."""
    told: list[dict[str, str]] = []
    for run in runs:
        own = dict(facts.options(run))
        for entry in run.steps:
            prefix = f"{entry.get('number', '')}. {entry.get('step', '')}: "
            own |= {f"{prefix}{name}": values.shown(value) for name, value in as_map(entry.get("options")).items()}
        if as_list(as_map(run.report.get("made")).get("command")):
            own |= {"seed": values.shown(run.report["seed"])} if "seed" in run.report else {}
        told.append(own)
    every = list(dict.fromkeys(key for own in told for key in own))
    differ = [key for key in every if len({own.get(key, MISSING) for own in told}) > 1]
    return [(key, [own.get(key, MISSING) for own in told]) for key in differ]
