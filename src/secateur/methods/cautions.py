"""When not to prune, and what to know before: rules of `advise` that warn, each from facts to advice."""

from collections import defaultdict
from collections.abc import Callable

from secateur.methods.advice import (
    CNN,
    INT8_CNN,
    INT8_SHARE,
    LAUNCH_BOUND,
    PRUNED,
    QUANTISED,
    SMALL_PRODUCT,
    ZEROS,
    Advice,
    Wish,
    command,
    percent,
    two_four_pays,
)
from secateur.methods.facts import Facts, Probe

DEAR = 1.0
"""KL in nats of one probe above which an axis should be left alone."""
MANY_ZEROS = 0.2
EMBEDDINGS = 0.35
"""Share of the parameters above which embeddings decide what a budget can be."""


def already_small(facts: Facts, wish: Wish) -> Advice | None:
    """Most of the time is overhead, which no cut takes away."""
    if facts.busy is None or facts.seconds is None or facts.busy >= LAUNCH_BOUND:
        return None
    return Advice(
        "already_small",
        "Do not prune for speed in this runtime: the model is small, and most of its time is overhead.",
        "Smaller products save only the time that is spent in products. Batch more, compile, or export to ONNX first; "
        "bytes and parameters shrink all the same.",
        f"measured: {percent(facts.busy)} of {1e3 * facts.seconds:.2f} ms ({facts.passed}) is in products",
    )


def int8_first(facts: Facts, wish: Wish) -> Advice | None:
    """INT8 serves the target, and loses less than a cut that saves as much."""
    int8 = INT8_SHARE.get(facts.dtype)
    if int8 is None or "memory" in wish.budget.limits or facts.untraced is not None or not wish_of_bytes(wish):
        return None
    return Advice(
        "int8_first",
        f"If bytes are what counts, INT8 alone comes to about {percent(int8)} of the {facts.dtype} bytes.",
        "It loses less than a cut that saves as much. Prune where time, or still fewer bytes, are wanted.",
        f"{INT8_CNN}; {CNN}" if facts.shares.get("convolutions", 0) > 0.5 else f"{QUANTISED}; {PRUNED}",
    )


def wish_of_bytes(wish: Wish) -> bool:
    """Whether the target or the budget may be about bytes."""
    return wish.target in ("mobile", "llm-serving", "cpu") and "latency" not in wish.budget.limits


def no_zeros(facts: Facts, wish: Wish) -> Advice | None:
    """Zeros make nothing faster on CPUs and phones."""
    if wish.target not in ("cpu", "mobile"):
        return None
    return Advice(
        "no_zeros",
        "Do not make single weights zero for speed (sparsity=..., n:m=...): these runtimes store and multiply zeros.",
        "ONNX Runtime densifies sparse weights, and CPU kernels do not skip. Compressed files do get smaller.",
        f"docs/sparsity.md, docs/statistics.md; {ZEROS}",
    )


def two_four(facts: Facts, wish: Wish) -> Advice | None:
    """Whether 2:4 has a point on this GPU."""
    if wish.target not in ("gpu", "llm-serving"):
        return None
    capability = facts.machine.capability
    if two_four_pays(facts):
        return Advice(
            "two_four",
            "2:4 masks may pay here: measure them before you train with them.",
            "They halve the work of large products in kernels made for it; nothing else of a model gets faster.",
            f"{facts.machine.gpu}, compute capability {capability}; products of up to {facts.product}, smaller side",
        )
    if capability is None:
        reason = "there is no GPU here to ask: it takes NVIDIA Ampere (8.0) or newer"
    elif capability < (8, 0):
        reason = f"{facts.machine.gpu} has compute capability {capability[0]}.{capability[1]}: it takes Ampere (8.0)"
    else:
        reason = f"the largest product has {facts.product} on its smaller side: below {SMALL_PRODUCT} it is no gain"
    return Advice(
        "two_four",
        "Do not count on 2:4 or other zeros for speed: remove structure.",
        f"GPUs skip zeros in 2:4 patterns alone, in large products; {reason}.",
        "docs/sparsity.md: alps at 2:4 lost 27% of perplexity (15.99 -> 20.25), untrained",
    )


def decoding(facts: Facts, wish: Wish) -> Advice | None:
    """Decoding is bound by bytes."""
    if wish.target != "llm-serving" or not facts.language:
        return None
    return Advice(
        "decoding",
        "Count bytes, not multiply-accumulates: with few sequences at a time, decoding is bound by memory.",
        "Every token reads all weights once. Prefill, and batches of hundreds, are bound by arithmetic, and gain from "
        "smaller sizes as well.",
        f"{facts.bytes / 1e6:,.1f} MB of weights, all of them read for each token of each step",
    )


def masked_already(facts: Facts, wish: Wish) -> Advice | None:
    """Zeros that are there already."""
    if facts.zeros < MANY_ZEROS:
        return None
    pattern = " They are 2:4: a GPU with kernels for it can use them." if facts.two_four else ""
    return Advice(
        "masked_already",
        f"{percent(facts.zeros)} of the weights are zero already: a second cut will not be as cheap as the first.",
        f"What was easy to spare is gone. Distilling holds zeros; cutting structure removes some of them.{pattern}",
        "measured in the weights",
        (command("stats", facts.name, "--gzip"),),
    )


def pruned_already(facts: Facts, wish: Wish) -> Advice | None:
    """A model that was pruned before."""
    if not facts.cut:
        return None
    return Advice(
        "pruned_already",
        "This model was pruned before: distil it before you cut again, or cut the dense one to the final size at once.",
        "With few tokens, one cut to the final size is better than cuts in stages.",
        "50% of the bundled model in one cut 20.88, by way of 70% 22.06 to 22.74 (docs/distill.md)",
    )


