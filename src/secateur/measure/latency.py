"""How long models take: end to end, interleaved; and tables of measured times, one for each device.

Times of different models are only comparable where they were taken in turns: a machine's speed drifts by more than a
cut saves. What counts is the ratio of two times of one run.
"""

import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from math import ceil, isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError, nearest
from secateur.files import check_file, read_json, write_json
from secateur.load.batches import run
from secateur.load.mode import evaluating
from secateur.progress import Track, quiet
from secateur.space.trace import Inputs, arguments

FORMAT = 1
HEAD = ("device", "dtype", "threads", "torch_version", "clock")
"""What the times of a table have in common."""
LEAST_SECONDS = 0.002
"""One sample repeats what it times until it takes that long."""
FEWEST = 3
"""Repeats that no limit of time cuts off."""

CLOCKS = ("wall", "process")

Timer = Callable[[Callable[[], object]], float]
"""Calls a function, once or more, and says how many seconds one call takes."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward pass.

    Attributes:
        median: Of all repeats.
        low: Lower quartile.
        high: Upper quartile.
        repeats: Samples taken.
    """

    median: float
    low: float
    high: float
    repeats: int

    @staticmethod
    def of(samples: Sequence[float]) -> "Timing":
        """The timing of at least one sample."""
        ranked = sorted(samples)
        last = len(ranked) - 1
        return Timing(median(ranked), ranked[last // 4], ranked[ceil(3 * last / 4)], len(ranked))


@dataclass(frozen=True)
class Stopwatch:
    """A `Timer` for one device: waits until the device is done.

    Attributes:
        device: What runs.
        clock: wall; or process, the time that the processors spent on this process. With one thread the two are the
            same where nothing else runs, and the second is right where something does.
        least: Seconds that one sample takes at least.

    Raises:
        SecateurError: for another clock, or clock="process" with several threads or a GPU.
    """

    device: torch.device
    clock: str = "wall"
    least: float = LEAST_SECONDS

    def __post_init__(self) -> None:
        if self.clock not in CLOCKS:
            raise SecateurError(f"there is no clock {self.clock!r}{nearest(self.clock, CLOCKS)}")
        threads = torch.get_num_threads()
        if self.clock == "process" and (self.device.type != "cpu" or threads > 1):
            where = f"{threads} threads" if self.device.type == "cpu" else str(self.device)
            raise SecateurError(f"the process's own time is no latency on {where}: take one CPU thread, or clock wall")

    def __call__(self, fn: Callable[[], object]) -> float:
        """Seconds of one call, the mean of as many as take `least` seconds together.

        A call before them brings back what others have driven out of the caches, unless it takes so long that this
        does not matter.
        """
        once = self._seconds(fn, 1)
        return once if once > 100 * self.least else self._seconds(fn, ceil(self.least / max(once, 1e-7)))

    def _seconds(self, fn: Callable[[], object], count: int) -> float:
        now = time.process_time if self.clock == "process" else time.perf_counter
        self._wait()
        begin = now()
        for _ in range(count):
            fn()
        self._wait()
        return (now() - begin) / count

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def in_turns(
    functions: Sequence[Callable[[], object]],
    timer: Timer,
    *,
    repeats: int = 20,
    warmup: int = 3,
    seconds: float | None = None,
    track: Track = quiet,
    what: str = "timing",
) -> list[list[float]]:
    """Samples of every function, taken in rounds: each round goes through all of them, every other one backwards.

    Of more than two, another one comes first every two rounds: where a round begins with what the last one ended with,
    that finds its weights in the caches, and none shall have that luck more often than the others. Of two, each has it
    every second time.

    Args:
        functions: what to time.
        timer: takes one sample.
        repeats: rounds.
        warmup: calls of each before the first round.
        seconds: no round begins after that long, once `FEWEST` are done; None = all do.
        track: shows progress.
        what: is told of it.

    Raises:
        SecateurError: for repeats or warmup that are no such numbers.
    """
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise SecateurError(f"{name} must be at least {least}, not {value}")
    if seconds is not None and seconds <= 0:
        raise SecateurError(f"seconds must be above 0, not {seconds:g}")
    # glibc gives freed memory back to the system, and pays for it anew in each pass, until it has once seen a block of
    # nearly 32 MiB freed. A process that runs models comes to that; here all samples shall be alike.
    torch.empty(31 << 20, dtype=torch.uint8)
    for function in functions:
        for _ in range(warmup):
            function()
    samples: list[list[float]] = [[] for _ in functions]
    begin = time.perf_counter()
    with without_collector():
        for number in track(range(repeats), what):
            if seconds is not None and number >= FEWEST and time.perf_counter() - begin > seconds:
                continue
            first = number // 2 % len(functions) if len(functions) > 2 else 0
            order = [*range(first, len(functions)), *range(first)]
            for index in reversed(order) if number % 2 else order:
                samples[index].append(timer(functions[index]))
    return samples


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's garbage collector would go through what a trace has left, in the middle of a sample.

    So it is called before, which takes a tenth of a second: open this around what is timed one after the other.
    """
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_models(
    models: Sequence[nn.Module],
    inputs: Inputs,
    *,
    repeats: int = 20,
    warmup: int = 3,
    seconds: float | None = None,
    timer: Timer | None = None,
    track: Track = quiet,
) -> list[Timing]:
    """Time the forward passes of several models, in turns.

    In evaluation mode, without gradients, and without a KV cache: for a language model this is the prefill.

    Args:
        models: all on one device; they stay as they are.
        inputs: arguments of one forward pass, for all of them; None = a Hugging Face model's default inputs.
        repeats: samples of each model; a sample repeats a quick pass until it takes 2 ms.
        warmup: passes of each before the first sample, after one that shows whether it runs.
        seconds: no further sample is begun after that long, once there are 3 of each.
        timer: takes a sample; the clock of the models' device by default.
        track: shows progress.

    Raises:
        SecateurError: for no model, models on different devices, or weights that are not there (meta).
    """
    if not models:
        raise SecateurError("there is no model to time: give at least one")
    places = [device_of(model) for model in models]
    if len(set(places)) > 1:
        raise SecateurError(f"the models are on {', '.join(map(str, dict.fromkeys(places)))}: put all on one device")
    passes = [forward(model, inputs) for model in models]
    timer, limits = timer or Stopwatch(places[0]), {"repeats": repeats, "warmup": warmup}
    with ExitStack() as stack, torch.no_grad():
        for model in models:
            stack.enter_context(evaluating(model))
        for model, function in zip(models, passes, strict=True):
            tried(model, function)
        timed = in_turns(passes, timer, **limits, seconds=seconds, track=track, what="timing models")
    return [Timing.of(samples) for samples in timed]


def forward(model: nn.Module, inputs: Inputs) -> Callable[[], Any]:
    """One forward pass as a function without arguments; Hugging Face models run without a KV cache."""
    args, kwargs = arguments(model, inputs)
    place = device_of(model)
    args, kwargs = pytree.tree_map(lambda x: x.to(place) if isinstance(x, torch.Tensor) else x, (args, kwargs))
    if hasattr(model, "config") and (kwargs or len(args) == 1):
        return lambda: run(model, kwargs or args[0])
    return lambda: model(*args, **kwargs)


def tried(model: nn.Module, function: Callable[[], Any]) -> Any:
    """What a first forward pass returns.

    Raises:
        SecateurError: where the model does not take the inputs.
    """
    try:
        return function()
    except SecateurError:
        raise
    except Exception as error:  # the model's own code raises whatever it likes
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise SecateurError(
            f"{type(model).__name__} does not run on these inputs ({type(error).__name__}: {first}): give inputs of "
            "the shapes and types that it takes"
        ) from error


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are.

    Raises:
        SecateurError: for a model on several devices, or on meta.
    """
    places = list(dict.fromkeys(parameter.device for parameter in model.parameters()))
    if len(places) > 1:
        raise SecateurError(f"{type(model).__name__} is on {', '.join(map(str, places))}: put all of it on one device")
    place = places[0] if places else torch.device("cpu")
    if place.type == "meta":
        raise SecateurError(f"{type(model).__name__} is on device 'meta' and holds no weights: nothing can be timed")
    return place


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type that most of the model's parameters have."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda kind: counts[kind]) if counts else torch.float32


@dataclass
class LatencyTable:
    """Times of operators and models, measured on one device.

    Attributes:
        device: Name of the processor or the GPU.
        dtype: Of most weights, such as float32.
        threads: CPU threads that torch used; 0 on a GPU.
        torch_version: As it says.
        clock: wall or process; see `Stopwatch`.
        entries: What was timed -> seconds of one call.
    """

    device: str
    dtype: str
    threads: int
    torch_version: str
    clock: str = "wall"
    entries: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def here(
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, clock: str = "wall"
    ) -> "LatencyTable":
        """An empty table for a device of this machine, as torch is set up now."""
        place = torch.device(device)
        on_cpu = place.type == "cpu"
        name = torch.cuda.get_device_name(place) if place.type == "cuda" else _cpu_name() if on_cpu else place.type
        threads = torch.get_num_threads() if on_cpu else 0
        return LatencyTable(name, str(dtype).removeprefix("torch."), threads, str(torch.__version__), clock)

    def differences(self, other: "LatencyTable", fields: Sequence[str] = HEAD) -> str:
        """How two tables were measured differently, in words; "" where they were not."""
        found = [(name, getattr(self, name), getattr(other, name)) for name in fields]
        return ", ".join(f"{name} {own!r} against {its!r}" for name, own, its in found if own != its)

    def save(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Write a JSON file, whole or not at all.

        Raises:
            SecateurError: where something is in the way; see `check_table_path`.
        """
        target = check_table_path(path, overwrite=overwrite)
        write_json(target, {"format": FORMAT, "kind": "latency", **asdict(self)}, sort_keys=True)

    @staticmethod
    def load(path: Path | str) -> "LatencyTable":
        """Read what `save` wrote.

        Raises:
            SecateurError: where it is missing, or no such table.
        """
        values = read_json(path, "latency table")
        hint = f"is no latency table of format {FORMAT}: make one with secateur profile"
        if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("kind") != "latency":
            raise SecateurError(f"{path} {hint}")
        head: dict[str, Any] = {name: values.get(name) for name in HEAD}
        entries: Any = values.get("entries")
        whole = all(isinstance(head[n], int if n == "threads" else str) for n in head) and isinstance(entries, dict)
        if not whole or not all(_is_seconds(seconds) for seconds in entries.values()):
            raise SecateurError(f"{path} {hint}: its fields are not those of a table")
        return LatencyTable(**head, entries={str(key): float(seconds) for key, seconds in entries.items()})


def check_table_path(path: Path | str, *, overwrite: bool = False) -> Path:
    """Check that a table may be written there; cheap, so ask before anything is timed.

    Args:
        path: of the file to make.
        overwrite: whether an old table may be replaced; nothing else ever is.

    Raises:
        SecateurError: Something is in the way, and how to get around it.
    """
    return check_file(path, "a latency table", overwrite=overwrite, known=LatencyTable.load)


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value >= 0


def _cpu_name() -> str:
    """What the processor calls itself; the architecture where it does not say."""
    described: Mapping[str, str] = {}
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = [line.partition(":") for line in information.read_text(encoding="utf-8", errors="replace").splitlines()]
        described = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    # Virtual machines give families of processors one name: the numbers tell them apart.
    family = "-".join(described[key] for key in ("cpu family", "model", "stepping") if key in described)
    name = described.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({family})" if family else name
