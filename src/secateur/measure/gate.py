"""The gate: how much worse a model is than the dense one, overall and on every slice of the data, and whether it may.

All measures are ratios of sums over rows (or samples): of losses, of predictions. Their intervals are paired: what
varies from row to row is the difference of the two models on the same row, by Fieller's theorem for a ratio (1954),
with Student's t. Rows are taken to be independent; tokens of one row are not.
"""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, output_of
from secateur.load.mode import evaluating
from secateur.measure.classify import labelled, sample_sums
from secateur.measure.quality import SUMS, logits_of, row_sums
from secateur.progress import Track, quiet

FORMAT = 1
MEASURES = {
    "loss": "loss increase",
    "perplexity": "perplexity increase",
    "accuracy": "accuracy drop",
    "kl": "KL to the dense model",
    "top1": "first choices that differ",
}
"""Measure -> what its value is; all are 0 for the dense model, and higher is worse."""
CONFIDENCE = 0.95
MIN_SLICE = 10
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(%|pts?|nats?)?", re.IGNORECASE)
_UNITS = {"loss": ("%", "nat"), "perplexity": ("%",), "accuracy": ("%", "pt"), "kl": ("nat",), "top1": ("%", "pt")}


@dataclass(frozen=True)
class Tolerance:
    """How much worse a model may be.

    Attributes:
        measure: one of `MEASURES`.
        limit: the largest value that passes: nats of loss and KL, perplexity, or a share of predictions; for a relative
            one a share of the dense model's.
        relative: whether it is relative to the dense model's.
    """

    measure: str
    limit: float
    relative: bool = False

    @staticmethod
    def parse(measure: str, text: str) -> "Tolerance":
        """Read ``2%`` (relative), ``0.02`` (absolute) or, of accuracies, ``1pt`` (percentage points).

        For ``top1`` the text is the least agreement that passes: ``99%`` or ``0.99``.

        Raises:
            SecateurError: for what is no such number.
        """
        match = _NUMBER.fullmatch(text.strip())
        units = _UNITS[measure]
        unit = (match[2] or "").lower().rstrip("s") if match else ""
        if match is None or (unit and unit not in units):
            known = {"%": "2%", "pt": "1pt", "nat": "0.02nats"}
            also = "".join(f" or {known[u]}" for u in units)
            raise SecateurError(f"the tolerance {text!r} for {measure} is no number, such as 0.02{also}")
        number = float(match[1])
        if not math.isfinite(number):
            raise SecateurError(f"the tolerance {text!r} for {measure} is infinite: nothing could fail it")
        if measure == "top1":
            least = number / 100 if unit else number
            if least > 1:
                raise SecateurError(f"the agreement {text!r} is above 1: write 99% or 0.99")
            return Tolerance(measure, 1 - least)
        limit = number / 100 if unit in ("%", "pt") else number
        if measure == "accuracy" and limit >= 1:
            raise SecateurError(
                f"the accuracy drop {text!r} is all there is, and nothing could fail it: write 1pt (a percentage "
                "point) or 0.01"
            )
        return Tolerance(measure, limit, relative=unit == "%")

    def __str__(self) -> str:
        what = MEASURES[self.measure]
        if self.relative:
            return f"{what} of at most {100 * self.limit:g}% of the dense model's"
        if self.measure in ("accuracy", "top1"):
            return f"{what} of at most {100 * self.limit:g} {'points' if self.measure == 'accuracy' else '%'}"
        return f"{what} of at most {self.limit:g}{'' if self.measure == 'perplexity' else ' nats'}"


@dataclass(frozen=True)
class Rows:
    """What single rows add up to.

    Attributes:
        sums: float64 [N, 7], in the order of `quality.SUMS`.
        unit: what is predicted: tokens or samples.
        paired: whether the dense model was run on the same rows; else its columns are constants from a report.
    """

    sums: torch.Tensor
    unit: str
    paired: bool

    def column(self, name: str) -> torch.Tensor:
        """One of the sums, [N]."""
        return self.sums[:, SUMS.index(name)]

    def some(self, places: Sequence[int]) -> "Rows":
        """Those rows alone."""
        return Rows(self.sums[list(places)], self.unit, self.paired)