def batch_norm(facts: Facts, wish: Wish) -> Advice | None:
    """Batch norm needs its statistics again, and training."""
    if not facts.batch_norms:
        return None
    return Advice(
        "batch_norm",
        f"Estimate the statistics of the {facts.batch_norms} batch norms again (--adapt-batch-norm), and fine-tune.",
        "A cut changes the means and variances that they were trained with.",
        "the best of six cuts of Torch-Pruning had 3.8% accuracy as returned, 43.7% with new statistics, 88.0% after 2 "
        "epochs (benchmarks/README.md)",
    )


def embeddings(facts: Facts, wish: Wish) -> Advice | None:
    """Embeddings that a budget of parameters cannot reach."""
    share = facts.shares.get("embeddings", 0.0)
    if share < EMBEDDINGS:
        return None
    return Advice(
        "embeddings",
        f"Embeddings hold {percent(share)} of the parameters: a budget of parameters falls hard on the rest.",
        "The vocabulary is never cut, and the hidden size is the dearest of all axes. Budget MACs or latency, not "
        "parameters, or quantise the tables.",
        "measured; the hidden size by coordinates: 160 of 192 lost 49% of perplexity (15.99 -> 23.9, docs/search.md)",
    )


def odd_sizes(facts: Facts, wish: Wish) -> Advice | None:
    """Sizes that kernels of servers and GPUs dislike."""
    if not facts.uneven or wish.target not in ("gpu", "llm-serving"):
        return None
    more = f" and {len(facts.uneven) - 2} more" if len(facts.uneven) > 2 else ""
    return Advice(
        "odd_sizes",
        "Some sizes do not suit the kernels: " + "; ".join(facts.uneven[:2]) + more + ".",
        "They run padded, or fall back to slower kernels. Cut to sizes that are liked: --round-to, --divisors.",
        "read off the weights",
    )


def slow_int8(facts: Facts, wish: Wish) -> Advice | None:
    """A CPU that has no instructions for INT8."""
    if wish.target != "cpu" or facts.machine.int8:
        return None
    return Advice(
        "slow_int8",
        "INT8 makes the model smaller on this CPU, and maybe no faster: it has no VNNI, AMX or dot products.",
        "Measure it, and give --reduce-range when you quantise: products of 8 bits may overflow here.",
        f"{facts.machine.cpu}: its flags in /proc/cpuinfo",
    )


def runtimes(facts: Facts, wish: Wish) -> Advice | None:
    """Runtimes that the target wants and that are not installed."""
    if wish.target not in ("cpu", "mobile") or "onnxruntime" in facts.machine.runtimes:
        return None
    return Advice(
        "runtimes",
        "Install the runtime that will serve the model: pip install 'secateur[onnx]'.",
        "Exporting and INT8 need ONNX Runtime, and times in PyTorch are not those of your runtime.",
        "onnxruntime cannot be imported here",
    )


def phone(facts: Facts, wish: Wish) -> Advice | None:
    """What is measured here says little of a phone."""
    if wish.target != "mobile":
        return None
    return Advice(
        "phone",
        "Time the result on the phone itself.",
        "What this machine measures says little about another processor.",
        f"measured here: {facts.machine.cpu}",
    )


def redundancy(facts: Facts, wish: Wish) -> Advice | None:
    """What single cuts cost, kind by kind."""
    kinds: dict[str, list[Probe]] = defaultdict(list)
    for probe in facts.probes:
        if probe.kind != "weights" and probe.params > 0:
            kinds[probe.kind].append(probe)
    if not kinds:
        return None
    if len(kinds) == 1:  # of one kind, its axes are told apart
        kinds = {probe.name: [probe] for probe in next(iter(kinds.values()))}
    cost = {kind: sum(p.loss for p in own) / sum(p.params for p in own) for kind, own in kinds.items()}
    order = sorted(cost, key=lambda kind: cost[kind])
    dear = [
        probe.name for probe in facts.probes if probe.loss >= DEAR and probe.kind != "weights" and facts.measure == "kl"
    ]
    unit = "nats of KL" if facts.measure == "kl" else "squared error"
    told = ", ".join(f"{kind} {cost[kind] / 100:.3f}" for kind in order)
    leave = f" Do not touch {', '.join(dear[:3])}: half of one costs more than {DEAR:g} nat." if dear else ""
    if len(order) == 1:
        leave = ""
    range_ = order[0] if len(order) == 1 else f"{order[0]}; dearest: {order[-1]}"
    return Advice(
        "redundancy",
        f"Cheapest to cut here, for each parameter: {range_}.{leave}",
        "One cut by half at a time, by the size of the weights, not repaired: an upper bound of what search loses. "
        "Search finds out in full, and leaves dear parts alone by itself.",
        f"measured, {unit} for each 1% of the parameters: {told}",
        (),
    )


def no_data(facts: Facts, wish: Wish) -> Advice | None:
    """Nothing was measured of what cuts cost."""
    if facts.probes:
        return None
    spread = "" if facts.spread is None else f"; the median stable rank is {percent(facts.spread)} of full"
    return Advice(
        "no_data",
        "What cuts cost was not measured: give --data for that.",
        "Weights alone say little: what matters is what they multiply.",
        f"without data{spread}",
    )


WARNINGS: tuple[Callable[[Facts, Wish], Advice | None], ...] = (
    *(already_small, int8_first, no_zeros, two_four, masked_already, pruned_already),
    *(decoding, batch_norm, embeddings, odd_sizes, slow_int8, runtimes, phone, redundancy, no_data),
)
"""When not to prune comes first."""
