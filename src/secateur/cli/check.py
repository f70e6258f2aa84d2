"""``secateur check MODEL --against DENSE --data NEW --max-loss-increase 2%``: the gate, overall and on every slice."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import nn

from secateur.cli.models import Building, batches_from, check_sources, open_model
from secateur.cli.options import Common, Group, Reading, parse
from secateur.cli.tables import table
from secateur.errors import SecateurError
from secateur.files import check_file, write_json
from secateur.load.functions import find_function, is_constructor, names_function
from secateur.load.groups import Sliced, load_groups, sliced
from secateur.measure.gate import (
    CONFIDENCE,
    FORMAT,
    MIN_SLICE,
    Check,
    Interval,
    Part,
    Tolerance,
    Verdict,
    against_constants,
    figures_of,
    judge,
    measure_rows,
)
from secateur.measure.onnx import OnnxModel
from secateur.methods.verbs import SAMPLES, SEQ_LEN, batches_of
from secateur.ship.checkpoint import json_values

FAILED = 3
"""Exit code where a tolerance is passed."""
WORST = 10
"""Slices that the table shows; --json lists all."""
_NAME = 36
"""Characters of a slice's name in it: a longer one would push the verdict out."""


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """What may be: 2% is relative to the dense model, 0.02 absolute."""

    max_loss_increase: str | None = None
    """Of the mean loss: 2% of the dense model's, or 0.02 nats."""
    max_perplexity_increase: str | None = None
    """Of the perplexity: 5% of the dense model's, or 0.8."""
    max_accuracy_drop: str | None = None
    """Of the accuracy (of a language model: of next tokens): 1pt or 0.01 is one point, 1% is relative."""
    max_kl: str | None = None
    """KL(dense || model) for each prediction, in nats."""
    min_top1: str | None = None
    """Share of first choices that are the dense model's: 95% or 0.95."""

    def parsed(self) -> list[Tolerance]:
        """Those that are given.

        Raises:
            SecateurError: for one that is no number; names the option.
        """
        found = []
        for field in dataclasses.fields(self):
            text = getattr(self, field.name)
            if text is not None:
                found.append(_tolerance(field.name, text))
        return found


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Exit with 3 where a model has lost more than it may: on all of the data, or on a slice of it."""

    model: Annotated[str, tyro.conf.Positional]
    """A folder or hub id, a folder that was saved with a constructor, module:callable, or an .onnx file."""
    data: str
    """As for eval: text, token ids, records, or module:function that returns batches, or a mapping slice -> batches."""
    against: str | None = None
    """The dense model; any of the forms of MODEL. Without, --baseline has its figures."""
    tolerances: Annotated[Tolerances, Group] = dataclasses.field(default_factory=Tolerances)
    by: str | None = None
    """What slices the data: a field of .jsonl or .parquet records, a column of batches, class (the true class of a
    classifier's samples), or module:function (batch -> one label for each row)."""
    baseline: bool = False
    """Compare with the figures of the model's own report.json: has it drifted?"""
    max_drift: str = "1%"
    """With --baseline: how much more than the report's the loss increase may be."""
    min_slice: int = MIN_SLICE
    """Rows (or samples) of the smallest slice that is judged."""
    strict: bool = False
    """Fail where a slice is uncertain or too small to judge, too."""
    out: Path | None = None
    """A .json file for the result, beside what is printed."""
    overwrite: bool = False
    """Replace that file."""
    making: Annotated[Building, Group] = dataclasses.field(default_factory=Building)
    reading: Annotated[Reading, Group] = dataclasses.field(default_factory=Reading)
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)


def run(words: Sequence[str]) -> None:
    """Run the verb; SystemExit(3) where the gate is closed."""
    arguments = parse(Arguments, "check", words)
    common = arguments.common
    tolerances, drift = _check(arguments)
    figures = None if not arguments.baseline else _figures(arguments.model)
    model, dense, tokenizer = _models(arguments)
    track = common.track()
    data = _data(arguments, dense or model, tokenizer)
    rows = measure_rows(model, dense, data.batches, track)
    if dense is None and figures is not None:
        rows = against_constants(rows, float(figures["dense_loss"] or 0.0), figures["dense_accuracy"])
    promised = None if figures is None else _promised(figures)
    found = judge(
        rows, tolerances, data.labels, min_slice=arguments.min_slice, promised=promised, max_drift=drift,
        strict=arguments.strict,
    )  # fmt: skip
    values = _values(found, arguments, rows.unit)
    if arguments.out is not None:
        write_json(arguments.out.expanduser().resolve(), values)
    common.show(values, lambda console: _draw(console, found, arguments, rows.unit))
    if not found.passed:
        raise SystemExit(FAILED)


