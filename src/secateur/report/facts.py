"""What a run came to, in words and in one table: before and after."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.report import values
from secateur.report.read import Run, as_list, as_map
from secateur.report.values import ARROW, MISSING

_QUALITY = {"perplexity": "perplexity", "accuracy": "accuracy", "loss": "loss", "metric": "metric"}
ORDER = ("params", "active_params", "nonzero", "memory", "macs", "bytes", "perplexity", "accuracy")
"""Measures that come first in a table of several runs."""
_SIZES = {
    "params": "parameters",
    "active_params": "parameters that a token meets",
    "nonzero": "parameters that are not zero",
    "memory": "memory of the weights",
    "macs": "multiply-accumulates",
    "bytes": "files of the weights",
}


@dataclass(frozen=True)
class Row:
    """One measure, before and after.

    Attributes:
        key: What is measured.
        label: The same in words.
        dense: Of the dense model, as text.
        now: Of the result, as text.
        change: As text; empty where it says nothing.
        share: Of a size, what is left of it; None for anything else.
        value: Of the result, to compare with; lower is better but of accuracy and top1.
        dense_value: Of the dense model.
    """

    key: str
    label: str
    dense: str
    now: str
    change: str
    share: float | None = None
    value: float | None = None
    dense_value: float | None = None

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is good."""
        return self.key in ("accuracy", "top1", "metric")


def rows(run: Run) -> list[Row]:
    """The table: sizes first, then quality, then time."""
    found = [row for key, label in _SIZES.items() for row in _size(run, key, label)]
    counted = {row.key: row for row in found}
    same = counted.get("active_params"), counted.get("params")
    if same[0] is not None and same[1] is not None and same[0].value == same[1].value:
        found.remove(same[0])  # no mixture of experts
    return [*found, *_quality(run), *_latency(run)]


def costs(run: Run) -> Mapping[str, Any]:
    """Costs of the whole run; of a recipe that cuts once, those that only its cut has counted too."""
    own = dict(as_map(run.report.get("costs")))
    cuts = [entry for entry in run.steps if "costs" in entry]
    for entry in cuts if len(cuts) == 1 and as_map(cuts[0].get("options")) else ():
        size, before = as_map(entry.get("size")), as_map(own.get("params")).get("dense")
        same = as_map(own.get("params")).get("pruned") == size.get("params")
        if same and as_map(as_map(entry["costs"]).get("params")).get("dense") == before:
            own = {**entry["costs"], **own}
    distilled = as_map(as_map(run.report.get("distillation")).get("settings"))
    if distilled.get("params"):
        own["params"] = {"dense": distilled["params"], **as_map(own.get("params"))}
    return own


def _size(run: Run, key: str, label: str) -> Iterator[Row]:
    both = as_map(costs(run).get(key))
    if key == "bytes":
        both = {"dense": as_map(run.report.get("bytes")).get("dense"), "pruned": run.weights}
    dense, now = values.number(both.get("dense")), values.number(both.get("pruned"))
    if now is None:
        return
    if key == "nonzero" and all(both.get(k) == as_map(costs(run).get("params")).get(k) for k in ("dense", "pruned")):
        return  # nothing is masked
    if key == "memory" and both.get("kv_cache", run.old):
        batch, length = (values.shown(both.get(k, least)) for k, least in (("kv_batch", 1), ("kv_seq_len", 0)))
        label = f"memory: weights and KV cache of {batch} x {length} tokens"
    text = values.size if key in ("memory", "bytes") else values.shown
    share = now / dense if dense else None
    shown = (text(both.get("dense")), text(both.get("pruned")))
    yield Row(key, label, *shown, values.change(dense, now), share, now, dense)


def _quality(run: Run) -> Iterator[Row]:
    measured = as_map(run.report.get("measured"))
    for key, label in _QUALITY.items():
        if key in measured:
            yield _both(key, label, measured[key])
    for key, value in measured.items():
        if key not in (*_QUALITY, "kl", "top1") and isinstance(value, Mapping) and "pruned" in value:
            yield _both(key, key, value)
    if "kl" in measured and not isinstance(measured["kl"], Mapping):
        unit = ", nats per token" if "perplexity" in measured else ""
        text = values.score(measured["kl"])
        yield Row("kl", f"KL from the dense model{unit}", MISSING, text, "", None, values.number(measured["kl"]))
    if "top1" in measured:
        text, value = values.percent(measured["top1"]), values.number(measured["top1"])
        what = "token" if "perplexity" in measured else "class"
        yield Row("top1", f"same most likely {what} as the dense model", MISSING, text, "", None, value)


