"""The steps of a recipe, the trainings among them, and the times that were measured: as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.report import values
from secateur.report.read import Run, as_list, as_map, step_name
from secateur.report.values import ARROW


@dataclass(frozen=True)
class StepRow:
    """One step of a recipe."""

    name: str
    what: str
    params: str
    nonzero: str
    quality: str
    seconds: str
    options: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Training:
    """How one training went.

    Attributes:
        name: Of the step; empty where there is only this one.
        facts: Name and value.
        columns: Of what was measured: before, after, teacher.
        rows: Measure, and a text for each column.
    """

    name: str
    facts: Sequence[tuple[str, str]]
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Bar:
    """One measured time.

    Attributes:
        name: Of the model.
        note: Its runtime.
        text: The median.
        spread: Lowest to highest.
        ratio: How many times as fast as the first.
        share: Of the longest, 0 to 1.
    """

    name: str
    note: str
    text: str
    spread: str
    ratio: str
    share: float


def steps(run: Run) -> list[StepRow]:
    """Every step of a recipe; empty for anything else."""
    return [
        StepRow(
            step_name(entry),
            _what(entry),
            values.shown(as_map(entry.get("size")).get("params")),
            values.shown(as_map(entry.get("size")).get("nonzero")),
            quality(entry),
            values.seconds(entry.get("seconds")),
            [(n, values.shown(v)) for n, v in as_map(entry.get("options")).items() if v not in (None, "", [], {})],
        )
        for entry in run.steps
    ]


def _what(entry: Mapping[str, Any]) -> str:
    """In a few words, what a step did."""
    told = as_map(entry.get("options"))
    parts = [str(entry["method"])] if isinstance(entry.get("method"), str) else []
    parts += [str(budget)] if (budget := entry.get("budget") or told.get("budget")) else []
    training = as_map(entry.get("training"))
    if training:
        parts.append(f"{values.shown(training.get('steps'))} steps")
        parts += [f"{values.short(training['tokens'])} tokens"] if training.get("tokens") else []
    parts += [f"{name}, {values.size(size)}" for name, size in as_map(entry.get("files")).items()]
    if "batch_norms_adapted" in entry:
        parts.append(f"{entry['batch_norms_adapted']} norms, {values.shown(entry.get('samples'))} samples")
    return "; ".join(parts)


def quality(entry: Mapping[str, Any]) -> str:
    """The first measure of quality that a step reported; empty where it measured nothing."""
    training = as_map(entry.get("training"))
    for found, before in (
        (as_map(entry.get("measured")), {}),
        (as_map(entry.get("quality")), {}),
        (as_map(training.get("after")), as_map(training.get("before"))),
    ):
        for name in ("perplexity", "accuracy", "metric", "loss"):
            if name in found:
                value = found[name]
                if isinstance(value, Mapping):
                    value = value.get("pruned", value.get("int8"))
                text = values.percent if name == "accuracy" else values.score
                was = f"{text(before[name])} {ARROW} " if name in before else ""
                return f"{name} {was}{text(value)}"
    if entry.get("step") == "iterative":
        for one in as_list(entry.get("history")):
            if as_map(one).get("step") == entry.get("best"):
                text = values.percent if entry.get("metric") == "accuracy" else values.score
                return f"{entry.get('metric', 'metric')} {text(as_map(one).get('after'))}"
    return ""


# --- trainings ---


def trainings(run: Run) -> list[Training]:
    """Every training of a run, the steps of `iterative` among them."""
    found = []
    told = as_map(run.report.get("distillation"))
    if told:
        found.append(_training("", told))
    for entry in run.steps:
        if as_map(entry.get("training")):
            found.append(_training(step_name(entry), as_map(entry["training"])))
        elif entry.get("step") == "iterative":
            found.append(_iterative(entry))
    return found


def _training(name: str, told: Mapping[str, Any]) -> Training:
    facts = [("steps", values.shown(told.get("steps")))]
    facts += [("tokens", values.shown(told["tokens"]))] if told.get("tokens") else []
    facts += [("highest learning rate", values.shown(told["lr"], 3))] if told.get("lr") is not None else []
    facts += [("kept", f"the weights of step {values.shown(told['best'])}")] if told.get("best") is not None else []
    facts += [("ended", str(told["stopped"]))] if told.get("stopped") else []
    facts += [("masks held", values.shown(told["masks"]))] if told.get("masks") else []
    before, after, teacher = (as_map(told.get(key)) for key in ("before", "after", "teacher"))
    columns = ["before", "after", *(["teacher"] if teacher else [])]
    rows = []
    for measure, value in after.items():
        text = values.percent if measure in ("accuracy", "top1") else values.score
        cells = [text(before.get(measure)), text(value)]
        label = "KL from the teacher" if measure == "kl" else str(measure)
        rows.append((label, [*cells, *([text(teacher.get(measure))] if teacher else [])]))
    return Training(name, facts, columns, rows)


def _iterative(entry: Mapping[str, Any]) -> Training:
    metric = str(entry.get("metric", "metric"))
    text = values.percent if metric == "accuracy" else values.score
    facts = [("metric", metric), ("of the dense model", text(entry.get("dense")))]
    facts += [("ended", str(entry["stopped"]))] if entry.get("stopped") else []
    rows = []
    for one in (as_map(own) for own in as_list(entry.get("history"))):
        best = ", kept" if one.get("step") == entry.get("best") else ""
        cells = [values.percent(one.get("sparsity")), values.shown(one.get("nonzero"))]
        cells += [text(one.get(key)) for key in ("before", "after")]
        rows.append((f"step {values.shown(one.get('step'))}{best}", cells))
    return Training(step_name(entry), facts, ["gone", "not zero", f"{metric}, before training", "after"], rows)


# --- times ---


def latency(run: Run) -> list[tuple[str, list[Bar]]]:
    """Measured times: what was timed, and a bar for each model."""
    if run.bench is not None:
        return _benched(as_list(run.bench.get("models")))
    found = []
    for name, part in run.parts():
        told = as_map(part.get("latency"))
        named = (("dense", "dense model"), ("predicted", "pruned, predicted"), ("measured", "pruned, measured"))
        times = [(label, told[key]) for key, label in named if values.number(told.get(key))]
        if len(times) > 1 and "measured" in told:
            longest, dense = max(own for _, own in times), values.number(told.get("dense"))
            ratios = [f"{dense / own:.2f}\N{MULTIPLICATION SIGN}" if dense else "" for _, own in times]
            bars = [
                Bar(label, "", values.seconds(own), "", ratio, own / longest)
                for (label, own), ratio in zip(times, ratios, strict=True)
            ]
            title = "One forward pass, timed while the model was cut"
            found.append((f"{name}: {title[0].lower()}{title[1:]}" if name else title, bars))
    return found


def _benched(models: Sequence[Any]) -> list[tuple[str, list[Bar]]]:
    told = [as_map(model) for model in models]
    found = []
    for what in dict.fromkeys(key for model in told for key in as_map(model.get("times"))):
        timed = [(model, as_map(as_map(model.get("times")).get(what))) for model in told]
        known = [(model, own, values.number(own.get("median"))) for model, own in timed]
        longest = max((median for _, _, median in known if median), default=0.0)
        bars: list[Bar] = []
        for model, own, median in known:
            if median is None:
                continue
            spread = [values.seconds(own.get(key)) for key in ("low", "high") if values.number(own.get(key))]
            faster = values.number(own.get("speedup"))
            ratio = "" if faster is None else f"{faster:.2f}\N{MULTIPLICATION SIGN}"
            spread = (
                [" to ".join(spread), "within the noise"] if bars and own.get("within_noise") else [" to ".join(spread)]
            )
            bars.append(
                Bar(
                    str(model.get("name", "")), str(model.get("runtime", "")), values.seconds(median),
                    ", ".join(filter(None, spread)), ratio, median / longest if longest else 0.0,
                )
            )  # fmt: skip
        found += [(what.capitalize(), bars)] if bars else []
    return found


def bench_sizes(run: Run) -> list[tuple[str, Sequence[str]]]:
    """Sizes that were measured beside the times: name of the model, and a text for each of `BENCH_COLUMNS`."""
    if run.bench is None:
        return []
    found: list[tuple[str, Sequence[str]]] = []
    for model in (as_map(own) for own in as_list(run.bench.get("models"))):
        cells = [values.shown(model.get("params"))]
        cells += [values.size(model.get(key)) for key in ("bytes", "bytes_compressed", "peak_memory")]
        cells.append(values.short(model.get("macs")))
        found.append((f"{model.get('name')} ({model.get('runtime', 'torch')})", cells))
    return found


BENCH_COLUMNS = ("parameters", "on disk", "compressed", "peak memory", "MACs")


def bench_notes(run: Run) -> list[str]:
    """What bench.json says in words."""
    return [str(note) for note in as_list(as_map(run.bench).get("notes"))]


def bench_setting(run: Run) -> str:
    """On what and how it was measured, in one line."""
    if run.bench is None:
        return ""
    told = {**as_map(run.bench.get("machine")), **as_map(run.bench.get("setting"))}
    return ", ".join(f"{name} {values.shown(value)}" for name, value in told.items() if value is not None)