def measure_rows(model: nn.Module, dense: nn.Module | None, batches: Sequence[Batch], track: Track = quiet) -> Rows:
    """Run a model, and the dense one if there is one, and add up what each row predicts.

    Args:
        model: a language model or a classifier; an `OnnxModel` will do.
        dense: what it was made from.
        batches: token rows or mappings; of a classifier (inputs, targets) or mappings with one label for each sample.
        track: progress over the batches.

    Raises:
        SecateurError: where nothing is predicted, models cannot be compared, or logits are not finite.
    """
    classes = labelled(batches)
    found: list[torch.Tensor] = []
    batch: Any  # what each kind of model takes is said where it is run
    for index, batch in enumerate(track(batches, "measuring rows")):
        with torch.inference_mode():
            own = _logits(model, batch, index, classes=classes)
            reference = None if dense is None else _logits(dense, batch, index, classes=classes)
            # What a batch means is told by the dense model: an ONNX file has no config that says it.
            told = model if dense is None else dense
            found.append((sample_sums if classes else row_sums)(told, batch, index, own, reference))
    every = torch.cat(found)
    if not float(every[:, 0].sum()):
        raise SecateurError("the data predicts nothing: rows need 2 tokens or more that are not masked, or a class")
    return Rows(every, "samples" if classes else "tokens", paired=dense is not None)


def _logits(model: nn.Module, batch: Any, index: int, *, classes: bool) -> torch.Tensor:
    """What a model gives for a batch; what it cannot be run on is the data's fault, and is said so."""
    name = type(model).__name__
    if isinstance(batch, Mapping):
        _check_columns(model, batch, index)
    try:
        with evaluating(model):
            return output_of(model, batch) if classes else logits_of(model, batch)
    except SecateurError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in tensors)
        text = " ".join(str(error).split())[:300]
        raise SecateurError(f"{name} cannot be run on batch {index} of the data ({shapes}): {text}") from error


def _check_columns(model: nn.Module, batch: Mapping[str, Any], index: int) -> None:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and not hasattr(model, "config"):
        return  # it takes anything, and says itself what it does not
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for column in batch:
        if column not in known and column != "labels":
            raise SecateurError(
                f"{type(model).__name__} has no input {column!r}, a column of batch {index}{nearest(column, known)}"
            )
    for p in parameters:
        if p.name in known and p.default is p.empty and p.name not in batch:
            raise SecateurError(
                f"{type(model).__name__} needs the input {p.name!r}, and batch {index} has {', '.join(batch) or 'none'}"
            )


