"""Several models side by side: sizes, memory, and times of one interleaved run, with what is noise and what is not.

Every round times all models one after the other, so that the machine's drift meets them alike. What counts is the
ratio of two times of one round; its median over all rounds, and an interval that holds the true median with a
confidence of 95%, say how much faster a model is. A difference is within the noise where that interval, widened by
`ALIKE`, holds 1.
"""

import dataclasses
import importlib.metadata
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

from secateur.errors import SecateurError
from secateur.files import check_file, read_json, write_json
from secateur.measure.latency import FEWEST, LatencyTable, Stopwatch, Timer, Timing, in_turns
from secateur.progress import Track, quiet

FORMAT = 1
CONFIDENCE = 0.95
ALIKE = 0.02
"""Two copies of one model differ by up to that much for as long as they live: where in memory they lie is chance."""
RUNTIMES = ("torch", "onnxruntime", "openvino")
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Rounds -> the 97.5% quantile of Student's t with one degree of freedom fewer."""
_INSTALLED = {"onnxruntime": "onnxruntime", "openvino": "openvino"}


@dataclass(frozen=True)
class Pass:
    """Something of a model that is timed.

    Attributes:
        run: does it once.
        count: tokens or samples that go through at once.
        reset: called before every sample, untimed; what has one is run once for each sample.
    """

    run: Callable[[], object]
    count: int
    reset: Callable[[], object] | None = None

    def __call__(self) -> object:
        """Once, from the start."""
        if self.reset is not None:
            self.reset()
        return self.run()


@dataclass(frozen=True)
class Facts:
    """What a model costs, but for time; None where it is not known.

    Attributes:
        params: parameters, each shared one once.
        nonzero: of them, not zero.
        bytes: of the files of its weights; of what has none, of its parameters.
        bytes_compressed: the same after zlib.
        peak_memory: bytes that the model and the timed passes need at most, alone in a process.
        macs: multiply-accumulates of one sample: of a language model, a sequence.
    """

    params: int | None = None
    nonzero: int | None = None
    bytes: int | None = None
    bytes_compressed: int | None = None
    peak_memory: int | None = None
    macs: float | None = None

    @property
    def zeros(self) -> float:
        """Share of the parameters that is zero, in [0, 1]; 0 where it is not known."""
        return 1 - self.nonzero / self.params if self.params and self.nonzero is not None else 0.0


@dataclass(frozen=True)
class Benched:
    """A model to be timed.

    Attributes:
        name: short; together with the runtime it is unique.
        runtime: torch, onnxruntime or openvino.
        passes: what is timed: prefill and decode of a language model, forward of others.
        facts: what else is known.
    """

    name: str
    runtime: str
    passes: Mapping[str, Pass]
    facts: Facts = Facts()


@dataclass(frozen=True)
class Ratio:
    """How many times faster one model is than another.

    Attributes:
        value: median over the rounds; above 1 = faster.
        low: lower end of the interval that holds the true median with a confidence of 95%.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether the interval, widened by `ALIKE`, holds 1."""
        return self.low / (1 + ALIKE) <= 1 <= self.high * (1 + ALIKE)


def ratio(first: Sequence[float], own: Sequence[float]) -> Ratio:
    """Times of a first model over those of another, round by round.

    From six rounds on the interval goes from one order statistic of the ratios to another: the narrowest pair that
    the median lies between in 95% of all cases, whatever the distribution (the interval of the sign test). Fewer
    rounds cannot say so much; there it is that of Student's t of the logarithms.

    Args:
        first: seconds of the first model in each round, at least two.
        own: seconds of the other in the same rounds.

    Raises:
        SecateurError: for fewer than two rounds, or not as many of each.
    """
    rounds = len(first)
    if rounds < 2 or len(own) != rounds:
        raise SecateurError(f"a ratio needs two rounds or more, as many of each model, not {rounds} and {len(own)}")
    logs = sorted(math.log(max(a, 1e-12) / max(b, 1e-12)) for a, b in zip(first, own, strict=True))
    if rounds in _STUDENT:
        half = _STUDENT[rounds] * stdev(logs) / math.sqrt(rounds)
        low, high = fmean(logs) - half, fmean(logs) + half
    else:
        outside = _outside(rounds)
        low, high = logs[outside], logs[rounds - 1 - outside]
    return Ratio(math.exp(median(logs)), math.exp(low), math.exp(high))


