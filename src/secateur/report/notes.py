"""Honest sentences: what gets faster and what does not, what was not measured, and what went otherwise than asked."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.report import values
from secateur.report.facts import costs
from secateur.report.read import Run, as_list, as_map

_BENCHED = 3  # of many models that were measured, those that are told in words
_NAMED = 3  # of many things, those that are named


@dataclass(frozen=True)
class Note:
    """A sentence or two, and the command that goes with it."""

    text: str
    command: str = ""


# --- what gets faster ---


def speed(run: Run) -> list[Note]:
    """What gets faster, as far as it was measured."""
    cut, masked = _is_cut(run), _is_masked(run)
    found: list[str] = []
    if masked:
        found.append(
            "Zeros make nothing faster here: the shapes are those of the dense model, and common runtimes multiply by "
            "zero as by anything else. The file gets smaller when it is compressed. (2:4 patterns alone speed up large "
            "layers, on GPUs that have it.)"
        )
    measured = list(_measured(run))
    if measured:
        return [Note(text) for text in (*found, *measured)]
    if cut:
        for name, part in run.parts():
            latency = as_map(part.get("latency"))
            before, after = values.number(latency.get("dense")), values.number(latency.get("measured"))
            if before and after:
                step = f" (step {name})" if name else ""
                found.append(
                    f"Measured while it was cut{step}: a forward pass takes {values.seconds(after)}, the dense model's "
                    f"{values.seconds(before)}: {before / after:.2f} times as fast."
                )
    told = [Note(text) for text in found]
    if cut and len(found) == masked:
        text = (
            "Whole rows and columns are gone, so every runtime has less to do. How much faster it is was not measured"
        )
        told.append(_with_command(run, text, "bench", ["secateur", "bench", _dense(run), run.folder]))
    return told


def _measured(run: Run) -> Iterator[str]:
    """What bench.json says of every model but the first, which the others are held against."""
    told = run.bench
    models = [as_map(model) for model in as_list(as_map(told).get("models"))]
    if told is None or len(models) < 2:
        return
    machine = as_map(told.get("machine"))
    count = machine.get("threads")
    where = [f"{count} thread{'' if count == 1 else 's'}"] if count else []
    where = [str(machine["device"]), *where] if machine.get("device") else where
    against = f"Measured against {_model(models[0])}{', on ' if where else ''}{', '.join(where)}"
    for model in models[1 : _BENCHED + 1]:
        parts = [_faster(what, as_map(own)) for what, own in as_map(model.get("times")).items()]
        if any(parts):
            yield f"{against}: {_model(model)} is {', '.join(part for part in parts if part)}."
    if len(models) > _BENCHED + 1:
        yield f"{len(models) - _BENCHED - 1} models more were measured: see the section on latency."


def _faster(what: str, own: Mapping[str, Any]) -> str:
    """How many times as fast, in words; empty where that is not known."""
    faster, low, high = (values.number(own.get(key)) for key in ("speedup", "speedup_low", "speedup_high"))
    if faster is None:
        return ""
    spread = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    if own.get("within_noise"):
        return f"neither faster nor slower in {what}, as far as the noise shows{spread}"
    return f"{faster:.2f} times as fast in {what}{spread}"


def _model(model: Mapping[str, Any]) -> str:
    return f"{model.get('name')} ({model.get('runtime', 'torch')})"


def _dense(run: Run) -> str:
    teacher, model = (as_map(run.report.get(key)).get("name") for key in ("teacher", "model"))
    return str(teacher or model or "DENSE")


def _with_command(run: Run, text: str, verb: str, words: Sequence[str], rest: str = "") -> Note:
    """A sentence with its command; of a model that is built by a function, more is needed than is known here."""
    if ":" in _dense(run) or _dense(run) == "DENSE":
        return Note(f"{text} (secateur {verb}).")
    return Note(f"{text}:", f"{shlex.join(words)}{rest}")


def _is_masked(run: Run) -> bool:
    nonzero, params = (values.number(as_map(costs(run).get(key)).get("pruned")) for key in ("nonzero", "params"))
    return "sparsity" in run.report or (nonzero is not None and params is not None and nonzero < 0.95 * params)


def _is_cut(run: Run) -> bool:
    both = as_map(costs(run).get("params"))
    dense, left = values.number(both.get("dense")), values.number(both.get("pruned"))
    return dense is not None and left is not None and left < dense


# --- what a reader must know ---


def caveats(run: Run) -> list[Note]:
    """What was not done and not measured."""
    found = []
    if run.old:
        version = run.report.get("secateur", "an unknown version")
        text = f"This report was written by secateur {version}, before reports had a format: it has fewer sections."
        found.append(Note(text))
    if "measured" not in run.report:
        found.append(Note("Quality was not measured: no held-out data was given (--eval-data, or a step evaluate)."))
    if not run.report.get("training") and (_is_cut(run) or _is_masked(run)):
        words = ["secateur", "distill", "--teacher", _dense(run), "--student", run.folder]
        text = "Nothing was trained after the cut. Distillation from the dense model wins much of the loss back"
        found.append(_with_command(run, text, "distill", words, " --data ... --out ..."))
    return found


def warnings(run: Run) -> list[Note]:
    """What went otherwise than asked, of every step."""
    found = []
    for name, part in run.parts():
        step = f"Step {name}: " if name else ""
        found += [f"{step}{text[0].lower() if step else text[0]}{text[1:]}" for text in _warned(part)]
    dense, other = (as_map(run.report.get("model")).get("fingerprint"), as_map(run.sensitivity).get("fingerprint"))
    if dense and other and dense != other and "teacher" not in run.report:
        found.append(f"The sensitivity beside this run is of another model, {as_map(run.sensitivity).get('model')}.")
    if run.steps:  # what the whole recipe has to say
        found += [text for text in _of_whole(run.report) if text not in found]
    return [Note(text) for text in found]


def _warned(part: Mapping[str, Any]) -> Iterator[str]:
    yield from _missed(as_map(part.get("target")))
    unreached = as_list(part.get("unreached"))
    if unreached:
        yield f"No calibration data was seen at {_some(unreached)}: masked by magnitude."
    for told, what in ((part, "weights"), (as_map(part.get("mend")), "weights that were repaired")):
        damping = as_map(told.get("more_damping"))
        if damping:
            worst = max((values.number(own) or 0.0 for own in damping.values()), default=0.0)
            yield f"{len(damping)} {what} took more damping than asked for, up to {values.shown(worst, 3)}."
    mend = as_map(part.get("mend"))
    left = [*as_map(mend.get("left")), *as_list(mend.get("no_bias"))]
    if left:
        yield f"Not repaired, though they lost inputs: {_some(left)}."
    if as_map(part.get("left")):
        yield f"Left whole, because they could not be surveyed: {_some(list(part['left']))}."
    if as_list(part.get("fewer_rows_than_columns")):
        yield f"Calibrated on fewer rows than columns: {_some(part['fewer_rows_than_columns'])}."
    levels = as_map(part.get("levels"))
    if levels.get("optimal") is False:
        yield f"The search was stopped before it was proven best; the gap is {values.percent(levels.get('gap'))}."
    if as_list(levels.get("whole")):
        yield f"Left whole, because no uniform size is smaller: {_some(levels['whole'])}."
    for key in ("distillation", "training"):
        training = as_map(part.get(key))
        if training.get("diverged"):
            yield f"Training diverged: {training.get('stopped', '')}."
    yield from _of_whole(part)


def _of_whole(part: Mapping[str, Any]) -> Iterator[str]:
    unused = as_list(part.get("unused_tensors"))
    if unused:
        yield f"Left out of the checkpoint, because the model has no place for them: {_some(unused)}."
    plan = part.get("plan")
    if isinstance(plan, str) and plan != "saved":
        yield f"The plan was {plan}."


def _missed(target: Mapping[str, Any]) -> Iterator[str]:
    for measure, both in target.items():
        limit, reached = (values.number(as_map(both).get(key)) for key in ("limit", "reached"))
        if limit is not None and reached is not None and reached > limit * 1.001:
            text = values.seconds if measure == "latency" else values.shown
            yield f"The budget was not met: {measure} is {text(reached)}, and should be {text(limit)} at most."


def _some(names: Sequence[Any]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(str(name) for name in names[:_NAMED])}{more}"