def against_constants(rows: Rows, loss: float, accuracy: float | None) -> Rows:
    """The rows with a dense model of which only means are known, of other data: loss in nats, accuracy as a share."""
    sums = rows.sums.clone()
    count = rows.column("count")
    sums[:, SUMS.index("dense_loss")] = count * loss
    sums[:, SUMS.index("dense_hits")] = count * (math.nan if accuracy is None else accuracy)
    return Rows(sums, rows.unit, paired=False)


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval; infinite where one row cannot say."""

    value: float
    low: float
    high: float


def estimate(rows: Rows, measure: str, *, relative: bool = False, confidence: float = CONFIDENCE) -> Interval:
    """How much worse the model is on these rows, by one measure.

    Args:
        rows: at least one.
        measure: one of `MEASURES`.
        relative: as a share of the dense model's.
        confidence: of the interval, two-sided.
    """
    count, loss, dense = (rows.column(name) for name in ("count", "loss", "dense_loss"))
    if measure == "loss":
        return _ratio(loss - dense, dense if relative else count, confidence)
    if measure == "perplexity":
        if not relative:
            return _perplexities(loss, dense, count, confidence)
        logs = _ratio(loss - dense, count, confidence)
        return Interval(*(_exp(x) - 1 for x in (logs.value, logs.low, logs.high)))
    if measure == "accuracy":
        hits = rows.column("dense_hits")
        return _ratio(hits - rows.column("hits"), hits if relative else count, confidence)
    if measure == "kl":
        return _ratio(rows.column("kl"), count, confidence)
    return _ratio(count - rows.column("agree"), count, confidence)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf  # above, a double overflows


def _perplexities(loss: torch.Tensor, dense: torch.Tensor, count: torch.Tensor, confidence: float) -> Interval:
    """The difference of two perplexities; both vary from row to row, which counts to first order."""
    means = [float(own.sum() / count.sum()) for own in (loss, dense)]
    new, old = map(_exp, means)
    if not math.isfinite(new - old):
        return Interval(new - old, new - old, new - old)
    varied = new * (loss - means[0] * count) - old * (dense - means[1] * count)
    return _ratio(varied + (new - old) * count, count, confidence)


def _ratio(above: torch.Tensor, below: torch.Tensor, confidence: float) -> Interval:
    """sum(above) / sum(below), with its interval."""
    from scipy.stats import t

    top, bottom, n = float(above.sum()), float(below.sum()), len(above)
    if bottom == 0:
        value = 0.0 if top <= 0 else math.inf
        return Interval(value, value, value)
    value = top / bottom
    if not math.isfinite(value):
        return Interval(value, value, value)
    if n < 2:
        return Interval(value, -math.inf, math.inf)
    squared = float(t.ppf(0.5 + confidence / 2, n - 1)) ** 2 / n
    a, b = top / n, bottom / n
    da, db = above - a, below - b
    vaa, vab, vbb = (float((x * y).sum()) / (n - 1) for x, y in ((da, da), (da, db), (db, db)))
    # The ratios x for which the mean of (above - x below) is not told from 0: a quadratic inequality in x.
    square, half, rest = b * b - squared * vbb, a * b - squared * vab, a * a - squared * vaa
    root = math.sqrt(max(0.0, half * half - square * rest))
    if square > 0:
        return Interval(value, min(value, (half - root) / square), max(value, (half + root) / square))
    if root == 0 or square == 0:
        return Interval(value, -math.inf, math.inf)
    left, right = sorted(((half - root) / square, (half + root) / square))
    # Where `below` may be 0, all ratios but those between the two; it is never negative, so one side can be.
    return Interval(value, right, math.inf) if value >= right else Interval(value, -math.inf, left)


@dataclass(frozen=True)
class Check:
    """One tolerance on some rows.

    Attributes:
        tolerance: what may be.
        found: what is.
        verdict: "pass", "uncertain" or "fail"; "small" for slices with too few rows to judge.
    """

    tolerance: Tolerance
    found: Interval
    verdict: str


@dataclass(frozen=True)
class Part:
    """The data as a whole, or one slice of it.

    Attributes:
        name: of the slice; "overall" for all data.
        rows: how many.
        predictions: how many.
        loss: of the model and of the dense one: means, in nats.
        dense_loss: see `loss`.
        accuracy: of first choices, of the model and of the dense one.
        dense_accuracy: see `accuracy`; NaN where it is not known.
        kl: mean KL(dense || model), in nats; NaN without the dense model.
        top1: share of first choices that are the dense model's; NaN without it.
        increase: of the mean loss, in nats, with its interval.
        relative: the same as a share of the dense model's loss.
        checks: of the tolerances.
    """

    name: str
    rows: int
    predictions: int
    loss: float
    dense_loss: float
    accuracy: float
    dense_accuracy: float
    kl: float
    top1: float
    increase: Interval
    relative: Interval
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> str:
        """The worst of its checks."""
        order = ("fail", "uncertain", "small", "pass")
        return min((check.verdict for check in self.checks), key=order.index, default="pass")


@dataclass(frozen=True)
class Drift:
    """What a report promised, and what is on new data.

    Attributes:
        promised: increase of the mean loss when the report was made, in nats.
        promised_drop: of the accuracy then, as a share; None where it has none.
        increase: of the mean loss now.
        allowed: how much more than promised may be, in nats.
        verdict: "pass", "uncertain" or "fail".
    """

    promised: float
    promised_drop: float | None
    increase: Interval
    allowed: float
    verdict: str


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        overall: the data as a whole.
        slices: its slices, the worst (by increase of the mean loss) first.
        drift: from a report; None where none was asked for.
        strict: whether what is uncertain or small fails too.
        confidence: of the interval of each slice.
    """

    overall: Part
    slices: tuple[Part, ...]
    drift: Drift | None
    strict: bool
    confidence: float

    @property
    def passed(self) -> bool:
        """Whether no tolerance is passed."""
        bad = ("fail", "uncertain", "small") if self.strict else ("fail",)
        said = [self.overall.verdict, *(part.verdict for part in self.slices)]
        return not any(v in bad for v in [*said, *([self.drift.verdict] if self.drift else [])])


def judge(
    rows: Rows,
    tolerances: Sequence[Tolerance],
    labels: Sequence[str] | None = None,
    *,
    min_slice: int = MIN_SLICE,
    promised: tuple[float, float | None] | None = None,
    max_drift: Tolerance | None = None,
    strict: bool = False,
) -> Verdict:
    """Hold what was measured against the tolerances.

    The data as a whole fails where its value is above a tolerance. A slice fails where the low end of its interval is:
    then chance does not explain it. Where only the value is above, it is "uncertain"; where it has fewer rows than
    `min_slice`, "small". The intervals of all slices together hold with 95%: each of k slices has one of 1 - 0.05 / k
    (Bonferroni), so that many slices do not fail one by chance.

    Args:
        rows: what was measured.
        tolerances: what may be.
        labels: the slice of every row.
        min_slice: rows of the smallest slice that is judged.
        promised: of a report: increase of the mean loss in nats, and drop of the accuracy as a share.
        max_drift: how much more than promised the increase may be; a loss tolerance.
        strict: whether what is uncertain or small fails too.

    Raises:
        SecateurError: where a tolerance needs the dense model, or not every row has a label.
    """
    for tolerance in tolerances:
        if tolerance.measure in ("kl", "top1") and not rows.paired:
            raise SecateurError(f"a tolerance for {tolerance.measure} needs the dense model: give --against")
        if tolerance.measure == "accuracy" and bool(rows.column("dense_hits").isnan().any()):
            raise SecateurError("a tolerance for accuracy needs the dense model's: give --against")
    overall = _part("overall", rows, tolerances, CONFIDENCE, certain=False)
    places: dict[str, list[int]] = {}
    if labels is not None:
        if len(labels) != len(rows.sums):
            raise SecateurError(f"there are {len(labels)} labels for {len(rows.sums)} rows")
        for place, label in enumerate(labels):
            places.setdefault(label, []).append(place)
    counts = {name: float(rows.column("count")[own].sum()) for name, own in places.items()}
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise SecateurError(f"slice {empty[0]!r} predicts nothing: all of its rows are masked or too short")
    judged = sum(len(own) >= min_slice for own in places.values())
    confidence = 1 - (1 - CONFIDENCE) / max(1, judged)
    slices = [
        _part(name, rows.some(own), tolerances, confidence, certain=True, small=len(own) < min_slice)
        for name, own in places.items()
    ]
    slices.sort(key=lambda part: (-part.increase.value, part.name))
    drift = None if promised is None else _drift(overall, promised, max_drift)
    return Verdict(overall, tuple(slices), drift, strict, confidence)


