"""A few cheap facts about a model and this machine: what `advise` goes by. All but timings are deterministic."""

import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.choose.cost import costs
from secateur.choose.plan import Plan
from secateur.choose.rank import keep_best
from secateur.cut.masks import masked
from secateur.cut.pretend import Pretence
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.measure.bench_passes import is_language_model, longest_of, vocabulary_of
from secateur.measure.closeness import Closeness
from secateur.measure.latency import device_of, forward
from secateur.progress import Track, quiet
from secateur.score.weights import magnitude
from secateur.ship.shapes import shape_advice
from secateur.space import Axis, Space
from secateur.space.trace import Inputs
from secateur.space.weights import Weight, maskable

INT8_FLAGS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp")
"""Flags of /proc/cpuinfo that say that a CPU multiplies 8-bit numbers fast (VNNI, AMX, and the dot products of ARM)."""
BF16_FLAGS = ("avx512_bf16", "amx_bf16")
RUNTIMES = ("onnxruntime", "openvino")
SHARE = 0.5
"""What a probe takes away of an axis or a weight."""
ROUNDS = 9
"""Forward passes that are timed; the median counts."""
_PRODUCTS = ("mm", "conv", "attention", "linear", "einsum", "matmul")
"""Parts of the names of operators whose work is multiplications."""
_ATTENTION = ("heads", "kv_groups", "head_dim")
_MLP = ("ffn", "shared_expert_ffn")
_PROBED = ("ffn", "expert_ffn", "experts", "kv_groups", "heads", "channels", "ssm_heads")
"""Kinds of axes that are probed, in this order."""


@dataclass(frozen=True)
class Machine:
    """What this machine can do.

    Attributes:
        cpu: name of the processor.
        threads: that torch uses.
        int8: flags of the CPU for 8-bit products.
        bf16: flags of the CPU for bfloat16 products.
        gpu: name of the first CUDA device; None where there is none.
        capability: its compute capability: (8, 0) is Ampere.
        runtimes: which of `RUNTIMES` are installed.
    """

    cpu: str
    threads: int
    int8: tuple[str, ...]
    bf16: tuple[str, ...]
    gpu: str | None
    capability: tuple[int, int] | None
    runtimes: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """One cut alone, unrepaired, by the size of the weights.

    Attributes:
        kind: of the axis or block; "weights" for zeros in one weight.
        name: of the axis, block or weight.
        loss: distance from the dense model: KL in nats for each prediction, or squared error over the variance.
        params: share of all parameters that goes (for weights: that become zero).
    """

    kind: str
    name: str
    loss: float
    params: float


@dataclass(frozen=True)
class Facts:
    """What is known of a model; times in seconds, sizes in bytes, shares in [0, 1].

    Attributes:
        name: of the model.
        language: whether it is a Hugging Face model that writes text.
        params: tied ones once.
        bytes: of all parameters.
        dtype: that most of them have.
        shares: part (embeddings, attention, mlp, experts, convolutions, other) -> its share of the parameters.
        zeros: share of the maskable weights that is zero.
        two_four: whether all maskable weights with zeros are 2:4.
        cut: whether it was pruned before, by us.
        batch_norms: how many.
        kinds: kind of what can be cut -> sizes that occur (of blocks, how many).
        untraced: why nothing can be cut; None where it can.
        uneven: sizes that kernels dislike, in words.
        product: smallest side of the largest matrix product.
        machine: this one.
        seconds: of one forward pass; None where it was not measured.
        passed: what it was of, in words.
        busy: share of it in products (the rest is launches, Python, and small operators).
        measure: of the probes: kl or mse; None where there are none.
        probes: single cuts.
        spread: median stable rank of the weights over their smaller side: small where few directions carry all.
    """

    name: str
    language: bool
    params: int
    bytes: int
    dtype: str
    shares: Mapping[str, float]
    zeros: float
    two_four: bool
    cut: bool
    batch_norms: int
    kinds: Mapping[str, tuple[int, ...]]
    untraced: str | None
    uneven: tuple[str, ...]
    product: int
    machine: Machine
    seconds: float | None = None
    passed: str = ""
    busy: float | None = None
    measure: str | None = None
    probes: tuple[Probe, ...] = ()
    spread: float | None = None


def read_machine(cpuinfo: str | None = None) -> Machine:
    """What this machine can do.

    Args:
        cpuinfo: text of /proc/cpuinfo; None = read it, where there is one.
    """
    file = Path("/proc/cpuinfo")
    text = (file.read_text(encoding="utf-8") if file.is_file() else "") if cpuinfo is None else cpuinfo
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    there = torch.cuda.is_available()
    return Machine(
        cpu=fields.get("model name", "unknown CPU"),
        threads=torch.get_num_threads(),
        int8=tuple(flag for flag in INT8_FLAGS if flag in flags),
        bf16=tuple(flag for flag in BF16_FLAGS if flag in flags),
        gpu=torch.cuda.get_device_name(0) if there else None,
        capability=torch.cuda.get_device_capability(0) if there else None,
        runtimes=tuple(name for name in RUNTIMES if importlib.util.find_spec(name) is not None),
    )