def _check(arguments: Arguments) -> tuple[list[Tolerance], Tolerance | None]:
    """The tolerances; raise SecateurError at once for what cannot be, before a model is loaded."""
    tolerances = arguments.tolerances.parsed()
    drift = _tolerance("max_drift", arguments.max_drift)
    if not tolerances and not arguments.baseline:
        raise SecateurError("nothing can fail: give a tolerance, such as --max-loss-increase 2%, or --baseline")
    if arguments.against is None and not arguments.baseline:
        raise SecateurError("give the dense model with --against, or --baseline for the figures of the model's report")
    if arguments.min_slice < 2:
        raise SecateurError(f"--min-slice must be at least 2, not {arguments.min_slice}: one row has no spread")
    if arguments.data == "self":
        raise SecateurError("--data self would measure a model on its own words: give held-out data")
    if arguments.out is not None:
        if arguments.out.suffix != ".json":
            raise SecateurError(f"--out {arguments.out}: the result is JSON: give a file that ends with .json")
        check_file(arguments.out, "the result", overwrite=arguments.overwrite)
    if names_function(arguments.by):
        find_function(str(arguments.by), "--by", "my_data:domain")
    check_sources(arguments.model if arguments.against is None else arguments.against, data=arguments.data)
    return tolerances, drift


def _tolerance(option: str, text: str) -> Tolerance:
    measure = option.split("_")[1]
    try:
        return Tolerance.parse("loss" if option == "max_drift" else measure, text)
    except SecateurError as error:
        raise SecateurError(f"--{option.replace('_', '-')}: {error}") from error


def _models(arguments: Arguments) -> tuple[nn.Module, nn.Module | None, Any]:
    """The model, the dense one, and the tokenizer that text is read with."""
    names = (arguments.model, arguments.against or "")
    built = [is_constructor(name) for name in names]
    if sum(built) > 1 and arguments.making != Building():
        raise SecateurError(
            "MODEL and --against are both module:callable: --weights and --model-args can be of neither"
        )
    if sum(built) == 0 and arguments.making != Building():
        raise SecateurError("--weights and --model-args go with a MODEL or --against that is module:callable")
    opened: list[tuple[Any, Any]] = []
    for name, own in zip(names, built, strict=True):
        opened.append(_open(name, arguments.making if own else Building(), arguments.common) if name else (None, None))
    (model, tokenizer), (dense, dense_tokenizer) = opened
    if dense is not None:
        small, large = (getattr(getattr(m, "config", None), "vocab_size", None) for m in (model, dense))
        if small is not None and large is not None and small != large:
            raise SecateurError(
                f"{arguments.model} has {small} tokens in its vocabulary, {arguments.against} has {large}: "
                "they cannot be compared"
            )
    return model, dense, dense_tokenizer or tokenizer


def _open(name: str, making: Building, common: Common) -> tuple[Any, Any]:
    if name.lower().endswith(".onnx"):
        return OnnxModel(name), None
    model, tokenizer, _ = open_model(name, making, device=common.device, dtype=common.dtype)
    return model, tokenizer


def _data(arguments: Arguments, model: nn.Module, tokenizer: Any) -> Sliced:
    """Batches, and the slice of each row."""
    reading, by = arguments.reading, arguments.by
    function = find_function(str(by), "--by", "my_data:domain") if names_function(by) else None
    if names_function(arguments.data):
        return sliced(batches_from(arguments.data, "--data"), function or by, reading.samples)
    if isinstance(model, OnnxModel):
        raise SecateurError(
            f"{arguments.model}: an ONNX file does not say how {arguments.data} is read: give --against a model "
            "folder, or module:function as --data"
        )
    how = dataclasses.asdict(reading)
    if by is None or function is not None:
        rows = batches_of(
            model,
            arguments.data,
            tokenizer=tokenizer,
            seed=arguments.common.seed,
            track=arguments.common.track(),
            **how,
        )
        return sliced(rows, function)
    config: Any = getattr(model, "config", None)
    if config is None:
        raise SecateurError(f"{arguments.data}: {type(model).__name__} has no config to read text for: pass batches")
    longest = getattr(config, "max_position_embeddings", None) or SEQ_LEN
    if reading.seq_len is not None and not 2 <= reading.seq_len <= longest:
        raise SecateurError(
            f"seq_len must be between 2 and the {longest} positions of the model, not {reading.seq_len}"
        )
    for option, value in (("samples", reading.samples), ("batch_size", reading.batch_size)):
        if value is not None and value < 1:
            raise SecateurError(f"{option} must be at least 1, not {value}")
    found = load_groups(
        arguments.data, str(by), tokenizer=tokenizer, vocab_size=config.vocab_size,
        seq_len=reading.seq_len or min(SEQ_LEN, longest), samples=reading.samples or SAMPLES,
        text_field=reading.text_field,
    )  # fmt: skip
    return sliced({name: list(torch.split(ids, reading.batch_size)) for name, ids in found.items()}, None)


