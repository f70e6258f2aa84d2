"""The steps of a recipe that write files beside the model: ONNX, INT8, and the report."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from secateur.errors import SecateurError
from secateur.methods import verbs
from secateur.recipe.options import Calibration, FileName, HeldOut
from secateur.recipe.work import Made, Work, rows_of, shown

EXPORTED = "model.onnx"
_POINTS = 12  # of a curve that are shown


def export(work: Work, *, format: Literal["onnx"] = "onnx", file: FileName = EXPORTED) -> Made:
    """Write the model as an ONNX file, which ONNX Runtime must agree with."""
    from secateur.ship.onnx import export_onnx

    model = work.model
    wide = any(p.dtype == torch.bfloat16 for p in model.parameters())
    if wide:  # ONNX Runtime has no kernels for it on CPUs
        model = copy.deepcopy(model).float()
    told = export_onnx(model, work.inputs, work.files / file, track=work.track)
    found = dataclasses.asdict(told) | {"path": file, "dtype": "float32" if wide else "as the model"}
    return Made(work.model, {"format": format, "file": file, "export": found})


def quantize(
    work: Work, *, mode: Literal["dynamic", "static"] = "dynamic", per_channel: bool = True,
    ranges: Literal["minmax", "percentile"] | None = None, exclude: Sequence[str] = (),
    file: FileName = "model_int8.onnx", data: Calibration | None = None, eval_data: HeldOut | None = None,
    **reading: Any,
) -> Made:  # fmt: skip
    """Make an INT8 file of what `export` wrote; with `eval_data`, measure it beside the model."""
    from secateur.ship.quantize import quantize_onnx

    name = next((e["file"] for e in reversed(work.entries) if e["step"] == "export"), None)
    if name is None:
        raise SecateurError("there is no exported file: put export before")
    source, target = work.made[name], work.files / file
    rows = rows_of(work, "data", data, reading) if mode == "static" else None
    told = quantize_onnx(
        source, target, mode=mode, calibration=rows, per_channel=per_channel, exclude=exclude, ranges=ranges,
        track=work.track,
    )  # fmt: skip
    found = dataclasses.asdict(told) | {"path": file}
    report: dict[str, Any] = {"mode": mode, "file": file, "of": name, "quantize": found}
    report["bytes"] = {"exported": source.stat().st_size, "quantized": target.stat().st_size}
    if eval_data is not None:
        report["quality"] = {**_beside(work, target, eval_data, reading), "data": shown(eval_data)}
    return Made(work.model, report)


def report(work: Work) -> Made:
    """Write report.md: a table of the steps before, and the curves of those that trained.

    The result gets report.html in any case, of all steps.
    """
    if not work.entries:
        raise SecateurError("there is nothing to report: put steps before")
    (work.files / "report.md").write_text(report_text(work.name, work.entries), encoding="utf-8")
    return Made(work.model, {"file": "report.md"})


def _beside(work: Work, file: Any, eval_data: Any, reading: Mapping[str, Any]) -> dict[str, Any]:
    """Quality of a file and of the model that it was made from: measure -> model and file, or their distance."""
    from secateur.measure.onnx import OnnxModel

    rows = rows_of(work, "eval_data", eval_data, {**reading, "samples": None})
    found = verbs.evaluate(OnnxModel(file), rows, against=work.model, track=work.track)
    both = [name for name in found if f"dense_{name}" in found]
    alone = {n: v for n, v in found.items() if n not in both and not n.startswith("dense_")}
    return {**{name: {"model": found[f"dense_{name}"], "int8": found[name]} for name in both}, **alone}


# --- the report ---


def report_text(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one row for each step, and after it the curve of each training.

    Args:
        name: of the model.
        entries: what the steps reported, in their order.
    """
    rows = [
        (
            *(f"{entry['number']}", entry["step"], f"{entry['size']['params']:,}", f"{entry['size']['nonzero']:,}"),
            *(quality_text(entry), f"{entry['seconds']:.1f}"),
        )
        for entry in entries
    ]
    lines = [f"# {name}, by a recipe of {len(entries)} steps", ""]
    lines += _table(("", "step", "parameters", "not zero", "quality", "seconds"), rows)
    for entry in entries:
        history = entry.get("training", {}).get("history", ())
        curve = [_flat(one) for one in history]
        if curve:
            shares = range(min(_POINTS, len(curve)))
            chosen = [curve[round(i * (len(curve) - 1) / max(1, len(shares) - 1))] for i in shares]
            columns = list(dict.fromkeys(key for one in chosen for key in one))
            lines += ["", f"## {entry['number']}. {entry['step']}", "", f"{entry['training'].get('stopped', '')}", ""]
            lines += _table(columns, [[_number(one.get(key)) for key in columns] for one in chosen])
    return "\n".join(lines) + "\n"


def _flat(one: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a history without mappings in it; what was measured on held-out data says so."""
    train, held_out = one.get("train", {}), one.get("held_out", {})
    rest = {key: value for key, value in one.items() if not isinstance(value, Mapping)}
    return {**rest, **train, **{f"held-out {key}": value for key, value in held_out.items()}}


def quality_text(entry: Mapping[str, Any]) -> str:
    """The first measure of quality that a step reported, in a few words; empty where it measured nothing."""
    for found in (entry.get("measured", {}), entry.get("quality", {}), entry.get("training", {}).get("after") or {}):
        for name in ("perplexity", "accuracy", "loss", "metric"):
            if name in found:
                value = found[name]
                if isinstance(value, Mapping):
                    value = value.get("pruned", value.get("int8"))
                return f"{name} {_number(value)}"
    best = next((one for one in entry.get("history", ()) if one["step"] == entry.get("best")), None)
    return "" if best is None else f"{entry['metric']} {_number(best['after'])}"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    return lines + [f"| {' | '.join(text.replace('|', '/') for text in row)} |" for row in rows]