def gather(
    model: nn.Module,
    *,
    name: str,
    inputs: Inputs = None,
    batches: Sequence[Batch] = (),
    seconds: float = 60.0,
    cut: bool = False,
    track: Track = quiet,
) -> Facts:
    """Measure all facts.

    Args:
        model: with its weights.
        name: of it.
        inputs: arguments of one forward pass, for what is no Hugging Face model.
        batches: a few rows that probes are measured on; without, there are none.
        seconds: no probe begins after that long.
        cut: whether it was pruned before.
        track: progress over the probes.

    Raises:
        SecateurError: where the model does not run.
    """
    begin = time.perf_counter()
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    if not total:
        raise SecateurError(f"{name} has no parameters: there is nothing to prune")
    space, untraced = _space(model, inputs)
    weights = tuple(maskable(model, inputs))
    zeros, two_four = _zeros(model, weights)
    types: dict[torch.dtype, int] = defaultdict(int)
    for parameter in parameters:
        types[parameter.dtype] += parameter.numel()
    timed_on = _timed_inputs(model, inputs)
    took, busy = _times(model, timed_on)
    probes, measure = _probes(model, space, inputs, weights, batches, begin + seconds, track)
    return Facts(
        name=name,
        language=is_language_model(model),
        params=total,
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        dtype=str(max(types, key=lambda kind: types[kind])).removeprefix("torch."),
        shares=_shares(model, space),
        zeros=zeros,
        two_four=two_four,
        cut=cut,
        batch_norms=sum(isinstance(module, _BatchNorm) for module in model.modules()),
        kinds={} if space is None else _kinds(space),
        untraced=untraced,
        uneven=tuple(map(str, shape_advice(model))),
        product=max((min(_sides(w)) for w in weights), default=0),
        machine=read_machine(),
        seconds=took,
        passed=_shape_text(timed_on),
        busy=busy,
        measure=measure,
        probes=probes,
        spread=_spread(model, weights),
    )


# --- what the model is made of ---


def _space(model: nn.Module, inputs: Inputs) -> tuple[Space | None, str | None]:
    try:
        space = discover(model, inputs)
    except SecateurError as error:
        return None, str(error)
    if not space.axes and not space.blocks:
        first = next((frozen.reason for frozen in space.frozen), "no axis was found")
        return None, first
    return space, None


def _shares(model: nn.Module, space: Space | None) -> dict[str, float]:
    """Part -> share of the parameters; what an axis says goes before what a module says."""
    part: dict[str, str] = {}
    for axis in () if space is None else space.axes:
        for place in axis.slices:
            for kinds, name in ((_ATTENTION, "attention"), (_MLP, "mlp"), (("experts", "expert_ffn"), "experts")):
                if axis.kind in kinds:
                    part[place.parameter] = name
    found: dict[str, int] = defaultdict(int)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    ask: Any = getattr(model, "get_output_embeddings", None)
    head = None if ask is None else ask()
    tables |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    convolutions = {id(p) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters()}
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if id(parameter) in tables:
            found["embeddings"] += parameter.numel()
        elif id(parameter) in convolutions:
            found["convolutions"] += parameter.numel()
        else:
            found[part.get(name, "other")] += parameter.numel()
    return {name: count / total for name, count in sorted(found.items(), key=lambda item: -item[1])}


def _zeros(model: nn.Module, weights: Iterable[Weight]) -> tuple[float, bool]:
    """Share of zeros, and whether every weight that has many of them is 2:4 along its inputs."""
    parameters = dict(model.named_parameters())
    zeros = total = 0
    patterned: list[bool] = []
    for weight in weights:
        tensor = parameters[weight.name].detach()
        count = tensor.numel() - int(tensor.count_nonzero())
        zeros, total = zeros + count, total + tensor.numel()
        if 4 * count >= tensor.numel():
            matrices = [weight.matrix(tensor, part) for part in weight.parts()]
            patterned.append(
                all(m.shape[1] % 4 == 0 and bool(((m.reshape(-1, 4) != 0).sum(1) <= 2).all()) for m in matrices)
            )
    return (zeros / total if total else 0.0), bool(patterned) and all(patterned)


def _kinds(space: Space) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for kind in space.kinds():
        sizes = {axis.size for axis in space.of_kind(kind)}
        found[kind] = tuple(sorted(sizes)) or (sum(block.kind == kind for block in space.blocks),)
    return found


