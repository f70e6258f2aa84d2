"""What pruning a decoder costs: seconds, memory, bytes read, written and sent, counted from what the code does.

    python benchmarks/cost_model.py check     # predicted / measured, on the points of results/streaming.json
    python benchmarks/cost_model.py table     # the table of docs/scale.md
    python benchmarks/cost_model.py page      # put both into docs/scale.md

Every term is a count (passes, products, looks at all weights) times a size, over a rate. Rates of this machine are
fitted to `results/streaming.json`; those of other machines are their public peaks times a stated efficiency. Pure: no
torch, nothing is run.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "streaming.json"
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
MASKING = ("wanda", "sparsegpt", "alps")
METHODS = ("minitron", *MASKING, "obs")
WIDE = 4096
"""Columns above which structured OBS works in float32 and in place (`methods.survey.WIDE`)."""
ALPS_STEPS = 100
"""Of ADMM, of 300 at most: how many it takes depends on the weights. Assumed."""
ELEMENTS = 1 << 24
"""Of a piece that is looked at (`load.pieces`)."""
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Shape:
    """A decoder; experts are as wide as `ffn` each."""

    name: str
    layers: int
    hidden: int
    ffn: int
    vocab: int
    queries: int
    """Columns of the output projection: heads x head_dim."""
    keys: int
    experts: int = 1
    active: int = 1
    itemsize: int = 2

    @property
    def attention(self) -> int:
        """Elements of query, key, value and output."""
        return self.hidden * (2 * self.queries + 2 * self.keys)

    @property
    def expert(self) -> int:
        """Elements of gate, up and down of one expert."""
        return 3 * self.hidden * self.ffn

    @property
    def block(self) -> int:
        """Elements of a layer."""
        return self.attention + self.experts * self.expert

    @property
    def met(self) -> int:
        """Elements of a layer that a token meets."""
        return self.attention + self.active * self.expert

    @property
    def head(self) -> int:
        """Elements of the output layer, and of the embeddings."""
        return self.hidden * self.vocab

    @property
    def params(self) -> int:
        """All elements; norms are not counted."""
        return self.layers * self.block + 2 * self.head

    @property
    def weights(self) -> int:
        """Bytes."""
        return self.params * self.itemsize


@dataclass(frozen=True)
class Work:
    """What is done."""

    method: str
    tokens: int
    batch: int
    """Tokens in a batch."""
    length: int
    """Tokens in a sample."""
    share: float = 0.7
    """Of the parameters that stay; masks change no size."""
    mend: bool = True
    """Least squares, after a structural cut."""
    fitted: tuple[str, ...] = ("qkv", "o", "gate_up", "down")
    """What the repair fits: all for a cut of all widths, ``o`` and ``down`` where only the FFN is cut."""

    @property
    def batches(self) -> int:
        """How many."""
        return max(1, self.tokens // self.batch)


@dataclass(frozen=True)
class Machine:
    """Rates are of one process.

    Attributes:
        name: what to call it.
        processes: that share the data and the layers.
        forward: flop/s of forward passes.
        solve: flop/s of statistics and solves, in float32 and float64.
        look: bytes/s at which weights are hashed and checked.
        choose: elements/s that are ranked and masked.
        read: bytes/s of the disk, all processes together.
        write: the same.
        link: bytes/s of an all-reduce.
        memory: bytes, of one process.
        program: bytes that the program takes without a model.
        start: seconds until the model is there, and after all is done.
    """

    name: str
    processes: int
    forward: float
    solve: float
    look: float
    choose: float
    read: float
    write: float
    link: float
    memory: float
    program: float = 460 * MIB
    start: float = 10.0
    host: float = 0.0
    """flop/s of solves on the CPU, where structured OBS finds its orders; 0 = as `solve`."""


@dataclass(frozen=True)
class Estimate:
    """What a run takes, by what for: seconds of one process after the other, bytes."""

    seconds: Mapping[str, float]
    memory: Mapping[str, float]
    read: Mapping[str, float]
    written: Mapping[str, float]
    network: float
    disk: float
    """Bytes of the result and of what is kept on the way, at most."""

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())

    @property
    def peak(self) -> float:
        """Bytes of memory of one process."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Group:
    """Matrices of a layer that read the same."""

    columns: int
    rows: int
    """Of all together."""
    before: float
    """Share of a pass of the layer up to their products."""
    count: int = 1