def _both(key: str, label: str, found: Any) -> Row:
    both = found if isinstance(found, Mapping) else {"pruned": found}
    dense, now = both.get("dense"), both.get("pruned")
    text, moved = (values.percent, values.points) if key == "accuracy" else (values.score, values.change)
    return Row(key, label, text(dense), text(now), moved(dense, now), None, values.number(now), values.number(dense))


def _latency(run: Run) -> Iterator[Row]:
    for _, part in run.parts():
        told = as_map(part.get("latency"))
        if "measured" in told and "dense" in told:
            dense, now = told["dense"], told["measured"]
            texts = values.seconds(dense), values.seconds(now), values.change(dense, now)
            numbers = values.number(now), values.number(dense)
            label = "latency when it was cut"
            yield Row("latency", label, *texts, None, *numbers)
            return


def headline(run: Run) -> str:
    """The result in one sentence: what is left, and what that cost."""
    table = {row.key: row for row in rows(run)}
    size = table.get("params")
    parts = []
    zeros = as_map(as_map(run.report.get("sparsity")).get("masked"))
    gone, masked = (values.number(zeros.get(key)) for key in ("zeros", "elements"))
    if gone is not None and masked:
        parts.append(f"{values.percent(gone / masked)} of the masked weights are zero")
    if size is not None and size.share is not None and (not parts or size.share < 1):
        parts.insert(0, f"{values.percent(size.share)} of the parameters")
    quality = next((table[key] for key in ("perplexity", "accuracy", "metric", "loss") if key in table), None)
    if quality is not None:
        before = f"{quality.dense} {ARROW} " if quality.dense != MISSING else ""
        parts.append(f"{quality.label} {before}{quality.now}")
    text = ", ".join(parts) or "nothing was counted and nothing was measured"
    return f"{text[0].upper()}{text[1:]}."


def about(run: Run) -> list[tuple[str, str]]:
    """What was run: name and value, of what a reader must know to judge the numbers."""
    report = run.report
    data = as_map(report.get("data"))
    found: list[tuple[str, Any]] = [
        ("dense model", as_map(report.get("teacher")).get("name") or as_map(report.get("model")).get("name")),
        ("pruned model", as_map(report.get("model")).get("name") if "teacher" in report else None),
        ("method", report.get("method")),
        ("budget", report.get("budget")),
        ("calibrated on", data.get("calibration")),
        ("trained on", data.get("training")),
        ("measured on", as_map(report.get("measured")).get("data") or data.get("evaluation")),
        ("held-out tokens", as_map(report.get("measured")).get("tokens")),
        ("held-out samples", as_map(report.get("measured")).get("samples")),
    ]
    took = as_map(report.get("seconds")).get("total")
    shown = [(name, values.shown(value)) for name, value in found if value not in (None, "", [], {})]
    return [*shown, *([("time", values.seconds(took))] if took is not None else [])]


# --- how to make it again ---


def options(run: Run) -> list[tuple[str, str]]:
    """Options that say something: name and value, alphabetically."""
    found = as_map(run.report.get("options")) or as_map(as_map(run.report.get("distillation")).get("settings"))
    return [(name, values.shown(found[name])) for name in sorted(found) if found[name] not in (None, "", [], {})]


def versions(run: Run) -> list[tuple[str, str]]:
    """What it was made with, and of which model."""
    found = as_map(as_map(run.report.get("made")).get("versions"))
    if not found and "secateur" in run.report:
        found = {"secateur": run.report["secateur"]}
    shown = [(str(name), values.shown(value)) for name, value in found.items()]
    mark = as_map(run.report.get("model")).get("fingerprint")
    of = "fingerprint of the pruned model" if "teacher" in run.report else "fingerprint of the dense model"
    return [*shown, *([(of, str(mark))] if mark else [])]


def command(run: Run) -> str | None:
    """The command that made it, as a shell takes it; None where no command did, or it was not written down."""
    import shlex

    words = as_list(as_map(run.report.get("made")).get("command"))
    return shlex.join(str(word) for word in words) or None