# --- the report of the model ---


def _figures(name: str) -> dict[str, float | None]:
    """What the model's own report measured."""
    if is_constructor(name):
        raise SecateurError(f"--baseline reads the report.json of a folder, and {name} is none")
    place = Path(name).expanduser()
    file = (place.parent if name.lower().endswith(".onnx") else place) / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SecateurError(f"--baseline: {file} cannot be read ({' '.join(str(error).split())})") from error
    return figures_of(report, str(file))


def _promised(figures: dict[str, float | None]) -> tuple[float, float | None]:
    drop = None
    if figures["accuracy"] is not None and figures["dense_accuracy"] is not None:
        drop = figures["dense_accuracy"] - figures["accuracy"]
    return float(figures["loss"] or 0.0) - float(figures["dense_loss"] or 0.0), drop


# --- the result ---


def _values(found: Verdict, arguments: Arguments, unit: str) -> dict[str, Any]:
    parts = [found.overall, *found.slices]
    values: dict[str, Any] = {
        "format": FORMAT,
        "kind": "check",
        "model": arguments.model,
        "against": arguments.against or "the figures of its report",
        "data": arguments.data,
        "by": arguments.by,
        "unit": unit,
        "passed": found.passed,
        "strict": found.strict,
        "tolerances": [str(check.tolerance) for check in found.overall.checks],
        "overall": _part_values(parts[0]),
        "slices": [_part_values(part) for part in parts[1:]],
        "min_slice": arguments.min_slice,
        "confidence": {"overall": CONFIDENCE, "slice": found.confidence},
        "drift": None,
    }
    if found.drift is not None:
        values["drift"] = {**dataclasses.asdict(found.drift), "increase": _ends(found.drift.increase)}
    finite: dict[str, Any] = json_values(values)
    return finite


def _part_values(part: Part) -> dict[str, Any]:
    plain = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name not in ("checks",)}
    values = {key: _ends(v) if isinstance(v, Interval) else v for key, v in plain.items()}
    values = {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in values.items()}
    checks = [
        {
            "measure": check.tolerance.measure,
            "limit": check.tolerance.limit,
            "relative": check.tolerance.relative,
            **_ends(check.found),
            "verdict": check.verdict,
        }
        for check in part.checks
    ]
    return {**values, "verdict": part.verdict, "checks": checks}


def _ends(found: Interval) -> dict[str, float | None]:
    """An interval; null for an end that is not known."""
    low, high = (x if math.isfinite(x) else None for x in (found.low, found.high))
    return {"value": found.value, "low": low, "high": high}


def _draw(console: Console, found: Verdict, arguments: Arguments, unit: str) -> None:
    whole = found.overall
    rows = f"{whole.rows:,} rows, {whole.predictions:,} {unit}" if unit == "tokens" else f"{whole.rows:,} samples"
    against = arguments.against or "the dense model as its report has it, on other data"
    dense = "dense" if arguments.against is not None else "dense, in the report"
    table(
        console, f"{arguments.model} on {arguments.data} ({rows}), against {against}",
        ("", dense, "this model", "change", "95% interval"), _overall(whole, unit),
    )  # fmt: skip
    if whole.checks:
        lines = [(str(c.tolerance), *_shown(c), c.verdict.upper() if c.verdict == "fail" else c.verdict)
                 for c in whole.checks]  # fmt: skip
        table(console, "Tolerances, on all of the data", ("", "found", "95% interval", "verdict"), lines)
    if found.slices:
        _draw_slices(console, found, arguments)
    if found.drift is not None:
        _draw_drift(console, found)
    reasons = _reasons(found)
    if found.passed:
        console.print("passed", style="bold green")
    else:
        console.print(f"FAILED: {'; '.join(reasons)}", style="bold red", markup=False, soft_wrap=True)


def _overall(whole: Part, unit: str) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    lines.append(
        ("mean loss, nats", f"{whole.dense_loss:.4f}", f"{whole.loss:.4f}", *_signed(whole.increase, ".4f", 1))
    )
    lines.append(("  the same, relative", "", "", *_signed(whole.relative, ".2f", 100, "%")))
    if unit == "tokens":
        old, new = (math.exp(min(x, 700.0)) for x in (whole.dense_loss, whole.loss))
        lines.append(("perplexity", f"{old:.3f}", f"{new:.3f}", f"{100 * (new / old - 1):+.2f}%", ""))
    name = "right next tokens" if unit == "tokens" else "accuracy"
    known = not math.isnan(whole.dense_accuracy)
    change = f"{100 * (whole.accuracy - whole.dense_accuracy):+.2f} pt" if known else ""
    before = f"{100 * whole.dense_accuracy:.2f}%" if known else "-"
    lines.append((name, before, f"{100 * whole.accuracy:.2f}%", change, ""))
    if not math.isnan(whole.kl):
        lines.append(("KL to the dense model, nats", "0", f"{whole.kl:.4f}", "", ""))
        lines.append(("same first choice", "100%", f"{100 * whole.top1:.2f}%", "", ""))
    return lines