def groups(shape: Shape) -> dict[str, Group]:
    """What a layer's weights are solved in: query, key and value; output; gate and up of an expert; its down."""
    reading = shape.hidden * (shape.queries + 2 * shape.keys)
    part = shape.active * shape.expert
    return {
        "qkv": Group(shape.hidden, shape.queries + 2 * shape.keys, reading / shape.met),
        "o": Group(shape.queries, shape.hidden, shape.attention / shape.met),
        "gate_up": Group(shape.hidden, 2 * shape.ffn, (shape.attention + part * 2 / 3) / shape.met, shape.experts),
        "down": Group(shape.ffn, shape.hidden, 1.0, shape.experts),
    }


# --- counts ---


def passes(shape: Shape, work: Work) -> dict[str, float]:
    """Passes of all data through all blocks, dense ones and those of the cut model's size."""
    if work.method in MASKING:
        return {"dense": 2.0, "cut": 0.0}  # statistics (up to the last product), then what the masked block gives
    dense = 1.0 if work.method == "minitron" else 2.0  # scores; survey: statistics, then what the block gives
    if not work.mend:
        return {"dense": dense, "cut": 0.0}
    own = groups(shape)
    both = 1.0 + sum(own[name].before for name in work.fitted)  # to each group's products, then what the block gives
    return {"dense": dense + both, "cut": both}


def looks(work: Work) -> float:
    """Times that all weights are gone through: finite (once more before masks), fingerprint, zeros of masks."""
    return 4.0 if work.method in MASKING else 2.0


def loads(work: Work) -> dict[str, float]:
    """Times that the weights of all blocks, and those of the output layer, are loaded before the result is saved."""
    if work.method in MASKING:  # two batches that show what multiplies and how blocks follow; the walk
        return {"dense": 3.0, "cut": 0.0, "head": 2.0}
    own = {"dense": 2.0, "cut": 0.0, "head": 1.0}
    if work.method == "minitron":  # what lies behind the blocks is loaded for every batch
        own["head"] += work.batches
    if work.mend:  # a batch that shows what multiplies, one for how blocks follow, and the walk, of both models
        own = {"dense": own["dense"] + 3.0, "cut": 3.0, "head": own["head"] + 4.0}
    return own


def flops(shape: Shape, work: Work) -> dict[str, float]:
    """Operations of forward passes, statistics and solves."""
    token = 2.0 * shape.met + 4.0 * work.length * shape.queries
    count = passes(shape, work)
    once = shape.layers * token
    found = {"passes": once * work.tokens * (count["dense"] + work.share * count["cut"])}
    shown = 2.0 if work.method in MASKING else 1.0 + 4.0 * work.mend + (work.method == "obs")
    found["batches that show how the model runs"] = shown * work.batch * (once + 2.0 * shape.head)
    if work.method == "minitron":
        found["passes"] += 2.0 * shape.head * work.tokens  # what lies behind the blocks runs, too
    statistics = solves = orders = 0.0
    for name, group in groups(shape).items():
        n, r, tokens = group.columns, group.rows, work.tokens * (shape.active if group.count > 1 else 1)
        watched = work.method in ("sparsegpt", "alps") or (work.method == "obs" and name in ("o", "down"))
        if watched:
            statistics += 2.0 * n * n * tokens
        if work.method == "sparsegpt":
            solves += group.count * (3.0 * n**3 + r * n * n)
        elif work.method == "alps":
            solves += group.count * (10.0 * n**3 + (4.0 * ALPS_STEPS + 20.0) * n * n * r)
        elif watched:  # inverse, and all columns taken out of it and of the weight
            orders += group.count * (3.0 * n**3 + r * n * n) / (2 if n > WIDE else 1)  # float32 is twice as fast
        if work.mend and work.method not in MASKING and name in work.fitted:
            k, s = n * work.share, r * work.share
            statistics += 2.0 * tokens * (r * n + k * k + k * s)
            solves += group.count * (2.0 * k**3 / 3 + 4.0 * k * k * s)
    found |= {"statistics": shape.layers * statistics, "solves": shape.layers * solves}
    return found | ({"orders": shape.layers * orders} if work.method == "obs" else {})