def _part(
    name: str, rows: Rows, tolerances: Sequence[Tolerance], confidence: float, *, certain: bool, small: bool = False
) -> Part:
    count = float(rows.column("count").sum())
    mean = {key: float(rows.column(key).sum()) / count for key in SUMS[1:]}
    checks = []
    for tolerance in tolerances:
        found = estimate(rows, tolerance.measure, relative=tolerance.relative, confidence=confidence)
        verdict = _verdict(found, tolerance.limit, certain=certain)
        checks.append(Check(tolerance, found, "small" if small else verdict))
    return Part(
        name=name,
        rows=len(rows.sums),
        predictions=int(count),
        loss=mean["loss"],
        dense_loss=mean["dense_loss"],
        accuracy=mean["hits"],
        dense_accuracy=mean["dense_hits"],
        kl=mean["kl"] if rows.paired else math.nan,
        top1=mean["agree"] if rows.paired else math.nan,
        increase=estimate(rows, "loss", confidence=confidence),
        relative=estimate(rows, "loss", relative=True, confidence=confidence),
        checks=tuple(checks),
    )


def _verdict(found: Interval, limit: float, *, certain: bool) -> str:
    slack = 1e-9 * max(1.0, abs(limit))  # sums of floats: what is equal is within the tolerance
    if found.value <= limit + slack:
        return "pass"
    return "fail" if not certain or found.low > limit + slack else "uncertain"


def _drift(overall: Part, promised: tuple[float, float | None], most: Tolerance | None) -> Drift:
    limit = 0.0 if most is None else most.limit
    allowed = limit * overall.dense_loss if most is not None and most.relative else limit
    verdict = _verdict(overall.increase, promised[0] + allowed, certain=True)
    return Drift(promised[0], promised[1], overall.increase, allowed, verdict)


def figures_of(report: Any, where: str) -> dict[str, float | None]:
    """What a report measured: mean losses and accuracies of the dense model and of the pruned one.

    Args:
        report: of a run, as report.json has it.
        where: its name, for messages.

    Returns:
        ``loss`` and ``dense_loss`` in nats, ``accuracy`` and ``dense_accuracy`` as shares or None.

    Raises:
        SecateurError: for a report of another format, or one that measured nothing.
    """
    if not isinstance(report, Mapping) or report.get("format", 1) != FORMAT or report.get("kind", "report") != "report":
        said = report.get("format") if isinstance(report, Mapping) else type(report).__name__
        raise SecateurError(
            f"{where} is no report of format {FORMAT} (it says {said!r}): make it anew with this version"
        )
    measured = report.get("measured")
    found: dict[str, float | None] = {}
    for name in ("perplexity", "loss", "accuracy"):
        entry = measured.get(name) if isinstance(measured, Mapping) else None
        for side, prefix in (("dense", "dense_"), ("pruned", "")):
            value = entry.get(side) if isinstance(entry, Mapping) else None
            number = isinstance(value, int | float) and math.isfinite(value)
            found[f"{prefix}{name}"] = float(value) if number else None  # type: ignore[arg-type]  # a number
    for prefix in ("", "dense_"):
        perplexity = found.pop(f"{prefix}perplexity")
        if found[f"{prefix}loss"] is None and perplexity is not None and perplexity > 0:
            found[f"{prefix}loss"] = math.log(perplexity)
    if found["loss"] is None or found["dense_loss"] is None:
        raise SecateurError(
            f"{where} has no loss or perplexity of both models: prune with --eval-data, and it is measured"
        )
    return found