def _signed(found: Interval, form: str, factor: float, unit: str = "") -> tuple[str, str]:
    value, low, high = (factor * x for x in (found.value, found.low, found.high))
    if not math.isfinite(low) and not math.isfinite(high):
        return f"{value:+{form}}{unit}", "not known: too few rows"
    if not math.isfinite(low) or not math.isfinite(high):
        end = f"above {low:+{form}}" if math.isfinite(low) else f"below {high:+{form}}"
        return f"{value:+{form}}{unit}", f"{end}{unit}"
    return f"{value:+{form}}{unit}", f"{low:+{form}} to {high:+{form}}{unit}"


def _shown(check: Check) -> tuple[str, str]:
    """A value and its interval, in the unit of the tolerance."""
    tolerance = check.tolerance
    if tolerance.relative:
        return _signed(check.found, ".2f", 100, "%")
    if tolerance.measure in ("accuracy", "top1"):
        return _signed(check.found, ".2f", 100, " pt" if tolerance.measure == "accuracy" else "%")
    return _signed(check.found, ".4f", 1)


def _draw_slices(console: Console, found: Verdict, arguments: Arguments) -> None:
    # Those that failed must be seen, then those with the largest increase.
    order = ("fail", "uncertain", "pass", "small")
    shown = sorted(found.slices, key=lambda part: order.index(part.verdict))[:WORST]
    lines: list[tuple[str, ...]] = []
    for part in shown:
        worst = next((c for c in part.checks if c.verdict == part.verdict), None)
        value, interval = _shown(worst) if worst is not None else _signed(part.relative, ".2f", 100, "%")
        verdict = part.verdict.upper() if part.verdict == "fail" else part.verdict if part.checks else ""
        losses = f"{part.dense_loss:.3f} -> {part.loss:.3f}"
        name = part.name if len(part.name) <= _NAME else f"{part.name[: _NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
        lines.append((name, f"{part.rows:,}", losses, _measure(worst), value, interval, verdict))
    left = len(found.slices) - len(shown)
    if left:
        lines.append((f"... and {left} more (--json lists all)", *[""] * 6))
    sure = f"{100 * found.confidence:.4g}% interval"
    title = f"Worst slices by {arguments.by or 'the mapping of the data'}, of {len(found.slices)}"
    table(console, title, ("slice", "rows", "loss", "measure", "found", sure, "verdict"), lines)
    if not found.overall.checks:
        return
    count = Counter(part.verdict for part in found.slices)
    told = [
        f"{count['pass']} pass",
        f"{count['uncertain']} uncertain (above a tolerance, but chance may explain it)",
        f"{count['fail']} fail (chance does not)",
        f"{count['small']} too small to judge (fewer than {arguments.min_slice} rows)",
    ]
    console.print(f"slices: {', '.join(told)}", soft_wrap=True, markup=False)


def _measure(check: Check | None) -> str:
    names = {"accuracy": "accuracy drop", "kl": "KL", "top1": "differ"}
    return "loss" if check is None else names.get(check.tolerance.measure, check.tolerance.measure)


def _draw_drift(console: Console, found: Verdict) -> None:
    drift = found.drift
    if drift is None:
        return
    value, interval = _signed(drift.increase, ".4f", 1)
    console.print(
        f"the report promised a loss increase of {drift.promised:+.4f} nats; here it is {value} ({interval}); "
        f"{drift.allowed:.4f} more than promised is allowed: {_DRIFT[drift.verdict]}",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    if drift.promised_drop is not None and not math.isnan(found.overall.dense_accuracy):
        drop = found.overall.dense_accuracy - found.overall.accuracy
        console.print(
            f"the report promised an accuracy drop of {100 * drift.promised_drop:+.2f} pt; "
            f"here it is {100 * drop:+.2f} pt"
        )


_DRIFT = {
    "pass": "no drift",
    "uncertain": "more than promised, but chance may explain it",
    "fail": "it has drifted",
}


def _reasons(found: Verdict) -> list[str]:
    """Why the gate is closed, in words."""
    bad = ("fail", "uncertain", "small") if found.strict else ("fail",)
    reasons = []
    for check in found.overall.checks:
        if check.verdict in bad:
            reasons.append(f"overall {_shown(check)[0]}, where the tolerance is {check.tolerance}")
    names = [part.name for part in found.slices if part.verdict in bad]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        reasons.append(f"slices {', '.join(names[:5])}{more}")
    if found.drift is not None and found.drift.verdict in bad:
        reasons.append("the loss increase is larger than the report promised")
    return reasons