# --- estimates ---


def estimate(shape: Shape, work: Work, machine: Machine, way: str = "streamed") -> Estimate:
    """What a run takes.

    Args:
        shape: of the model.
        work: what is done.
        machine: on which.
        way: ``streamed`` (block by block, one process), ``memory`` (every process has the model, the data is split),
            ``stages`` (every process has some of the layers; only minitron, without a repair, does that today).

    Raises:
        ValueError: for a method or a way that there is not.
    """
    if work.method not in METHODS or way not in ("streamed", "memory", "stages"):
        raise ValueError(f"no method {work.method} or no way {way}")
    streamed = way == "streamed"
    count = 1 if streamed else machine.processes
    done, many = flops(shape, work), work.batches
    result = shape.weights * (1.0 if work.method in MASKING else work.share)
    read, written = _moved(shape, work, streamed, result, many)
    rates = {"statistics": machine.solve, "solves": machine.solve, "orders": machine.host or machine.solve}
    seconds = {}
    for name, operations in done.items():
        # Solves are split for masks and repairs; the orders of OBS are found by all alike.
        split: float = 1 if name.startswith("batches") or name == "orders" else count
        if way == "stages":
            split = max(1.0, count * many / (many + count - 1)) if name == "passes" else count  # a pipeline fills first
        seconds[name] = operations / rates.get(name, machine.forward) / split
    if work.method in MASKING:
        seconds["choosing"] = shape.layers * shape.block / machine.choose / count
    seconds["looking at all weights"] = looks(work) * shape.weights / machine.look / (count if way == "stages" else 1)
    seconds["reading and writing"] = sum(read.values()) / machine.read + sum(written.values()) / machine.write
    network = 0.0 if streamed or count == 1 else _reduced(shape, work) * 2 * (count - 1) / count
    if way == "stages":
        network = work.tokens * shape.hidden * shape.itemsize
    seconds |= {"network": network / machine.link, "start": machine.start}
    memory = _memory(shape, work, machine, way, many)
    acts = 2.5 * work.tokens * shape.hidden * shape.itemsize if streamed else 0.0
    masks = shape.params / 8 if work.method in MASKING else 0.0
    return Estimate(seconds, memory, read, written, network, result + acts + masks)