def _outside(rounds: int) -> int:
    """How many ratios may lie outside of the interval on either side."""
    tail, count = 0.0, 0
    while True:
        tail += math.comb(rounds, count) / 2**rounds
        if 2 * tail > 1 - CONFIDENCE:
            return max(count - 1, 0)
        count += 1


@dataclass
class Bench:
    """What was measured.

    Attributes:
        models: in the order that they were given; the first is what the others are compared with.
        samples: for each model, pass -> seconds of every round.
        machine: device, threads, versions.
        setting: batch, seq and so on.
        notes: plain sentences.
    """

    models: list[Benched]
    samples: list[dict[str, list[float]]]
    machine: dict[str, Any]
    setting: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def timing(self, index: int, what: str) -> Timing | None:
        """Seconds of a model's pass; None where it has none."""
        found = self.samples[index].get(what)
        return Timing.of(found) if found else None

    def ratio(self, index: int, what: str, to: int = 0) -> Ratio | None:
        """How many times faster a model is than another, by default the first; None where either has no such pass."""
        first, own = self.samples[to].get(what), self.samples[index].get(what)
        if not first or not own:
            return None
        return Ratio(1.0, 1.0, 1.0) if index == to else ratio(first, own)

    def ideal(self, index: int, to: int = 0) -> float | None:
        """Multiply-accumulates of the first model over those of this one: what a cut could save at most."""
        first, own = self.models[to].facts.macs, self.models[index].facts.macs
        return first / own if first and own else None

    def first_of(self, runtime: str) -> int:
        """The first model under a runtime: where runtimes are mixed, what a cut does shows against it alone."""
        return next(i for i, model in enumerate(self.models) if model.runtime == runtime)

    def to_json(self) -> dict[str, Any]:
        """As bench.json holds it."""
        return {
            "format": FORMAT,
            "kind": "bench",
            "secateur": importlib.metadata.version("secateur"),
            "machine": self.machine,
            "setting": self.setting,
            "models": [
                {
                    "name": model.name,
                    "runtime": model.runtime,
                    **dataclasses.asdict(model.facts),
                    "times": {what: self._times(index, what) for what in model.passes},
                }
                for index, model in enumerate(self.models)
            ],
            "notes": self.notes,
        }

    def _times(self, index: int, what: str) -> dict[str, Any]:
        timing, against = Timing.of(self.samples[index][what]), self.ratio(index, what)
        return {
            **dataclasses.asdict(timing),
            "speedup": against.value if against else None,
            "speedup_low": against.low if against else None,
            "speedup_high": against.high if against else None,
            "within_noise": against.within_noise if against else None,
            "per_second": self.models[index].passes[what].count / timing.median,
        }

    def save(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Write a JSON file, whole or not at all.

        Raises:
            SecateurError: where something is in the way; see `check_bench_path`.
        """
        write_json(check_bench_path(path, overwrite=overwrite), self.to_json())


def load_bench(path: Path | str) -> dict[str, Any]:
    """Read what `Bench.save` wrote.

    Raises:
        SecateurError: where it is missing, or no bench.json of this format.
    """
    values = read_json(path, "bench.json")
    if not isinstance(values, dict) or values.get("kind") != "bench" or values.get("format") != FORMAT:
        kind = values.get("format") if isinstance(values, dict) and values.get("kind") == "bench" else "another kind"
        raise SecateurError(f"{path}: is no bench.json of format {FORMAT} ({kind}): make it anew with secateur bench")
    return values


def check_bench_path(path: Path | str, *, overwrite: bool = False) -> Path:
    """Check that a bench.json may be written there; cheap, so ask before anything is timed.

    Args:
        path: of the file to make.
        overwrite: whether an old one may be replaced; nothing else ever is.

    Raises:
        SecateurError: Something is in the way, and how to get around it.
    """
    return check_file(path, "the result", overwrite=overwrite, known=load_bench)


def bench(
    models: Sequence[Benched],
    *,
    repeats: int = 20,
    warmup: int = 2,
    seconds: float | None = None,
    timer: Timer | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    setting: Mapping[str, Any] | None = None,
    track: Track = quiet,
) -> Bench:
    """Time all passes of all models in one run, round by round.

    Args:
        models: what to time; the first is what the others are compared with.
        repeats: rounds, at least 3.
        warmup: runs of each before the first round.
        seconds: no round begins after that long, once there are 3.
        timer: takes one sample; the clock of the device by default.
        device: where the torch models are.
        dtype: of most weights, for the record.
        setting: what the passes are made of, for the record.
        track: shows progress.

    Raises:
        SecateurError: for no model, two of one name and runtime, a runtime that is none, or too few rounds.
    """
    check_rounds(repeats, seconds)
    _check_models(models)
    place = torch.device(device)
    timed = _timer(timer or Stopwatch(place))
    kinds = list(dict.fromkeys(what for model in models for what in model.passes))
    # Passes that are compared follow each other.
    order = [(i, what) for what in kinds for i, model in enumerate(models) if what in model.passes]
    functions = [models[i].passes[what] for i, what in order]
    machine = machine_of(place, dtype, {model.runtime for model in models})
    with torch.no_grad():
        found = in_turns(
            functions, timed, repeats=repeats, warmup=warmup, seconds=seconds, track=track, what="timing models"
        )
    samples: list[dict[str, list[float]]] = [{} for _ in models]
    for (i, what), own in zip(order, found, strict=True):
        samples[i][what] = own
    rounds = min(map(len, found))
    return Bench(list(models), samples, machine, {**(setting or {}), "rounds": rounds})


def check_rounds(repeats: int, seconds: float | None) -> None:
    """Check what limits a run; cheap, so ask before models are loaded.

    Raises:
        SecateurError: for fewer than 3 rounds, or no time at all.
    """
    if repeats < FEWEST:
        raise SecateurError(f"repeats must be at least {FEWEST}, not {repeats}: fewer say nothing of the noise")
    if seconds is not None and seconds <= 0:
        raise SecateurError(f"seconds must be above 0, not {seconds:g}")


def _check_models(models: Sequence[Benched]) -> None:
    if not models:
        raise SecateurError("there is no model to bench: give at least one")
    seen: set[tuple[str, str]] = set()
    for model in models:
        if model.runtime not in RUNTIMES:
            raise SecateurError(f"{model.name}: there is no runtime {model.runtime!r}; known: {', '.join(RUNTIMES)}")
        if not model.passes:
            raise SecateurError(f"{model.name}: there is nothing to time")
        if (model.name, model.runtime) in seen:
            raise SecateurError(f"two models are named {model.name!r} under {model.runtime}: give each its own name")
        seen.add((model.name, model.runtime))


def _timer(base: Timer) -> Timer:
    """The same timer for a `Pass`: what must be reset is run once for each sample, after the reset."""
    once = dataclasses.replace(base, least=0.0) if isinstance(base, Stopwatch) else base

    def timed(fn: Callable[[], object]) -> float:
        if isinstance(fn, Pass):
            if fn.reset is None:
                return base(fn.run)
            fn.reset()
            return once(fn.run)
        return base(fn)

    return timed


def machine_of(device: torch.device, dtype: torch.dtype, runtimes: set[str]) -> dict[str, Any]:
    """What the times hold for: processor or GPU, threads, versions, and how busy the machine was."""
    here = LatencyTable.here(device, dtype)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": here.device,
        "threads": here.threads,
        "cores": os.cpu_count(),
        "dtype": here.dtype,
        "system": platform.system(),
        "load": load,
        "torch": str(torch.__version__),
        **{name: importlib.metadata.version(_INSTALLED[name]) for name in RUNTIMES if name in runtimes - {"torch"}},
    }