def _sides(weight: Weight) -> tuple[int, int]:
    rows = torch.Size([weight.shape[d] for d in weight.rows]).numel()
    return rows, max(1, weight.size // max(1, rows))


def _spread(model: nn.Module, weights: Sequence[Weight]) -> float | None:
    """Median of ||W||_F^2 / ||W||_2^2 over the smaller side, of a few weights; no data is needed."""
    parameters = dict(model.named_parameters())
    found = []
    for weight in _few(weights, 6):
        matrix = weight.matrix(parameters[weight.name].detach(), weight.parts()[0]).float()
        if min(matrix.shape) > 1 and min(matrix.shape) <= 4096:
            largest = float(torch.linalg.svdvals(matrix)[0])
            if largest > 0:
                found.append(float(matrix.square().sum()) / largest**2 / min(matrix.shape))
    return median(found) if found else None


# --- time ---


def _timed_inputs(model: nn.Module, inputs: Inputs) -> Any:
    """128 tokens of a language model; of others what is given, or what they are traced with."""
    if inputs is not None or not is_language_model(model):
        return inputs
    length = min(128, longest_of(model) or 128)
    return torch.full((1, length), 3, dtype=torch.int64) % (vocabulary_of(model) or 1)


def _shape_text(inputs: Any) -> str:
    if isinstance(inputs, torch.Tensor):
        kind = "tokens" if inputs.dtype == torch.int64 else "values"
        return f"{' x '.join(map(str, inputs.shape))} {kind}"
    return "the example inputs"


def _times(model: nn.Module, inputs: Any) -> tuple[float, float]:
    """Seconds of a forward pass (the median), and the share of it that products take."""
    device = device_of(model)
    function = forward(model, inputs)

    # With one thread the process's own time is the time that the model takes, whatever else runs beside it.
    now = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        function()
        samples, shares = [], []
        for _ in range(ROUNDS):
            wait()
            begin = now()
            function()
            wait()
            samples.append(now() - begin)
            if device.type != "cuda":
                with _Products(now) as products:
                    function()
                shares.append(products.seconds / samples[-1])
        took = median(samples)
        if device.type != "cuda":
            return took, min(1.0, median(shares))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            wait()
    # All that the device does; the rest is waiting for Python.
    spent = sum(event.self_device_time_total for event in profile.key_averages())
    return took, min(1.0, spent / 1e6 / took)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Adds up the seconds that operators take whose work is multiplications."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds, self.now = 0.0, now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Time one operator."""
        begin = self.now()
        result = func(*args, **(kwargs or {}))
        if any(part in func.__name__ for part in _PRODUCTS):
            self.seconds += self.now() - begin
        return result


# --- what single cuts cost ---


def _few(items: Sequence[Any], count: int) -> list[Any]:
    """Up to so many, spread evenly from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _probes(
    model: nn.Module,
    space: Space | None,
    inputs: Inputs,
    weights: Sequence[Weight],
    batches: Sequence[Batch],
    until: float,
    track: Track,
) -> tuple[tuple[Probe, ...], str | None]:
    """Cut a handful of axes, blocks and weights by half, one at a time, until the time is up."""
    if not batches:
        return (), None
    total = sum(p.numel() for p in model.parameters())
    distance = Closeness(model, batches)
    jobs: list[tuple[str, Any]] = [("weights", weight) for weight in _few(weights, 3)]
    if space is not None:
        for kind in _PROBED:
            axes = [a for a in space.of_kind(kind) if a.per_group > 1 and a.size > 2 * a.minimum]
            jobs += [(kind, axis) for axis in _few(axes, 3)]
        for kind in ("layers", "attention", "mlp"):
            blocks = [block for block in space.blocks if block.kind == kind]
            jobs += [(kind, block) for block in blocks[len(blocks) // 2 : len(blocks) // 2 + 1]]
    # The first of each kind, then the second: whatever time there is, every kind has its turn.
    order = sorted(range(len(jobs)), key=lambda i: sum(jobs[k][0] == jobs[i][0] for k in range(i)))
    pretence = None if space is None else Pretence(model, space, inputs)
    scores = {} if space is None else magnitude(model, space)
    found: list[Probe] = []
    for index in track(order, "cutting a little, one at a time"):
        if time.perf_counter() > until and found:
            break
        kind, item = jobs[index]
        if kind == "weights":
            found.append(Probe(kind, item.name, distance(_thinned(model, item)), SHARE * item.size / total))
            continue
        if space is None or pretence is None:
            continue
        if isinstance(item, Axis):
            stay = max(item.minimum, item.groups * (item.per_group - int(item.per_group * SHARE)))
            plan = Plan({item.name: keep_best(item, scores[item.name], stay)})
        else:
            plan = Plan(dropped=(item.name,))
        gone = 1 - costs(space, plan).params / costs(space, Plan()).params
        try:
            with pretence.cut(plan) as cut:
                found.append(Probe(kind, item.name, distance(cut), gone))
        except SecateurError:  # a block that the model cannot be without, as in `sensitivity.tried_removals`
            if isinstance(item, Axis):
                raise
    return tuple(found), distance.measure


def _thinned(model: nn.Module, weight: Weight) -> nn.Module:
    """The model with the smaller half of one weight's elements at zero."""
    tensor = dict(model.named_parameters())[weight.name]
    flat = tensor.detach().abs().flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(flat.numel() - int(flat.numel() * SHARE)).indices] = True
    return masked(model, {weight.name: mask.reshape(tensor.shape)})