def _moved(
    shape: Shape, work: Work, streamed: bool, result: float, many: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes read and written."""
    if not streamed:
        return {"weights": float(shape.weights)}, {"result": result}
    found, block, head = loads(work), shape.layers * shape.block * shape.itemsize, shape.head * shape.itemsize
    acts = many * work.batch * shape.hidden * shape.itemsize * shape.layers
    count = passes(shape, work)
    read = {
        "weights of blocks": block * (found["dense"] + work.share * found["cut"]),
        "weights that are cut as they are saved": 0.0 if work.mend or work.method in MASKING else float(block),
        "weights of the output layer": head * found["head"],
        "looks": looks(work) * shape.weights,
        "activations": acts * (count["dense"] + count["cut"]),
    }
    walks = 1.0 if work.method in MASKING else 1.0 + 2.0 * work.mend
    return read, {
        "result": result,
        "activations": acts * walks,
        "masks": shape.params / 8 * (not result < shape.weights),
    }


def _reduced(shape: Shape, work: Work) -> float:
    """Bytes of the sums that are added up over all processes."""
    own = groups(shape)
    if work.method in ("sparsegpt", "alps"):
        found = sum(4.0 * g.count * g.columns**2 for g in own.values())
        found += shape.block * (shape.itemsize + 1)  # what was solved is sent to the others
    elif work.method == "wanda":
        found = sum(4.0 * g.count * g.columns for g in own.values()) + shape.block
    elif work.method == "obs":
        found = sum(4.0 * own[n].count * own[n].columns ** 2 for n in ("o", "down"))
    else:
        found = 4.0 * (2 * shape.hidden + shape.queries + shape.experts * shape.ffn)
    if work.mend and work.method not in MASKING:
        for name in work.fitted:
            n, r = own[name].columns * work.share, own[name].rows * work.share
            found += own[name].count * (8.0 * n * (n + r) + r * n * shape.itemsize)
    return shape.layers * found


def _memory(shape: Shape, work: Work, machine: Machine, way: str, many: int) -> dict[str, float]:
    """The most that one process has at a time."""
    own = groups(shape)
    block, head = float(shape.block * shape.itemsize), float(shape.head * shape.itemsize)
    piece = float(4 * ELEMENTS) if way == "streamed" else 0.0
    token = shape.vocab + 4 * max(shape.ffn * shape.active, shape.queries) + 8 * shape.hidden
    batch = float(work.batch * token * shape.itemsize)
    widest = max((g for g in own.values()), key=lambda g: g.columns * g.rows)
    if work.method in MASKING:
        room = shape.block + 12.0 * widest.columns * widest.rows  # masks of the block; scores of a group, and to rank
        if work.method != "wanda":
            room += 16.0 * max(g.columns for g in own.values()) ** 2
    else:
        room = 0.0
        n = max(own[name].columns for name in ("o", "down"))
        if work.method == "obs":
            room = float(n * n * (8 if n > WIDE else 32))
        if work.mend:
            fits = [own[name] for name in work.fitted]
            room = max([room, *(40 * work.share**2 * g.columns * (g.columns + g.rows / max(1, g.count)) for g in fits)])
    if way == "streamed":
        blocks = block * (1 if work.method in MASKING else 1 + work.share)
        shown = 3.0 * shape.layers * work.batch * shape.hidden * shape.itemsize  # of each block: what goes in and out
        largest = max(head + shown + batch, block + shown + batch, blocks + room + batch, piece)
        return {"program": machine.program, "weights, sums and a batch": largest}
    weights = shape.weights * (2.0 if work.method in MASKING else 1 + work.share) + block
    acts = work.tokens * shape.hidden * shape.itemsize * 2.0 / machine.processes
    if way == "stages":
        weights, acts = weights / machine.processes, acts / max(1, many)
    return {"program": machine.program, "weights": weights, "sums": room, "activations": acts, "a batch": batch}


# --- measured points ---

HERE = Machine(
    "1 CPU box, 2 cores, as here (one process, one thread)", 1, forward=450e9, solve=42e9, look=100e9, choose=43e6,
    read=0.46e9, write=0.46e9, link=1e9, memory=24 * GIB, program=460 * MIB, start=5.5,
)  # fmt: skip
"""Fitted. To hash and check weights cannot be told from reading them in the points that there are: `read` is both."""


def points(found: Mapping[str, Any]) -> Iterator[tuple[str, Shape, Work, Mapping[str, Any]]]:
    """What was measured: name, shape, work, and ``seconds``, ``peak_rss``, ``bytes_read``, ``bytes_written``."""
    growth = found.get("growth", {"points": []})
    for point in growth["points"]:
        config = growth["shape"]
        shape = _shape(f"growth-{point['layers']}", {**config, "num_hidden_layers": point["layers"]})
        tokens = point["batches"] * growth["tokens_per_batch"]
        method, _, how = point["method"].partition(", ")
        share = (4 + 12 * 2816 / 4096) / 16 if method == "minitron" else 1.0  # of a block
        work = Work(method, tokens, growth["tokens_per_batch"], 128, share, how == "mended", ("o", "down"))
        name = f"{point['method']}, {point['layers']} layers, {point['batches']} batches"
        yield name, shape, work, point | point["streamed"] | {"seconds": point["seconds"]}
    for name, point in found.get("large", {}).items():
        if "method" in point:  # the others are plain forward passes
            shape = _shape(name, {**point["config"], "num_hidden_layers": point["layers"]})
            method = point["method"]
            mend = method not in MASKING and "none" not in point["command"]
            work = Work(method, point["tokens"], point["batch_tokens"], point["length"], 0.7, mend)
            yield name, shape, work, point | point["streamed"] | {"seconds": point["seconds"]}


def _shape(name: str, config: Mapping[str, Any]) -> Shape:
    return Shape(
        name, config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"], config["vocab_size"],
        config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"],
    )  # fmt: skip


def check(found: Mapping[str, Any], machine: Machine = HERE) -> list[dict[str, Any]]:
    """Predicted over measured: seconds of the processor, peak memory, bytes of weights that were read."""
    rows = []
    for name, shape, work, point in points(found):
        told = estimate(shape, work, machine)
        loaded = told.read["weights of blocks"] + told.read["weights of the output layer"]
        rows.append({
            "point": name,
            "seconds": told.total / point["cpu_seconds"],
            "peak": told.peak / point["peak_rss"],
            "read": loaded / point["bytes_read"],
            "measured seconds": point["cpu_seconds"],
            "wall seconds": point["seconds"],
            "measured peak": point["peak_rss"],
            "load": point.get("load_before"),
        })  # fmt: skip
    return rows


# --- the table ---

SHAPES = (
    Shape("0.1B", 12, 768, 2048, 32_000, 768, 768),
    Shape("1B", 16, 2048, 8192, 128_256, 2048, 512),
    Shape("8B", 32, 4096, 14336, 128_256, 4096, 1024),
    Shape("70B", 80, 8192, 28672, 128_256, 8192, 1024),
    Shape("405B", 126, 16384, 53248, 128_256, 16384, 1024),
    Shape("1T, 384 experts (32B active)", 61, 7168, 2048, 163_840, 8192, 1024, experts=384, active=9),
)
EFFICIENCY = 0.35
"""Share of the peak that forward passes of large matrices reach: assumed."""
H100 = Machine(
    "1 GPU (H100 class)", 1, forward=EFFICIENCY * 989e12, solve=EFFICIENCY * 67e12, look=1e9, choose=2e9, read=3e9,
    write=2e9, link=300e9, memory=80 * GIB, program=3 * GIB, start=60.0, host=32 * HERE.solve,
)  # fmt: skip
BOX = replace(
    HERE, name="1 CPU box, 64 cores", processes=1, forward=64 * HERE.forward * 0.5, solve=64 * HERE.solve * 0.5,
    choose=8 * HERE.choose, look=1e9, read=3e9, write=2e9, memory=512 * GIB,
)  # fmt: skip
MACHINES = (
    HERE, BOX, H100,
    replace(H100, name="8 GPUs, one node", processes=8),
    replace(H100, name="64 GPUs, 8 nodes", processes=64, link=40e9, read=10e9, write=5e9),
)  # fmt: skip
TABLE_TOKENS = 128 * 2048
"""128 samples of 2048 tokens, as Wanda and SparseGPT take."""


def chosen(shape: Shape, work: Work, machine: Machine) -> tuple[str, Estimate] | None:
    """How a run would be made: in memory where that fits, else as stages, else streamed; None where nothing does."""
    ways = ["memory"]
    if machine.processes > 1 and work.method == "minitron" and not work.mend:
        ways.append("stages")
    if machine.name.startswith("1 CPU"):
        ways.append("streamed")
    for way in ways:
        found = estimate(shape, work, machine, way)
        if found.peak <= machine.memory:
            return way, found
    return None


def table(works: Sequence[Work]) -> str:
    """Markdown: a table for each work, shapes down, machines across."""
    lines: list[str] = []
    for work in works:
        repair = "" if work.method in MASKING else ", least squares" if work.mend else ", no repair"
        lines += ["", f"**{work.method}{repair}**", ""]
        lines += ["| model | " + " | ".join(m.name for m in MACHINES) + " |", "|---" * (1 + len(MACHINES)) + "|"]
        for shape in SHAPES:
            cells = [_cell(chosen(shape, work, machine), machine) for machine in MACHINES]
            lines.append(f"| {shape.name} ({_size(shape.weights)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def _cell(found: tuple[str, Estimate] | None, machine: Machine) -> str:
    if found is None:
        return "does not fit"
    way, told = found
    label = {"memory": "in memory", "streamed": "streamed", "stages": "stages"}[way]
    if way == "memory" and machine.processes > 1:
        label = "data split"
    return f"{label}: {_time(told.total)}, {_size(told.peak)}, disk {_size(told.disk)}"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}" if seconds < 99.5 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: float) -> str:
    return (
        f"{count / 2**40:.1f} TiB"
        if count >= 2**40
        else f"{count / GIB:.3g} GiB"
        if count < 99.5 * GIB
        else f"{count / GIB:.0f} GiB"
    )


def checked(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what was measured, and predicted over measured."""
    lines = ["| run | processor s | wall s (load) | peak MiB | s | peak | weights read |", "|---" * 7 + "|"]
    for row in rows:
        measured = f"{row['measured seconds']:,.0f} | {row['wall seconds']:,.0f} ({row['load']:.1f})"
        ratios = " | ".join(f"{row[key]:.2f}" for key in ("seconds", "peak", "read"))
        lines.append(f"| {row['point']} | {measured} | {row['measured peak'] / MIB:,.0f} | {ratios} |")
    return "\n".join(lines)


def grown(found: Mapping[str, Any]) -> str:
    """Markdown: peak memory over layers and over batches."""
    growth = found["growth"]
    lines = ["| | layers | batches | weights | peak RSS | above the program | wall s | load |", "|---" * 8 + "|"]
    for point in [*growth["program"].values(), *growth["points"]]:
        above = point.get("above_program")
        method = point["method"] if above is not None else f"program ({point['method']})"
        sizes = [
            f"{value / 1e6:,.0f} MB" if value is not None else ""
            for value in (point["weights"], point["peak_rss"], above)
        ]
        rest = [f"{point['seconds']:.0f}", f"{point['load_before']:.1f}"]
        lines.append("| " + " | ".join([method, str(point["layers"]), str(point["batches"]), *sizes, *rest]) + " |")
    return "\n".join(lines)


def eight(found: Mapping[str, Any]) -> str:
    """Markdown: the runs of 8B."""
    large = found.get("large", {})
    if not large:
        return "LEAD fills: no run is in results/streaming.json yet."
    plain = next((point["seconds"] for name, point in large.items() if "forward" in name), None)
    lines = [
        "| | wall s (load) | s a block | peak RSS | read | written | time / plain forward pass |",
        "|---" * 7 + "|",
    ]
    for name, point in large.items():
        load = f" ({point['load_before']:.1f})" if "load_before" in point else ""
        own = [f"{point['seconds']:,.0f}{load}", f"{point['seconds'] / point.get('layers', 32):.1f}"]
        own += [f"{point[key] / GIB:.2f} GiB" for key in ("peak_rss", "read", "written")]
        own += ["" if plain is None else f"{point['seconds'] / plain:.1f}"]
        lines.append(f"| {name} | " + " | ".join(own) + " |")
    return "\n".join(lines)


def _sections(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {"growth": grown(found), "large": eight(found), "check": checked(rows), "table": table(works())}


def works() -> list[Work]:
    """The runs of the table."""
    minitron = Work("minitron", TABLE_TOKENS, 2048, 2048, 0.7, mend=False)
    return [minitron, replace(minitron, mend=True), *(replace(minitron, method=m, mend=True) for m in METHODS[1:3]),
            replace(minitron, method="obs", mend=True)]  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "table", "page"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.what == "table":
        print(table(works()))
        return
    found = json.loads(given.results.read_text())
    rows = check(found)
    if given.what == "page":
        text = PAGE.read_text()
        for name, content in _sections(found, rows).items():
            text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{content}\n\g<2>", text, flags=re.DOTALL)
        PAGE.write_text(text)
        return
    for row in rows:
        shown = "  ".join(f"{key} x{row[key]:.2f}" for key in ("seconds", "peak", "read"))
        print(f"{row['point']:44} {shown}   ({row['measured seconds']:.0f} s, {row['measured peak'] / MIB:.0f} MiB)")


if __name__ == "__main__":
    main()
